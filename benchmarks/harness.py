"""What every benchmark shares: options, fair timing, peak memory and checks against fp64. `report.py` has the tables.

    options = command_line(__doc__)                       # --device, --smoke, --budget, --results
    report, cases = Report("napo_loss", options), []  # report.py
    if report.has_time("B 1024, N 8"):
        variants = {"napo": run_napo, "eager": run_eager}
        cases.append(compare(report, "B 1024, N 8", variants, error=distance_from_fp64, tolerance=1e-4))
    sweep(report, cases)
    report.finish()

`compare` checks the variants of one case: one that is wrong, fails or does not fit is named with the reason and not
timed, and the run goes on; where it is ours or the baseline the program ends with status 1. They are measured in turn
within one process, so that a slow moment of the machine hits all of them: on a GPU at once, with CUDA events and the L2
cache flushed before each run; on a CPU by `sweep`, with the wall clock. Memory is the most that a run held above what
was there.

How many times slower than ours a variant is, is the ratio of the fastest runs: neighbours on a shared machine add time,
and to some variants more than to others (studies/benchmark_stability.md). So that one run of each is one that they left
alone, `sweep` goes over all cases many times, a few runs a time, and `by_turns.py` has the sweeps of several benchmarks
take turns.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memory
import torch
from machine import RESULTS
from report import Report
from torch import Tensor

from napo_kernels.dispatch import backends

device = torch.device("cpu")  # set by command_line


def command_line(doc: str | None, add: Callable[[argparse.ArgumentParser], Any] | None = None) -> argparse.Namespace:
    """The options that all benchmarks have, and those of `add`; the device chosen becomes the harness's."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    parser.add_argument("--budget", type=float, default=None, help="seconds after which no further case is begun")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--threads", type=int, default=None, help="of torch on the CPU; default: one a core")
    if add is not None:
        add(parser)
    options = parser.parse_args()
    use(options.device)
    missing = backends()["cpu"]["why_not"]
    if options.device == "cpu" and missing and not options.smoke:
        raise SystemExit(f"our C++ kernels cannot run: {missing}")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def use(name: str) -> None:
    global device
    device = torch.device(name)
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device is visible to torch")


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
        """Of the fastest run, which ratios are of."""
        return min(self.runs)

    def row(self) -> dict[str, float | int]:
        low, high = quartiles(self.runs)
        found = {"low_ms": low, "median_ms": statistics.median(self.runs), "high_ms": high, "best_ms": self.best}
        return {name: round(1e3 * seconds, 3) for name, seconds in found.items()} | {"runs": len(self.runs)}


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, high


def compare(
    report: Report,
    case: str,
    variants: Variants,
    *,
    error: Callable[[str, Any], float] | None = None,
    tolerance: float = 0.0,
    seconds: float = 2.0,
    repeats: int = 9,
    **how: Any,
) -> Comparison:
    """Checks the variants of one case; on a GPU also measures them, `repeats` rounds or for `seconds`, since the next
    case wants the memory.

    `error(name, result)` is the distance of a result from the fp64 truth, held against `tolerance`. The rest are the
    arguments of `Comparison`.
    """
    comparison = Comparison(report, case, variants, **how)
    comparison.check(error, tolerance)
    if device.type == "cuda":
        comparison.measure(list(comparison.once), repeats=repeats, least=3, seconds=seconds)
    return comparison


LONG_RUN = 3.0  # seconds: one tells enough
SWEEPS = 10  # over all cases on a CPU
SECONDS_OF_A_VARIANT = 8.0  # in all sweeps: what takes longer takes part in fewer of them, but in three
SECONDS_OF_A_VISIT = 0.3  # in which the variants of a case run in turn, once each at least
KEPT = 4 << 30  # bytes; larger cases run as PyTorch allocates by default: kept memory falls into pieces, and grows


