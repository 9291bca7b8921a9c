"""The report's figures as Plotly's JSON: ``data`` and ``layout``, without colours of the page, which the page adds in
its light or dark theme.

Text in Plotly is markup: names and titles go through ``label``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from napo.evaluation.differences import Pair
from napo.evaluation.metrics import BUCKETS
from napo.evaluation.report.contents import Contents

COLOURS = {
    "popularity": "#8a8f98",
    "itemknn": "#a3937a",
    "rules": "#7d8f5f",
    "sasrec": "#4f8fb5",
    "base": "#b8a22e",
    "sft": "#dd8a3c",
    "sft-longer": "#c05f28",
    "napo": "#2f9e6e",
}
OTHERS = ("#b06aa0", "#6a84d8", "#d0645a", "#3fa3a3", "#9a8a4a")
PANELS = {
    "SFT loss": ("sft_loss", "eval_sft_loss"),
    "Preference loss": ("loss", "eval_loss"),
    "Margin (gamma)": ("gamma",),
    "Reward margin": ("rewards/margins", "eval_rewards/margins"),
    "Preference accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "Validation HR@1": ("eval_hr@1",),
}
BIAS_PANELS = {
    "hr@1": ("HR@1", ".3f"),
    "arp": ("ARP: popularity of what is recommended", ".0f"),
    "gini": ("Gini: 0 every item equally often, 1 always the same", ".2f"),
    "coverage": ("Coverage: share of the catalogue that is recommended", ".1%"),
}
LONGEST_LABEL = 22
POINTS = 400
"""A training curve of more steps is thinned to so many points."""


@dataclass(frozen=True)
class Figure:
    """``alt`` says in words what is to be seen. ``choices``: other data of the same figure, by what is chosen."""

    id: str
    title: str
    alt: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    chosen: str = ""
    choose: str = ""


def label(text: str, longest: int = LONGEST_LABEL) -> str:
    """Text as Plotly shows it: nothing of it is taken for markup, and it is not wider than a phone."""
    cut = text if len(text) <= longest else text[: longest - 1] + "…"
    return cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def colours(names: Sequence[str]) -> dict[str, str]:
    """One colour a model, the same in every figure."""
    others = itertools.cycle(OTHERS)
    return {name: COLOURS[name] if name in COLOURS else next(others) for name in names}


def models(loaded: Sequence[Contents]) -> list[str]:
    return list(dict.fromkeys(record["model"] for contents in loaded for record in contents.records))


def hit_rates(loaded: Sequence[Contents]) -> Figure:
    """HR@1 by model: of one run with its interval over users, of several runs each with their mean and deviation."""
    names = models(loaded)
    paint = colours(names)
    several = len(loaded) > 1
    data, heights, told = [], [], []
    for name in names:
        found = [(contents, r) for contents in loaded for r in contents.records if r["model"] == name]
        values = [record["hr@1"] for _, record in found]
        mean = float(np.mean(values))
        heights.append(label(_marked(loaded, name)))
        told.append(f"{name} {mean:.3f}")
        if several:
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            hover = f"<b>{label(name, 100)}</b><br>mean {mean:.3f}, sd {spread:.3f}, {len(values)} runs<extra></extra>"
            data.append(_marker(mean, heights[-1], paint[name], [spread], None, hover, size=13, symbol="diamond-open"))
            for contents, record in found:
                hover = f"<b>{label(name, 100)}</b><br>{label(contents.name, 80)}: {record['hr@1']:.3f}<extra></extra>"
                data.append(_marker(record["hr@1"], heights[-1], paint[name], None, None, hover, size=7))
        else:
            low, high = found[0][1]["hr@1_ci"]
            hover = (
                f"<b>{label(name, 100)}</b><br>HR@1 {mean:.3f}<br>95% interval {low:.3f} to {high:.3f}"
                f"<br>n = {found[0][1]['n']}<extra></extra>"
            )
            data.append(_marker(mean, heights[-1], paint[name], [high - mean], [mean - low], hover))
    protocols = [record["protocol"] for contents in loaded for record in contents.records]
    chances = sorted({1 / protocol["candidates"] for protocol in protocols if "lists" not in protocol})
    layout = _rows_layout(len(names), "HR@1")
    layout["xaxis"]["rangemode"] = "tozero"
    layout["shapes"] = [
        {"type": "line", "x0": chance, "x1": chance, "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dot"}}
        for chance in chances
    ]
    layout["annotations"] = [
        {"x": chance, "yref": "paper", "y": 1, "yanchor": "bottom", "text": "chance", "showarrow": False}
        for chance in chances
    ]
    shown = "mean (diamond, bar: sd over runs) and each run" if several else "95% interval over users"
    return Figure("hit-rates", f"HR@1, {shown}", f"HR@1 by model: {', '.join(told)}.", data, layout)


def forest(number: int, pairs: Sequence[Pair], names: Sequence[str]) -> Figure:
    """Differences to one model, which the reader chooses; the best one at first."""
    paint = colours(list(names))
    choices: dict[str, dict[str, Any]] = {}
    for reference in dict.fromkeys([pairs[0].model, *names]):
        own = [p if p.model == reference else p.reversed for p in pairs if reference in (p.model, p.other)]
        data, told = [], []
        for pair in own:
            hover = (
                f"<b>{label(pair.model, 100)} less {label(pair.other, 100)}</b><br>{pair.difference:+.3f}"
                f"<br>95% interval {pair.low:+.3f} to {pair.high:+.3f}"
                f"<br>{'told apart' if pair.apart else 'cannot be told apart'}<extra></extra>"
            )
            data.append(
                _marker(
                    pair.difference,
                    label(pair.other),
                    paint[pair.other],
                    [pair.high - pair.difference],
                    [pair.difference - pair.low],
                    hover,
                    symbol="circle" if pair.apart else "circle-open",
                )
            )
            told.append(f"{pair.other} {pair.difference:+.3f} ({pair.low:+.3f} to {pair.high:+.3f})")
        alt = f"HR@1 of {reference} less that of each other model, with 95% intervals: {', '.join(told)}."
        choices[reference] = {
            "data": data,
            "alt": alt,
            "x": f"HR@1 of {label(reference, 40)}<br>less that of the model",
        }
    first = next(iter(choices.values()))
    layout = _rows_layout(len(names) - 1, first["x"])
    layout["shapes"] = [{"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 1}}]
    title = "Paired differences (filled: told apart; open: the interval includes 0)"
    return Figure(
        f"forest-{number}", title, first["alt"], first["data"], layout, choices, pairs[0].model, "difference of"
    )


def bias(loaded: Sequence[Contents]) -> list[Figure]:
    """HR@1 and, beside it, how popular and how diverse the recommendations are; over runs their means."""
    names = models(loaded)
    paint = colours(names)
    figures = []
    for key, (title, form) in BIAS_PANELS.items():
        values = []
        for name in names:
            found = [r[key] for contents in loaded for r in contents.records if r["model"] == name and key in r]
            values.append(float(np.mean(found)) if found else None)
        if all(value is None for value in values):
            continue
        bar = {
            "type": "bar",
            "orientation": "h",
            "y": [label(_marked(loaded, name)) for name in names],
            "x": values,
            "marker": {"color": [paint[name] for name in names]},
            "text": ["" if value is None else format(value, form) for value in values],
            "textposition": "outside",
            "cliponaxis": False,
            "hovertemplate": f"<b>%{{y}}</b><br>%{{x:{form}}}<extra></extra>",
        }
        layout = _rows_layout(len(names), "")
        layout["height"] -= 30
        layout["xaxis"]["range"] = [
            0,
            1.18 * max(0.0, *(value or 0.0 for value in values)) or 1,
        ]  # room for the numbers
        layout["xaxis"]["nticks"] = 6
        layout["xaxis"]["tickformat"] = ".0%" if form.endswith("%") else ""
        told = ", ".join(
            f"{name} {format(value, form)}" for name, value in zip(names, values, strict=True) if value is not None
        )
        figures.append(Figure(f"bias-{key.replace('@', '')}", title, f"{title}: {told}.", [bar], layout))
    return figures


def buckets(loaded: Sequence[Contents]) -> Figure:
    """Where each model finds the right item: among popular or among rare ones."""
    names = models(loaded)
    paint = colours(names)
    of_all = [record["hr@1_by_popularity"] for contents in loaded for record in contents.records]
    counts = [sorted({of.get(name, {"n": 0})["n"] for of in of_all}) for name in BUCKETS]
    places = [f"{name}<br>n = {' or '.join(map(str, each))}" for name, each in zip(BUCKETS, counts, strict=True)]
    data, told = [], []
    for name in names:
        found = [r["hr@1_by_popularity"] for c in loaded for r in c.records if r["model"] == name]
        heights = [
            float(np.mean([hits[b]["hr@1"] for hits in found if b in hits])) if any(b in h for h in found) else None
            for b in BUCKETS
        ]
        data.append(
            {
                "type": "bar",
                "name": label(name),
                "x": places,
                "y": heights,
                "marker": {"color": paint[name]},
                "hovertemplate": f"<b>{label(name, 100)}</b><br>%{{x}}<br>HR@1 %{{y:.3f}}<extra></extra>",
            }
        )
        told.append(f"{name} {', '.join('-' if h is None else format(h, '.3f') for h in heights)}")
    layout = {"height": 320, "barmode": "group", "yaxis": {"title": {"text": "HR@1"}, "rangemode": "tozero"}}
    alt = f"HR@1 where the right item is a head, middle or tail item: {'; '.join(told)}."
    return Figure("buckets", "HR@1 by popularity of the right item", alt, data, _legend_below(layout))


def curves(number: int, logs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Figure]:
    """Training curves: a figure for each title in ``PANELS`` that has something to show, a line for each key."""
    paint = colours(list(logs))
    figures: list[Figure] = []
    for title, keys in PANELS.items():
        data, told = [], []
        for name, log in logs.items():
            for key in keys:
                points = [(entry["step"], entry[key]) for entry in log if key in entry and "step" in entry]
                if not points:
                    continue
                validation = key.startswith("eval")
                shown = f"{name}, validation" if validation else name
                kept = points if len(points) <= POINTS else [*points[:: -(-len(points) // POINTS)], points[-1]]
                data.append(
                    {
                        "type": "scatter",
                        "mode": "lines+markers" if validation or len(points) < 3 else "lines",
                        "name": label(shown, 40),
                        "x": [step for step, _ in kept],
                        "y": [value for _, value in kept],
                        "line": {"color": paint[name], "width": 2, "dash": "dash" if validation else "solid"},
                        "hovertemplate": f"<b>{label(shown, 100)}</b><br>step %{{x}}: %{{y:.4g}}<extra></extra>",
                    }
                )
                told.append(f"{shown} from {points[0][1]:.3g} to {points[-1][1]:.3g} in {points[-1][0]} steps")
        if data:
            layout = _legend_below({"height": 300, "xaxis": {"title": {"text": "step"}}, "yaxis": {}})
            figures.append(
                Figure(f"curve-{number}-{len(figures)}", title, f"{title}: {'; '.join(told)}.", data, layout)
            )
    return figures


def _marked(loaded: Sequence[Contents], name: str) -> str:
    return next((contents.labels[name] for contents in loaded if name in contents.notes), name)


def _marker(
    x: float,
    y: str,
    colour: str,
    above: list[float] | None,
    below: list[float] | None,
    hover: str,
    *,
    size: int = 10,
    symbol: str = "circle",
) -> dict[str, Any]:
    """A point of a row with its bar; ``below`` is None where the bar is as long on both sides."""
    point: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "x": [x],
        "y": [y],
        "marker": {"color": colour, "size": size, "symbol": symbol, "line": {"width": 2, "color": colour}},
        "hovertemplate": hover,
        "showlegend": False,
    }
    if above is not None:
        bar = {"type": "data", "array": above, "symmetric": below is None, "thickness": 2.5, "width": 0}
        point["error_x"] = {**bar, "color": colour} | ({} if below is None else {"arrayminus": below})
    return point


def _rows_layout(rows: int, x: str) -> dict[str, Any]:
    """A row a model, the first on top."""
    return {
        "height": 90 + 34 * rows,
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category", "fixedrange": True},
    }


def _legend_below(layout: dict[str, Any]) -> dict[str, Any]:
    return {**layout, "showlegend": True, "legend": {"orientation": "h", "y": -0.25, "yanchor": "top"}}
