"""What every benchmark shares: options, fair timing, peak memory, checks against fp64, tables and JSON.

    options = command_line(__doc__)                       # --device, --smoke, --budget, --results
    report = Report("napo_loss", options)
    if report.has_time("B 1024, N 8"):
        compare(report, "B 1024, N 8", {"napo": run_napo, "eager": run_eager}, error=distance_from_fp64, tolerance=1e-4)
        report.write()

`compare` runs the variants of one case in turn within one process, so that a slow moment of the machine hits all of
them. Each is checked first: a wrong result of ours or of the baseline stops the run, a peer that is wrong, fails or
does not fit is named with the reason and not timed. On a GPU the clock is CUDA events with the L2 cache flushed before
each run; on the CPU it is the wall clock. Memory is the most that a run held above what was there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, facts_of_machine, slug
from torch import Tensor

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
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile."""
        low, _, high = statistics.quantiles(self.runs, n=4) if len(self.runs) > 1 else self.runs * 3
        return low, high

    def row(self) -> dict[str, float | int]:
        low, high = self.spread
        return {
            "median_ms": round(1e3 * self.median, 3),
            "low_ms": round(1e3 * low, 3),
            "high_ms": round(1e3 * high, 3),
            "runs": len(self.runs),
        }


def compare(
    report: Report,
    case: str,
    variants: Variants,
    *,
    error: Callable[[str, Any], float] | None = None,
    tolerance: float = 0.0,
    seconds: float = 20.0,
    repeats: int = 9,
    ours: str = "napo",
    floor: float | None = None,
    **facts: Any,
) -> dict[str, Timing]:
    """Checks, measures and reports the variants of one case, in about `seconds` beside the first run of each.

    `error(name, result)` is the distance of a result from the fp64 truth, held against `tolerance`. The floor is
    `floor` seconds, or the fastest variant whose name begins with "floor". What takes more than a quarter of `seconds`
    runs once. Returns the timings by name.
    """
    rows: dict[str, dict[str, Any]] = {}
    once: dict[str, float] = {}
    ready = {name: v if isinstance(v, Variant) else Variant(v) for name, v in variants.items()}
    for name, variant in ready.items():
        rows[name] = {}
        with _named_when_it_fails(rows[name], required=variant.required or name == ours):
            if error is not None and not name.startswith("floor"):
                wrong = error(name, variant.bind()())
                rows[name]["error"] = float(f"{wrong:.2g}")
                if not wrong <= tolerance:
                    message = f"wrong by {wrong:.2g}, allowed {tolerance:.2g}"
                    if variant.required or name == ours:
                        raise SystemExit(f"{report.name}, {case}, {name}: {message}; nothing reported")
                    rows[name]["note"] = f"{message}; not timed"
                    continue
            once[name], peak = clock_and_peak(variant.bind())
            rows[name]["peak_mib"] = round(peak / 2**20, 1)
    timings = {name: Timing([spent]) for name, spent in once.items() if spent > seconds / 4}
    quick = {name: ready[name] for name in once if name not in timings}
    timings |= interleave(quick, repeats=repeats, warmup=0, seconds=seconds)
    floors = [t.median for name, t in timings.items() if name.startswith("floor")]
    least = min(floors) if floors else floor
    for name in ready:
        row = rows[name]
        timing = timings.get(name)
        if timing is not None and least:
            row["of_floor"] = round(timing.median / least, 3)
        if timing is not None and ours in timings and name != ours:
            row["times_napo"] = round(timing.median / timings[ours].median, 3)
        report.add(case, name, timing, **row, **facts)
    return {name: timings[name] for name in ready if name in timings}


