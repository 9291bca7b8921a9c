"""Evaluation on held-out users: every model ranks the same lists, and every row's rank is kept for paired tests."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from napo.data.prepared import PreparedData
from napo.evaluation import metrics
from napo.evaluation.differences import Judged, pairs
from napo.evaluation.doubts import weights_sha256
from napo.evaluation.held_out import HeldOut
from napo.evaluation.parts import in_parts
from napo.evaluation.records import SCORES, check_not_lost, check_same_rows, read_predictions, read_record
from napo.files import content_hash, text_hash, write_json
from napo.language_models.bases import Bases
from napo.ranks import rank, told
from napo.recommenders.combination import Combination
from napo.recommenders.lower_layers import LowerLayers
from napo.recommenders.protocol import Generator, Recommender, ScoringOptions
from napo.recommenders.registry import BASELINES, available, check_fits, find
from napo.runs import Run

KEPT = 50
"""Of each history the last so many items are kept beside the predictions: as many as a prompt is likely to show."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """How models are judged."""

    split: str = "test"
    """Which rows: ``test``, or ``val`` while tuning."""
    limit: int | None = None
    """So many rows, drawn once and for all (the same for every model, run and seed); null takes all."""
    score: str = "sum"
    """``sum`` of a title's token log-probabilities, or their ``average``, which favours long titles less harshly."""
    greedy: bool = True
    """Also generate greedily; False saves about a third of the time."""
    greedy_limit: int | None = None
    """Generate for the first so many rows alone; null for all."""
    tokens_per_batch: int = 2048
    """Memory against speed."""

    def __post_init__(self) -> None:
        if self.split not in ("val", "test"):
            raise ValueError(f"split: expected val or test; got {self.split!r}")
        if self.score not in SCORES:
            raise ValueError(f"score: expected {' or '.join(SCORES)}; got {self.score!r}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected a positive number of rows; got {self.limit}")


@dataclass(frozen=True)
class Lists:
    """The rows that every model is judged on: n rows of C candidates, the right one among them. Where lists differ in
    length, ``candidates`` is (n,) of arrays."""

    rows: NDArray[np.int64]  # (n,) position in the split
    users: NDArray[np.int64]  # (n,) codes; rows of one user share one
    histories: list[list[int]]  # whole; a model looks at as many as it can
    targets: NDArray[np.int64]  # (n,)
    candidates: NDArray[Any]  # (n, C), or (n,) of arrays
    columns: NDArray[np.int64]  # (n,) where the target stands in its list
    sha256: str

    @property
    def lengths(self) -> NDArray[np.int64]:  # (n,)
        return np.array([len(row) for row in self.candidates], np.int64)

    def by_length(self) -> Iterator[tuple[NDArray[np.int64], list[list[int]], NDArray[np.int64], NDArray[np.int64]]]:
        """Of the lists of each length their rows (g,), histories, candidates (g, C) and columns (g,)."""
        for length in np.unique(self.lengths):
            rows = np.flatnonzero(self.lengths == length)
            candidates = np.stack(list(self.candidates[rows]))
            yield rows, [self.histories[row] for row in rows], candidates, self.columns[rows]

    @classmethod
    def of(cls, data: PreparedData, options: EvaluateOptions) -> Lists:
        held = HeldOut.of(data, options.split, options.limit)
        rows, targets = held.numbers, held.targets
        every = [np.asarray(row, np.int64) for row in held.frame["candidates"]]
        columns = np.zeros(len(rows), np.int64)
        for number, (row, target) in enumerate(zip(every, targets, strict=True)):
            places = np.flatnonzero(row == target)
            if len(places) != 1:
                raise ValueError(
                    f"{options.split}.parquet row {rows[number]}: expected `next` exactly once among its candidates"
                )
            columns[number] = places[0]
        if len({len(row) for row in every}) == 1:
            candidates = np.stack(every)
        else:
            candidates = np.empty(len(every), object)
            candidates[:] = every
        text = json.dumps([targets.tolist(), [row.tolist() for row in every]])
        return cls(
            rows=rows,
            users=held.users,
            histories=held.histories,
            targets=targets,
            candidates=candidates,
            columns=columns,
            sha256=text_hash(text),
        )


