"""The pickles of LLaRA, S-DPO and NAPO: {train,Val,Test}_data.df and id2name.txt, in either case of the file names.

A row has ``seq`` (10 item ids, padded on the right), ``len_seq`` and ``next``. The files bring their split. No users
are in them, but where the rows of a user follow one another from an empty history on (LastFM), the users are rebuilt.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..lines import BAD_LINE, Lines
from ..log import Preset

FILES = {"train": "train_data.df", "val": "val_data.df", "test": "test_data.df"}

# All that a data frame of numbers and lists needs. Nothing here runs code of the file's choice.
ALLOWED = {
    ("builtins", "slice"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("pandas", "DataFrame"),
    ("pandas", "Index"),
    ("pandas", "RangeIndex"),
    ("pandas.core.frame", "DataFrame"),
    ("pandas.core.internals.managers", "BlockManager"),
    ("pandas._libs.internals", "_unpickle_block"),
    ("pandas.core.indexes.base", "Index"),
    ("pandas.core.indexes.base", "_new_Index"),
    ("pandas.core.indexes.range", "RangeIndex"),
}
# Names of older numpy and pandas for the same things.
RENAMED = {
    ("pandas.core.indexes.numeric", "Int64Index"): ("pandas.core.indexes.base", "Index"),
}


class _DataFrameUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")
        wanted = RENAMED.get((module, name), (module, name))
        if wanted not in ALLOWED:
            if module.split(".")[0] in ("pandas", "pyarrow"):
                raise ValueError(
                    f"the pickle asks for {module}.{name}, expected a frame of plain lists and integers; save it again "
                    "after frame.columns = frame.columns.astype(object), with protocol 4"
                )
            raise ValueError(
                f"the pickle asks for {module}.{name}, which no data frame needs and which may run code; refused"
            )
        if np.lib.NumpyVersion(np.__version__) < "2.0.0":
            wanted = (wanted[0].replace("numpy._core.", "numpy.core."), wanted[1])
        return super().find_class(*wanted)


def read_frame(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A pickled data frame, without running code, and what dataset.json says of its file."""
    content = path.read_bytes()
    try:
        frame = _DataFrameUnpickler(io.BytesIO(content)).load()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # A damaged pickle can raise nearly anything from inside numpy and pandas.
    except Exception as error:
        raise ValueError(f"{path}: cut short or damaged ({type(error).__name__}: {error}); fetch it again") from None
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"{path}: expected a pickled data frame, got {type(frame).__name__}")
    missing = {"seq", "len_seq", "next"} - set(frame.columns)
    if missing or not frame.columns.is_unique:
        missing = missing or {"one of each"}
        raise ValueError(f"{path}: expected columns seq, len_seq and next; {', '.join(sorted(missing))} is missing")
    return frame, {
        "name": path.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "rows": len(frame),
    }


def read(path: Path, *, max_bad: float, noun: str = "Items") -> Preset:
    """``path``: the folder of the files. ``noun``: what the items are (Movies, Artists, Books, Games, Items)."""
    preset = Preset(noun=noun)
    names = _find(path, "id2name.txt")
    if names is None:
        raise ValueError(f"{path}: no id2name.txt there; expected the files of LLaRA or S-DPO")
    numbers: dict[int, int] = {}
    with Lines(names, max_bad=max_bad) as lines:
        for number, text in lines:
            key, found, title = text.partition("::")
            if not found or not title.strip() or not key.strip().isdecimal() or int(key) in numbers:
                lines.bad(number, f"expected a new id::name, got {text[:60]!r}")
                continue
            numbers[int(key)] = len(numbers)
            preset.titles.append(title)
    preset.source_ids = [str(key) for key in numbers]
    preset.report["files"].append(lines.report())

    for split, name in FILES.items():
        file = _find(path, name)
        if file is None:
            if split == "train":
                raise ValueError(f"{path}: no {name} there; expected the files of LLaRA or S-DPO")
            preset.report.setdefault("missing_files", []).append(name)
            preset.rows[split] = []
            continue
        frame, report = read_frame(file)
        preset.report["files"].append(report)
        preset.rows[split] = [
            _row(file, index, row, numbers)
            for index, row in enumerate(zip(frame["seq"], frame["len_seq"], frame["next"], strict=True))
        ]
    return preset


def _row(file: Path, index: int, row: tuple[Any, Any, Any], numbers: dict[int, int]) -> tuple[list[int], int]:
    """(history, next) in our numbers. MovieLens' entries are (id, rating).

    The history ends where the padding begins, whatever ``len_seq`` says: it says 1 for an empty one.
    """
    try:
        entries, length, last = row
        ids = [int(entry[0] if isinstance(entry, tuple | list) else entry) for entry in entries]
        target = int(last[0] if isinstance(last, tuple | list) else last)
        history = ids[: int(length)]
    except BAD_LINE as error:
        raise ValueError(
            f"{file}: row {index}: expected a list of ids, its length and an id ({type(error).__name__}: {error})"
        ) from None
    while history and history[-1] not in numbers:
        history.pop()
    unknown = next((item for item in [*history, target] if item not in numbers), None)
    if unknown is not None:
        raise ValueError(f"{file}: row {index}: item {unknown} is not in id2name.txt; the files do not belong together")
    return [numbers[item] for item in history], numbers[target]


def _find(folder: Path, name: str) -> Path | None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of the files, got a file")
    found = sorted(file for file in folder.iterdir() if file.name.lower() == name)
    return found[0] if found else None
