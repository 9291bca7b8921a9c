from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import small_world as worlds
from command_calls import Call

from napo.data.prepare import PrepareOptions, prepare
from napo.demo import MODELS, Budget, demo
from napo.evaluation.report.contents import Contents
from napo.files import content_hash, file_hashes, read_json, write_json
from napo.runs import Run, sealed
from napo.stages import require_compiled

TIMES = ("seconds",)


def figures(run: Run) -> list[dict[str, Any]]:
    """metrics.json without what a clock says."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_json(run.path / "metrics.json")]


def test_run_folder_is_complete(demo_run: Run) -> None:
    records = read_json(demo_run.path / "metrics.json")
    assert [record["model"] for record in records] == list(MODELS)
    for record in records:
        assert record["n"] == 30 and 0 <= record["hr@1_ci"][0] <= record["hr@1"] <= record["hr@1_ci"][1] <= 1
        assert record["lists_sha256"] == records[0]["lists_sha256"]
    for record in records:
        generates = record["model"] in ("sft", "sft-longer", "napo")
        assert generates == ({"hr@1_greedy", "valid_ratio", "hr@1_trie"} <= record.keys())
    for name in ("sft", "napo", "sft-longer"):
        assert (demo_run.path / "models" / name / "adapter_model.safetensors").is_file()
        assert not (demo_run.path / "models" / name / "README.md").exists(), "PEFT's form, which nobody filled in"
    assert "<svg" in (demo_run.path / "report.html").read_text()
    assert "Paired differences" in (demo_run.path / "report.md").read_text()
    assert len(pd.read_parquet(demo_run.path / "items.parquet")) == 60
    pairs = {(pair["model"], pair["other"]) for pair in read_json(demo_run.path / "comparisons.json")}
    assert {("napo", "sft"), ("napo", "sft-longer"), ("napo", "sasrec"), ("napo+sasrec", "sasrec")} <= pairs


def test_training_shows_in_the_log(demo_run: Run) -> None:
    sft, napo = (read_json(demo_run.path / "models" / name / "log_history.json") for name in ("sft", "napo"))
    validation = [entry["eval_loss"] for entry in sft if "eval_loss" in entry]
    assert validation[-1] < validation[0]
    steps = [entry for entry in napo if "loss" in entry]
    assert steps and all({"gamma", "rewards/margins"} <= entry.keys() for entry in steps)


def test_compiled_kernels_trained_it(demo_run: Run) -> None:
    ran = read_json(demo_run.path / "models" / "napo" / "kernels.json")
    for op in ("shared_negatives", "napo_loss"):
        assert list(ran[op]) == ["cpu"] and ran[op]["cpu"] > 0


def test_demo_stops_without_the_compiled_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["napo_kernels.dispatch"], "why_not", lambda name: "not built")
    with pytest.raises(ValueError, match=r"C\+\+ kernels are not available: not built"):
        demo(tmp_path / "run", source=tmp_path)
    monkeypatch.undo()
    run = Run(tmp_path)
    counts = {"shared_negatives": {"cpu": 9}, "napo_loss": {"reference": 9}}
    write_json(tmp_path / "models" / "napo" / "kernels.json", counts)
    with pytest.raises(ValueError, match=r"napo_loss: expected the C\+\+ kernel .* it ran on reference"):
        require_compiled(run)


def test_killed_demo_continues_and_ends_in_the_same_metrics(
    demo_run: Run, small_world: Path, small_budget: Budget, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"model": str(small_world / "model"), "source": str(small_world / "files")}
    code = (
        "import small_world; from napo.demo import demo; "
        f"demo({str(tmp_path)!r}, budget=small_world.budget(), **{arguments})"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    child = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        stamp = tmp_path / "stages" / "sft.json"
        # Without a fingerprint its outputs are still being put in place; with one the next stage is about to begin.
        while not (stamp.is_file() and "fingerprint" in read_json(stamp)):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "metrics.json").exists()
    capsys.readouterr()
    run = demo(tmp_path, budget=small_budget, **arguments)
    said = capsys.readouterr().out
    for stage in ("prepare", "sasrec", "sft"):
        assert f"{stage}: finished before" in said
    assert "evaluate-napo: finished before" not in said
    assert figures(run) == figures(demo_run)
    assert json.dumps(read_json(run.path / "comparisons.json")) == json.dumps(
        read_json(demo_run.path / "comparisons.json")
    )


def test_another_seed_is_another_run(demo_run: Run, small_world: Path, small_budget: Budget, tmp_path: Path) -> None:
    run = demo(
        tmp_path / "run", seed=1, model=str(small_world / "model"), source=small_world / "files", budget=small_budget
    )
    theirs, ours = figures(demo_run), figures(run)
    assert ours[0]["lists_sha256"] == theirs[0]["lists_sha256"]  # the same users and lists, so that seeds compare
    scores = [
        pd.read_parquet(r.path / "predictions" / "napo.parquet")["scores"].map(list).tolist() for r in (demo_run, run)
    ]
    assert scores[0] != scores[1]


def test_overwrite_goes_for_figures_of_fewer_rows_too(
    demo_run: Run, small_world: Path, small_budget: Budget, tmp_path: Path
) -> None:
    shutil.copytree(demo_run.path, tmp_path / "run")
    fewer = replace(small_budget, evaluate=replace(small_budget.evaluate, limit=5))
    arguments: dict[str, Any] = {"model": str(small_world / "model"), "source": small_world / "files", "budget": fewer}
    with pytest.raises(ValueError, match=r"5 rows of test would replace figures .* pass --overwrite"):
        demo(tmp_path / "run", **arguments)
    assert {record["n"] for record in figures(demo(tmp_path / "run", overwrite=True, **arguments))} == {5}


def test_a_tokenizer_that_cannot_write_the_titles_is_found_before_sasrec_has_run(
    small_world: Path, small_budget: Budget, tmp_path: Path
) -> None:
    lossy = worlds.lossy_model(tmp_path / "lossy")
    with pytest.raises(ValueError, match=r"^tokenizer: .* each of 60 titles, got 60 titles that"):
        demo(tmp_path / "run", model=str(lossy), source=small_world / "files", budget=small_budget)
    assert [path.stem for path in (tmp_path / "run" / "stages").iterdir()] == ["prepare"]


def test_a_source_with_too_few_users_is_named(napo: Call, small_world: Path, tmp_path: Path) -> None:
    assert "more than 500 users" in " ".join(napo("demo", "--help")[1].split())
    with pytest.raises(ValueError, match=r"^source: expected more than 500 users .* got \d+ in .*; take a larger"):
        demo(tmp_path / "run", model=str(small_world / "model"), source=small_world / "files")


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source: no such folder"):
        demo(tmp_path / "run", source=tmp_path / "nothing")


def all_files(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_a_run_of_other_data_is_refused_before_anything_is_written(
    small_world: Path, small_budget: Budget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = prepare("recbole", small_world / "files", tmp_path / "data dir" / "shop", PrepareOptions(seed=5))
    monkeypatch.chdir(tmp_path)
    run = Run("runs/shop")
    run.adopt(shop.path, run.check_data(shop.path))
    before = all_files(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError) as caught:
            demo(run.path, source=small_world / "files", budget=small_budget, overwrite=overwrite)
        said = str(caught.value)
        assert said.startswith("data: runs/shop was made with data dir/shop as it was then (sha256 "), said
        assert f"{small_world / 'files'} is other data" in said and "\n" not in said
        assert all_files(tmp_path) == before
    assert "dataset" not in run.config


def test_a_finished_demo_keeps_its_data_where_another_source_is_given(
    demo_run: Run, small_world: Path, small_budget: Budget, tmp_path: Path
) -> None:
    shutil.copytree(demo_run.path, tmp_path / "run")
    before = all_files(tmp_path / "run")
    other = worlds.recbole_files(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"run was made with .*run/data as it was then .*; .*other is other data"):
        demo(tmp_path / "run", source=other, budget=small_budget)
    assert all_files(tmp_path / "run") == before


def test_the_name_of_other_data_that_a_demo_left_is_not_that_of_the_run(demo_run: Run, tmp_path: Path) -> None:
    """As an older napo left it in a run that it refused: name, data and stamp."""
    assert Contents.of(demo_run).dataset == "files"
    shutil.copytree(demo_run.path, tmp_path / "run")
    other = tmp_path / "run" / "data"
    shutil.move(other, tmp_path / "shop")
    other.mkdir()
    (other / "dataset.json").write_text("{}\n")
    stamp = read_json(tmp_path / "run" / "stages" / "prepare.json")
    stamp |= {"outputs": {"data": content_hash(other)}, "files": file_hashes(other)}
    write_json(tmp_path / "run" / "stages" / "prepare.json", sealed(stamp))
    run = Run(tmp_path / "run")
    run.configure(dataset="MovieLens-100K", data="../shop")
    assert Contents.of(run).dataset == "shop"
