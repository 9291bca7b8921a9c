"""The variants of one case: checked against fp64, then measured in turn.

    report, cases = Report("napo_loss", options), []
    if report.has_time("B 1024, N 8"):
        variants = {"napo": run_napo, "eager": run_eager}
        cases.append(compare(report, "B 1024, N 8", variants, error=distance_from_fp64, tolerance=1e-4))
    sweep(report, cases)
    report.finish()

`compare` checks the variants of one case. One that is wrong, fails or does not fit is named with the reason and not
timed, and the run goes on; if it is ours or the baseline, the program ends with status 1. The others are measured in
turn within one process, so that a slow moment of the machine hits all of them: on a GPU at once, on a CPU by `sweep`.
Memory is the most that a run held above what was there.

Ratios use the fastest runs: neighbours on a shared machine add time, and to some variants more than to others
(studies/benchmark_stability.md). So that they leave at least one run of each variant alone, `sweep` goes over all cases
many times, a few runs at a time.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import device, memory
from benchmarks.report import OUT_OF_MEMORY, Report, reason_of
from benchmarks.timing import Timing, Variant, Variants, clock_and_peak, interleave

OURS = "napo"  # the variant that others are compared with
LONG_RUN = 3.0  # seconds: one tells enough
SWEEPS = 10  # over all cases on a CPU
SECONDS_OF_A_VARIANT = 8.0  # in all sweeps: what takes longer takes part in fewer of them, but in three
SECONDS_OF_A_VISIT = 0.3  # in which the variants of a case run in turn, each at least once
KEPT = 4 << 30  # bytes; larger cases run as PyTorch allocates by default: kept memory falls into pieces, and grows


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
    """Checks the variants of one case; on a GPU also measures them, in `repeats` rounds or for `seconds`, since the
    next case needs the memory.

    `error(name, result)` is the distance of a result from the fp64 truth; more than `tolerance` is wrong. The rest are
    the arguments of `Comparison`.
    """
    comparison = Comparison(report, case, variants, **how)
    comparison.check(error, tolerance)
    if device.on_gpu():
        comparison.measure(list(comparison.once), repeats=repeats, least=3, seconds=seconds)
    return comparison


def sweep(report: Report, cases: list[Comparison]) -> None:
    """Measures the cases on a CPU, in as many sweeps as the budget allows, in memory that the process keeps."""
    if device.on_gpu() or not cases:
        return
    smoke = getattr(report.options, "smoke", False)
    sweeps, visit = (2, 0.01) if smoke else (SWEEPS, SECONDS_OF_A_VISIT)
    for number in range(sweeps):
        # The first sweep has all variants, so that each is timed; later ones have what the budget still covers.
        longest = affordable(cases, report.time_left()) if number else float("inf")
        if longest == 0.0:
            break
        report.say(f"sweep {number + 1} of up to {sweeps}")
        first = number % len(cases)  # so that no case is always first
        for case in cases[first:] + cases[:first]:
            names = [name for name in case.due() if case.once[name] <= longest]
            if not names:
                continue
            if case.peak(names) > KEPT:
                memory.as_by_default()
                memory.touch(int(1.2 * case.peak(names)))
            else:  # twice: blocks in use cut the free memory into pieces
                memory.keep(int(2 * case.peak(names)))
            case.measure(names, repeats=30, least=1, seconds=visit)
        report.write()
    memory.as_by_default()


def affordable(cases: list[Comparison], seconds: float) -> float:
    """The longest run for which a sweep over all variants up to it takes at most `seconds`; 0 if there is none."""
    total, longest = SECONDS_OF_A_VISIT * len(cases), 0.0
    for spent in sorted(case.once[name] for case in cases for name in case.due()):
        total += spent
        if total > seconds:
            break
        longest = spent
    return longest


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
        derive: Derive | None = None,  # adds columns to the rows before they are reported
    ) -> None:
        self.report, self.case, self.floor, self.derive = report, case, floor, derive
        self.ready = {name: v if isinstance(v, Variant) else Variant(v) for name, v in variants.items()}
        self.rows: dict[str, dict[str, Any]] = {name: {} for name in self.ready}
        self.once: dict[str, float] = {}  # seconds of a first run, or of the fastest so far
        self.timings: dict[str, Timing] = {}
        self.visits = dict.fromkeys(self.ready, 0)

    def check(self, error: Callable[[str, Any], float] | None = None, tolerance: float = 0.0) -> None:
        """The first runs: results against the truth, and memory."""
        gc.collect()
        for name in self.ready:
            try:
                self._check_one(name, error, tolerance)
            except Exception as failure:
                self.rows[name]["note"] = reason_of(failure)
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
        # A first run may compile, load libraries and fill their caches, so a short one tells nothing.
        if device.on_gpu() or _compilations() > compilations or spent < LONG_RUN:
            spent, peak, _ = clock_and_peak(variant.bind())
        self.once[name] = spent
        row["peak_mib"] = round(peak / 2**20, 1)
        if not device.on_gpu() and spent >= LONG_RUN and peak > KEPT:  # as in a sweep: it counts as a visit
            self._add(name, [spent])

    def _failed(self, name: str) -> None:
        note = self.rows[name]["note"]
        what = f"{self.case}, {name}: {note}"
        print(f"  {what}", file=sys.stderr)
        if (self.ready[name].required or name == OURS) and note != OUT_OF_MEMORY:
            self.report.failed.append(what)
        gc.collect()
        if not device.answers():
            self.report.put(self.case, self._rows())
            self.report.end(what)

    def due(self) -> list[str]:
        """The variants that need more runs."""
        return [name for name, visits in self.visits.items() if name in self.once and visits < self._enough(name)]

    def _enough(self, name: str) -> int:
        return max(3, round(SECONDS_OF_A_VARIANT / self.once[name]))

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


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative error in norm; NaN is infinitely far."""
    got, expected = got.detach().double(), expected.detach().to(got.device).double()
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-300))
    return error if error == error else float("inf")
