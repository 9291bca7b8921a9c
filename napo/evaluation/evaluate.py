"""Evaluation on held-out users: every model ranks the same lists, and every row's rank is kept for paired tests."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from napo.data.prepared import PreparedData
from napo.evaluation import metrics
from napo.evaluation.held_out import HeldOut
from napo.evaluation.parts import in_parts
from napo.evaluation.records import read_predictions, read_record, read_records
from napo.files import content_hash, text_hash, write_json
from napo.identity import adapter_hash
from napo.ranks import rank, told
from napo.recommenders.combination import Combination
from napo.recommenders.lower_layers import LowerLayers
from napo.recommenders.protocol import Generator, Recommender, ScoringOptions
from napo.recommenders.registry import BASELINES, available, find
from napo.runs import Origin, Run

KEPT = 50
"""Of each history the last so many items are kept beside the predictions: as many as a prompt is likely to show."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """How models are judged."""

    split: str = "test"
    """Which rows: ``test``, or ``val`` while tuning."""
    limit: int | None = None
    """So many rows, drawn once and for all (the same for every model, run and seed); None takes all."""
    score: str = "sum"
    """``sum`` of a title's token log-probabilities, or their ``average``, which favours long titles less harshly."""
    greedy: bool = True
    """Also generate greedily; False saves about a third of the time."""
    greedy_limit: int | None = None
    """Generate for the first so many rows alone; None for all."""
    tokens_per_batch: int = 2048
    """Memory against speed."""

    def __post_init__(self) -> None:
        if self.split not in ("val", "test"):
            raise ValueError(f"split: expected val or test; got {self.split!r}")
        if self.score not in ("sum", "average"):
            raise ValueError(f"score: expected sum or average; got {self.score!r}")
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


def evaluate(
    data: PreparedData,
    run: Run,
    models: Sequence[str],
    options: EvaluateOptions | None = None,
    *,
    foreign_data: bool = False,
) -> list[dict[str, Any]]:
    """Judge ``models`` and return ``metrics.json``: the records of all models that the run has judged so far.

    A model that was judged before, on the same lists and unchanged since, is not judged again. ``foreign_data`` allows
    other data than the run was made with, whose test rows may have been trained on; the records say so.
    """
    options = options or EvaluateOptions()
    lists = Lists.of(data, options)
    popularity = data.training_counts()
    # Before anything long begins: is there such a model, and is it whole?
    fingerprints = {name: find(run, name).fingerprint(run) for name in models}
    data_note = check_data(data, run, models, foreign_data)
    lower: dict[Any, LowerLayers] = {}  # shared by models of one base whose prompts are the same
    sums: dict[str, NDArray[np.float64]] = {}  # scores of the models so far, for combinations of them
    with run.writing():
        for name in models:
            _judge_stage(data, run, name, fingerprints[name], lists, popularity, options, lower, sums, data_note)
        return told(lambda: collect(run))


def _judge_stage(
    data: PreparedData,
    run: Run,
    name: str,
    fingerprint: str,
    lists: Lists,
    popularity: NDArray[np.int64],
    options: EvaluateOptions,
    lower: dict[Any, LowerLayers],
    sums: dict[str, NDArray[np.float64]],
    data_note: dict[str, str],
) -> None:
    """``RUN/predictions/NAME.parquet`` and ``.json``"""
    base = Origin.read(run.adapter(name)) if name in run.model_names() else None
    scoring = ScoringOptions(
        average=options.score == "average",
        tokens_per_batch=options.tokens_per_batch,
        # Lists of several lengths are scored in several calls, whose batches have the same numbers.
        lower=lower.setdefault((base.model_identity, base.prompt) if base else name, LowerLayers())
        if lists.candidates.ndim == 2
        else None,
    )

    def work(aside: Path) -> None:
        parts = aside / "parts"
        record, predictions = _judge_model(data, run, name, lists, popularity, options, scoring, sums, parts)
        if rank() > 0:
            return
        record["protocol"] |= data_note
        folder = aside / "predictions"
        folder.mkdir(exist_ok=True)
        predictions.to_parquet(folder / f"{name}.parquet")
        write_json(folder / f"{name}.json", record)

    run.stage(
        f"evaluate-{name}",
        work,
        options=asdict(options),
        inputs={
            "model": fingerprint,
            "lists": lists.sha256,
            "train": content_hash(data.path / "train.parquet"),
            **data_note,
        },
        outputs=[f"predictions/{name}.parquet", f"predictions/{name}.json"],
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
            f"data: {data.path} (sha256 {sha256[:12]}) is not what {run.path} was made with ({known[:12]}), so its "
            "models may have been trained on these test rows; pass --foreign-data to judge on it nevertheless"
        )
    if "sasrec" in models and data.titles != run.catalogue().titles:
        raise ValueError(
            f"models: sasrec knows the items of {run.path} alone, and {data.path} has others; leave it out"
        )
    return {"data": f"not the run's own, but {data.path.name} (sha256 {sha256[:12]})"}


def collect(run: Run) -> list[dict[str, Any]]:
    """Write ``metrics.json`` and ``comparisons.json`` from ``predictions/``; returns the records."""
    found = {path.stem: read_record(path) for path in (run.path / "predictions").glob("[!.]*.json")}
    order = list(available(run))
    records = [found[name] for name in sorted(found, key=lambda n: order.index(n) if n in order else len(order))]
    write_json(run.path / "metrics.json", records)
    write_json(run.path / "comparisons.json", compare_all(run, records))
    return records


