"""The reference's log-probabilities: from the adapter switched off, or computed once and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainer_cases import distance, make_rows, step_gradients, tiny_model, trainer

import napo.trainer.references as references

ROWS = make_rows(12)
FRESH = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("objective", ["sdpo", "dmpo"])
def test_precomputed_equals_adapter_switched_off(objective: str, tmp_path: Path) -> None:
    """Over steps that move the adapter away from the reference, micro-batches and accumulated pools alike."""
    options: dict[str, Any] = {"objective": objective, "max_steps": 3, "learning_rate": 0.5, "optim": "sgd"}
    for pool in ("batch", "accumulated"):
        options |= {"pool": pool, "gradient_accumulation_steps": 1 if pool == "batch" else 2, "peft_config": FRESH}
        kept = step_gradients(tmp_path / pool / "kept", ROWS, precompute_ref_log_probs=True, **options)
        switched = step_gradients(tmp_path / pool / "switched", ROWS, precompute_ref_log_probs=False, **options)
        for a, b in zip(kept, switched, strict=True):
            assert distance(a, b) < 1e-4


def test_the_cache_is_for_these_weights_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    replacing = references.replacing
    monkeypatch.setattr(references, "replacing", lambda path: written.append(path) or replacing(path))

    def run(rows: list[dict[str, Any]], seed: int) -> Any:
        model = get_peft_model(tiny_model(), FRESH)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        made = trainer(tmp_path, rows, model, objective="sdpo")
        made.train()
        return made.train_dataset.ref_logps

    def files() -> list[Path]:
        return [path for path in written if path.name.startswith("ref_logps")]

    first = run(ROWS, seed=1)  # a trained adapter: precomputed without being asked to
    assert len(files()) == 1
    again = run(ROWS, seed=1)
    assert len(files()) == 1
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    other = run(ROWS, seed=2)
    assert len(files()) == 2
    assert not np.allclose(other[0], first[0])
    run(make_rows(12, seed=5), seed=1)
    assert len(set(files())) == 3


def test_resuming_takes_the_model_that_the_run_began_with(tmp_path: Path) -> None:
    """Given the trained one, the reference would be another without anybody's noticing."""
    options: dict[str, Any] = {"objective": "sdpo", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path, ROWS, max_steps=1, **options)
    run.train()
    with pytest.raises(ValueError, match=r"^model: expected the weights that the run of .* began with"):
        trainer(tmp_path, ROWS, run.model, max_steps=2, **options).train(resume_from_checkpoint=True)
    again = trainer(tmp_path, ROWS, max_steps=2, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_resuming_takes_any_fresh_adapter(tmp_path: Path) -> None:
    """Its first matrix is drawn anew in each process; the reference is the model below it, as it does nothing yet."""
    options: dict[str, Any] = {"objective": "sdpo", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    options["precompute_ref_log_probs"] = True
    for steps in (1, 2):
        base = tiny_model()
        torch.manual_seed(steps)
        run = trainer(tmp_path, ROWS, get_peft_model(base, FRESH), max_steps=steps, **options)
        run.train(resume_from_checkpoint=steps > 1)
    assert run.state.global_step == 2
    with pytest.raises(ValueError, match=r"^model: expected the weights that the run of .* began with"):
        trainer(tmp_path, ROWS, run.model, max_steps=3, **options).train(resume_from_checkpoint=True)
