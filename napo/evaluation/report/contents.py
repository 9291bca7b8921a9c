"""What a report is made of: a run's figures, settings, data, machines and examples, as they stand in its folder.

Files of a run may come from anywhere. Records are checked where they are read; of the rest, what does not look as it
was written is left out or refused, and every text is made fit to be shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from napo.data.prompts import build_prompt
from napo.data.styles import shows_candidates
from napo.data.texts import shown
from napo.evaluation.differences import Judged, Pair, pairs
from napo.evaluation.doubts import MARK, doubts
from napo.evaluation.records import (
    check_same_rows,
    read_comparisons,
    read_log,
    read_predictions,
    read_record,
    read_records,
)
from napo.evaluation.report.verdict import sentences
from napo.files import read_json
from napo.recommenders.registry import BASELINES
from napo.runs import Origin, Run
from napo.runs.stamps import seconds_of

EXAMPLES = 60
COUNTED = ("lines", "rows", "records")
"""What a file of the data has, by its format."""
RANKED = 3
"""Of each model's ranking an example shows so many items, the best ones."""


@dataclass
class Contents:
    """One run as a report sees it."""

    run: Run
    name: str
    dataset: str
    origins: dict[str, Origin]
    records: list[dict[str, Any]]
    notes: dict[str, list[str]]
    comparisons: list[dict[str, Any]]
    logs: dict[str, list[dict[str, float]]]
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run) -> Contents:
        path = run.path / "metrics.json"
        if not path.is_file():
            raise ValueError(f"run: {run.path} has no metrics.json; run `{run.command('evaluate')}` first")
        run.check_stamps()
        comparisons = run.kept("comparisons.json")
        records = read_records(run.kept("metrics.json"))
        _check_records(run, path, records)
        meta = run.kept("dataset.json")
        found = read_json(meta) if meta.is_file() else {}
        return cls(
            run=run,
            name=shown(run.path.resolve().name, 80),
            dataset=shown(run.dataset or Path(str(run.config.get("data") or "")).name),
            origins=_origins(run),
            records=records,
            notes=_notes(run, records),
            comparisons=read_comparisons(comparisons) if comparisons.is_file() else [],
            logs={name: _log(run, name) for name in run.model_names()},
            meta=found if isinstance(found, dict) else {},
        )

    @cached_property
    def labels(self) -> dict[str, str]:
        return {r["model"]: f"{r['model']} {MARK}" if r["model"] in self.notes else r["model"] for r in self.records}

    @property
    def seed(self) -> str:
        seeds = {origin.seed for origin in self.origins.values()}
        seeds = seeds or {r["seed"] for r in self.records if r.get("seed") is not None}
        if not seeds and (stamp := self.run.stamp("sasrec")) is not None:
            seeds = {stamp["options"]["seed"]} if "seed" in stamp["options"] else set()
        return ", ".join(shown(seed, 20) for seed in sorted(seeds, key=str)) or "?"

    @cached_property
    def predictions(self) -> dict[str, pd.DataFrame]:
        """Of each model whose predictions are kept and are those of its record."""
        found = {}
        for record in self.records:
            path = self.run.path / "predictions" / f"{record['model']}.parquet"
            if path.is_file():
                found[record["model"]] = read_predictions(self.run.path, record)
        return found

    def stamps(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The finished stages, oldest first."""
        stamps = (self.run.path / "stages").glob("[!.]*.json")
        for path in sorted(stamps, key=lambda path: path.stat().st_mtime):
            if (stamp := self.run.stamp(path.stem)) is not None:
                yield path.stem, stamp


def _check_records(run: Run, path: Path, records: list[dict[str, Any]]) -> None:
    """What the run judged, and nothing else: not changed, and not of another run."""
    for record in records:
        name = record["model"]
        run.check_unchanged(f"evaluate-{name}", f"predictions/{name}.json", f"predictions/{name}.parquet")
        own = run.path / "predictions" / f"{name}.json"
        if own.is_file() and read_record(own) != record:
            raise ValueError(f"{path}: {name}: expected what {own} says; run napo evaluate again")


def _origins(run: Run) -> dict[str, Origin]:
    """Of each trained model; one that does not say how it was made has a note instead."""
    found = {}
    for name in run.model_names():
        with contextlib.suppress(ValueError):
            found[name] = run.origin(name)
    return found


def _log(run: Run, name: str) -> list[dict[str, float]]:
    run.check_unchanged(name, f"models/{name}/log_history.json")
    return training_log(run.path / "models" / name)


def training_log(folder: Path) -> list[dict[str, float]]:
    """The steps that a trainer logged beside its adapter.

    SFT's loss and a preference loss have nothing to do with one another, so they get names of their own.
    """
    log = read_log(folder / "log_history.json")
    if any(key.startswith("rewards/") for entry in log for key in entry):
        return log
    names = {"loss": "sft_loss", "eval_loss": "eval_sft_loss"}
    return [{names.get(key, key): value for key, value in entry.items()} for entry in log]


def _notes(run: Run, records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Why figures of a model are not what its name says, by model."""
    found = {record["model"]: doubts(run, record) for record in records}
    return {name: sentences for name, sentences in found.items() if sentences}


# Verdicts.


@dataclass(frozen=True)
class Verdict:
    """``of``: what it is on, where there are several."""

    of: str
    sentences: list[str]
    pairs: list[Pair]
    names: Sequence[str]
    rows: int = 0


def verdicts(loaded: Sequence[Contents]) -> list[Verdict]:
    """One for all runs, where they judged the same lists; else one a run. Within a run, one for each set of lists."""
    if len(loaded) > 1:
        together = _over_runs(loaded)
        if together is not None:
            return [together]
    return [verdict for contents in loaded for verdict in _of_run(contents, several=len(loaded) > 1)]


def _over_runs(loaded: Sequence[Contents]) -> Verdict | None:
    lists = {record["lists_sha256"] for contents in loaded for record in contents.records}
    shared = [n for n in loaded[0].predictions if all(n in contents.predictions for contents in loaded)]
    if len(lists) != 1 or not shared:
        return None
    check_same_rows([(f"{shared[0]} in {contents.name}", contents.predictions[shared[0]]) for contents in loaded])
    judged = Judged(
        names=shared,
        values=np.stack([np.stack([_hits(contents, name) for name in shared]) for contents in loaded]),
        users=loaded[0].predictions[shared[0]]["user"].to_numpy(),
    )
    told = _told(judged, loaded)
    partly = {record["model"] for contents in loaded for record in contents.records} - set(shared)
    if partly:
        told.sentences.append(f"Left out, because not every run has them: {', '.join(sorted(partly))}.")
    return told


def _of_run(contents: Contents, *, several: bool) -> list[Verdict]:
    groups: dict[str, list[str]] = {}
    for record in contents.records:
        if record["model"] in contents.predictions:
            groups.setdefault(record["lists_sha256"], []).append(record["model"])
    made = []
    for sha256, names in groups.items():
        parts = [contents.name] if several else []
        parts += [f"lists {sha256[:6]}"] if len(groups) > 1 else []
        check_same_rows([(name, contents.predictions[name]) for name in names])
        judged = Judged(
            names=names,
            values=np.stack([_hits(contents, name) for name in names])[None],
            users=contents.predictions[names[0]]["user"].to_numpy(),
        )
        made.append(_told(judged, [contents], of=", ".join(parts)))
    missing = [record["model"] for record in contents.records if record["model"] not in contents.predictions]
    if missing:
        line = f"Not compared, because their predictions are not in the run: {', '.join(missing)}."
        made = made or [Verdict(contents.name if several else "", [], [], [])]
        made[-1].sentences.append(line)
    return made


def _told(judged: Judged, loaded: Sequence[Contents], of: str = "") -> Verdict:
    parents = {name: origin.parent for contents in loaded for name, origin in contents.origins.items()}
    found = pairs(judged)
    told = sentences(judged, found, baselines=BASELINES, parents=parents)
    records = [record for contents in loaded for record in contents.records if record["model"] in judged.names]
    splits = {str(record["protocol"].get("split", "test")) for record in records}
    if splits == {"val"}:
        told.append("These are validation rows, on which settings may have been chosen: judge on test rows in the end.")
    if any(contents.notes.keys() & set(judged.names) for contents in loaded):
        told.append(f"Some of these figures are not what their names say: see the notes marked {MARK}.")
    return Verdict(of, told, found, judged.names, judged.values.shape[2])


def _hits(contents: Contents, name: str) -> np.ndarray:
    return (contents.predictions[name]["rank"] == 1).to_numpy(dtype=float)


# Settings, data and machines.


def settings_rows(contents: Contents) -> list[list[str]]:
    """Of each trained model: from what it was made and with which options."""
    rows = []
    seconds = {name: seconds_of(stamp) for name, stamp in contents.stamps()}
    stamps = dict(contents.stamps())
    if "sasrec" in stamps:
        options = stamps["sasrec"]["options"]
        own = options.get("options")
        rows.append(["sasrec", "-", "-", shown(options.get("seed"), 20), seconds["sasrec"], _options(own)])
    for name, origin in contents.origins.items():
        told = f"{origin.style}, {origin.history} titles, over the {origin.normalise}"
        made_from = origin.parent or shown(Path(origin.model).name, 80)
        rows.append([name, made_from, told, str(origin.seed), seconds.get(name, "-")])
        rows[-1].append(_options(origin.options) + _ended_earlier(contents.run, name))
    return rows


def _options(options: object) -> str:
    if not isinstance(options, Mapping) or not options:
        return "defaults"
    return shown(", ".join(f"{key}={value}" for key, value in options.items()), 600)


def _ended_earlier(run: Run, name: str) -> str:
    """What the options do not tell: that time or patience ended a training before its steps were done."""
    path = run.path / "models" / name / "steps.json"
    if not path.is_file():
        return ""
    run.check_unchanged(name, f"models/{name}/steps.json")
    found = read_json(path)
    done, planned = (found.get("done"), found.get("planned")) if isinstance(found, dict) else (None, None)
    if not isinstance(done, int) or not isinstance(planned, int):
        raise ValueError(
            f'{path}: expected {{"done": steps, "planned": steps}}, got {shown(found, 80)}; delete it and train again'
        )
    return f"; ended after step {done:,} of {planned:,}" if done < planned else ""


def data_lines(contents: Contents) -> list[str]:
    """What the data is and what each step of preparing it dropped."""
    from napo.data.prepare import summary

    meta = contents.meta
    if not meta:
        return ["not known: the run has no dataset.json"]
    try:
        counts = meta["counts"]
        lines = [f"source: {meta['source']}"]
        if "interactions" in counts:
            lines.append(
                f"kept: {counts['users']} users, {counts['items']} items, {counts['interactions']} interactions"
            )
        lines.append("rows: " + ", ".join(f"{number} {split}" for split, number in counts["rows"].items()))
        lines += summary(meta)
        for file in meta.get("files", []):
            noun = next((noun for noun in COUNTED if noun in file), COUNTED[0])
            bad = f", {file[f'bad_{noun}']} bad {noun}" if f"bad_{noun}" in file else ""
            lines.append(f"file {file['name']}: {file.get(noun, '?')} {noun}{bad}, sha256 {file['sha256'][:16]}...")
        lines.append("options: " + ", ".join(f"{key}={value}" for key, value in meta["options"].items()))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{contents.run.path / 'dataset.json'}: not what napo prepare writes ({type(error).__name__}: {error}); "
            "copy it again from the prepared data"
        ) from None
    return [shown(line, 500) for line in lines]


