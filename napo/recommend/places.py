"""Where recommendations may be written, which is known before a model is loaded."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from napo.data.prepared import FILES
from napo.files import refuse_special
from napo.recommend.rows import kind_of
from napo.recommend.writing import FORMATS
from napo.runs.names import COUNTED_FILES, KEPT_FILES

OWN_FILES = {*KEPT_FILES, *COUNTED_FILES}
"""Tables of a run."""
OWN_FOLDERS = {"stages", "sasrec", "models", "combinations", "predictions", "catalogue", "data"}
"""Of a run: whatever is in them is the work of its stages."""


def check_files(source: str | Path, out: str | Path) -> str:
    """The format to write; ValueError where the names cannot be right, which is known before a model is loaded."""
    source, out = Path(source), Path(out)
    kind_of(source)
    if not source.exists():
        raise ValueError(f"input: {source}: no such file")
    suffix = out.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"out: expected a name that ends in {', '.join(FORMATS)}; got {out}")
    refuse_special(out)
    if out.is_dir():
        raise ValueError(f"out: expected the name of a file; {out} is a folder")
    if out.exists() and out.samefile(source):
        raise ValueError(f"out: {out} is the input, which would be lost; give another name")
    _refuse_own_files(out)
    return suffix


def _refuse_own_files(out: Path) -> None:
    """ValueError for what is, or would be taken for, a part of a run or of prepared data."""
    place = Path(os.path.realpath(out))
    for folder in place.parents:
        inside = place.relative_to(folder)
        of_run = inside.parts[0] in (OWN_FILES if len(inside.parts) == 1 else OWN_FOLDERS) and _is_run(folder)
        of_data = str(inside) in FILES and (folder / "dataset.json").is_file()
        if of_run or of_data:
            what = "the run" if of_run else "the prepared data"
            raise ValueError(f"out: {out} would be among the files of {what} {folder}; give another place")


def _is_run(folder: Path) -> bool:
    """The settings of a transformers model have the same name."""
    with suppress(OSError, ValueError, RecursionError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(config, dict) and "format" in config
    return False


def check_place(place: Path) -> None:
    """OSError where nothing can be written there, which is found before anything is computed. Nothing is left."""
    folder = place.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def folders_of(place: Path) -> Iterator[None]:
    """Makes the folders that a file is to be in, which are not left behind where it is not written."""
    missing = [folder for folder in place.parents if not os.path.lexists(folder)]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:  # the innermost first
            with suppress(OSError):  # somebody else has a file there by now
                folder.rmdir()
        raise
