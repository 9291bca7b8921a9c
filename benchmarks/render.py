"""Tables (benchmarks/README.md) and plots (benchmarks/plots/) from every file in benchmarks/results/.

    python -m benchmarks render [--results FOLDER] [--out FOLDER]

A plot appears where a benchmark has three or more cases that differ in one number only; its legend gives the slope
fitted on logarithmic axes (1: cost grows in proportion).
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes

HERE = Path(__file__).parent
NUMBER = re.compile(r"\b([A-Z]'?) (\d+)\b")
TITLES = {"N": "negatives N", "P": "prompt tokens P", "B'": "pool of users B'", "V": "vocabulary V", "B": "users B"}
COLUMNS = {  # of the tables, in this order; what a row has beyond these is appended
    "variant": "variant",
    "fastest": "ms",
    "median_ms": "median ms",
    "spread": "quartiles",
    "peak_mib": "peak MiB",
    "of_floor": "x floor",
    "times_napo": "x napo's time",
    "times_napo_memory": "x napo's memory",
    "error": "error",
    "runs": "runs",
    "note": "",
}
HEAD = """# Benchmarks

Made by `make bench` (CPU) and `make bench-gpu` (one NVIDIA GPU), rendered by `python -m benchmarks render` from
[`results/`](results/). How to read the tables:

- The variants of a case run in turn within one process. What takes long runs less often.
- "ms" is the fastest of the runs. "x napo's time" and "x floor" are ratios of it. The fastest is taken because other
  programs on a shared machine add time, and to some variants more than to others.
- The floor is the least that the computation can take: the bare matmuls, or the time to copy as many bytes as must
  move. It is measured in the same run. The docstring of each benchmark's file says which of the two it is.
- "Peak MiB" is the most memory that a run held above what was there before.
- "Error" is the relative distance from fp64. A variant whose result is wrong is named and not timed. If it is ours or a
  baseline, the run ends with an error.
- On CPUs each variant that takes up to 4 GiB uses memory again that the process has already, as most allocators do.
  PyTorch by default asks the system for new memory where blocks are large. That costs time, most of all for variants
  that allocate much, so their ratios would be worse than shown.
- Two older files were made in other ways. In those of 2026-11-23 and of the EPYC of family 25 (2026-11-26) training
  steps and evaluation ran in new memory. In that of 2026-11-23 ratios are of medians, and "ms" is the lower quartile.
- Peers that were absent are named under each title; `pip install '.[bench]'` brings those that run on a CPU.

`python -m benchmarks compare` tells how far the ratios of two runs are apart.
[HOPPER.md](HOPPER.md) has the byte and flop model of each GPU kernel.

