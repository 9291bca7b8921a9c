"""SFT on packed rows: the gradient is that of the answers' tokens, example by example."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from trainer_cases import Gradients, distance, tiny_model
from transformers import TrainingArguments

from napo.finetuning.options import SFTOptions
from napo.finetuning.sft import Example, SFTCollator, SFTTrainer, _Examples
from napo.language_models.options import LoraOptions

END = 2
EXAMPLES: list[Example] = [
    ([1, 5, 6, 7, 8, 9], [10, 11, END]),
    ([1, 12], [13, END]),
    ([1, 5, 6], [14, 15, 16, 17, END]),  # begins like the first
    ([1, 18, 19, 20], [END]),
    ([1, 21, 22, 23, 24], [25, 26, END]),
    ([1, 27], [28, 29, END]),
]


def oracle(first_target: int | None) -> dict[str, Tensor]:
    """Cross-entropy of the examples one by one, from its answer's first token on, or from token ``first_target`` on."""
    model, total, count = tiny_model(), 0.0, 0
    for prompt, answer in EXAMPLES:
        ids = torch.tensor(prompt + answer)
        start = len(prompt) if first_target is None else first_target
        logits = model(ids[None]).logits[0, start - 1 : -1].double()
        total = total + cross_entropy(logits, ids[start:], reduction="sum")
        count += len(ids) - start
    assert isinstance(total, Tensor)
    (total / count).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_is_that_of_the_answers_alone(tmp_path: Path) -> None:
    kept, collate = Gradients(), SFTCollator(pad_id=0, max_length=32, keep_prefix=0)
    run = SFTTrainer(
        model=tiny_model(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            per_device_train_batch_size=len(EXAMPLES),
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=_Examples(EXAMPLES),
        data_collator=collate,
        callbacks=[kept],
    )
    run.train()
    packed = collate(EXAMPLES)["packed"]
    assert packed.input_ids.shape[0] < len(EXAMPLES)  # several a row
    assert sorted(packed.targets.tolist()) == sorted(token for _, answer in EXAMPLES for token in answer)
    assert distance(kept.steps[0], oracle(None)) < 1e-5
    assert distance(kept.steps[0], oracle(1)) > 1e-3  # with the prompts' tokens it is another


def test_options_that_change_nothing_are_said() -> None:
    assert SFTOptions(window=5, history=3).without_effect("history", None) is None
    assert SFTOptions(loss_on="titles", min_history=2).without_effect("history", None) is None
    assert SFTOptions(loss_on="answer", window=5, min_history=2).without_effect("history", None) == (
        "window: 5 has no effect with loss_on 'answer', but with 'sequences'; "
        "min_history: 2 has no effect with loss_on 'answer', but with 'titles'"
    )
    assert SFTOptions(history=3).without_effect("candidates", None) == (
        "history: 3 has no effect with loss_on 'answer', but with 'sequences'"
    )
    lines = SFTOptions(tokens=100, epochs=2.0, lora=LoraOptions(r=3)).without_effect("history", "sft")
    assert lines == (
        "epochs: 2 has no effect with tokens; "
        "lora: has no effect with --init-from, the adapter of sft is trained on as it is"
    )
