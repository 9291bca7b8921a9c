"""The report of one run, or of several side by side: ``report.html`` (self-contained) and ``report.md``."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from napo.data.texts import shown
from napo.evaluation.records import read_comparisons, read_log, read_predictions, read_records
from napo.files import write_text
from napo.runs import Run

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
    "arp": "ARP",
    "log_popularity_gap": "log-pop. gap",
    "gini": "Gini",
    "coverage": "coverage",
    "tail_share": "tail",
    "top3_share": "top 3",
    "unique_ratio": "unique/total",
}
PANELS = {
    "SFT loss": ("sft_loss", "eval_sft_loss"),
    "Preference loss": ("loss", "eval_loss"),
    "Margin (gamma)": ("gamma",),
    "Reward margin": ("rewards/margins", "eval_rewards/margins"),
    "Preference accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "Validation HR@1": ("eval_hr@1",),
}
EXAMPLES = 6
MARK = "†"
"""Behind the name of a model whose figures need a note."""
CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; color: #1c1e21; background: #fff;
       max-width: 920px; margin: 2.5em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; margin-bottom: .1em; } h2 { font-size: 1.15em; margin: 2em 0 .5em; }
p.sub { color: #666; margin-top: 0; } p.note { color: #666; font-size: .9em; }
table { border-collapse: collapse; font-size: .88em; font-variant-numeric: tabular-nums; margin: .6em 0; }
th, td { padding: .32em .7em; text-align: right; border-bottom: 1px solid #e8e8e8; white-space: nowrap; }
th { color: #555; font-weight: 600; border-bottom-color: #bbb; }
td.text, th.text { text-align: left; white-space: normal; }
tr.best td { font-weight: 600; }
div.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
.right { color: #1f6f4a; font-weight: 600; } code { font-size: .92em; }
"""


def report(runs: Sequence[Run], out: Path) -> Path:
    """Write ``out`` (.html or .md); returns it."""
    if out.suffix not in (".html", ".md"):
        raise ValueError(f"out: expected a name that ends in .html or .md; got {out}")
    loaded = [_load(run) for run in runs]
    write_text(out, _html(loaded) if out.suffix == ".html" else _markdown(loaded))
    return out


def table_text(run: Run) -> str:
    """The final table and paired differences, for a terminal."""
    loaded = _load(run)
    parts = [_plain_table(*_metrics_table([loaded], FIGURES))]
    if loaded["comparisons"]:
        parts.append("Paired differences in HR@1 (95% interval, users resampled):")
        parts += [f"  {line}" for line in _difference_lines(loaded)]
    parts += _note_lines([loaded])
    return "\n".join(parts)


def training_log(folder: Path) -> list[dict[str, float]]:
    """The steps that a trainer logged beside its adapter.

    SFT's loss and a preference loss have nothing to do with one another, so they get names of their own.
    """
    log = read_log(folder / "log_history.json")
    if any(key.startswith("rewards/") for entry in log for key in entry):
        return log
    names = {"loss": "sft_loss", "eval_loss": "eval_sft_loss"}
    return [{names.get(key, key): value for key, value in entry.items()} for entry in log]


def _load(run: Run) -> dict[str, Any]:
    path = run.path / "metrics.json"
    if not path.is_file():
        raise ValueError(f"run: {run.path} has no metrics.json; run `napo evaluate` first")
    comparisons = run.path / "comparisons.json"
    records = read_records(path)
    notes = _notes(run, records)
    return {
        "run": run,
        "name": shown(run.path.resolve().name, 80),
        "dataset": shown(run.config.get("dataset", "")),
        "origin": run.first_origin,
        "records": records,
        "notes": notes,
        "labels": {r["model"]: f"{r['model']} {MARK}" if r["model"] in notes else r["model"] for r in records},
        "comparisons": read_comparisons(comparisons) if comparisons.is_file() else [],
        "logs": {name: training_log(run.path / "models" / name) for name in run.model_names()},
    }


def _notes(run: Run, records: list[dict[str, Any]]) -> dict[str, str]:
    """Why figures of a model are not what its name says, by model."""
    from napo.evaluation.evaluate import weights_sha256

    notes = {}
    for record in records:
        name = record["model"]
        why = []
        if (model := name.split("+")[0]) in run.model_names():
            why.append(run.stale(model))
        if (judged := record.get("weights_sha256")) is not None and weights_sha256(run, name) != judged:
            why.append(f"{name}: trained again, or removed, after it was evaluated")
        if (data := record["protocol"].get("data")) is not None:
            why.append(f"{name}: judged on data that is {data}")
        if any(why):
            notes[name] = shown("; ".join(filter(None, why)), 400)
    return notes


# Tables: a header and rows of text, which each format draws in its way.