def sweep(report: Report, cases: list[Comparison]) -> None:
    """Measures the cases on a CPU, in as many sweeps as the budget allows, in memory that the process keeps."""
    if device.type == "cuda" or not cases:
        return
    smoke = getattr(report.options, "smoke", False)
    most, visit = (2, 0.01) if smoke else (SWEEPS, SECONDS_OF_A_VISIT)

    def seconds(number: int, of: int, longest: float) -> list[float]:
        plans = [case.plan(number, of, longest) for case in cases]
        return [
            sum(max(visit, case.seconds_of(plan[at])) for case, plan in zip(cases, plans, strict=True) if plan[at])
            for at in range(of - number)
        ]

    expected = took = 0.0  # seconds of the sweeps so far: what is around the runs takes time too

    def fits(number: int, of: int, longest: float) -> bool:
        return took / expected * sum(seconds(number, of, longest)) < report.time_left()

    number, of, longest = 0, 1, float("inf")
    while number < of:
        memory.as_by_default()  # others measure now, and may want what was kept
        ahead = seconds(number, of, longest)[0]
        report.pause(f"sweep {number + 1}{f' of {of}' if number else ''}, about {ahead:.0f} s")
        began = report.spent
        # What others gave back a moment ago the system may still be returning to its host: no case is always first.
        first = number % len(cases)
        for case in cases[first:] + cases[:first]:
            names = case.plan(number, of, longest)[0]
            if case.peak(names) > KEPT:
                memory.as_by_default()
                memory.touch(int(1.2 * case.peak(names)))
            else:  # twice: blocks in use cut what is free into pieces
                memory.keep(int(2 * case.peak(names)))
            case.measure(names, repeats=30, least=1, seconds=visit)
        report.write()
        number, expected, took = number + 1, expected + ahead, took + report.spent - began
        # The first sweep has all variants, and tells how long they take in this memory.
        of = max((count for count in range(number, most + 1) if fits(number, count, longest)), default=number)
        if of == number < most:  # one more, without what takes too long
            once = {spent for case in cases for spent in case.once.values()}
            longest = max((spent for spent in once if fits(number, number + 1, spent)), default=0.0)
            of += longest > 0.0
    memory.as_by_default()


Derive = Callable[[list[dict[str, Any]]], object]


