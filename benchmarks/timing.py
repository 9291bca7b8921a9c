"""Fair clocks: CUDA events and a flushed L2 cache on a GPU, the wall clock on a CPU, variants in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import device, memory

QUICK = 0.2  # seconds; a slower run does not notice what ran before it


@dataclass(frozen=True)
class Variant:
    """One way to compute the thing. `prepare` makes the argument of `run` anew each time, outside the clock and the
    memory measured: for what destroys its input. `required`: ours and the baseline; a peer is not."""

    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None
    required: bool = False

    def bind(self) -> Callable[[], Any]:
        if self.prepare is None:
            return self.run
        prepared = self.prepare()
        return lambda: self.run(prepared)


Variants = dict[str, Callable[[], Any] | Variant]


@dataclass(frozen=True)
class Timing:
    """Seconds of every run of one variant."""

    runs: list[float]

    @property
    def best(self) -> float:
        """Fastest run; ratios use it."""
        return min(self.runs)

    def row(self) -> dict[str, float | int]:
        low, high = quartiles(self.runs)
        found = {"low_ms": low, "median_ms": statistics.median(self.runs), "high_ms": high, "best_ms": self.best}
        return {name: round(1e3 * seconds, 3) for name, seconds in found.items()} | {"runs": len(self.runs)}


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, high


def interleave(
    variants: Variants,
    *,
    repeats: int = 9,
    least: int = 3,
    seconds: float | None = None,
    expected: dict[str, float] | None = None,
) -> dict[str, Timing]:
    """Times the variants in `repeats` rounds, in turn and starting each round with another one; with `seconds` it stops
    after the round in which that much time has passed (`least` rounds if so many were asked for).

    On a CPU a quick variant first runs once untimed in each of its turns, so that caches, the allocator and threads
    that still spin are its own and not its predecessor's. `expected`: the seconds that each takes; where they are not
    given, a first run of each tells.
    """
    ready = {name: v if isinstance(v, Variant) else Variant(v) for name, v in variants.items()}
    if expected is None:
        expected = {name: clock(variant.bind())[0] for name, variant in ready.items()}
    names = list(ready)
    quick = {name for name in names if not device.on_gpu() and expected[name] < QUICK}
    runs: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    gc.collect(1)
    gc.disable()
    try:
        for turn in range(repeats if names else 0):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if name in quick:
                    ready[name].bind()()
                runs[name].append(clock(ready[name].bind())[0])
            if seconds is not None and turn + 1 >= least and time.perf_counter() - began > seconds:
                break
    finally:
        gc.enable()
    return {name: Timing(values) for name, values in runs.items()}


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one run, and its result."""
    if device.on_gpu():
        flush_l2()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()  # reached when the flush is done; from there on host and device both count
        result = run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


_flush: list[Tensor] = []


def flush_l2() -> None:
    """Evicts what an earlier run left in the GPU's L2 cache."""
    if not _flush:
        size = max(2 * torch.cuda.get_device_properties(device.current).L2_cache_size, 64 << 20)
        _flush.append(torch.empty(size, dtype=torch.uint8, device=device.current))
    _flush[0].zero_()


def clock_and_peak(run: Callable[[], Any]) -> tuple[float, int, Any]:
    """Seconds of one run, the bytes by which the memory in use rose at most while it ran, and its result."""
    clocked: list[tuple[float, Any]] = []
    if device.on_gpu():
        flush_l2()  # its buffer exists before memory is read
    peak = peak_memory(lambda: clocked.append(clock(run)))
    return clocked[0][0], peak, clocked[0][1]


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes by which the memory in use rose at most while ``run`` ran, over what was in use before."""
    gc.collect(1)  # what the last run left; all of it would take longer than most runs
    if device.on_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return memory.peak_of_process(run)


def fastest(run: Callable[[], Any], repeats: int = 7) -> float:
    """Seconds of the fastest run, the first two left out; for what is measured without comparison."""
    for _ in range(2):
        run()
    return min(clock(run)[0] for _ in range(repeats))


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes per second, read plus written, of a copy between two buffers of `size` bytes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device.current) for _ in range(2))
    return 2 * size / interleave({"copy": lambda: target.copy_(source)}, repeats=7)["copy"].best


def of_device(run: Callable[[], Any]) -> tuple[dict[str, Any], Counter[str]]:
    """Milliseconds during which the device is busy, its launches, and the milliseconds by kernel."""
    if not device.on_gpu():
        run()
        return {}, Counter()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    flush_l2()
    device.synchronise()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        device.synchronise()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels: Counter[str] = Counter()
    for event in events:
        kernels[event.name[:80]] += event.device_time / 1e3
    return {"device_ms": round(sum(kernels.values()), 3), "launches": len(events)}, kernels