def machine_lines(contents: Contents) -> list[str]:
    """Each machine with its versions once, and the stages that ran on it."""
    machines: dict[str, list[str]] = {}
    for name, stamp in contents.stamps():
        found = stamp.get("machine")
        machines.setdefault(_machine(found) if isinstance(found, Mapping) else "", []).append(shown(name, 120))
    unknown = machines.pop("", [])
    lines = [f"{', '.join(stages)}: {machine}" for machine, stages in machines.items()]
    if unknown:
        lines.append(f"{', '.join(unknown)}: not recorded, made with an older napo")
    return lines


def _machine(found: Mapping[str, Any]) -> str:
    rest = dict(found)
    parts = [f"{rest.pop('cpu', 'unknown CPU')}, {rest.pop('cores', '?')} cores"]
    if (memory := rest.pop("memory_gib", None)) is not None:
        parts.append(f"{memory} GiB")
    if isinstance(gpus := rest.pop("gpus", None), list):
        parts += map(str, gpus)
    rest.pop("threads", None)  # differs from stage to stage, where torch was not needed
    return shown(", ".join([*parts, *(f"{key} {value}" for key, value in rest.items())]), 600)


# Examples.


@dataclass(frozen=True)
class Answer:
    """What one model made of an example."""

    model: str
    rank: int
    best: list[tuple[str, bool]]  # title, whether it is the right one
    said: str | None  # the free answer, where one was generated


