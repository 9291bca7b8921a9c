"""Training with a recorded body is training without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from trainer_cases import config, distance, make_rows, step_gradients, tiny_model, trainer

ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("pool", ["batch", "accumulated"])
@pytest.mark.parametrize("reference", [True, False])
def test_gradients_of_every_step(pool: str, reference: bool, tmp_path: Path, stand_in: Any) -> None:
    """Micro-batches of different shapes, some for the first time; weights that move; an evaluation between steps."""
    options: dict[str, Any] = {"max_steps": 5, "learning_rate": 0.5, "optim": "sgd", "peft_config": ADAPTER}
    options |= {"pool": pool, "objective": "sdpo" if reference else "napo", "gradient_accumulation_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": make_rows(4, seed=3)}
    rows = make_rows(16)
    plain = step_gradients(tmp_path / "plain", rows, **options)
    assert stand_in.recorded == 0
    graphed = step_gradients(tmp_path / "graphed", rows, cuda_graphs=True, **options)
    assert stand_in.recorded >= 2
    assert len(plain) == len(graphed) == 5
    for ours, theirs in zip(graphed, plain, strict=True):
        assert distance(ours, theirs) < 1e-4


def test_on_a_cpu_it_is_said(tmp_path: Path) -> None:
    assert not config(tmp_path).cuda_graphs
    with pytest.warns(RuntimeWarning, match="cuda_graphs: expected a model on a CUDA device, got cpu"):
        trainer(tmp_path, make_rows(4), tiny_model(), cuda_graphs=True).train()
