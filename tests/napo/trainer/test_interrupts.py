"""What is interrupted, or begun anew, leaves nothing behind that moves what comes after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import Gradients, distance, make_rows, trainer

ROWS = make_rows(16)
ACCUMULATED: dict[str, Any] = {"pool": "accumulated", "gradient_accumulation_steps": 2}


def fail_at(run: Any, number: int, error: Callable[[], BaseException]) -> None:
    """The backward of that number raises ``error()``, once."""
    own, calls = run.accelerator.backward, [0]

    def backward(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            raise error()
        return own(*args, **kwargs)

    run.accelerator.backward = backward


def test_an_interrupted_evaluation_leaves_the_margin_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, ROWS, eval_dataset=ROWS)
    with monkeypatch.context() as patched:
        patched.setattr(run, "_losses", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.evaluate()
    assert run.margin is not None and run.margin.training
    run.margin.eval()  # by whomever
    run.train()
    assert run.margin.initialized


@pytest.mark.parametrize("options", [ACCUMULATED, {"gradient_accumulation_steps": 2}], ids=["accumulated", "batch"])
@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_step_is_forgotten(options: dict[str, Any], at: int, tmp_path: Path) -> None:
    steps, margins = [], []
    for name in ("whole", "interrupted"):
        kept = Gradients()
        run = trainer(tmp_path / name, ROWS, callbacks=[kept], **options)
        if name == "interrupted":
            fail_at(run, at, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                run.train()
        run.train()
        steps.append(kept.steps[-1])
        margins.append(float(run.margin.mean))
    assert distance(*steps) < 1e-6
    assert margins[0] == pytest.approx(margins[1], abs=1e-6)


def test_a_batch_size_that_is_found_begins_anew(tmp_path: Path) -> None:
    """Every try has the micro-batches and the figures of its own."""
    run = trainer(tmp_path, ROWS, **ACCUMULATED, auto_find_batch_size=True)
    fail_at(run, 2, lambda: torch.OutOfMemoryError("CUDA out of memory."))
    run.train()
    (logged,) = [entry for entry in run.state.log_history if "loss" in entry]
    again = trainer(tmp_path / "again", ROWS, **ACCUMULATED, per_device_train_batch_size=run._train_batch_size)
    again.train()
    (alone,) = [entry for entry in again.state.log_history if "loss" in entry]
    assert run._train_batch_size < 4
    assert all(scorer.model in (run.model, run.model_wrapped) for scorer in run._scorers.values())
    assert logged["pool_size"] == alone["pool_size"]
    assert logged["loss"] == pytest.approx(alone["loss"], abs=1e-6)