@dataclass(frozen=True)
class Example:
    """One held-out row."""

    row: int
    history: list[str]
    next: str
    answers: list[Answer]
    prompts: list[tuple[str, str]]  # the models that were given it, the prompt

    @property
    def right(self) -> str:
        """The models that were, with blanks between."""
        return " ".join(answer.model for answer in self.answers if answer.rank == 1)

    @property
    def said(self) -> bool:
        return any(answer.said is not None for answer in self.answers)


def examples(contents: Contents) -> list[Example]:
    """Rows at even distances, whoever was right: what the user saw last, what came next, what the models made of it."""
    frames = contents.predictions
    path = contents.run.kept("items.parquet")
    if not frames or not path.is_file():
        return []
    titles = pd.read_parquet(path).set_index("item_id")["title"]
    lists = {record["model"]: record["lists_sha256"] for record in contents.records}
    first = next(iter(frames))
    frames = {name: frame for name, frame in frames.items() if lists[name] == lists[first]}
    rows = np.unique(np.linspace(0, len(frames[first]) - 1, EXAMPLES).astype(int))
    noun = contents.meta.get("noun", "Items")
    try:
        return [_example(contents, frames, titles, int(row), str(noun)) for row in rows]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{contents.run.path / 'predictions'}: expected items of items.parquet ({type(error).__name__}: {error}); "
            "run napo evaluate again"
        ) from None


