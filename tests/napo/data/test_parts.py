"""A log that does not fit into memory goes through files part by part, to the same data set."""

from __future__ import annotations

import os
from pathlib import Path

import data_files
import numpy as np
import pandas as pd
import pytest
from data_files import prepare

from napo.data import parts, writing
from napo.data.parts import Parts
from napo.data.split_kinds import SPLIT_KINDS

TABLES = ("interactions", "items", "users", "train", "val", "test")


def shuffled(fractions: bool) -> list[tuple]:
    """Users in turn, times out of order, ties, and items met twice."""
    rows = [(u, i, t + (0.25 * u if fractions else 0)) for u, i, t in data_files.log(users=40, length=15)]
    rows += [(u, i, t - 7) for u, i, t in rows[::5]] + [(u, (i + 1) % data_files.ITEMS, t) for u, i, t in rows[::4]]
    return [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]


@pytest.mark.parametrize("split", SPLIT_KINDS)
@pytest.mark.parametrize("fractions", [False, True])
@pytest.mark.parametrize("size", [23, 250])
def test_parts_give_what_the_whole_gives(
    size: int, split: str, fractions: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    data_files.csv(folder, shuffled(fractions))
    options = {"split": split, "rows_per_user": 2, "min_item": 8}
    whole = prepare("csv", folder, tmp_path / "whole", **options)
    monkeypatch.setattr(parts, "PART", size)
    monkeypatch.setattr(writing, "CHUNK_IDS", 500)
    cut = prepare("csv", folder, tmp_path / "cut", **options)
    for name in TABLES:
        one, other = (pd.read_parquet(tmp_path / out / f"{name}.parquet") for out in ("whole", "cut"))
        pd.testing.assert_frame_equal(one, other)
    assert whole.meta == cut.meta
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "in", "whole"]


def test_one_part_stays_in_memory_and_more_lie_in_the_folder(tmp_path: Path) -> None:
    token = parts.scratch.set(tmp_path)
    try:
        one = Parts()
        one.append([np.arange(3)], last=True)
        assert not os.listdir(tmp_path)
        more = Parts()
        more.append([np.arange(3)])
        more.append([np.arange(2), np.ones(2)], last=True)
        assert len(os.listdir(tmp_path)) == 1
        assert [column.tolist() for column in more.load(0)] == [[0, 1, 2], [0, 0, 0]]
        more.store(0, [np.arange(1)])
        assert more.sizes == [1, 2] and more.load(0, range(1))[0].tolist() == [0]
        more.close()
        assert not os.listdir(tmp_path)
    finally:
        parts.scratch.reset(token)
