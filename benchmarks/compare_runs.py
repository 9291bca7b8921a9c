"""How stable ratios to napo's time are from run to run: the share of them that differ by at most 10%.

    make bench BENCH_RESULTS=build/run-1; make bench BENCH_RESULTS=build/run-2
    python -m benchmarks compare build/run-1 build/run-2 [--within 0.1] [--all]

Takes two JSON files, or two folders with one each, and prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Change:
    """One ratio in the first run and in the second."""

    benchmark: str
    case: str
    variant: str
    first: float
    second: float

    @property
    def relative(self) -> float:
        return self.second / self.first - 1


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=results, nargs=2, metavar="RUN", help="a JSON file, or a folder with one")
    parser.add_argument("--within", type=float, default=0.1, help="relative to the first run")
    parser.add_argument("--all", action="store_true", help="also list the ratios that are within it")
    options = parser.parse_args(arguments)
    found = changes(*options.runs)
    if not found:
        raise SystemExit("the two runs have no ratio in common")
    print("\n".join(summary(found, options.within)))
    print("\n".join(["", *details(found, 0.0 if options.all else options.within)]))


def results(path: str) -> dict[str, Any]:
    files = sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)]
    if len(files) != 1 or not files[0].exists():
        raise argparse.ArgumentTypeError(f"{path}: expected one JSON file, found {len(files) if files else 'none'}")
    record: dict[str, Any] = json.loads(files[0].read_text())
    return record


def changes(first: dict[str, Any], second: dict[str, Any]) -> list[Change]:
    found = []
    for name, benchmark in first.items():
        later = ratios(second.get(name, {}).get("rows", []))
        for (case, variant), ratio in ratios(benchmark["rows"]).items():
            if (case, variant) in later:
                found.append(Change(name, case, variant, ratio, later[case, variant]))
    return found


def ratios(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Ratios of the fastest runs; the columns of an old file may use other runs."""
    timed = {(row["case"], row["variant"]): row["best_ms"] for row in rows if "best_ms" in row}
    ours = {case: best for (case, variant), best in timed.items() if variant == "napo"}
    return {key: best / ours[key[0]] for key, best in timed.items() if key[0] in ours and key[1] != "napo"}


def summary(found: list[Change], within: float) -> list[str]:
    lines = [f"| benchmark | ratios within {within:.0%} of the first run | the furthest |", "|---|---:|---|"]
    for name in [*dict.fromkeys(change.benchmark for change in found), "all"]:
        some = [change for change in found if name in (change.benchmark, "all")]
        far = max(some, key=lambda change: abs(change.relative))
        close = sum(abs(change.relative) <= within for change in some)
        lines.append(f"| {name} | {close} of {len(some)} | {far.relative:+.0%} ({far.variant}; {far.case}) |")
    return lines


def details(found: list[Change], beyond: float) -> list[str]:
    far = [change for change in found if abs(change.relative) >= beyond]
    lines = ["| case | variant | first | second | change |", "|---|---|---:|---:|---:|"] if far else []
    return lines + [f"| {c.case} | {c.variant} | {c.first:.3g} | {c.second:.3g} | {c.relative:+.0%} |" for c in far]
