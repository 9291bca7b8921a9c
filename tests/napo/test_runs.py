from __future__ import annotations

from pathlib import Path

import pytest

from napo.files import content_hash
from napo.runs import Run, fingerprint


def quiet(_: str) -> None:
    pass


def test_finished_stage_is_skipped_until_inputs_or_outputs_change(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    calls = []

    def work(aside: Path) -> None:
        calls.append(1)
        (aside / "out").write_text("done")

    first = run.stage("a", work, inputs={"steps": 1}, outputs=["out"], say=quiet)
    assert run.stage("a", work, inputs={"steps": 1}, outputs=["out"], say=quiet) == first
    assert len(calls) == 1
    assert run.stage("a", work, inputs={"steps": 2}, outputs=["out"], say=quiet) != first
    (run.path / "out").unlink()
    run.stage("a", work, inputs={"steps": 2}, outputs=["out"], say=quiet)
    assert len(calls) == 3


def test_stage_that_died_is_redone_from_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)

    def dies(aside: Path) -> None:
        (aside / "out").mkdir()
        (aside / "out" / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage("a", dies, inputs={}, outputs=["out"], say=quiet)
    assert run.stamp("a") is None
    run.stage("a", lambda aside: (aside / "out").mkdir(), inputs={}, outputs=["out"], say=quiet)
    assert list((run.path / "out").iterdir()) == []


def test_stage_must_write_what_it_promises(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="without writing out"):
        Run(tmp_path).stage("a", lambda aside: None, inputs={}, outputs=["out"], say=quiet)


def test_a_path_counts_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("x")
    (tmp_path / "two").write_text("x")
    assert fingerprint({"f": tmp_path / "one"}) == fingerprint({"f": tmp_path / "two"})
    (tmp_path / "two").write_text("y")
    assert fingerprint({"f": tmp_path / "one"}) != fingerprint({"f": tmp_path / "two"})
    before = content_hash(tmp_path)
    (tmp_path / "two").rename(tmp_path / "three")
    assert content_hash(tmp_path) != before


def test_reading_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        Run(tmp_path, create=False)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json:1: not JSON"):
        _ = Run(tmp_path, create=False).config
