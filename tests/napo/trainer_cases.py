"""Shared by the trainer's tests: a tiny model, its tokenizer, rows, and how to take a step's gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from napo.trainer import NAPOConfig, NAPOTrainer

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character."""
    words = ["<pad>", "<s>", "</s>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny_model(dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    # Weights ten times the usual, so that log-probabilities differ enough to matter.
    model = LlamaForCausalLM(LlamaConfig(initializer_range=0.2, **{"vocab_size": 48, **sizes, **config}))
    return model.to(dtype)


def make_rows(
    count: int, negatives: int = 3, *, items: int = 30, ragged: bool = True, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows with all fields; two rows per user, and histories long enough to make false negatives."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        n = negatives - (number % 2 if ragged else 0)
        chosen, *rejected = (int(item) for item in rng.choice(items, 1 + n, replace=False))
        rows.append(
            {
                "prompt": "watched " + "ab " * (number % 4),
                "chosen": title(chosen),
                "rejected": [title(item) for item in rejected],
                "user_id": f"u{number // 2}",
                "user_state": rng.normal(size=4).tolist(),
                "rejected_scores": rng.normal(size=n).tolist(),
                "chosen_id": chosen,
                "rejected_ids": rejected,
                "history_ids": [int(item) for item in rng.choice(items, 5, replace=False)],
            }
        )
    return rows


def title(item: int) -> str:
    return f"t{item}" + "x" * (item % 3)


def config(folder: Path | str, **options: Any) -> NAPOConfig:
    """Deterministic, on the CPU, rows in order, no clipping, nothing saved unless asked for."""
    defaults = {
        "objective": "napo",
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 0.0,
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
    }
    return NAPOConfig(output_dir=str(folder), **{**defaults, **options})


def trainer(folder: Path | str, rows: Any, model: nn.Module | None = None, **options: Any) -> NAPOTrainer:
    extra = {
        name: options.pop(name)
        for name in ("callbacks", "peft_config", "item_vectors", "item_bias", "eval_dataset", "compute_metrics", "trie")
        if name in options
    }
    model = tiny_model() if model is None else model
    tokenizer = options.pop("processing_class", None) or tiny_tokenizer()
    return NAPOTrainer(model, config(folder, **options), train_dataset=rows, processing_class=tokenizer, **extra)


class Gradients(TrainerCallback):
    """Keeps the gradient of every parameter at every optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        assert model is not None
        named = model.named_parameters()
        self.steps.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})


def step_gradients(folder: Path | str, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Tensor]]:
    kept = Gradients()
    trainer(folder, rows, callbacks=[kept], **options).train()
    return kept.steps


def own_logps(model: nn.Module, example: Any) -> list[float]:
    """The log-probability of each answer of an encoded row by the model's own forward, alone behind the prompt."""
    found = []
    for answer in example.answers:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([example.prompt + answer])).logits[0, len(example.prompt) - 1 : -1]
        found.append(float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()))
    return found


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two gradients, in units of the largest entry."""
    assert a.keys() == b.keys()
    scale = max(float(grad.abs().max()) for grad in b.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / scale
