"""Where recommendations of a file may be written, and what is left where they are not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from napo.recommend import Recommender, check_files, recommend_file
from napo.runs import Run


@pytest.fixture(scope="module")
def recommender(demo_run: Run) -> Recommender:
    return Recommender.from_run(demo_run.path, model="sasrec")


@pytest.fixture
def given(tmp_path: Path) -> Path:
    path = tmp_path / "in.csv"
    path.write_text("user\n1\n")
    return path


@pytest.mark.parametrize("why", ["rows", "model", "interrupt"])
def test_folders_are_not_left_where_nothing_is_written(
    recommender: Recommender, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def broken(asked: Any) -> Any:
        raise KeyboardInterrupt if why == "interrupt" else OSError(5, "Input/output error", "weights")

    (tmp_path / "there").mkdir()
    out = tmp_path / "there" / "a" / "b" / "out.csv"
    if why == "rows":
        given.write_text("history\nAlien\n")
        expected, message = ValueError, "expected a title or an id"
    else:
        monkeypatch.setattr(recommender, "answer", broken)
        expected, message = (OSError, "weights") if why == "model" else (KeyboardInterrupt, "^$")  # type: ignore
    with pytest.raises(expected, match=message):
        recommend_file(recommender, given, out)
    assert [*(tmp_path / "there").iterdir()] == []
    monkeypatch.undo()
    given.write_text("user\n1\n")
    recommend_file(recommender, given, out)
    assert [path.name for path in out.parent.iterdir()] == ["out.csv"]


def test_files_of_a_run_and_of_data_are_not_replaced(demo_run: Run, given: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copyfile(demo_run.path / "config.json", run / "config.json")
    data = tmp_path / "prepared"
    data.mkdir()
    (data / "dataset.json").write_text("{}")
    link = tmp_path / "link.parquet"
    link.symlink_to(run / "interactions.parquet")
    (tmp_path / "other").symlink_to(run)
    for out in (
        run / "interactions.parquet",
        run / "models" / "napo" / "new" / "log.jsonl",
        run / "stages" / ".." / "users.parquet",
        tmp_path / "other" / "items.parquet",
        link,
        data / "train.parquet",
    ):
        with pytest.raises(ValueError, match=r"^out: .* would be among the files of the .*; give another place$"):
            check_files(given, out)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    for out in (run / "mine.parquet", run / "mine" / "items.parquet", data / "mine.csv", model / "items.parquet"):
        assert check_files(given, out) == out.suffix
