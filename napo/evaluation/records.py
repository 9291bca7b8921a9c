"""What evaluation leaves in a run folder, read back: nothing of it is believed that does not look as it was written."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from napo.files import read_json
from napo.runs import NAME

SHA256 = re.compile(r"[0-9a-f]{64}")
FIGURES_OF_ALL = ("hr@1", "mrr", "ndcg@5", "ndcg@10", "arp")
FIGURES_OF_PAIRS = ("hr@1_difference", "mrr_difference")


def read_record(path: Path) -> dict[str, Any]:
    """``predictions/NAME.json``"""
    record = read_json(path)
    if not _is_record(record) or record["model"] != path.stem:
        raise ValueError(f"{path}: not a record of napo evaluate; delete it and evaluate {path.stem!r} again")
    return record


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
