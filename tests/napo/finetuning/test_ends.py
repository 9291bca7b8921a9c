"""How a training ends: what is kept where it was killed, moved, or came to numbers that are not finite."""

from __future__ import annotations

import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from napo import signals
from napo.data.prepared import PreparedData
from napo.files import read_json
from napo.finetuning import callbacks, settings, sft
from napo.finetuning.options import PreferenceOptions, SFTOptions
from napo.finetuning.preferences import train_preferences
from napo.finetuning.settings import steps_of
from napo.finetuning.sft import SFTTrainer, train_sft
from napo.recommenders.options import SASRecOptions
from napo.recommenders.sasrec import SASRec
from napo.runs import Run
from napo.signals import Stopped
from napo.stages import sft_stage

RISES: dict[str, Any] = {"tokens": 3_000, "window": 8, "evaluations": 8, "val_examples": 8, "learning_rate": 0.5}
"""A training whose validation loss is best long before its end."""


def evaluated(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["eval_loss"]) for row in read_json(folder / "log_history.json") if "eval_loss" in row]


def assert_same_weights(one: Path, other: Path) -> None:
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())


def test_a_training_that_had_ended_early_does_not_go_on(
    small_world: Path, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind its last checkpoint, it used to train on and end in other weights."""
    model, options = str(small_world / "model"), SFTOptions(**RISES, patience=2)
    whole = train_sft(data, tmp_path / "whole", options, model=model)
    assert len(evaluated(whole)) < 8

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(settings, "replacing", killed)
        with pytest.raises(KeyboardInterrupt):
            train_sft(data, tmp_path / "killed", options, model=model)
    again = train_sft(data, tmp_path / "killed", options, model=model, resume=True)
    assert evaluated(again) == evaluated(whole)
    assert_same_weights(again, whole)


def test_the_best_is_found_where_the_folder_was_moved(
    small_world: Path, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of a checkpoint names the best one by its path; where that was gone, the last weights were taken."""
    model, options = str(small_world / "model"), SFTOptions(**RISES | {"learning_rate": 0.05}, patience=8)
    whole = train_sft(data, tmp_path / "whole", options, model=model)
    best, _ = min(evaluated(whole), key=lambda one: one[1])
    assert best < evaluated(whole)[-2][0]
    steps = iter(range(1, 1000))
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "stop_asked", lambda: next(steps) == best + 1)
        with pytest.raises(Stopped):
            train_sft(data, tmp_path / "before", options, model=model)
    (tmp_path / "before").rename(tmp_path / "behind")
    checkpoint = tmp_path / "behind" / "models" / ".sft.work" / f"checkpoint-{best + 1}"
    for rank in range(2):  # as if two had begun
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    with pytest.raises(ValueError, match=r"ranks: expected 2, with which the training of \S+ began, got 1; start as"):
        train_sft(data, tmp_path / "behind", options, model=model, resume=True)
    for rank in range(2):
        (checkpoint / f"rng_state_{rank}.pth").unlink()
    again = train_sft(data, tmp_path / "behind", options, model=model, resume=True)
    assert evaluated(again) == evaluated(whole)
    assert_same_weights(again, whole)


@pytest.mark.parametrize("val_examples", [0, 8])
def test_numbers_that_are_not_finite_are_no_model(
    small_world: Path, data: PreparedData, tmp_path: Path, val_examples: int
) -> None:
    model = str(small_world / "model")
    options = SFTOptions(**RISES | {"learning_rate": 1e30, "val_examples": val_examples})
    with pytest.raises(
        ValueError, match=r"loss: expected a finite one, got nan in or .*; lower learning_rate, .* 1e\+30"
    ):
        train_sft(data, tmp_path, options, model=model)
    assert not (tmp_path / "models" / "sft").exists()


def test_a_last_step_to_numbers_that_are_not_finite_is_said(
    small_world: Path, data: PreparedData, tmp_path: Path
) -> None:
    """The loss of every step was finite; nobody computed the one behind the last."""
    model = str(small_world / "model")
    SASRec(data.num_items, SASRecOptions(dim=8)).save(tmp_path / "sasrec")
    train_sft(data, tmp_path, SFTOptions(examples=8, val_examples=0), model=model)
    options = PreferenceOptions(prefixes=False, users=16, batch_size=8, learning_rate=1e39, max_grad_norm=0.0)
    with pytest.raises(ValueError, match=r"learning_rate: with 1e\+39 .* became numbers that are not finite"):
        train_preferences(data, tmp_path, options, model=model)
    assert not (tmp_path / "models" / "napo").exists()


def test_every_example_has_its_turn() -> None:
    """11 rows in steps of 8 used to be one step: 3 rows were left out, and nothing said so."""
    assert [steps_of(1.0, count, 8) for count in (1, 8, 9, 11, 16)] == [1, 1, 2, 2, 2]
    assert [steps_of(epochs, 10, 4) for epochs in (0.01, 0.4, 0.5, 1.0, 2.0, 2.2)] == [1, 1, 2, 3, 6, 7]
    assert steps_of(0.3, 100, 10) == 3


@pytest.mark.parametrize("limited", [None, 60.0])
def test_a_training_of_one_step_learns(
    small_world: Path, data: PreparedData, tmp_path: Path, limited: float | None
) -> None:
    """The rate rose from 0 in its first step, which was the only one: the adapter was the untrained one."""
    options = SFTOptions(examples=3, val_examples=0, max_minutes=limited)
    trained = train_sft(data, tmp_path, options, model=str(small_world / "model"))
    weights = load_file(trained / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in weights.items() if ".lora_B." in name)