def compare_all(run: Run, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every tuned model against every model that stands before it, on the same lists."""
    pairs = []
    for later, record in enumerate(records):
        if record["model"] in BASELINES:
            continue
        for other in records[:later]:
            if other["lists_sha256"] == record["lists_sha256"]:
                pairs.append(compare(run, record, other))
    return pairs


def compare(run: Run, record: Mapping[str, Any], against: Mapping[str, Any]) -> dict[str, Any]:
    """The paired difference in HR@1 of two models that were judged, with its interval over users."""
    model, other = record["model"], against["model"]
    frames = [read_predictions(run.path, one) for one in (record, against)]
    if not (frames[0]["row"].equals(frames[1]["row"]) and frames[0]["next"].equals(frames[1]["next"])):
        raise ValueError(f"predictions of {model} and {other}: expected the same rows; evaluate both again")
    users = frames[0]["user"].to_numpy()
    result: dict[str, Any] = {"model": model, "other": other, "n": len(users), "users": len(np.unique(users))}
    for key, values in {
        "hr@1": [(frame["rank"] == 1).to_numpy(dtype=float) for frame in frames],
        "mrr": [1.0 / frame["rank"].to_numpy() for frame in frames],
    }.items():
        difference = values[0] - values[1]
        result[f"{key}_difference"] = float(difference.mean())
        result[f"{key}_difference_ci"] = metrics.interval(difference, users)
    return result


def undecided(run: Run) -> list[str]:
    """A warning for each model that the lists do not tell from the best one by HR@1."""
    records = read_records(run.path / "metrics.json")
    best = max(records, key=lambda record: record["hr@1"])
    lines = []
    for other in records:
        if other is best or other["lists_sha256"] != best["lists_sha256"]:
            continue
        pair = compare(run, best, other)
        low, high = pair["hr@1_difference_ci"]
        if low <= 0 <= high:
            lines.append(
                f"cannot be told apart: {best['model']} and {other['model']}: HR@1 differs by "
                f"{pair['hr@1_difference']:.3f} [{low:.3f}, {high:.3f}], n {pair['n']}"
            )
    return lines


def weights_sha256(run: Run, name: str) -> str | None:
    """Of a model that the run trained, to tell records of it from those of the one before it; else None."""
    if name in run.model_names():
        return adapter_hash(run.adapter(name))
    if "+" in name:
        kind = available(run).get(name)
        return None if kind is None else text_hash(kind.fingerprint(run))
    return content_hash(run.path / "sasrec") if name == "sasrec" else None


def _seed(run: Run, name: str) -> int | None:
    model = name.split("+")[0]
    origin = Origin.read(run.adapter(model)) if model in run.model_names() else run.first_origin
    return None if origin is None else origin.seed


def _judge_model(
    data: PreparedData,
    run: Run,
    name: str,
    lists: Lists,
    popularity: NDArray[np.int64],
    options: EvaluateOptions,
    scoring: ScoringOptions,
    sums: dict[str, NDArray[np.float64]],
    parts: Path,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """A model's record for ``metrics.json`` and its prediction for every row. ``parts`` keeps scores meanwhile."""
    began = time.monotonic()
    protocol: dict[str, Any] = {
        "split": options.split,
        "candidates": int(lists.lengths.max()),
        "ties": "a tie with the right item counts as a miss",
        "ci": f"95%, percentile bootstrap over {'users' if data.has_users else 'rows: the source tells no users'}",
    }
    if lists.candidates.ndim == 1:
        protocol["lists"] = f"of {lists.lengths.min()} to {lists.lengths.max()} candidates"
    greedy: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    recommender = in_parts(find(run, name).load(run, data, scoring), name, parts)
    if lists.candidates.ndim == 1:
        scores = _ragged_scores(recommender, lists)
    elif isinstance(recommender, Combination):
        missing = {part: r for part, r in recommender.parts.items() if part not in sums}
        sums |= {part: r.scores(lists.histories, lists.candidates) for part, r in missing.items()}
        scores = recommender.combine(sums)
    else:
        scores = recommender.scores(lists.histories, lists.candidates)
        if not scoring.average:
            sums[name] = scores
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
    rows = range(len(lists.rows))
    if scores.ndim == 2:
        ranks = metrics.target_ranks(scores, lists.columns)
        best = metrics.first_choices(scores, lists.columns, ranks)
    else:
        each = [(scores[r][None], lists.columns[r : r + 1]) for r in rows]
        ranks = np.array([metrics.target_ranks(*one)[0] for one in each])
        best = np.array([metrics.first_choices(*one, ranks[r : r + 1])[0] for r, one in enumerate(each)])
    recommended = np.array([lists.candidates[r][best[r]] for r in rows], np.int64)
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


def _ragged_scores(recommender: Recommender, lists: Lists) -> NDArray[Any]:
    """(n,) of arrays: lists of one length at a time."""
    scores = np.empty(len(lists.rows), object)
    for length in np.unique(lists.lengths):
        rows = np.flatnonzero(lists.lengths == length)
        found = recommender.scores([lists.histories[row] for row in rows], np.stack(lists.candidates[rows].tolist()))
        for row, of_row in zip(rows, found, strict=True):
            scores[row] = of_row
    return scores
