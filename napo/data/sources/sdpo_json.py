"""S-DPO's JSON: records with ``historyList`` (``::``-joined or a list), ``itemList`` and ``trueSelection``, all titles.

The split is told by the files' names (train, val, test). Items are numbered as their titles come; users are not told.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..interactions import Preset
from ..lines import BAD_LINE, Tally
from ..prepared import SPLITS
from ..texts import clean_title, shown

logger = logging.getLogger(__name__)

JOINER = "::"
WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
WORDS |= {"test": "test", "testing": "test"}


@dataclass(kw_only=True)
class Options:
    noun: str = "Items"
    """Kind of the items: Movies, Artists, Books, Games or Items."""


def read(path: Path, options: Options, *, max_bad: float) -> Preset:
    """``path``: a file, or a folder of .json files."""
    preset = Preset(noun=options.noun, rows={split: [] for split in SPLITS}, lists={split: [] for split in SPLITS})
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    splits = {file: split for file in files if (split := _split_of(file)) is not None}
    others = [file.name for file in files if file not in splits]
    if not splits:
        raise ValueError(f"{path}: expected .json files with train, val or test in their names, found none")
    if others:
        logger.warning("%s: left out, as no split is in their names: %s", path, shown(", ".join(others)))
        preset.report["left_out_files"] = [shown(name) for name in others]
    contents = {file: file.read_bytes() for file in splits}
    loaded = {file: _records(file, content) for file, content in contents.items()}
    joined = _titles_with_joiner(record for records in loaded.values() for record in records)

    numbers: dict[str, int] = {}
    for file, split in splits.items():
        records = loaded[file]
        if not records:
            raise ValueError(f"{file}: an empty list, expected records")
        tally = Tally(file, max_bad, "record")
        tally.num_lines = len(records)
        for index, record in enumerate(records):
            try:
                history, candidates, target = _titles(record, joined)
            except BAD_LINE as error:
                tally.bad(index, error)
                continue
            ids = [numbers.setdefault(title, len(numbers)) for title in (*history, target, *candidates)]
            preset.rows[split].append((ids[: len(history)], ids[len(history)]))
            preset.lists[split].append(ids[len(history) + 1 :])
        tally.settle()
        repeated = sum(len(set(candidates)) < len(candidates) for candidates in preset.lists[split])
        if repeated:
            logger.warning(
                "%s: %d of %d itemLists name a title more than once; it is ranked as often, against the right one",
                *(file, repeated, len(preset.lists[split])),
            )
        sizes = {len(candidates) for candidates in preset.lists[split]}
        if len(sizes) > 1:
            raise ValueError(f"{file}: expected itemLists of one length, got {', '.join(map(str, sorted(sizes)))}")
        preset.report["files"].append(
            {
                "name": shown(file.name),
                "split": split,
                "bytes": len(contents[file]),
                "sha256": hashlib.sha256(contents[file]).hexdigest(),
                **tally.report(),
                **({"repeated_candidates": repeated} if repeated else {}),
            }
        )
    preset.titles = list(numbers)
    preset.source_ids = list(numbers)
    return preset


def _records(file: Path, content: bytes) -> list[Any]:
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON ({shown(error)}); is it cut short?") from None
    if not isinstance(records, list):
        raise ValueError(f"{file}: expected a list of records, got {type(records).__name__}")
    return records


def _split_of(file: Path) -> str | None:
    """The split is a whole word of the name: the data set "retrieval" is no validation."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", file.stem)
    found = {WORDS[word.lower()] for word in words if word.lower() in WORDS}
    if len(found) > 1:
        raise ValueError(f"{file}: expected one of train, val and test in its name, found {', '.join(sorted(found))}")
    return found.pop() if found else None


def _titles_with_joiner(records: Any) -> set[tuple[str, ...]]:
    """The titles of all lists that contain the joiner of a history, cut into parts at the joiner."""
    found = set()
    for record in records:
        if isinstance(record, dict):
            history = record.get("historyList")
            lists = (record.get("itemList"), [record.get("trueSelection")], history)
            for title in (one for titles in lists if isinstance(titles, list) for one in titles):
                if isinstance(title, str) and JOINER in title:
                    found.add(tuple(title.split(JOINER)))
    return found


def _split_history(text: str, joined: set[tuple[str, ...]]) -> list[str]:
    """A title that contains the joiner stays whole if a list names it; the longest such title counts."""
    parts = text.split(JOINER)
    longest = max(map(len, joined), default=1)
    titles, at = [], 0
    while at < len(parts):
        sizes = range(min(longest, len(parts) - at), 1, -1)
        size = next((size for size in sizes if tuple(parts[at : at + size]) in joined), 1)
        titles.append(JOINER.join(parts[at : at + size]))
        at += size
    return titles


def _titles(record: dict[str, Any], joined: set[tuple[str, ...]]) -> tuple[list[str], list[str], str]:
    history = record["historyList"]
    history = _split_history(history, joined) if isinstance(history, str) else list(history)
    titles = [*history, *record["itemList"], record["trueSelection"]]
    if not all(isinstance(title, str) for title in titles):
        raise ValueError("expected titles as text")
    titles = [clean_title(title) for title in titles]
    if not all(titles):
        raise ValueError("an empty title")
    candidates, target = titles[len(history) : -1], titles[-1]
    if candidates.count(target) != 1:
        raise ValueError(f"expected trueSelection once in itemList, got it {candidates.count(target)} times")
    return titles[: len(history)], candidates, target