def _metrics_table(loaded: list[dict[str, Any]], columns: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    records = [record for run in loaded for record in run["records"]]
    keys = [key for key in columns if any(key in record for record in records)]
    several_lists = len({record["lists_sha256"] for record in records}) > 1
    header = [*(["run"] if len(loaded) > 1 else []), "model"]
    header += [*(["lists"] if several_lists else []), *(columns[key] for key in keys)]
    rows = []
    for run in loaded:
        for record in run["records"]:
            lead = [run["name"]] if len(loaded) > 1 else []
            lead += [run["labels"][record["model"]]]
            lead += [record["lists_sha256"][:6]] if several_lists else []
            rows.append([*lead, *(_cell(record.get(key)) for key in keys)])
    return header, rows


def _differences_table(loaded: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = [*(["run"] if len(loaded) > 1 else []), "model", "against", "HR@1", "95% interval", "MRR", "95% interval"]
    rows = []
    for run in loaded:
        for pair in run["comparisons"]:
            cells = [run["name"]] if len(loaded) > 1 else []
            cells += [run["labels"].get(pair[name], pair[name]) for name in ("model", "other")]
            for key in ("hr@1", "mrr"):
                cells += [f"{pair[f'{key}_difference']:+.3f}", _cell(pair[f"{key}_difference_ci"], sign=True)]
            rows.append(cells)
    return header, rows


def _seeds_table(loaded: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """HR@1 of each model in each run, and their mean."""
    names = list(dict.fromkeys(record["model"] for run in loaded for record in run["records"]))
    header = [
        "model",
        *(f"{run['name']} (seed {run['origin'].seed if run['origin'] else '?'})" for run in loaded),
        "mean",
    ]
    rows = []
    for name in names:
        values = [next((r["hr@1"] for r in run["records"] if r["model"] == name), None) for run in loaded]
        known = [value for value in values if value is not None]
        rows.append([name, *(_cell(value) for value in values), _cell(sum(known) / len(known))])
    return header, rows


def _difference_lines(run: dict[str, Any]) -> list[str]:
    width = max(len(f"{p['model']} - {p['other']}") for p in run["comparisons"])
    return [
        f"{pair['model'] + ' - ' + pair['other']:<{width}}  {pair['hr@1_difference']:+.3f} "
        f"{_cell(pair['hr@1_difference_ci'], sign=True)}"
        for pair in run["comparisons"]
    ]


def _note_lines(loaded: list[dict[str, Any]]) -> list[str]:
    """What marked rows mean, and that rows of different lists do not compare."""
    lines = [f"{MARK} {note}" for run in loaded for note in run["notes"].values()]
    if len({record["lists_sha256"] for run in loaded for record in run["records"]}) > 1:
        lines.append("Rows of different lists were judged on other users or candidates: their figures do not compare.")
    return lines


def _cell(value: Any, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(f"{v:+.3f}" if sign else f"{v:.3f}" for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def _plain_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    )


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, [":--", *(["--:"] * (len(header) - 1))], *rows]
    rule = lines.pop(1)
    rows_of_text = [[_plain(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [rows_of_text[0], rule, *rows_of_text[1:]])


def _plain(text: str) -> str:
    """Text from files, so that Markdown takes nothing of it for markup."""
    return re.sub(r"([\\`*_{}<>|\[\]])", r"\\\1", text)


def _html_table(header: list[str], rows: list[list[str]], *, text_columns: int = 1) -> str:
    def line(cells: list[str], tag: str) -> str:
        kind = [' class="text"' if i < text_columns else "" for i in range(len(cells))]
        return (
            "<tr>" + "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for c, k in zip(cells, kind, strict=True)) + "</tr>"
        )

    return f'<div class="wide"><table>{line(header, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


# The two formats.


def _subtitle(loaded: list[dict[str, Any]]) -> str:
    first = loaded[0]
    record, origin = first["records"][0], first["origin"]
    parts = [
        first["dataset"],
        Path(origin.model).name if origin else "",
        f"{record['n']} rows of {record['users']} held-out users",
        f"{record['protocol']['candidates']} candidates",
        f"seed {origin.seed}" if len(loaded) == 1 and origin else "",
    ]
    return " · ".join(part for part in parts if part)


def _protocols(loaded: list[dict[str, Any]]) -> list[str]:
    """How each figure was made, a line for every distinct protocol."""
    lines: dict[str, list[str]] = {}
    for run in loaded:
        for record in run["records"]:
            words = shown("; ".join(f"{key}: {value}" for key, value in record["protocol"].items()), 1000)
            lines.setdefault(words, [])
            if record["model"] not in lines[words]:
                lines[words].append(record["model"])
    return [f"{', '.join(models)}: {words}" for words, models in lines.items()]


def _stages_table(loaded: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for run in loaded:
        stamps = sorted((run["run"].path / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime)
        stages = [(path.stem, run["run"].stamp(path.stem)) for path in stamps]
        rows += [[run["name"], shown(name), f"{stamp['seconds']:.0f}"] for name, stamp in stages if stamp is not None]
    return ["run", "stage", "seconds"], rows


def _examples(run: dict[str, Any]) -> list[dict[str, Any]]:
    """A few rows: what the user saw last, what was next, and what the models put first."""
    folder = run["run"].path
    titles = run["run"].catalogue().titles
    frames = {}
    for record in run["records"]:
        if (folder / "predictions" / f"{record['model']}.parquet").is_file():
            frames[record["model"]] = read_predictions(folder, record, len(titles))
    if not frames:
        return []
    last = next(reversed(frames.values()))
    step = max(1, len(last) // EXAMPLES)
    examples = []
    for row in range(0, len(last), step)[:EXAMPLES]:
        best = {name: int(f["recommended"].iloc[row]) for name, f in frames.items() if len(f) == len(last)}
        target = int(last["next"].iloc[row])
        examples.append(
            {
                "history": [titles[i] for i in last["history"].iloc[row][-4:]],
                "next": titles[target],
                "best": {name: (titles[item], item == target) for name, item in best.items()},
            }
        )
    return examples


def _html(loaded: list[dict[str, Any]]) -> str:
    from napo.evaluation import plots

    records = [record for run in loaded for record in run["records"]]
    several = len(loaded) > 1
    labels = [
        f"{run['name']}: {run['labels'][r['model']]}" if several else run["labels"][r["model"]]
        for run in loaded
        for r in run["records"]
    ]
    body = [f"<h1>napo: {html.escape(', '.join(run['name'] for run in loaded))}</h1>"]
    body.append(f'<p class="sub">{html.escape(_subtitle(loaded))}</p>')
    if several:
        body += ["<h2>HR@1 by run</h2>", _html_table(*_seeds_table(loaded))]
    body += ["<h2>Ranking</h2>", plots.hit_rates(records, labels)]
    body.append(_html_table(*_metrics_table(loaded, FIGURES), text_columns=2 if several else 1))
    body += [f'<p class="note">{html.escape(line)}</p>' for line in _note_lines(loaded)]
    differences = _differences_table(loaded)
    if differences[1]:
        body += ["<h2>Paired differences</h2>", _html_table(*differences, text_columns=3 if several else 2)]
        body.append('<p class="note">Same lists, row by row; intervals resample users with all their rows.</p>')
    for run in loaded:
        figure = plots.curves({name: log for name, log in run["logs"].items() if log}, PANELS)
        if figure:
            body += [_heading("Training", run, several), figure]
    body += ["<h2>Popularity and diversity</h2>", plots.popularity(records, labels)]
    body.append(_html_table(*_metrics_table(loaded, BIAS), text_columns=2 if several else 1))
    body.append(
        '<p class="note">Of the first recommendation in each list. ARP: mean training interactions of what is '
        "recommended; gap: its log popularity less that of the user's history; tail: share outside the most popular "
        "20% of the catalogue; head, middle and tail items hold a third of the training interactions each.</p>"
    )
    for run in loaded:
        examples = _examples(run)
        if examples:
            body += [_heading("Examples", run, several), _examples_html(examples)]
    body += ["<h2>How it was measured</h2>", "<ul>"]
    body += [f"<li>{html.escape(line)}</li>" for line in _protocols(loaded)]
    lists = ", ".join(sorted({record["lists_sha256"][:16] for record in records}))
    body += [f"<li>lists: sha256 <code>{html.escape(lists)}…</code></li>", "</ul>"]
    stages = _stages_table(loaded)
    if stages[1]:
        body += ["<h2>Time</h2>", _html_table(*stages, text_columns=2)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>napo report</title>'
        f'<meta name="viewport" content="width=device-width"><style>{CSS}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _heading(text: str, run: dict[str, Any], several: bool) -> str:
    return f"<h2>{text}{': ' + html.escape(run['name']) if several else ''}</h2>"


def _examples_html(examples: list[dict[str, Any]]) -> str:
    names = list(examples[0]["best"])
    head = "".join(f'<th class="text">{html.escape(name)}</th>' for name in ["history (last 4)", "next", *names])
    rows = []
    for example in examples:
        cells = ["<br>".join(html.escape(t) for t in example["history"]), html.escape(example["next"])]
        for title, right in example["best"].values():
            cells.append(f'<span class="right">{html.escape(title)} ✓</span>' if right else html.escape(title))
        rows.append("<tr>" + "".join(f'<td class="text">{cell}</td>' for cell in cells) + "</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _markdown(loaded: list[dict[str, Any]]) -> str:
    several = len(loaded) > 1
    parts = [f"# napo: {_plain(', '.join(run['name'] for run in loaded))}", _plain(_subtitle(loaded))]
    if several:
        parts += ["## HR@1 by run", _markdown_table(*_seeds_table(loaded))]
    parts += ["## Ranking", _markdown_table(*_metrics_table(loaded, FIGURES))]
    parts += [_plain(line) for line in _note_lines(loaded)]
    differences = _differences_table(loaded)
    if differences[1]:
        parts += ["## Paired differences", _markdown_table(*differences)]
        parts.append("Same lists, row by row; intervals resample users with all their rows.")
    parts += ["## Popularity and diversity", _markdown_table(*_metrics_table(loaded, BIAS))]
    parts += ["## How it was measured", "\n".join(f"- {_plain(line)}" for line in _protocols(loaded))]
    return "\n\n".join(parts) + "\n"