def test_checkpoints_stay_until_the_model_is_in_its_place(
    small_world: Path, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the end of the training and the stamp of its stage, all of it used to be done again."""
    run, steps = Run(tmp_path / "run"), []
    step, keep = SFTTrainer.training_step, Run._keep

    def counted(trainer: SFTTrainer, *rest: Any, **more: Any) -> Any:
        steps.append(1)
        return step(trainer, *rest, **more)

    def killed(*rest: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    def stage() -> None:
        options = {"examples": 16, "val_examples": 4}
        sft_stage(run, data, model=str(small_world / "model"), style="history", seed=0, options=options)

    monkeypatch.setattr(SFTTrainer, "training_step", counted)
    monkeypatch.setattr(Run, "_keep", killed)
    with pytest.raises(KeyboardInterrupt):
        stage()
    monkeypatch.setattr(Run, "_keep", keep)
    assert len(steps) == 4
    stage()
    assert len(steps) == 4 and (run.path / "models" / "sft" / "origin.json").is_file()
    assert not (run.path / ".working").exists()


def test_a_training_goes_on_in_the_dtype_that_it_began_in(
    small_world: Path, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """``auto`` may be another one on another machine, where a folder was copied to."""
    model, options = str(small_world / "model"), SFTOptions(tokens=600, window=8, evaluations=2, val_examples=8)
    seen = []
    loaded = sft.load_model

    def watched(*arguments: Any, **more: Any) -> Any:
        model, tokenizer = loaded(*arguments, **more)
        seen.append(next(model.parameters()).dtype)
        return model, tokenizer

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "load_model", watched)
    monkeypatch.setenv("NAPO_DTYPE", "bf16")
    with monkeypatch.context() as patch:
        patch.setattr(settings, "replacing", killed)
        with pytest.raises(KeyboardInterrupt):
            train_sft(data, tmp_path / "run", options, model=model)
    monkeypatch.setenv("NAPO_DTYPE", "fp32")
    train_sft(data, tmp_path / "run", options, model=model, resume=True)
    train_sft(data, tmp_path / "other", options, model=model)
    train_sft(data, tmp_path / "half", replace(options, dtype="fp16"), model=model)
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float16]
    said = capsys.readouterr().out
    assert said.count("without loss scaling") == 1


def test_an_end_by_time_is_said_and_only_what_was_trained_is_noted(
    small_world: Path, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It used to end without a word, and its budget was that of the plan."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: 0.01 * next(ticks)))
    options = SFTOptions(tokens=3_000, window=8, val_examples=0, batch_size=4, max_minutes=0.002)
    trained = train_sft(data, tmp_path, options, model=str(small_world / "model"))
    steps, spent = read_json(trained / "steps.json"), read_json(trained / "budget.json")
    assert 1 < steps["done"] < steps["planned"]
    said = capsys.readouterr().out
    assert said.count(f"sft: --max-minutes ended the training after step {steps['done']} of {steps['planned']}\n") == 1
    assert spent["windows"] == 4 * steps["done"]
    assert 0.5 < (spent["tokens"] / 3_000) / (steps["done"] / steps["planned"]) < 1.5


@pytest.mark.parametrize("val_examples", [0, 8])
def test_a_training_whose_only_step_had_no_rate_is_no_model(
    small_world: Path, data: PreparedData, tmp_path: Path, val_examples: int
) -> None:
    options = SFTOptions(tokens=3_000, window=8, val_examples=val_examples, max_minutes=1e-6)
    with pytest.raises(ValueError, match=r"max_minutes: 1e-06 ended the training after step 1 of \d+, .*; raise it"):
        train_sft(data, tmp_path, options, model=str(small_world / "model"))
    assert not list((tmp_path / "models").iterdir())
    once = replace(options, warmup=0.0)  # whose first step has the whole rate
    assert read_json(train_sft(data, tmp_path, once, model=str(small_world / "model")) / "steps.json")["done"] == 1


def test_signals_are_answered_at_once_and_say_what_is_lost(
    small_world: Path, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The first was acknowledged when its step had ended, so that people pressed again; then what was lost was "kept",
    and the bar was still drawn."""
    bars: list[Any] = []
    said: list[str] = []
    step = SFTTrainer.training_step

    def interrupted(trainer: SFTTrainer, *rest: Any, **more: Any) -> Any:
        if trainer.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            said.append(capfd.readouterr().err)
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, *rest, **more)

    class Watched(callbacks.BarCallback):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.stack.callback(bars.append, "closed")

    def train(folder: str, **options: Any) -> Stopped:
        monkeypatch.setattr(signals, "_asked", None)
        with pytest.raises(Stopped) as stopped:
            options = {"tokens": 3_000, "window": 8, "val_examples": 8, "learning_rate": 0.5, **options}
            train_sft(data, tmp_path / folder, SFTOptions(**options), model=str(small_world / "model"))
        return stopped.value

    monkeypatch.setattr(SFTTrainer, "training_step", interrupted)
    monkeypatch.setattr(settings, "BarCallback", Watched)
    before = signal.signal(signal.SIGINT, signals._stop)
    try:
        none, some = train("none", evaluations=1), train("some", evaluations=12)
    finally:
        signal.signal(signal.SIGINT, before)
    for one in said:
        assert one.endswith("sft: stopping: saves after this step; Ctrl-C again stops without saving\n")
    assert bars == ["closed", "closed"] and len(said) == 2
    assert none.lost == "sft begins at the first step again"
    assert re.fullmatch(r"sft goes on after step [123] of \d+", str(some.lost))