class Comparison:
    """One case of a report."""

    def __init__(
        self,
        report: Report,
        case: str,
        variants: Variants,
        *,
        floor: float | None = None,  # seconds; otherwise the fastest variant whose name begins with "floor"
        takes: int = 0,  # bytes, about, on a CPU: see memory.touch
        derive: Derive | None = None,  # adds columns to the rows before they are reported
    ) -> None:
        self.report, self.case, self.floor, self.derive = report, case, floor, derive
        self.takes = takes if device.type == "cpu" else 0
        self.ready = {name: v if isinstance(v, Variant) else Variant(v) for name, v in variants.items()}
        self.rows: dict[str, dict[str, Any]] = {name: {} for name in self.ready}
        self.once: dict[str, float] = {}  # seconds of a first run, or of the fastest so far
        self.timings: dict[str, Timing] = {}
        self.visits = dict.fromkeys(self.ready, 0)

    def check(self, error: Callable[[str, Any], float] | None = None, tolerance: float = 0.0) -> None:
        """The first runs: results against the truth, and memory."""
        memory.touch(self.takes)
        gc.collect()
        for name in self.ready:
            with _named_when_it_fails(self.rows[name]):
                self._check_one(name, error, tolerance)
            if "note" in self.rows[name]:
                self._failed(name)
        self.report.put(self.case, self._rows())

    def _check_one(self, name: str, error: Callable[[str, Any], float] | None, tolerance: float) -> None:
        variant, row = self.ready[name], self.rows[name]
        compilations = _compilations()
        spent, peak, result = clock_and_peak(variant.bind())
        if error is not None and not name.startswith("floor"):
            wrong = error(name, result)
            row["error"] = float(f"{wrong:.2g}")
            if not wrong <= tolerance:
                row["note"] = f"wrong by {wrong:.2g}, allowed {tolerance:.2g}; not timed"
                return
        del result
        # A first run may compile, load libraries and fill their caches: if it is short it tells nothing.
        if device.type == "cuda" or _compilations() > compilations or spent < LONG_RUN:
            spent, peak, _ = clock_and_peak(variant.bind())
        self.once[name] = spent
        row["peak_mib"] = round(peak / 2**20, 1)
        if device.type == "cpu" and spent >= LONG_RUN and peak > KEPT:  # as in a sweep: it is a turn already
            self._add(name, [spent])

    def _failed(self, name: str) -> None:
        note = self.rows[name]["note"]
        what = f"{self.case}, {name}: {note}"
        print(f"  {what}", file=sys.stderr)
        if (self.ready[name].required or name == OURS) and note != OUT_OF_MEMORY:
            self.report.failed.append(what)
        gc.collect()
        if not device_answers():
            self.report.put(self.case, self._rows())
            self.report.write()
            raise SystemExit(f"{self.report.name}, {what}; the device is in an error state: this program ends here")

    def plan(self, number: int, of: int, longest: float = float("inf")) -> list[list[str]]:
        """The variants that run in each of the sweeps from `number` to `of`: those that take long in some of them,
        evenly spread, in the next one where a longer plan before had spared them; beyond `longest` seconds in none."""
        visits = {name: max(3, round(SECONDS_OF_A_VARIANT / spent)) for name, spent in self.once.items()}
        had = dict(self.visits)
        sweeps = []
        for at in range(number, of):
            names = [n for n, count in visits.items() if had[n] <= at * count // of and self.once[n] <= longest]
            had |= {name: had[name] + 1 for name in names}
            sweeps.append(names)
        return sweeps

    def seconds_of(self, names: list[str]) -> float:
        return sum(self.once[name] for name in names)

    def peak(self, names: list[str]) -> float:
        """Bytes."""
        return max((2**20 * self.rows[name]["peak_mib"] for name in names), default=0.0)

    def measure(self, names: list[str], **how: Any) -> None:
        """Some of the variants; `how`: see `interleave`. All that is known goes into the report."""
        for name, timing in interleave({name: self.ready[name] for name in names}, expected=self.once, **how).items():
            self._add(name, timing.runs)
        self.report.put(self.case, self._rows())

    def _add(self, name: str, runs: list[float]) -> None:
        known = self.timings[name].runs if name in self.timings else []
        self.timings[name] = Timing(known + runs)
        self.once[name] = min(self.once[name], *runs)
        self.visits[name] += 1

    def _rows(self) -> list[dict[str, Any]]:
        floors = [timing.best for name, timing in self.timings.items() if name.startswith("floor")]
        least = min(floors) if floors else self.floor
        rows = []
        for name in self.ready:
            row, timing = {"variant": name}, self.timings.get(name)
            if timing is not None:
                row |= timing.row()
                if least:
                    row["of_floor"] = round(timing.best / least, 3)
                if OURS in self.timings and name != OURS:
                    row["times_napo"] = round(timing.best / self.timings[OURS].best, 3)
            rows.append(row | self.rows[name])
        if self.derive is not None:
            self.derive(rows)
        return rows


def _compilations() -> int:
    """How many graphs torch.compile has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@contextmanager
def _named_when_it_fails(row: dict[str, Any]) -> Iterator[None]:
    """Leaves a failure's reason in `row`."""
    try:
        yield
    except torch.OutOfMemoryError:
        row["note"] = OUT_OF_MEMORY
    except Exception as reason:
        first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        row["note"] = f"failed: {type(reason).__name__}: {first[:100]}"


def device_answers() -> bool:
    """False once a kernel has left the device in an error state, in which this process can do nothing more there."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


OUT_OF_MEMORY = "out of memory"  # no error of a benchmark
OURS = "napo"  # the variant that others are held against
QUICK = 0.2  # seconds; what is slower does not notice what ran before it
RUNS_IN_A_TURN = 10


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
    that still spin are its own and not its predecessor's; beside slow ones it is timed several times a turn.
    `expected`: the seconds that each takes; where they are not given, a first run of each tells.
    """
    ready = {name: v if isinstance(v, Variant) else Variant(v) for name, v in variants.items()}
    if expected is None:
        expected = {name: clock(variant.bind())[0] for name, variant in ready.items()}
    names = list(ready)
    share = sum(expected[name] for name in names) / (4 * max(len(names), 1))
    own = {name: device.type == "cpu" and expected[name] < QUICK for name in names}
    samples = {name: max(1, min(RUNS_IN_A_TURN, int(share / expected[name]))) if own[name] else 1 for name in names}
    runs: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    gc.collect(1)
    gc.disable()
    try:
        for turn in range(repeats if names else 0):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if own[name]:
                    ready[name].bind()()
                runs[name] += [clock(ready[name].bind())[0] for _ in range(samples[name])]
            if seconds is not None and turn + 1 >= least and time.perf_counter() - began > seconds:
                break
    finally:
        gc.enable()
    return {name: Timing(values) for name, values in runs.items()}


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one run, and its result."""
    if device.type == "cuda":
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
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 64 << 20)
        _flush.append(torch.empty(size, dtype=torch.uint8, device=device))
    _flush[0].zero_()


def clock_and_peak(run: Callable[[], Any]) -> tuple[float, int, Any]:
    """Seconds of one run, the bytes by which the memory in use rose at most while it ran, and its result."""
    clocked: list[tuple[float, Any]] = []
    if device.type == "cuda":
        flush_l2()  # its buffer exists before memory is read
    peak = peak_memory(lambda: clocked.append(clock(run)))
    return clocked[0][0], peak, clocked[0][1]


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes by which the memory in use rose at most while ``run`` ran, over what was in use before."""
    gc.collect(1)  # what the last run left; all of it would take longer than most runs
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return memory.peak_of_process(run)


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second, read plus written, of a copy between two buffers of `size` bytes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / interleave({"copy": lambda: target.copy_(source)}, repeats=7)["copy"].best


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative error in norm; NaN is infinitely far."""
    got, expected = got.detach().double(), expected.detach().to(got.device).double()
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-300))
    return error if error == error else float("inf")