def prompt_note(contents: Contents) -> str | None:
    """Where prompts showed more of a history than the run keeps."""
    frames = [frame for frame in contents.predictions.values() if "history" in frame]
    kept = max((len(history) for frame in frames for history in frame["history"]), default=0)
    longer = [name for name, origin in contents.origins.items() if origin.history > kept]
    if not longer or not kept:
        return None
    return f"Of each history the run keeps the last {kept} titles; {', '.join(longer)} may have been shown more of it."


def _example(contents: Contents, frames: Mapping[str, pd.DataFrame], titles: pd.Series, row: int, noun: str) -> Example:
    reference = next(iter(frames.values())).iloc[row]
    target = int(reference["next"])
    answers: list[Answer] = []
    prompts: dict[str, list[str]] = {}
    for name, frame in frames.items():
        line = frame.iloc[row]
        best = [int(line["recommended"])]
        if "candidates" in frame and "scores" in frame:
            order = np.argsort(-np.asarray(line["scores"]), kind="stable")[:RANKED]
            best = [int(item) for item in np.asarray(line["candidates"])[order]]
        said = line.get("answer")
        answers.append(
            Answer(
                model=name,
                rank=int(line["rank"]),
                best=[(shown(titles[item]), item == target) for item in best],
                said=shown(said) if isinstance(said, str) else None,
            )
        )
        if (origin := contents.origins.get(name)) is not None:
            prompts.setdefault(_prompt(origin, line, titles, noun), []).append(name)
    return Example(
        row=int(reference["row"]),
        history=[shown(titles[int(item)]) for item in reference["history"][-5:]],
        next=shown(titles[target]),
        answers=answers,
        prompts=[(", ".join(names), prompt) for prompt, names in prompts.items()],
    )


def _prompt(origin: Origin, line: pd.Series, titles: pd.Series, noun: str) -> str:
    watched = [shown(titles[int(item)]) for item in line["history"][-origin.history :]]
    listed = None
    if shows_candidates(origin.prompt.style):
        if "candidates" not in line:
            return ""
        listed = [shown(titles[int(item)]) for item in line["candidates"]]
    return build_prompt(origin.prompt.style, watched, listed, noun=noun)
