"""Tables (benchmarks/README.md) and plots (benchmarks/plots/) from every file in benchmarks/results/.

    python benchmarks/render.py

A plot appears where a benchmark has three or more cases that differ in one number alone; its legend gives the slope
fitted on logarithmic axes (1: cost grows in proportion).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
MEMORY = ("peak_mib", "peak_gb", "bytes_per_entry")
NUMBER = re.compile(r"\b([A-Z]'?) (\d+)\b")
HEAD = """# Benchmarks

Made by `make bench` (CPU) and `make bench-gpu`; rendered by `python benchmarks/render.py` from
[`results/`](results/). Variants of one case run in turn within one process; times are medians, `low` and `high` the
quartiles. Every result is compared with its peers' before it is timed. Peers that are not installed are named by the
benchmark and absent from its table (`pip install '.[bench]'` brings them).

"""
GPU_NOTE = "**No GPU results yet**: nothing here has been measured on a GPU, and nothing is extrapolated to one.\n\n"


def main() -> None:
    files = sorted((HERE / "results").glob("*.json"))
    sections = [section(path, json.loads(path.read_text())) for path in files]
    measured_on_gpu = any('"gpu"' in path.read_text() for path in files)
    text = HEAD + ("" if measured_on_gpu else GPU_NOTE) + "\n".join(reversed(sections))
    (HERE / "README.md").write_text(text.rstrip() + "\n")
    print(f"{HERE / 'README.md'}: {len(files)} machines and days")


def section(path: Path, record: dict[str, Any]) -> str:
    lines = [f"## {path.stem}", ""]
    for name, benchmark in record.items():
        facts = benchmark["machine"]
        lines += [f"### {name}", "", describe(facts, benchmark["date"]), ""]
        lines += [*table(benchmark["rows"]), ""]
        lines += [f"![{plot.stem}](plots/{plot.name})\n" for plot in plots(path.stem, name, benchmark["rows"])]
    return "\n".join(lines)


def describe(facts: dict[str, Any], date: str) -> str:
    where = facts.get("gpu") or f"{facts['cores']} cores of {facts['cpu']}, {facts['threads']} threads"
    return f"{where}; torch {facts['torch']}, Python {facts['python']}; {date[:10]}."


def table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(text(row.get(name)) for name in columns) + " |" for row in rows]


def text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def plots(stem: str, name: str, rows: list[dict[str, Any]]) -> list[Path]:
    """One picture for each number of the cases that is varied alone: time, and memory where it was measured."""
    made = []
    for symbol, lines in series(rows).items():
        memory = {key: points for key, points in lines.items() if any(row_memory(row) for _, row in points)}
        figure, axes = plt.subplots(1, 2 if memory else 1, figsize=(11 if memory else 6, 4.2), squeeze=False)
        draw(axes[0, 0], {k: [(x, row.get("median_ms")) for x, row in v] for k, v in lines.items()}, symbol, "ms")
        if memory:
            column = next(key for key in MEMORY if any(key in row for v in memory.values() for _, row in v))
            draw(axes[0, 1], {k: [(x, row.get(column)) for x, row in v] for k, v in memory.items()}, symbol, column)
        figure.suptitle(name)
        figure.tight_layout()
        path = HERE / "plots" / f"{stem}-{name}-{symbol.rstrip(chr(39))}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
        made.append(path)
    return made


def row_memory(row: dict[str, Any]) -> bool:
    return any(key in row for key in MEMORY)


def series(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, dict[str, Any]]]]]:
    """symbol -> "variant, rest of the case" -> (number, row), where a symbol takes three values or more."""
    found: dict[str, dict[str, list[tuple[int, dict[str, Any]]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for match in NUMBER.finditer(row["case"]):
            rest = row["case"].replace(match.group(), "").strip(" ,").replace(", ,", ",")
            found[match.group(1)][f"{row['variant']}; {rest}"].append((int(match.group(2)), row))
    lines = {
        symbol: {key: sorted(points, key=lambda p: p[0]) for key, points in group.items() if len(points) >= 3}
        for symbol, group in found.items()
    }
    return {symbol: group for symbol, group in lines.items() if group}


def draw(axes: Axes, lines: dict[str, list[tuple[int, float | None]]], symbol: str, unit: str) -> None:
    for label, points in lines.items():
        x, y = np.array([(at, value) for at, value in points if value]).T if any(v for _, v in points) else ([], [])
        if len(x) < 3:
            continue
        slope = np.polyfit(np.log(x), np.log(y), 1)[0]
        axes.loglog(x, y, "o-", label=f"{label} (slope {slope:.2f})")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
    axes.set_xlabel(symbol)
    axes.set_ylabel(unit.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
