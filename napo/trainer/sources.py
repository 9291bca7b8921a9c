"""Data sets of any kind as rows: a length, and a dict at each place."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "chosen", "rejected")


def as_rows(name: str, data: Any, *, most: int | None = None) -> Any:
    """``name`` is what errors call the data set. ``most``: so many rows are read of a data set without a length, None
    reads it to its end. Rows that are made when they are asked for are made once."""
    if hasattr(data, "iterrows"):  # pandas
        return data.to_dict("records")
    for method in ("to_dicts", "to_pylist"):  # Polars, pyarrow
        if hasattr(data, method):
            return getattr(data, method)()
    if isinstance(data, Mapping):
        return _of_columns(name, data) if is_columns(data) else _of_splits(name, data, most)
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        return _of_stream(name, data, most)
    kind = (getattr(data, "format", None) or {}).get("type")
    if kind not in (None, "custom"):  # datasets, as tensors
        return data.with_format(None)
    if type(data) in (list, tuple) or (hasattr(data, "with_format") and kind is None):
        return data
    # Rows are read more than once below, and whatever makes them may draw their negatives anew each time.
    rows = [data[number] for number in range(len(data))]
    if any(str(data[number]) != str(row) for number, row in enumerate(rows[:3])):
        logger.warning(
            "%s: a row is another one each time it is asked for; rows are read once, and every epoch has the same ones "
            "(docs/trainer.md, New negatives in each epoch)",
            name,
        )
    return rows


def is_columns(data: Any) -> bool:
    """Whether a dict is one data set by columns, and not several by name."""
    return isinstance(data, Mapping) and any(column in data for column in COLUMNS)


def _of_columns(name: str, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    sizes = {column: len(values) for column, values in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{name}: expected columns of one length, got {sizes}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _of_splits(name: str, splits: Mapping[str, Any], most: int | None) -> Any:
    """A ``datasets.DatasetDict`` to train on: its ``train``."""
    if name == "train_dataset" and "train" in splits:
        return as_rows(name, splits["train"], most=most)
    raise ValueError(
        f"{name}: expected rows or a dict of columns with 'prompt', got a dict of {', '.join(map(str, splits))}; "
        "give one of these data sets"
    )


def _of_stream(name: str, data: Any, most: int | None) -> list[dict[str, Any]]:
    """Rows are checked before training starts, so what a stream brings is kept."""
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise ValueError(f"{name}: expected rows (dicts), got {type(data).__name__}; make a list of it")
    if hasattr(data, "with_format"):  # datasets
        data = data.with_format(None)
    rows = list(itertools.islice(iter(data), most))
    if most is not None and len(rows) == most:
        logger.info("%s: the first %d rows were read, as many as max_steps takes", name, most)
    return rows
