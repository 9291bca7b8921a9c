"""What every benchmark shares: interleaved timing, peak memory, hardware and versions, tables and JSON.

    timings = interleave({"napo": run_napo, "eager": run_eager}, repeats=9)
    report = Report("bench_napo_loss")
    report.add("B 1024, N 8", "napo", timings["napo"], ratio=...)
    report.write()

Variants run in turn within one process, so that a slow moment of the machine hits all of them. A benchmark checks its
results first (``require_close``) and reports nothing about wrong ones.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


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


def interleave(
    variants: dict[str, Callable[[], Any]], *, repeats: int = 9, warmup: int = 1, seconds: float | None = None
) -> dict[str, Timing]:
    """Times each variant ``repeats`` times, in turn and starting each round with another one; with ``seconds`` it
    stops after the round in which that much time has passed (three rounds at least)."""
    names = list(variants)
    runs: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            variants[name]()
    began = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                synchronize()
                start = time.perf_counter()
                result = variants[name]()
                synchronize()
                runs[name].append(time.perf_counter() - start)
                del result
            if seconds is not None and turn >= 2 and time.perf_counter() - began > seconds:
                break
    finally:
        gc.enable()
    return {name: Timing(values) for name, values in runs.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes by which the memory in use rose at most while ``run`` ran, over what was in use before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide what run() takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM") - before
    del result
    return max(peak, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def require_close(what: str, got: Tensor, expected: Tensor, *, relative: float) -> None:
    """Stops the benchmark where ``got`` is further than ``relative`` (in norm) from ``expected``."""
    got, expected = got.detach().double(), expected.detach().double()
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-300))
    if not error <= relative:
        raise SystemExit(f"{what}: wrong result (relative error {error:.2e}, allowed {relative:.0e}); nothing reported")


PEERS: dict[str, str] = {}


def peer(module: str, name: str) -> Any | None:
    """A peer's function, or None with a line that says so; its package's version goes into the results either way."""
    package = module.partition(".")[0]
    try:
        found = getattr(importlib.import_module(module), name)
        PEERS[package] = importlib.metadata.version(package)
    except (ImportError, AttributeError, RuntimeError) as error:
        PEERS[package] = "absent"
        print(f"{package}: not measured ({str(error).splitlines()[0]}); pip install '.[bench]' brings it")
        return None
    return found


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    from napo_kernels.backends import compiled

    module = compiled()
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiled_module": dict(module.build_config()) if module else None,
        "peers": PEERS,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split("\t: ") for line in lines if line.count("\t: ") == 1)
    flags = fields.get("flags", "").split()
    wide = [flag for flag in ("avx2", "avx512f", "amx_bf16") if flag in flags]
    model = " ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    return f"{fields.get('model name', platform.processor())} ({model}; {', '.join(wide)})"


class Report:
    """Rows of a benchmark: printed as a table, written as JSON with hardware and versions."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[dict[str, Any]] = []

    def add(self, case: str, variant: str, timing: Timing | None = None, **facts: Any) -> None:
        self.rows.append({"case": case, "variant": variant, **(timing.row() if timing else {}), **facts})

    def print(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        cells = [[_text(row.get(column)) for column in columns] for row in self.rows]
        widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
        for line in [columns, ["-" * width for width in widths], *cells]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    def write(self) -> Path:
        """Prints the table and puts it into results/DATE-HARDWARE.json, beside what other benchmarks left there."""
        self.print()
        facts, now = machine(), datetime.now(timezone.utc)
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{now:%Y-%m-%d}-{_slug(facts)}.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        record[self.name] = {"machine": facts, "date": now.isoformat(timespec="seconds"), "rows": self.rows}
        aside = path.with_suffix(".json.tmp")
        aside.write_text(json.dumps(record, indent=1) + "\n")
        aside.replace(path)
        return path


def _slug(facts: dict[str, Any]) -> str:
    """The hardware in a file's name."""
    words = facts["gpu"] if "gpu" in facts else f"{facts['cpu'].split(' (cpu family')[0]} {facts['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)", "", words).lower()).strip("-")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else str(value)
