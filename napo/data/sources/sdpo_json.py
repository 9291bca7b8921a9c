"""S-DPO's JSON: records with ``historyList`` (``::``-joined or a list), ``itemList`` and ``trueSelection``, all titles.

The split is told by the files' names (train, val, test). Items are numbered as their titles come; users are not told.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..lines import BAD_LINE, Tally
from ..log import Preset
from ..prepared import SPLITS


def read(path: Path, *, max_bad: float, noun: str = "Items") -> Preset:
    """``path``: a file, or a folder of .json files. ``noun``: what the items are."""
    preset = Preset(noun=noun, rows={split: [] for split in SPLITS}, lists={split: [] for split in SPLITS})
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    numbers: dict[str, int] = {}
    for file in files:
        split = _split_of(file)
        if split is None:
            continue
        content = file.read_bytes()
        try:
            records = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: no JSON ({error}); is it cut short?") from None
        if not isinstance(records, list):
            raise ValueError(f"{file}: expected a list of records, got {type(records).__name__}")
        tally = Tally(file, max_bad, "record")
        tally.num_lines = len(records)
        for index, record in enumerate(records):
            try:
                history, candidates, target = _titles(record)
            except BAD_LINE as error:
                tally.bad(index, error)
                continue
            ids = [numbers.setdefault(title, len(numbers)) for title in (*history, target, *candidates)]
            preset.rows[split].append((ids[: len(history)], ids[len(history)]))
            preset.lists[split].append(ids[len(history) + 1 :])
        tally.settle()
        sizes = {len(candidates) for candidates in preset.lists[split]}
        if len(sizes) > 1:
            raise ValueError(f"{file}: expected itemLists of one length, got {', '.join(map(str, sorted(sizes)))}")
        preset.report["files"].append(
            {
                "name": file.name,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                **tally.report(),
            }
        )
    if not preset.report["files"]:
        raise ValueError(f"{path}: expected .json files with train, val or test in their names, found none")
    preset.titles = list(numbers)
    preset.source_ids = list(numbers)
    return preset


def _split_of(file: Path) -> str | None:
    return next((split for split in SPLITS if split in file.stem.lower()), None)


def _titles(record: dict[str, Any]) -> tuple[list[str], list[str], str]:
    history = record["historyList"]
    history = history.split("::") if isinstance(history, str) else list(history)
    candidates, target = list(record["itemList"]), record["trueSelection"]
    if not all(isinstance(title, str) and title.strip() for title in (*history, *candidates, target)):
        raise ValueError("expected titles as text")
    if candidates.count(target) != 1:
        raise ValueError(f"expected trueSelection once in itemList, got it {candidates.count(target)} times")
    return history, candidates, target
