"""What the trainer says about models whose own loss or forward has more in it than packed scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import make_rows, tiny_model, trainer
from transformers import LlamaForCausalLM


class Cool(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


def test_a_forward_of_somebody_else_is_not_passed_over(tmp_path: Path) -> None:
    model = tiny_model()
    model.__class__ = Cool
    rows = make_rows(4)
    with pytest.raises(
        ValueError, match=r"Cool with test_model_refusals\.Cool scores random titles .* set packed=False"
    ):
        trainer(tmp_path, rows, model, objective="softmax").train()
    run = trainer(tmp_path, rows, model, objective="softmax", packed=False)
    example = run.train_dataset[1]
    expected = []
    for answer in example.answers:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([example.prompt + answer])).logits[0, len(example.prompt) - 1 : -1]
        expected.append(float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()))
    with torch.no_grad():
        logps = run._scored(run.model, run.collator([example])["batch"])
    assert logps.tolist() == pytest.approx(expected, abs=1e-4)
    run.train()
