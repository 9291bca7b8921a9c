"""The report's figures, as inline SVG: text stays text, nothing is fetched when the file is opened."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from napo.evaluation.metrics import BUCKETS

COLOURS = {
    "popularity": "#8a8f98",
    "itemknn": "#b3aa9a",
    "sasrec": "#5b7f95",
    "base": "#d3c36b",
    "sft": "#e0a25e",
    "sft-longer": "#b3632c",
    "napo": "#1f6f4a",
}
OTHERS = ("#8c4a7f", "#3f5fa8", "#a8483f", "#4a9a9a", "#7a6a3a")
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with two dollar signs is a name
    "svg.hashsalt": "napo",  # the same figures give the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


def colours(names: Sequence[str]) -> dict[str, str]:
    """One colour a model, the same in every figure."""
    others = itertools.cycle(OTHERS)
    return {name: COLOURS[name] if name in COLOURS else next(others) for name in names}


def hit_rates(records: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """HR@1 with its interval, a line a model."""
    paint = colours(list(dict.fromkeys(str(r["model"]) for r in records)))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 0.9 + 0.34 * len(records)))
        for row, record in enumerate(records):
            low, high = record["hr@1_ci"]
            axes.plot([low, high], [row, row], color=paint[record["model"]], linewidth=3, solid_capstyle="round")
            axes.plot(record["hr@1"], row, "o", color=paint[record["model"]], markersize=8)
            axes.annotate(
                f"{record['hr@1']:.3f}", (high, row), xytext=(6, 0), textcoords="offset points", va="center", size=9
            )
        chance = 1 / records[0]["protocol"]["candidates"]
        axes.axvline(chance, color="#bbbbbb", linestyle=":", zorder=0)
        axes.annotate(
            "chance", (chance, -0.55), xytext=(3, 0), textcoords="offset points", color="#888888", size=8, va="center"
        )
        axes.set_yticks(range(len(records)), labels)
        axes.set_ylim(len(records) - 0.5, -0.8)
        axes.set_xlim(left=0)
        axes.margins(x=0.1)
        axes.set_title("HR@1, 95% interval over users")
        axes.grid(axis="x")
        return _svg(figure)


def curves(logs: Mapping[str, Sequence[Mapping[str, float]]], panels: Mapping[str, Sequence[str]]) -> str | None:
    """Training curves: a panel for each title in ``panels`` that has something to show, a line for each of its keys."""
    shown: dict[str, list[tuple[str, str, list[float], list[float]]]] = {}
    for title, keys in panels.items():
        for name, log in logs.items():
            for key in keys:
                points = [(entry["step"], entry[key]) for entry in log if key in entry and "step" in entry]
                if points:
                    steps, values = map(list, zip(*points, strict=True))
                    shown.setdefault(title, []).append((name, key, steps, values))
    if not shown:
        return None
    paint = colours(list(logs))
    with plt.rc_context(STYLE):
        columns = min(len(shown), 2)
        rows = -(-len(shown) // columns)
        figure, grid = plt.subplots(rows, columns, figsize=(3.7 * columns + 0.4, 2.6 * rows), squeeze=False)
        for axes, (title, lines) in zip(grid.flat, shown.items(), strict=False):
            for name, key, places, heights in lines:
                validation = key.startswith(("eval", "val"))
                axes.plot(
                    places,
                    heights,
                    color=paint[name],
                    linewidth=1.6,
                    linestyle="--" if validation else "-",
                    marker="o" if validation or len(places) < 3 else None,
                    markersize=3,
                    label=f"{name}, validation" if validation else name,
                )
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.grid(axis="y")
            if len(lines) > 1 or len(shown) > 1:
                axes.legend(fontsize=8)
        for axes in list(grid.flat)[len(shown) :]:
            axes.remove()
        return _svg(figure)


def popularity(records: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """How popular what a model recommends is, and where it finds the right item."""
    paint = colours(list(dict.fromkeys(str(r["model"]) for r in records)))
    with plt.rc_context(STYLE):
        height = 1.1 + 0.3 * len(records)
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.8, max(height, 2.8)), width_ratios=(1, 1.35))
        left.barh(range(len(records)), [r["arp"] for r in records], color=[paint[r["model"]] for r in records])
        left.set_yticks(range(len(records)), labels)
        left.invert_yaxis()
        left.set_title("Popularity of recommendations")
        left.set_xlabel("training interactions, mean")
        left.grid(axis="x")
        left.set_axisbelow(True)
        _buckets(right, records, labels, paint)
        return _svg(figure)


def _buckets(axes: Axes, records: Sequence[Mapping[str, Any]], labels: Sequence[str], paint: Mapping[str, str]) -> None:
    width = 0.8 / len(records)
    for position, (record, label) in enumerate(zip(records, labels, strict=True)):
        hits = record["hr@1_by_popularity"]
        places = [column + (position + 0.5) * width - 0.4 for column, name in enumerate(BUCKETS) if name in hits]
        heights = [hits[name]["hr@1"] for name in BUCKETS if name in hits]
        axes.bar(places, heights, width=width * 0.92, color=paint[record["model"]], label=label)
    counts = records[0]["hr@1_by_popularity"]
    axes.set_xticks(range(len(BUCKETS)), [f"{name}\n(n = {counts.get(name, {'n': 0})['n']})" for name in BUCKETS])
    axes.set_title("HR@1 by popularity of the right item")
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    figure.tight_layout()
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]