@dataclass(frozen=True)
class _Shared:
    """What models leave to those that are judged after them."""

    bases: Bases = field(default_factory=Bases)
    lower: dict[Any, LowerLayers] = field(default_factory=dict)
    """Of models of one base whose prompts are the same."""
    sums: dict[int, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    """By length of the lists the scores of the models so far, for combinations of them."""


def evaluate(
    data: PreparedData,
    run: Run,
    models: Sequence[str],
    options: EvaluateOptions | None = None,
    *,
    foreign_data: bool = False,
    folder: str | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Judge ``models`` and return ``metrics.json``: the records of all models that the run has judged so far.

    A model that was judged before, on the same lists and unchanged since, is not judged again. ``foreign_data`` allows
    other data than the run was made with, whose test rows may have been trained on; the records say so. ``folder``: of
    the run, which gets what is found in place of the run itself, so that validation and test rows have figures side by
    side. ``overwrite``: figures of fewer rows, another split, score or other data may take the place of what is there.
    """
    options = options or EvaluateOptions()
    lists = Lists.of(data, options)
    popularity = data.training_counts()
    # Before anything long begins: is there such a model, is it whole, and are its parts what it was fitted to?
    fingerprints = {name: find(run, name).fingerprint(run) for name in models}
    for name in models:
        check_fits(run, name)
    data_note = check_data(data, run, models, foreign_data)
    if not overwrite:
        places = {name: run.path / _place(folder) / f"{name}.json" for name in models}
        protocol = {"split": options.split, "score": options.score, **data_note}
        n = len(lists.rows)
        generated = len(range(n)[: options.greedy_limit]) if options.greedy else 0
        weights = partial(weights_sha256, run)
        check_not_lost(places, n, protocol, "figures", generated=generated, weights=weights)
    shared = _Shared()
    with run.writing():
        for name in models:
            _judge_stage(data, run, name, fingerprints[name], lists, popularity, options, shared, data_note, folder)
        return told(lambda: collect(run, folder))


def _judge_stage(
    data: PreparedData,
    run: Run,
    name: str,
    fingerprint: str,
    lists: Lists,
    popularity: NDArray[np.int64],
    options: EvaluateOptions,
    shared: _Shared,
    data_note: dict[str, str],
    folder: str | None,
) -> None:
    """``RUN/predictions/NAME.parquet`` and ``.json``, or those of ``folder``"""
    kept, stage = _place(folder), _stage(name, folder)
    base = run.origin(name) if name in run.model_names() else None
    scoring = ScoringOptions(
        average=options.score == "average",
        tokens_per_batch=options.tokens_per_batch,
        # Lists of several lengths are scored in several calls, whose batches have the same numbers.
        lower=shared.lower.setdefault((base.model_identity, base.prompt) if base else name, LowerLayers())
        if lists.candidates.ndim == 2
        else None,
        bases=shared.bases,
    )

    def work(aside: Path) -> None:
        parts = aside / "parts"
        record, predictions = _judge_model(data, run, name, lists, popularity, options, scoring, shared.sums, parts)
        if rank() > 0:
            return
        record["protocol"] |= data_note
        (aside / kept).mkdir(parents=True, exist_ok=True)
        predictions.to_parquet(aside / kept / f"{name}.parquet")
        write_json(aside / kept / f"{name}.json", record)

    run.stage(
        stage,
        work,
        options=asdict(options),
        inputs={
            "model": fingerprint,
            "lists": lists.sha256,
            "train": content_hash(data.path / "train.parquet"),
            **data_note,
        },
        outputs=[f"{kept}/{name}.parquet", f"{kept}/{name}.json"],
        ask=False,  # figures are made again from what is still there
    )


def check_data(data: PreparedData, run: Run, models: Sequence[str], foreign: bool) -> dict[str, str]:
    """Nothing where ``data`` is what the run was made with; else what the records say of it, if it is allowed."""
    known = run.config.get("data_sha256")
    sha256 = content_hash(data.path)
    if known is None or sha256 == known:
        return {}
    if not foreign:
        raise ValueError(
            f"data: {data.path} (sha256 {sha256[:12]}) is not what {run.path} was made with ({known[:12]}, as its "
            "config.json says), so its models may have been trained on these test rows; pass --foreign-data to judge "
            "on it nevertheless"
        )
    own = [name for name in models if {"popularity", "rules", "sasrec"} & {*name.split("+")}]
    if own and data.titles != run.catalogue().titles:
        raise ValueError(
            f"models: {own[0]} knows the items of {run.path} alone, and {data.path} has others; leave it out"
        )
    return {"data": f"not the run's own, but {data.path.name} (sha256 {sha256[:12]})"}


def _place(folder: str | None) -> str:
    """Where in a run predictions are kept."""
    return f"{folder}/predictions" if folder else "predictions"


def _stage(name: str, folder: str | None) -> str:
    """No model's name has an @."""
    return f"evaluate-{name}@{folder}" if folder else f"evaluate-{name}"


def collect(run: Run, folder: str | None = None) -> list[dict[str, Any]]:
    """Write ``metrics.json`` and ``comparisons.json`` from ``predictions/``, all in ``folder`` of the run where one is
    named; returns the records."""
    place, kept = run.path / folder if folder else run.path, _place(folder)
    found = {path.stem: read_record(path) for path in (place / "predictions").glob("[!.]*.json")}
    for name in found:
        run.check_unchanged(_stage(name, folder), f"{kept}/{name}.json", f"{kept}/{name}.parquet")
    run.say_left_out(kept)
    order = list(available(run))
    records = [found[name] for name in sorted(found, key=lambda n: order.index(n) if n in order else len(order))]
    write_json(place / "metrics.json", records)
    write_json(place / "comparisons.json", compare_all(place, records))
    run.note(*(str((place / name).relative_to(run.path)) for name in ("metrics.json", "comparisons.json")))
    return records


def compare_all(place: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paired differences of every tuned model to every model that stands before it, on the same lists. ``place``:
    the folder that has ``predictions/``."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for lists in dict.fromkeys(record["lists_sha256"] for record in records):
        same = [record for record in records if record["lists_sha256"] == lists]
        names = [record["model"] for record in same]
        chosen = [(a, b) for a, name in enumerate(names) if name not in BASELINES for b in range(a)]
        if not chosen:
            continue
        frames = [read_predictions(place, record) for record in same]
        check_same_rows(list(zip(names, frames, strict=True)))
        users, ranks = frames[0]["user"].to_numpy(), np.stack([frame["rank"].to_numpy() for frame in frames])
        for key, values in {"hr@1": (ranks == 1).astype(float), "mrr": 1.0 / ranks}.items():
            for pair in pairs(Judged(names, values[None], users), chosen):
                entry = found.setdefault((pair.model, pair.other), {"model": pair.model, "other": pair.other})
                entry |= {"n": len(users), "users": len(np.unique(users)), f"{key}_difference": pair.difference}
                entry[f"{key}_difference_ci"] = (pair.low, pair.high)
    order = {record["model"]: number for number, record in enumerate(records)}
    return sorted(found.values(), key=lambda entry: order[entry["model"]])


def _seed(run: Run, name: str) -> int | None:
    model = name.split("+")[0]
    origin = run.origin(model) if model in run.model_names() else run.first_origin
    return None if origin is None else origin.seed


def _judge_model(
    data: PreparedData,
    run: Run,
    name: str,
    lists: Lists,
    popularity: NDArray[np.int64],
    options: EvaluateOptions,
    scoring: ScoringOptions,
    sums: dict[int, dict[str, NDArray[np.float64]]],
    parts: Path,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """A model's record for ``metrics.json`` and its prediction for every row. ``parts`` keeps scores meanwhile."""
    began = time.monotonic()
    protocol: dict[str, Any] = {
        "split": options.split,
        "candidates": int(lists.lengths.max()),
        "ties": metrics.TIES,
        "ci": f"95%, percentile bootstrap over {'users' if data.has_users else 'rows: the source tells no users'}",
    }
    if lists.candidates.ndim == 1:
        protocol["lists"] = f"of {lists.lengths.min()} to {lists.lengths.max()} candidates"
    greedy: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    recommender = in_parts(find(run, name).load(run, data, scoring), name, parts)
    n = len(lists.rows)
    scores, ranks, recommended = np.empty(n, object), np.empty(n, np.int64), np.empty(n, np.int64)
    for rows, histories, candidates, places in lists.by_length():
        found = _scores(recommender, name, histories, candidates, sums.setdefault(candidates.shape[1], {}), scoring)
        ranks[rows] = metrics.target_ranks(found, places)
        best = metrics.best_choices(found, places, 1)
        recommended[rows] = np.take_along_axis(candidates, best, 1)[:, 0]
        for row, of_row in zip(rows, found, strict=True):
            scores[row] = of_row
    protocol |= recommender.protocol
    if options.greedy and isinstance(recommender, Generator):
        part = slice(0, options.greedy_limit)
        answers = recommender.answers(lists.histories[part], lists.candidates[part])
        items, protocol["greedy"] = recommender.judge(answers, lists.candidates[part])
        greedy = {
            "hr@1_greedy": float((items == lists.targets[part]).mean()),
            "valid_ratio": float((items >= 0).mean()),
            "n_greedy": len(items),
        }
        named = recommender.greedy_items(lists.histories[part])
        if named is not None:
            greedy["hr@1_trie"] = float((named == lists.targets[part]).mean())
            protocol["greedy"] += "; under the trie of the catalogue every answer is the title of an item"
        silent = len(lists.rows) - len(answers)
        columns = {"answer": [*answers, *[None] * silent], "answer_item": [*items.tolist(), *[-1] * silent]}
    hits = (ranks == 1).astype(float)
    figures = metrics.ranking_figures(ranks)
    record = {
        "model": name,
        "n": len(ranks),
        "users": len(np.unique(lists.users)),
        "seed": _seed(run, name),
        "weights_sha256": weights_sha256(run, name),
        "hr@1": figures.pop("hr@1"),
        "hr@1_ci": metrics.interval(hits, lists.users),
        "hr@1_per_user": metrics.per_user_mean(hits, lists.users),
        **greedy,
        **figures,
        **metrics.popularity_figures(recommended, lists.histories, popularity),
        "hr@1_by_popularity": metrics.hits_by_popularity(ranks, lists.targets, popularity),
        "protocol": protocol,
        "lists_sha256": lists.sha256,
        "seconds": round(time.monotonic() - began, 1),
    }
    predictions = pd.DataFrame(
        {
            "row": lists.rows,
            "user": lists.users,
            "next": lists.targets,
            "rank": ranks,
            "recommended": recommended,
            "history": [history[-KEPT:] for history in lists.histories],
            "candidates": list(lists.candidates),
            "scores": list(scores),
            **columns,
        }
    )
    return record, predictions


def _scores(
    recommender: Recommender,
    name: str,
    histories: list[list[int]],
    candidates: NDArray[np.int64],
    sums: dict[str, NDArray[np.float64]],
    scoring: ScoringOptions,
) -> NDArray[np.float64]:
    """(g, C) of lists of one length. ``sums``: what each model gave for these lists, kept for combinations."""
    if isinstance(recommender, Combination):
        missing = {part: r for part, r in recommender.parts.items() if part not in sums}
        sums |= {part: r.scores(histories, candidates) for part, r in missing.items()}
        return recommender.combine(sums)
    scores = recommender.scores(histories, candidates)
    if not scoring.average:
        sums[name] = scores
    return scores
