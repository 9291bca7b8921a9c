"""Finding the file of a source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..lines import Lines
from ..texts import shown


def only(folder: Path, pattern: str) -> Path:
    """The one file of ``folder`` that matches."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of the files, got a file")
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        hint = "; the pickles there are read as llara" if any(folder.glob("*.df")) else ""
        raise ValueError(f"{folder}: expected one file like {pattern}, found {len(found)}{hint}")
    return found[0]


def skip_header(lines: Lines, entries: Iterator[tuple[int, str]], expected: str) -> None:
    """Takes the first line away, which has to name the columns as published: without it a row would be lost, and with
    others the fields would be taken for what they are not."""
    number, found = next(entries, (1, expected))
    names, told = (re.split("[,\t]", line.replace('"', "")) for line in (expected, found))
    if [name.strip().lower() for name in told] != [name.lower() for name in names]:
        raise ValueError(
            f"{lines.path}:{number}: expected the header {', '.join(names)}; got {shown(', '.join(told), 80)}; files "
            "of other columns are read as csv, with their names given"
        )