@contextmanager
def _named_when_it_fails(row: dict[str, Any], *, required: bool) -> Iterator[None]:
    """Leaves a failure's reason in `row`. What does not fit into memory is no error of the benchmark, ever."""
    try:
        yield
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    except Exception as reason:
        if required:
            raise
        first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        row["note"] = f"failed: {type(reason).__name__}: {first[:100]}"
    if "note" in row:
        print(f"  {row['note']}", file=sys.stderr)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def interleave(
    variants: Variants, *, repeats: int = 9, warmup: int = 1, seconds: float | None = None
) -> dict[str, Timing]:
    """Times each variant `repeats` times, in turn and starting each round with another one; with `seconds` it stops
    after the round in which that much time has passed (three rounds at least)."""
    ready = {name: v if isinstance(v, Variant) else Variant(v) for name, v in variants.items()}
    names = list(ready)
    runs: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            ready[name].bind()()
    began = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats if names else 0):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                runs[name].append(clock(ready[name].bind()))
            if seconds is not None and turn >= 2 and time.perf_counter() - began > seconds:
                break
    finally:
        gc.enable()
    return {name: Timing(values) for name, values in runs.items()}


def clock(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    if device.type == "cuda":
        flush_l2()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()  # reached when the flush is done; from there on host and device both count
        result = run()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    result = run()
    spent = time.perf_counter() - began
    del result
    return spent


_flush: list[Tensor] = []


def flush_l2() -> None:
    """Evicts what an earlier run left in the GPU's L2 cache."""
    if not _flush:
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 64 << 20)
        _flush.append(torch.empty(size, dtype=torch.uint8, device=device))
    _flush[0].zero_()


def clock_and_peak(run: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of one run, and the bytes by which the memory in use rose at most while it ran."""
    spent: list[float] = []
    if device.type == "cuda":
        flush_l2()  # its buffer exists before memory is read
    peak = peak_memory(lambda: spent.append(clock(run)))
    return spent[0], peak


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes by which the memory in use rose at most while ``run`` ran, over what was in use before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide what run() takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM") - before
    del result
    return max(peak, 0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second, read plus written, of a copy between two buffers of `size` bytes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / interleave({"copy": lambda: target.copy_(source)}, repeats=7)["copy"].median


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative error in norm; NaN is infinitely far."""
    got, expected = got.detach().double(), expected.detach().to(got.device).double()
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-300))
    return error if error == error else float("inf")


def require_close(what: str, got: Tensor, expected: Tensor, *, relative: float) -> None:
    """Stops the benchmark where ``got`` is further than ``relative`` (in norm) from ``expected``."""
    error = distance(got, expected)
    if not error <= relative:
        raise SystemExit(f"{what}: wrong result (relative error {error:.2e}, allowed {relative:.0e}); nothing reported")


@dataclass
class Report:
    """Rows of a benchmark: printed as a table, written as JSON with hardware and versions."""

    name: str
    options: argparse.Namespace | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def has_time(self, case: str) -> bool:
        """Whether the budget allows another case; names the case where it does not."""
        budget = getattr(self.options, "budget", None)
        if budget is None or time.perf_counter() - self.began < budget:
            print(f"[{time.perf_counter() - self.began:5.0f} s] {self.name}: {case}", file=sys.stderr, flush=True)
            return True
        self.left_out.append(case)
        print(f"{self.name}, {case}: left out, the {budget:.0f} s are over", file=sys.stderr)
        return False

    def add(self, case: str, variant: str, timing: Timing | None = None, **facts: Any) -> None:
        self.rows.append({"case": case, "variant": variant, **(timing.row() if timing else {}), **facts})

    def print(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        cells = [[_text(row.get(column)) for column in columns] for row in self.rows]
        widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
        for line in [columns, ["-" * width for width in widths], *cells]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    def write(self) -> Path:
        """Puts the rows into results/DATE-HARDWARE.json, beside what other benchmarks left there. Called after every
        case, so that a run that is cut short leaves what it has."""
        facts, now = facts_of_machine(device), datetime.now(timezone.utc)
        folder = getattr(self.options, "results", RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{now:%Y-%m-%d}-{slug(facts)}.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        record[self.name] = {
            "machine": facts,
            "date": now.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self.began, 1),
            "left_out": self.left_out,
            "rows": self.rows,
        }
        aside = path.with_suffix(".json.tmp")
        aside.write_text(json.dumps(record, indent=1) + "\n")
        aside.replace(path)
        return path

    def finish(self) -> None:
        """The last write, with the table."""
        if self.rows:
            self.print()
        print(f"{self.write()}: {self.name}")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else str(value)
