"""Finding the file of a source."""

from __future__ import annotations

from pathlib import Path


def only(folder: Path, pattern: str) -> Path:
    """The one file of ``folder`` that matches."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of the files, got a file")
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        hint = "; the pickles there are read as llara" if any(folder.glob("*.df")) else ""
        raise ValueError(f"{folder}: expected one file like {pattern}, found {len(found)}{hint}")
    return found[0]
