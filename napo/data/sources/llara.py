"""The pickles of LLaRA, S-DPO and NAPO: {train,Val,Test}_data.df and id2name.txt, in either case of the file names.

A row has ``seq`` (10 item ids, padded on the right), ``len_seq`` and ``next``. The files bring their split. No users
are in them, but where the rows of a user follow one another from an empty history on (LastFM), the users are rebuilt.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..interactions import Preset
from ..lines import Lines
from ..pickles import MOST_BYTES, MOST_ENTRIES, integer, read_frame, sequence
from ..texts import clean_title, shown
from ..titles import article_first, split_year

FILES = {"train": "train_data.df", "val": "val_data.df", "test": "test_data.df"}

COLUMNS = ("seq", "len_seq", "next")


@dataclass(kw_only=True)
class Options:
    noun: str = "Items"
    """Kind of the items: Movies, Artists, Books, Games or Items."""


def read(path: Path, options: Options, *, max_bad: float) -> Preset:
    """``path``: the folder of the files."""
    preset = Preset(noun=options.noun)
    numbers = _read_names(preset, path, max_bad)
    for split, name in FILES.items():
        file = _find(path, name)
        if file is None:
            if split == "train":
                raise ValueError(f"{path}: no {name} there; expected the files of LLaRA or S-DPO")
            preset.report.setdefault("missing_files", []).append(name)
            preset.rows[split] = []
            continue
        preset.rows[split], report = read_rows(file, numbers)
        preset.report["files"].append(report)
    return preset


def read_rows(file: Path, numbers: dict[int, int]) -> tuple[list[tuple[list[int], int]], dict[str, Any]]:
    """The rows of a pickle, items in our ``numbers``, and what ``dataset.json`` says of the file."""
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{file}: {size} bytes, expected at most {MOST_BYTES}; is it a file of LLaRA?")
    content = file.read_bytes()
    frame = read_frame(file, content, COLUMNS)
    rows, entries = [], 0
    for index, row in enumerate(zip(*(frame[name] for name in COLUMNS), strict=True)):
        try:
            items = sequence(row[0])
            entries += len(items)
            if entries > MOST_ENTRIES:
                raise ValueError(f"more than {MOST_ENTRIES} items in the rows so far; is it a file of LLaRA?")
            rows.append(_row(items, row[1], row[2], numbers))
        except ValueError as error:
            raise ValueError(f"{file}: row {index}: {error}") from None
    digest = hashlib.sha256(content).hexdigest()
    return rows, {"name": file.name, "bytes": len(content), "sha256": digest, "rows": len(rows)}


def _read_names(preset: Preset, path: Path, max_bad: float) -> dict[int, int]:
    """Titles from id2name.txt or, as LLaRA's MovieLens has it, from u.item, whose numbers begin with 1 where the rows'
    begin with 0. Returns our number of each item."""
    file = _find(path, "id2name.txt")
    numbered_from, separator = 0, "::"
    if file is None:
        file = _find(path, "u.item")
        numbered_from, separator = 1, "|"
    if file is None:
        raise ValueError(f"{path}: no id2name.txt there, nor MovieLens' u.item; expected the files of LLaRA or S-DPO")
    numbers: dict[int, int] = {}
    with Lines(file, max_bad=max_bad) as lines:
        for number, text in lines:
            key, found, title = text.partition(separator)
            key = key.strip()
            if numbered_from:
                title, year = split_year(title.partition(separator)[0])
                title = article_first(title)
            if not found or not clean_title(title) or not key.isdecimal() or len(key) > 18:
                lines.bad(number, f"expected id{separator}name, got {shown(text, 60)}")
                continue
            item = int(key) - numbered_from
            if item in numbers:
                lines.bad(number, f"the id {key} again")
                continue
            numbers[item] = len(numbers)
            preset.titles.append(title)
            preset.years.append(year if numbered_from else "")
    preset.source_ids = [str(item) for item in numbers]
    preset.report["files"].append(lines.report())
    return numbers


def _row(entries: list[Any], length: Any, last: Any, numbers: dict[int, int]) -> tuple[list[int], int]:
    """(history, next) in our numbers. MovieLens' entries are (id, rating)."""
    ids = [_item(entry) for entry in entries]
    target, count = _item(last), integer(length)
    if not 0 <= count <= len(ids):
        raise ValueError(f"expected a length from 0 to {len(ids)}, got {count}")
    history = ids[:count]
    # Padding is what the row ends with, if it is no item. An empty history has a length of 1 in these files.
    padded = count < len(ids) and ids[-1] not in numbers
    while padded and history and history[-1] == ids[-1]:
        history.pop()
    unknown = next((item for item in [*history, target] if item not in numbers), None)
    if unknown is not None:
        raise ValueError(f"item {unknown} is not in the file of names; the files do not belong together")
    return [numbers[item] for item in history], numbers[target]


def _item(entry: Any) -> int:
    return integer(entry[0] if type(entry) in (tuple, list) and entry else entry)


def _find(folder: Path, name: str) -> Path | None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of the files, got a file")
    found = sorted(file for file in folder.iterdir() if file.name.lower() == name)
    return found[0] if found else None
