"""The report's tables: a header and rows of text, which each format draws in its way."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from napo.evaluation.differences import Pair
from napo.evaluation.doubts import MARK
from napo.evaluation.report.contents import Contents, settings_rows
from napo.runs.stamps import seconds_of

FIGURES = {
    "n": "n",
    "hr@1": "HR@1",
    "hr@1_ci": "95% interval",
    "mrr": "MRR",
    "ndcg@5": "NDCG@5",
    "ndcg@10": "NDCG@10",
    "hr@1_greedy": "HR@1 greedy",
    "valid_ratio": "valid",
    "hr@1_trie": "HR@1 trie",
}
BIAS = {
    "n": "n",
    "arp": "ARP",
    "log_popularity_gap": "log-pop. gap",
    "gini": "Gini",
    "coverage": "coverage",
    "tail_share": "tail",
    "top3_share": "top 3",
    "unique_ratio": "unique/total",
}


@dataclass(frozen=True)
class Table:
    """``text``: so many columns at the left are words, the others numbers."""

    header: list[str]
    rows: list[list[str]]
    text: int = 1

    def __bool__(self) -> bool:
        return bool(self.rows)


def figures(loaded: Sequence[Contents], columns: Mapping[str, str]) -> Table:
    """A row for each model of each run."""
    records = [record for contents in loaded for record in contents.records]
    keys = [key for key in columns if any(key in record for record in records)]
    several = len(loaded) > 1
    several_lists = len({record["lists_sha256"] for record in records}) > 1
    header = [*(["run"] if several else []), "model", *(["lists"] if several_lists else [])]
    rows = []
    for contents in loaded:
        for record in contents.records:
            lead = [contents.name] if several else []
            lead += [contents.labels[record["model"]]]
            lead += [record["lists_sha256"][:6]] if several_lists else []
            rows.append([*lead, *(cell(record.get(key)) for key in keys)])
    return Table([*header, *(columns[key] for key in keys)], rows, text=len(header))


def comparisons(loaded: Sequence[Contents]) -> Table:
    """What each trained model gained over those before it, as ``comparisons.json`` has it."""
    several = len(loaded) > 1
    header = [*(["run"] if several else []), "model", "against", "n", "HR@1", "95% interval", "MRR", "95% interval"]
    rows = []
    for contents in loaded:
        for pair in contents.comparisons:
            cells = [contents.name] if several else []
            cells += [contents.labels.get(pair[name], pair[name]) for name in ("model", "other")]
            cells.append(cell(pair.get("n")))
            for key in ("hr@1", "mrr"):
                cells += [f"{pair[f'{key}_difference']:+.3f}", cell(pair[f"{key}_difference_ci"], sign=True)]
            rows.append(cells)
    return Table(header, rows, text=3 if several else 2)


def differences(pairs: Iterable[Pair], n: int) -> Table:
    """Every two models of a verdict."""
    rows = [
        [
            pair.model,
            pair.other,
            str(n),
            f"{pair.difference:+.3f}",
            cell((pair.low, pair.high), sign=True),
            "yes" if pair.apart else "no",
        ]
        for pair in pairs
    ]
    return Table(["model", "less", "n", "HR@1", "95% interval", "told apart"], rows, text=2)


def seeds(loaded: Sequence[Contents]) -> Table:
    """HR@1 of each model: mean and standard deviation over the runs, and each run."""
    names = list(dict.fromkeys(record["model"] for contents in loaded for record in contents.records))
    header = ["model", "runs", "mean", "sd", *(f"{contents.name} (seed {contents.seed})" for contents in loaded)]
    rows = []
    for name in names:
        values = [next((r["hr@1"] for r in contents.records if r["model"] == name), None) for contents in loaded]
        known = [value for value in values if value is not None]
        spread = statistics.stdev(known) if len(known) > 1 else None
        mark = any(name in contents.notes for contents in loaded)
        lead = [f"{name} {MARK}" if mark else name, str(len(known)), cell(statistics.fmean(known)), cell(spread)]
        rows.append([*lead, *map(cell, values)])
    return Table(header, rows)


def settings(loaded: Sequence[Contents]) -> Table:
    several = len(loaded) > 1
    header = ["model", "made from", "prompt", "seed", "seconds", "options"]
    rows = [[*([contents.name] if several else []), *row] for contents in loaded for row in settings_rows(contents)]
    return Table([*(["run"] if several else []), *header], rows, text=len(header) + several)


def stages(loaded: Sequence[Contents]) -> Table:
    several = len(loaded) > 1
    rows = [
        [*([contents.name] if several else []), name, seconds_of(stamp)]
        for contents in loaded
        for name, stamp in ((shown_name(name), stamp) for name, stamp in contents.stamps())
    ]
    return Table([*(["run"] if several else []), "stage", "seconds"], rows, text=1 + several)


def shown_name(name: str) -> str:
    from napo.data.texts import shown

    return shown(name, 120)


def cell(value: Any, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(f"{v:+.3f}" if sign else f"{v:.3f}" for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def as_text(table: Table) -> str:
    """For a terminal."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if place == 0 else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def as_markdown(table: Table) -> str:
    rule = [":--" if place < table.text else "--:" for place in range(len(table.header))]
    lines = [[plain(text) for text in line] for line in [table.header, *table.rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def plain(text: str) -> str:
    """Text from files, so that Markdown takes nothing of it for markup."""
    return re.sub(r"([\\`*_{}<>|\[\]])", r"\\\1", text)
