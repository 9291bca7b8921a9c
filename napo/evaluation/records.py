"""What evaluation leaves in a run folder, read back: nothing of it is believed that does not look as it was written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from napo.data.texts import shown
from napo.evaluation import metrics
from napo.files import read_json
from napo.runs import NAME

SHA256 = re.compile(r"[0-9a-f]{64}")
RANKED = re.compile(r"catalogue|sasrec's first \d+")
CUTOFFS = (1, 5, 10, 20)
"""Of rankings of the whole catalogue."""
BIAS = ("arp", "gini", "coverage", "tail_share")
SCORES = ("sum", "average")
"""Of a title's token log-probabilities."""
FIGURES_OF_ALL = ("hr@1", "mrr", "ndcg@5", "ndcg@10", "arp")
FIGURES_OF_PAIRS = ("hr@1_difference", "mrr_difference")


def read_record(path: Path) -> dict[str, Any]:
    """``predictions/NAME.json``"""
    record = read_json(path)
    if not _is_record(record) or record["model"] != path.stem:
        raise ValueError(f"{path}: not a record of napo evaluate; delete it and evaluate {path.stem!r} again")
    return record


def check_not_lost(
    places: Mapping[str, Path],
    rows: int,
    protocol: Mapping[str, Any],
    what: str,
    *,
    generated: int = 0,
    weights: Callable[[str], str | None],
) -> None:
    """Raise ValueError where figures of ``rows`` rows would take the place of those of more rows, or of figures that
    mean something else: of another split, other data, another score. Figures of weights that are no more are nobody's.

    places: By model the file of its records, which need not be there.
    protocol: Of the new figures; ``score`` is ``sum`` or ``average``.
    what: Name of the figures.
    generated: Rows for which language models generate an answer.
    weights: By model the hash of its weights, as records have it.
    """
    lost: list[str] = []
    told = {"split"}
    mine = _meaning(protocol)
    for name, path in places.items():
        found = read_json(path) if path.is_file() else []
        for record in found if isinstance(found, list) else [found]:
            there = record.get("protocol") if isinstance(record, dict) else None
            if not isinstance(there, dict) or record.get("weights_sha256") != weights(record.get("model", name)):
                continue
            old = _meaning(there)
            other = {key for key, meaning in old.items() if mine.get(key, meaning) != meaning}
            n, answers = _count(record, "n"), _count(record, "n_greedy")
            if other or n > rows or answers > generated:
                more = f", {answers} of them with generated answers" if answers > generated else ""
                lost.append(f"{name} ({n} rows of {_said(old, {'split', *other})}{more})")
                told |= other
                break
    if lost:
        raise ValueError(
            f"models: {rows} rows of {_said(mine, told)} would replace {what} of {', '.join(lost)}; pass --overwrite "
            "for that, or judge at least as many rows in the same way"
        )


def _meaning(protocol: Mapping[str, Any]) -> dict[str, str]:
    """What figures are of, by word. Only a language model's score has a kind."""
    found = {"split": str(protocol.get("split")), "data": f"({protocol['data']})" if "data" in protocol else ""}
    if "met_items" in protocol:
        found["met_items"] = f"with met items {protocol['met_items']}d"
    kind = str(protocol.get("score", "")).split(" ")[0]
    if kind in SCORES:
        found["score"] = f"by {kind}"
    return found


def _said(meaning: Mapping[str, str], keys: Collection[str]) -> str:
    return " ".join(text for key, text in meaning.items() if key in keys and text)


def _count(record: Mapping[str, Any], key: str) -> int:
    return record[key] if type(record.get(key)) is int else 0


def read_records(path: Path) -> list[dict[str, Any]]:
    """``metrics.json``"""
    records = read_json(path)
    if not isinstance(records, list) or not records or not all(map(_is_record, records)):
        raise ValueError(f"{path}: not the records of napo evaluate; delete it and run napo evaluate again")
    return records


def read_comparisons(path: Path) -> list[dict[str, Any]]:
    """``comparisons.json``"""
    pairs = read_json(path)
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise ValueError(f"{path}: not the comparisons of napo evaluate; delete it and run napo evaluate again")
    return pairs