"""
GPU_NOTE = (
    "**No GPU benchmarks yet**: the tables below are of CPUs. What was measured in the first minutes on a GPU is in\n"
    "[studies/first_gpu.md](../studies/first_gpu.md).\n\n"
)
PALETTE = ["#d1495b", "#30638e", "#8d96a3", "#edae49", "#3c7a57", "#7b5ea7", "#00798c", "#a26769", "#5c5c5c"]
LINES_IN_A_PLOT = 8


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of README.md and plots/")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*.json"))
    records = {path.stem: json.loads(path.read_text()) for path in files}
    sections = [section(stem, record, options.out / "plots") for stem, record in records.items()]
    on_gpu = any("gpu" in benchmark["machine"] for record in records.values() for benchmark in record.values())
    text = HEAD + ("" if on_gpu else GPU_NOTE) + "\n".join(reversed(sections))
    (options.out / "README.md").write_text(text.rstrip() + "\n")
    print(f"{options.out / 'README.md'}: {len(files)} machines and days")


def section(stem: str, record: dict[str, Any], plots_folder: Path) -> str:
    facts = next(iter(record.values()))["machine"]
    lines = [f"## {stem}", "", describe(facts), ""]
    for name, benchmark in record.items():
        lines += [f"### {name}", "", *notes(benchmark)]
        for case, rows in by_case(benchmark["rows"]).items():
            lines += [f"**{case}**", "", *table(rows), ""]
        for plot in plots(stem, name, benchmark["rows"], plots_folder):
            lines += [f"![{name} over {plot.stem.rpartition('-')[2]}](plots/{plot.name})", ""]
    return "\n".join(lines)


def describe(facts: dict[str, Any]) -> str:
    where = facts.get("gpu") or f"{facts['cores']} cores of {facts['cpu']}, {facts['threads']} threads"
    versions = [f"{name} {facts[name]}" for name in ("torch", "triton", "transformers", "cuda") if facts.get(name)]
    return f"{where}; {', '.join(versions)}, Python {facts['python']}."


def notes(benchmark: dict[str, Any]) -> list[str]:
    peers = benchmark["machine"].get("peers", {})
    parts = [f"{name} {version}" for name, version in peers.items() if not version.startswith("absent")]
    parts += [f"{name} {version}" for name, version in peers.items() if version.startswith("absent")]
    lines = [f"Measured {benchmark['date'][:10]}." + (f" Peers: {'; '.join(parts)}." if parts else ""), ""]
    left_out = benchmark.get("left_out")
    return lines + ([f"Left out when the time was over: {'; '.join(left_out)}.", ""] if left_out else [])


def by_case(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    cases: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cases[row["case"]].append(row)
    return cases


def table(rows: list[dict[str, Any]]) -> list[str]:
    shown = [{**row, "fastest": fastest(row), "spread": spread(row)} for row in rows]
    had = {key for row in shown for key, value in row.items() if value not in (None, "")}
    hidden = {"case", "best_ms", "low_ms", "high_ms"}
    columns = [key for key in COLUMNS if key in had]
    columns += [key for key in dict.fromkeys(key for row in shown for key in row) if key not in {*columns, *hidden}]
    columns = [key for key in columns if key in had]
    names = [COLUMNS.get(key, key.replace("_", " ")) for key in columns]
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return lines + ["| " + " | ".join(text(row.get(key)) for key in columns) + " |" for row in shown]


def spread(row: dict[str, Any]) -> str:
    if row.get("runs", 0) < 2:
        return ""
    return f"{text(float(row['low_ms']))}, {text(float(row['high_ms']))}"


def fastest(row: dict[str, Any]) -> float | None:
    """The fastest run in milliseconds; the lower quartile if an old file has no fastest run."""
    return row.get("best_ms", row.get("low_ms"))


def text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def plots(stem: str, name: str, rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """A picture for each number that varies while all others stay the same: time, and memory if measured."""
    made = []
    for symbol, (rest, lines) in series(rows).items():
        panels = {"fastest": "milliseconds (fastest run)"}
        if any(len([1 for _, row in points if row.get("peak_mib")]) >= 3 for points in lines.values()):
            panels["peak_mib"] = "peak MiB"
        figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.8), squeeze=False)
        for axis, (column, unit) in zip(axes[0], panels.items(), strict=True):
            value = fastest if column == "fastest" else lambda row, column=column: row.get(column)
            data = {key: [(x, value(row)) for x, row in points] for key, points in lines.items()}
            draw(axis, data, TITLES.get(symbol, symbol), unit)
        figure.suptitle(f"{name}: cost against {TITLES.get(symbol, symbol)}\n{rest}", fontsize=11)
        figure.tight_layout()
        path = folder / f"{stem}-{name}-{symbol.replace(chr(39), '-pool')}.png"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        plt.close(figure)
        made.append(path)
    return made


Points = list[tuple[int, dict[str, Any]]]


def series(rows: list[dict[str, Any]]) -> dict[str, tuple[str, dict[str, Points]]]:
    """symbol -> the rest of its cases and line -> (number, row), where a symbol takes three values or more. Several
    groups of cases may vary the same number: the lines of all but the largest say in what their cases differ."""
    found: dict[str, dict[str, dict[str, Points]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        for match in NUMBER.finditer(row["case"]):
            rest = re.sub(r"(, )+", ", ", row["case"].replace(match.group(), "")).strip(" ,")
            found[match.group(1)][rest][variant_of(row)].append((int(match.group(2)), row))
    chosen: dict[str, tuple[str, dict[str, Points]]] = {}
    for symbol, groups in found.items():
        long = {
            rest: {name: sorted(p, key=lambda x: x[0]) for name, p in group.items() if len({x for x, _ in p}) >= 3}
            for rest, group in groups.items()
        }
        best = max(long, key=lambda rest: len(long[rest]))
        lines = dict(long[best])
        for rest, group in long.items():
            differs = ", ".join(part for part in rest.split(", ") if part not in best.split(", "))
            lines |= {f"{name}, {differs}": points for name, points in group.items() if rest != best}
        if lines:
            chosen[symbol] = best, lines
    return chosen


def variant_of(row: dict[str, Any]) -> str:
    """One line for the chunkings of the floor: the fastest is picked when it is drawn."""
    return "floor" if row["variant"].startswith("floor") else row["variant"]


def round_numbers(low: float, high: float) -> list[float]:
    """Ticks for a logarithmic axis: powers of ten, with 2 and 5, or 3, between them where there are few of those."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(found) >= 4:
            break
    return found


def draw(axes: Axes, lines: dict[str, list[tuple[int, float | None]]], symbol: str, unit: str) -> None:
    ticks: set[int] = set()
    for number, (label, points) in enumerate(list(lines.items())[:LINES_IN_A_PLOT]):
        least: dict[int, float] = {}
        for at, value in points:
            if value:
                least[at] = min(value, least.get(at, value))
        if len(least) < 3:
            continue
        x, y = np.array(sorted(least.items())).T
        ticks.update(least)
        slope = np.polyfit(np.log(x), np.log(y), 1)[0]
        ours = label == "napo"
        axes.loglog(
            x,
            y,
            "--" if label == "floor" else "-",
            marker="o",
            markersize=6 if ours else 4,
            linewidth=2.6 if ours else 1.6,
            color=PALETTE[number % len(PALETTE)],
            zorder=3 if ours else 2,
            label=f"{label}  (slope {slope:.2f})",
        )
    shown = sorted(ticks)
    axes.set_xticks(shown, [f"{value:,}" for value in shown])
    low, high = axes.get_ylim()
    wider = max(1.0, math.sqrt(10 * low / high))  # at least a decade, so that flat lines look flat
    low, high = low / wider, high * wider
    axes.set_ylim(low, high)
    axes.set_yticks(round_numbers(low, high))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel(symbol)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if ticks:
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
