"""Item ids of rows, and data sets in the shapes that people have them."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from trainer_cases import trainer

OPTIONS: dict[str, Any] = {"objective": "napo", "alpha": 0.0, "rho": 1.0}


def catalogue_rows(name: Callable[[int], Any] = int) -> list[dict[str, Any]]:
    """User 0 knows item 21, which user 2 rejected; user 1 chose item 10 and knows 11, which user 0 rejected."""
    return [
        {
            "prompt": f"p{user}",
            "chosen": f"c{user}",
            "rejected": [f"n{user}", f"m{user}"],
            "user_state": [1.0, user],
            "chosen_id": name(chosen),
            "rejected_ids": [name(item) for item in rejected],
            "history_ids": [name(item) for item in history],
        }
        for user, (chosen, rejected, history) in enumerate(
            [(5, (10, 11), (21, 30)), (10, (12, 13), (11, 40)), (20, (21, 22), ())]
        )
    ]


def excluded(folder: Path, rows: Any, **options: Any) -> set[tuple[int, ...]]:
    """(user, owner, negative) of the pool that the first batch makes."""
    run = trainer(folder, rows, **{**OPTIONS, **options})
    pool = run._pool([run.collator([run.train_dataset[i] for i in range(3)])["batch"]])
    return set() if pool.exclude is None else {tuple(triple) for triple in pool.exclude.tolist()}


KNOWN = {(0, 2, 0), (1, 0, 0), (1, 0, 1)}

NAMES: dict[str, Callable[[int], Any]] = {
    "plain": int,
    "negative": lambda item: -item - 1,
    "minus-one": lambda item: item - 13,
    "signed-hash": lambda item: item - 2**63,
    "unsigned-hash": lambda item: item + 2**63,
    "mixed-signs": lambda item: item + 2**63 if item > 20 else -item,
    "beyond-64-bit": lambda item: item + 2**70,
    "close-by": lambda item: item + 2**53,  # equal as floats
    "strings": lambda item: f"B00{item}",
    "numpy": np.int64,
    "numpy-unsigned": lambda item: np.uint64(item + 2**63),
}


@pytest.mark.parametrize("kind", NAMES)
def test_the_same_exclusions_whatever_the_ids_are(kind: str, tmp_path: Path) -> None:
    assert excluded(tmp_path, catalogue_rows(NAMES[kind])) == KNOWN


def as_tensors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``with_format("torch")``."""
    texts = ("prompt", "chosen", "rejected")
    return [{name: value if name in texts else torch.tensor(value) for name, value in row.items()} for row in rows]


SHAPES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "tuple": tuple,
    "columns": lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    "pandas": pd.DataFrame,
    "pyarrow": pa.Table.from_pylist,
    "tensors": as_tensors,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_data_set_in_another_shape_is_the_same(shape: str, tmp_path: Path) -> None:
    assert excluded(tmp_path, SHAPES[shape](catalogue_rows())) == KNOWN


def test_a_data_set_of_no_known_shape_is_named(tmp_path: Path) -> None:
    rows = catalogue_rows()
    with pytest.raises(ValueError, match=r"^train_dataset: .* got a dict of one, other; give one"):
        trainer(tmp_path, {"one": rows, "other": rows}, **OPTIONS)
    with pytest.raises(ValueError, match=r"^train_dataset: expected columns of one length"):
        trainer(tmp_path, {"prompt": ["a"], "chosen": ["b", "c"]}, **OPTIONS)
    with pytest.raises(ValueError, match=r"^train_dataset: expected rows .* got int; make a list of it"):
        trainer(tmp_path, 3, **OPTIONS)


def test_histories_that_nothing_is_compared_with_are_refused(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k not in ("chosen_id", "rejected_ids")} for row in catalogue_rows()]
    with pytest.raises(ValueError, match=r"^train_dataset\[0\]\.history_ids: .*; give item ids in every row, or leave"):
        trainer(tmp_path, rows, **OPTIONS)
    for nothing in (float("nan"), np.float32("nan"), Decimal("nan"), pd.NA, pd.NaT):
        for row in rows:
            row.update(history_ids=None, chosen_id=None, rejected_ids=nothing)
        assert excluded(tmp_path, rows) == set()


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"chosen_id": None, "rejected_ids": None}, "chosen_id", "since other rows have item ids"),
        ({"rejected_ids": None}, "rejected_ids", "since other rows have item ids"),
        ({"rejected_ids": [1.0, 2.0]}, "rejected_ids", "as integers or strings, got 1.0"),
        ({"rejected_ids": [True, False]}, "rejected_ids", "as integers or strings, got True"),
        ({"rejected_ids": 7}, "rejected_ids", "a list of item ids, got 7"),
        ({"history_ids": "21"}, "history_ids", "a list of item ids, got '21'"),
        ({"history_ids": ["21"]}, "history_ids", "item ids as integers, like those before it, got '21'"),
    ],
)
def test_a_row_with_other_ids_is_named(
    change: dict[str, Any], field: str, words: str, place: int, tmp_path: Path
) -> None:
    rows = catalogue_rows()
    rows[place] |= change
    with pytest.raises(ValueError, match=r"^train_dataset") as error:
        trainer(tmp_path, rows, **OPTIONS)
    assert str(error.value).startswith(f"train_dataset[{place}].{field}: ")
    assert words in str(error.value)


@pytest.mark.parametrize("item", [-1, 25, 2**63])
def test_ids_that_index_item_vectors_are_in_range(item: int, tmp_path: Path) -> None:
    rows = catalogue_rows(lambda one: one % 25)
    rows[1]["rejected_ids"] = [3, item]
    with pytest.raises(
        ValueError, match=rf"^train_dataset\[1\]\.rejected_ids: expected item ids in \[0, 25\), .* got {item}"
    ):
        trainer(tmp_path, rows, granularity="pair", item_vectors=torch.randn(25, 2))
