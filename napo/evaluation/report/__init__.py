"""The report of one run, or of several side by side: ``report.html`` (one file that needs no other) and ``report.md``.

Its figures are Plotly's. Plotly comes to Python as one wheel without compiled parts that has the JavaScript in it;
Vega's comes only within a compiled package of 30 MB. The price is 4.8 MB in each page. A page loads nothing: it may be
mailed, and it opens without a network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napo.data.texts import shown
from napo.evaluation.doubts import MARK
from napo.evaluation.report import figures, tables
from napo.evaluation.report.contents import (
    Contents,
    data_lines,
    examples,
    machine_lines,
    prompt_note,
    training_log,
    verdicts,
)
from napo.extras import require
from napo.files import write_text
from napo.runs import Run

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["report", "table_text", "training_log"]


def report(runs: Sequence[Run], out: Path) -> Path:
    """Write ``out`` (.html or .md); returns it."""
    if out.suffix not in (".html", ".md"):
        raise ValueError(f"out: expected a name that ends in .html or .md; got {out}")
    require("report")
    loaded = [Contents.of(run) for run in runs]
    names = [contents.name for contents in loaded]
    for contents in loaded:
        if names.count(contents.name) > 1:  # of seed-0/run and seed-1/run the last part tells nothing
            contents.name = shown(contents.run.path)
    text = _html(loaded) if out.suffix == ".html" else _markdown(loaded)
    write_text(Path(os.path.realpath(out)), text)  # a link stays one
    return out


def table_text(run: Run) -> str:
    """Verdict, final table and paired differences, for a terminal."""
    contents = Contents.of(run)
    parts = []
    for verdict in verdicts([contents]):
        parts += [f"{verdict.of}: {line}" if verdict.of else line for line in verdict.sentences]
    parts += ["", tables.as_text(tables.figures([contents], tables.FIGURES))]
    if contents.comparisons:
        parts.append("Paired differences in HR@1 (95% interval, users resampled):")
        width = max(len(f"{pair['model']} - {pair['other']}") for pair in contents.comparisons)
        parts += [
            f"  {pair['model'] + ' - ' + pair['other']:<{width}}  {pair['hr@1_difference']:+.3f} "
            f"{tables.cell(pair['hr@1_difference_ci'], sign=True)}"
            for pair in contents.comparisons
        ]
    return "\n".join([*parts, *_note_lines([contents])])


def _html(loaded: list[Contents]) -> str:
    from plotly.offline import get_plotlyjs

    found = verdicts(loaded)
    hit_rates, buckets, bias = figures.hit_rates(loaded), figures.buckets(loaded), figures.bias(loaded)
    curves = [(c.name, figures.curves(i, {n: log for n, log in c.logs.items() if log})) for i, c in enumerate(loaded)]
    forests = [figures.forest(number, v.pairs, v.names) for number, v in enumerate(found) if v.pairs]
    return (
        _environment(autoescape=True)
        .get_template("report.html.j2")
        .render(
            **_common(loaded),
            verdicts=found,
            plotly=get_plotlyjs(),
            hit_rates=hit_rates,
            forests=forests,
            differences=[(v.of, tables.differences(v.pairs, v.rows)) for v in found if v.pairs],
            curves=curves,
            bias_figures=bias,
            buckets=buckets,
            plotted=[
                asdict(one) for one in [hit_rates, *forests, *bias, buckets, *(f for _, of in curves for f in of)]
            ],
            examples=[(contents, examples(contents), prompt_note(contents)) for contents in loaded],
        )
    )


def _markdown(loaded: list[Contents]) -> str:
    text = (
        _environment(autoescape=False)
        .get_template("report.md.j2")
        .render(**_common(loaded), verdicts=verdicts(loaded), comparisons=tables.comparisons(loaded))
    )
    return text.strip() + "\n"


def _common(loaded: list[Contents]) -> dict[str, Any]:
    return {
        "loaded": loaded,
        "several": len(loaded) > 1,
        "title": ", ".join(contents.name for contents in loaded),
        "subtitle": _subtitle(loaded),
        "ranking": tables.figures(loaded, tables.FIGURES),
        "bias": tables.figures(loaded, tables.BIAS),
        "seeds": tables.seeds(loaded) if len(loaded) > 1 else None,
        "settings": tables.settings(loaded),
        "stages": tables.stages(loaded),
        "notes": _note_lines(loaded),
        "protocols": _protocols(loaded),
        "data_lines": data_lines,
        "machine_lines": machine_lines,
        "MARK": MARK,
    }


def _environment(*, autoescape: bool) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("napo.evaluation.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"markdown": tables.as_markdown, "plain": tables.plain}
    return environment


def _note_lines(loaded: list[Contents]) -> list[str]:
    """Explains marked rows, and that rows of different lists do not compare."""
    notes = [note for contents in loaded for of_model in contents.notes.values() for note in of_model]
    lines = [f"{MARK} {note}" for note in dict.fromkeys(notes)]  # a combination has those of its language model
    if len({record["lists_sha256"] for contents in loaded for record in contents.records}) > 1:
        lines.append("Rows of different lists were judged on other users or candidates: their figures do not compare.")
    rules: dict[str, list[str]] = {}
    for record in (record for contents in loaded for record in contents.records):
        rule, of, _ = str(record["protocol"].get("score")).partition(" of the title's token log-probabilities")
        if of and record["model"] not in rules.setdefault(rule, []):
            rules[rule].append(record["model"])
    if len(rules) > 1:
        told = "; ".join(f"{shown(rule, 20)} by {', '.join(names)}" for rule, names in rules.items())
        lines.append(
            f"Titles were scored in several ways ({told}): a difference may be one of --score, not of the models."
        )
    return lines


def _subtitle(loaded: list[Contents]) -> str:
    records = [record for contents in loaded for record in contents.records]
    bases = (shown(Path(origin.model).name, 80) for c in loaded for origin in c.origins.values())
    parts = [
        _listed(contents.dataset for contents in loaded),
        _listed(bases),
        _listed(f"{record['n']} rows of {record['users']} held-out users" for record in records),
        _listed(f"{record['protocol']['candidates']} candidates" for record in records),
        f"seed {loaded[0].seed}" if len(loaded) == 1 else f"{len(loaded)} runs",
    ]
    return " · ".join(part for part in parts if part)


def _listed(words: Iterable[str]) -> str:
    """Each once."""
    return ", ".join(dict.fromkeys(filter(None, words)))


def _protocols(loaded: list[Contents]) -> list[str]:
    """How each figure was made: one line for every distinct protocol."""
    lines: dict[str, list[str]] = {}
    for contents in loaded:
        for record in contents.records:
            words = shown("; ".join(f"{key}: {value}" for key, value in record["protocol"].items()), 1000)
            lines.setdefault(words, [])
            if record["model"] not in lines[words]:
                lines[words].append(record["model"])
    lists = ", ".join(sorted({record["lists_sha256"][:16] for contents in loaded for record in contents.records}))
    return [*(f"{', '.join(names)}: {words}" for words, names in lines.items()), f"lists: sha256 {lists}…"]