def read_predictions(run: Path, record: Mapping[str, Any], num_items: int | None = None) -> pd.DataFrame:
    """``predictions/NAME.parquet`` of a record, with a row for each of its ``n``; ids of items are below
    ``num_items``."""
    path = run / "predictions" / f"{record['model']}.parquet"
    again = f"delete it and evaluate {record['model']!r} again"
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({shown(str(error).splitlines()[0])}); {again}") from None
    for name, least, most in (
        ("row", 0, None),
        ("user", 0, None),
        ("rank", 1, record["protocol"]["candidates"]),
        ("next", 0, None if num_items is None else num_items - 1),
        ("recommended", 0, None if num_items is None else num_items - 1),
    ):
        if name not in frame or frame[name].dtype.kind not in "iu":
            raise ValueError(f"{path}: column {name}: expected whole numbers; {again}")
        if len(frame) and (frame[name].min() < least or (most is not None and frame[name].max() > most)):
            raise ValueError(f"{path}: column {name}: expected {least} to {most}, got others; {again}")
    if len(frame) != record["n"]:
        raise ValueError(f"{path}: {len(frame)} rows, expected {record['n']} as in metrics.json; {again}")
    _check_figures(path, metrics.ranking_figures(frame["rank"].to_numpy()), record, again)
    if "history" not in frame or not all(_ids(history, num_items) for history in frame["history"]):
        raise ValueError(f"{path}: column history: expected lists of item ids; {again}")
    if {"candidates", "scores"} <= set(frame) and not _ranks_follow(frame):
        raise ValueError(f"{path}: its ranks do not follow from its candidates and scores; {again}")
    return frame


def read_catalogue_records(path: Path) -> list[dict[str, Any]]:
    """``catalogue/NAME.json``"""
    records = read_json(path)
    again = f"delete it and rank the catalogue with {path.stem!r} again"
    if not isinstance(records, list) or not records or not all(map(_is_catalogue_record, records)):
        raise ValueError(f"{path}: not the records of napo evaluate --catalogue; {again}")
    if any(record["protocol"].get("ties") != metrics.TIES for record in records):
        raise ValueError(f"{path}: expected ranks by the rule that {metrics.TIES}; {again}")
    if any(record["model"].split("+")[0] != path.stem.split("+")[0] for record in records):
        raise ValueError(f"{path}: records of another model; {again}")
    return records


def read_catalogue_ranks(path: Path, column: str, record: Mapping[str, Any]) -> pd.DataFrame:
    """``catalogue/NAME.parquet``: row, user and next, and as ``rank`` the ranks of one of its records."""
    again = f"delete it and rank the catalogue with {path.stem!r} again"
    names = ["row", "user", "next", column]
    try:
        frame = pd.read_parquet(path, columns=names)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({shown(str(error).splitlines()[0])}); {again}") from None
    bounds = ((0, None), (0, None), (0, record["items"] - 1), (1, record["items"] + 1))
    for name, (least, most) in zip(names, bounds, strict=True):
        if frame[name].dtype.kind not in "iu":
            raise ValueError(f"{path}: column {name}: expected whole numbers; {again}")
        if len(frame) and (frame[name].min() < least or (most is not None and frame[name].max() > most)):
            raise ValueError(f"{path}: column {name}: expected {least} to {most}, got others; {again}")
    if len(frame) != record["n"]:
        raise ValueError(f"{path}: {len(frame)} rows, expected {record['n']} as in {path.stem}.json; {again}")
    _check_figures(path, metrics.cutoff_figures(frame[column].to_numpy(), CUTOFFS), record, again)
    return frame.rename(columns={column: "rank"})


def _check_figures(path: Path, figures: Mapping[str, float], record: Mapping[str, Any], again: str) -> None:
    for name, value in figures.items():
        if abs(value - record[name]) > 1e-9:
            raise ValueError(f"{path}: expected {name.upper()} {record[name]:.6f}, as its record says; {again}")


