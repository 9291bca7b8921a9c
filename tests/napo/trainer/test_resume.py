"""A run that was killed at any moment and resumed ends with the same weights as an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from trainer_cases import make_rows, trainer
from transformers import TrainerCallback

DEATHS = ["step", "weights", "optimizer", "state", "before-rename", "after-rename"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("kills")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, str(here / "trainer_kills.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    report = json.loads((folder / "report.json").read_text())
    assert report["whole"] == 0, finished.stderr[-4000:]
    return folder, report


@pytest.mark.parametrize("death", DEATHS)
def test_resumed_weights_are_those_of_an_uninterrupted_run(death: str, runs: tuple[Path, dict[str, Any]]) -> None:
    folder, report = runs
    status = report["statuses"][death]
    told = f"{death}, random step {report['step']}: {status}"
    assert status["killed"] == -signal.SIGKILL, told
    assert status["resumed"] == 0, told
    whole, resumed = ((folder / name / "final" / "adapter_model.safetensors") for name in ("whole", death))
    assert whole.read_bytes() == resumed.read_bytes(), told
    if death in ("weights", "optimizer", "state"):  # mid-write: what is there is whole, the rest is aside
        assert status["left"] == ["checkpoint-2", "tmp-checkpoint"], told


def test_the_weights_compared_were_trained(runs: tuple[Path, dict[str, Any]]) -> None:
    weights = load_file(runs[0] / "whole" / "final" / "adapter_model.safetensors")
    assert all(bool(value.any()) for value in weights.values())
    assert not (runs[0] / "whole" / "tmp-checkpoint").exists()


def test_the_best_checkpoint_is_named_where_it_ends_up(tmp_path: Path) -> None:
    rows = make_rows(16)
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
    }
    run = trainer(
        tmp_path, rows, eval_dataset=rows, max_steps=6, learning_rate=1e-2, load_best_model_at_end=True, **options
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best == tmp_path / f"checkpoint-{run.state.best_global_step}"
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert not (tmp_path / "tmp-checkpoint").exists()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert run.state.best_global_step == min(losses, key=lambda step: losses[step])


SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("objective", ["napo", "softmax", "sdpo"])
def test_a_checkpoint_without_the_optimisers_state_is_not_resumed(objective: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {**SAVING, "save_only_model": True, "objective": objective}
    trainer(tmp_path, make_rows(8), **options).train()
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: expected a checkpoint with the optimiser's state"):
        trainer(tmp_path, make_rows(8), max_steps=2, **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ({"objective": "napo"}, {"objective": "softmax"}, "objective"),
        ({"objective": "softmax"}, {"objective": "napo"}, "objective"),
        ({"objective": "softmax"}, {"objective": "sdpo"}, "objective"),
        ({"objective": "simpo"}, {"objective": "simpo", "beta": 2.5}, "beta"),
        ({"objective": "softmax"}, {"objective": "softmax", "average": True}, "average"),
        ({"objective": "softmax"}, {"objective": "softmax", "sft_weight": 0.1}, "sft_weight"),
        ({"objective": "napo"}, {"objective": "napo", "pool": "accumulated"}, "pool"),
        ({"objective": "napo"}, {"objective": "napo", "granularity": "user"}, "granularity"),
    ],
)
def test_a_run_with_another_loss_is_not_resumed(
    first: dict[str, Any], second: dict[str, Any], name: str, tmp_path: Path
) -> None:
    trainer(tmp_path, make_rows(8), **SAVING, **first).train()
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, with which the run of .* began, got "):
        trainer(tmp_path, make_rows(8), max_steps=2, **SAVING, **second).train(resume_from_checkpoint=True)
    again = trainer(tmp_path, make_rows(8), max_steps=2, **SAVING, **first)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


@pytest.mark.parametrize("options", [{}, {"save_only_model": True}], ids=str)
def test_the_best_checkpoint_is_loaded_with_its_margin(options: dict[str, Any], tmp_path: Path) -> None:
    rows = make_rows(16)
    run = trainer(
        tmp_path,
        rows,
        eval_dataset=rows[:6],
        max_steps=4,
        learning_rate=0.5,
        optim="sgd",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        **options,
    )
    run.train()
    assert run.state.best_global_step < 4  # what is loaded is not what training ended with
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-6)


def test_a_best_checkpoint_that_is_gone_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = make_rows(16)
    run = trainer(
        tmp_path,
        rows,
        eval_dataset=rows[:6],
        max_steps=2,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        callbacks=[Removes()],
    )
    with caplog.at_level(logging.WARNING, logger="napo"):
        run.train()
    assert run.state.global_step == 2
    assert "has no margin.pt; the margin keeps the figures of the last step" in caplog.text


class Removes(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            shutil.rmtree(state.best_model_checkpoint)


def test_a_checkpoint_without_the_margin_is_not_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, make_rows(8), **SAVING).train()
    (tmp_path / "checkpoint-1" / "margin.pt").unlink()
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: expected a checkpoint with margin\.pt, got "):
        trainer(tmp_path, make_rows(8), max_steps=2, **SAVING).train(resume_from_checkpoint=True)