def _ranks_follow(frame: pd.DataFrame) -> bool:
    """Whether each right item is once among its candidates, and has the rank that the scores give it."""
    lists = [[np.asarray(values) for values in frame[name]] for name in ("candidates", "scores")]
    sizes = np.array([len(values) for values in lists[0]], np.int64)
    if [len(values) for values in lists[1]] != sizes.tolist() or not len(sizes) or not sizes.all():
        return not len(sizes)
    candidates, scores = map(np.concatenate, lists)
    if candidates.dtype.kind not in "iu" or scores.dtype.kind != "f" or np.isnan(scores).any():
        return False
    owner = np.repeat(np.arange(len(sizes)), sizes)
    right = candidates == frame["next"].to_numpy()[owner]
    if not np.array_equal(owner[right], np.arange(len(sizes))):
        return False
    as_high = scores >= scores[right][owner]
    return np.array_equal(np.bincount(owner[as_high], minlength=len(sizes)), frame["rank"])


def check_same_rows(frames: Sequence[tuple[str, pd.DataFrame]]) -> None:
    """Models are paired row by row: predictions of the same lists are of the same rows."""
    first, reference = frames[0]
    for name, frame in frames[1:]:
        if not all(frame[column].equals(reference[column]) for column in ("row", "user", "next")):
            raise ValueError(f"predictions of {first} and {name}: expected the same rows; evaluate both again")


def _ids(history: Any, num_items: int | None) -> bool:
    if not isinstance(history, np.ndarray) or (len(history) and history.dtype.kind not in "iu"):
        return False
    return not len(history) or (history.min() >= 0 and (num_items is None or history.max() < num_items))


def read_log(path: Path) -> list[dict[str, float]]:
    """``log_history.json`` of an adapter: its numbers, without those that are not finite."""
    log = read_json(path) if path.is_file() else []
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise ValueError(f"{path}: not the log of a training; delete it")
    return [{str(key): value for key, value in entry.items() if _number(value)} for entry in log]


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not _name(record.get("model")):
        return False
    protocol, buckets = record.get("protocol"), record.get("hr@1_by_popularity")
    return (
        all(_number(record.get(key)) for key in FIGURES_OF_ALL)
        and all(type(record.get(key)) is int and record[key] > 0 for key in ("n", "users"))
        and _interval(record.get("hr@1_ci"))
        and isinstance(record.get("lists_sha256"), str)
        and SHA256.fullmatch(record["lists_sha256"]) is not None
        and isinstance(protocol, dict)
        and type(protocol.get("candidates")) is int
        and protocol["candidates"] > 0
        and isinstance(buckets, dict)
        and all(isinstance(b, dict) and _number(b.get("n")) and _number(b.get("hr@1")) for b in buckets.values())
    )


def _is_catalogue_record(record: Any) -> bool:
    if not isinstance(record, dict) or not _name(record.get("model")):
        return False
    buckets, ranked = record.get("by_popularity"), record.get("ranked")
    return (
        isinstance(ranked, str)
        and RANKED.fullmatch(ranked) is not None
        and all(_number(record.get(key)) for key in (*metrics.cutoff_figures(np.ones(1, np.int64), CUTOFFS), *BIAS))
        and all(type(record.get(key)) is int and record[key] > 0 for key in ("n", "users", "items"))
        and all(_interval(record.get(key)) for key in ("hr@10_ci", "ndcg@10_ci"))
        and isinstance(record.get("rows_sha256"), str)
        and SHA256.fullmatch(record["rows_sha256"]) is not None
        and isinstance(record.get("protocol"), dict)
        and isinstance(buckets, dict)
        and all(isinstance(b, dict) and _number(b.get("n")) and _number(b.get("ndcg@10")) for b in buckets.values())
    )


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, dict)
        and _name(pair.get("model"))
        and _name(pair.get("other"))
        and all(_number(pair.get(key)) and _interval(pair.get(f"{key}_ci")) for key in FIGURES_OF_PAIRS)
    )


def _name(value: Any) -> bool:
    return isinstance(value, str) and all(NAME.fullmatch(part) for part in value.split("+"))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _interval(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_number, value))
