"""Run by test_trainer_pool on two gloo processes: trains in every way that is compared with one process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trainer_cases import make_rows, tiny_model, trainer
from transformers import set_seed

from napo.scoring.scorer import causal_lm_of
from napo.trainer.rows import Encoder
from napo_kernels import DynamicMargin

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 5,
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
}
LORA: dict[str, Any] = {
    "objective": "sdpo",  # its reference is the adapter switched off
    "rho": 0.7,
    "peft_config": LoraConfig(r=4, target_modules="all-linear"),
}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-accumulated": {"pool": "accumulated", "gradient_accumulation_steps": 2},
    "ddp-pair": {"granularity": "pair", "standardize": True, "gradient_accumulation_steps": 1},
    "ddp-apart": {"pool_ranks": False},
    "filled-13": {},
    "filled-12": {"objective": "napo", "sft_weight": 0.1},
    "filled-18": {"granularity": "pair", "standardize": True, "gradient_accumulation_steps": 1},
    "filled-21": {"pool": "accumulated", "gradient_accumulation_steps": 2},
    "filled-20": {"objective": "softmax", "gradient_accumulation_steps": 2},
    "filled-19": {**LORA, "shared_gradient": False},
    "filled-resumed-14": {"save_strategy": "steps", "save_steps": 3},
    "authors": {"authors_compat": True, "learning_rate": 0.0},
    "ddp-resumed": {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3},
    "ddp-lora": LORA,
    "ddp-kept": {"cache_rows": True},
    "ddp-precomputed": {**LORA, "precompute_ref_log_probs": True},
    "fsdp2": {},
    "fsdp2-lora": LORA,
    "fsdp2-accumulated": {"pool": "accumulated", "gradient_accumulation_steps": 2},
}

if Version(transformers.__version__) < Version("5.23"):  # whose ranks on CPUs cannot load an optimizer's state
    del WAYS["ddp-resumed"]


def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(40, 4, generator=generator), torch.randn(40, generator=generator)


def rows_of_ranks(name: str) -> list[dict[str, Any]]:
    """The number in a name is that of the rows, which two ranks with four each cannot share evenly."""
    count = int(name.rpartition("-")[2]) if name.startswith("filled") else 80
    return make_rows(count, items=40, ragged=name != "authors")


def losses(name: str, folder: Path) -> list[float]:
    model = tiny_model()
    options = {**COMMON, **WAYS[name]}
    if options.get("granularity") == "pair":
        options["item_vectors"], options["item_bias"] = vectors()
    if name.startswith("fsdp2"):
        if "peft_config" in options:  # as the trainer makes it
            set_seed(42)
            model = get_peft_model(model, options.pop("peft_config"))
        for layer in causal_lm_of(model).model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    run = trainer(folder / name, rows_of_ranks(name), model, **options)
    if name.startswith("fsdp2"):
        # accelerate on a CPU turns FSDP2 into DDP: the model is sharded by hand above, and has to be left alone.
        run.accelerator.prepare_model = lambda model, **_: model
    run.train()
    if "resumed" in name:
        run = trainer(folder / name, rows_of_ranks(name), tiny_model(), **options)
        run.train(resume_from_checkpoint=str(folder / name / "checkpoint-3"))
    wrapped = isinstance(run.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert wrapped != name.startswith("fsdp2"), type(run.model_wrapped)
    if name.startswith("fsdp2"):
        assert all(isinstance(parameter, DTensor) for parameter in run.model.parameters())
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


EVALUATED: dict[str, dict[str, Any]] = {
    "softmax": {"objective": "softmax"},
    "napo": {"rho": 1.0},
    "napo-user": {"rho": 1.0, "granularity": "user"},
    "napo-pair": {"rho": 0.0, "granularity": "pair", "standardize": True},
    "authors": {"authors_compat": True, "rho": 1.0},
}
COUNTS = (1, 3, 5, 7, 8)  # of rows, which two ranks with two each cannot share evenly


def evaluated(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Loss, accuracy, margin and a figure of one's own for so many rows, by every way."""
    return {
        name: {str(count): list(evaluation(folder / f"eval-{name}-{count}", name, count).values()) for count in COUNTS}
        for name in EVALUATED
    }


def evaluation(folder: Path, name: str, count: int) -> dict[str, float]:
    rows, options = rows_to_evaluate(name, count), {"per_device_eval_batch_size": 2, **EVALUATED[name]}
    if options.get("granularity") == "pair":
        options["item_vectors"], options["item_bias"] = vectors()
    run = trainer(folder, rows, tiny_model(), eval_dataset=rows, compute_metrics=first_reward, **options)
    if isinstance(run.margin, DynamicMargin):  # without a past it begins with the mean of who is there together
        run.margin.mean.fill_(0.3)
        run.margin.initialized.fill_(True)
    figures = run.evaluate()
    return {name: figures[f"eval_{name}"] for name in ("loss", "rewards/accuracies", "gamma", "first_reward")}


def rows_to_evaluate(name: str, count: int) -> list[dict[str, Any]]:
    return make_rows(count, items=40, seed=1, ragged=name != "authors")


def first_reward(prediction: Any) -> dict[str, float]:
    return {"first_reward": float(prediction.predictions[:, 0].mean())}


def watch_encoding(seen: list[Any]) -> None:
    """The rows that this rank turns into tokens go into ``seen``."""
    tokens = Encoder.tokens

    def watched(self: Encoder, row: Any) -> Any:
        seen.append(row)
        return tokens(self, row)

    Encoder.tokens = watched  # type: ignore[method-assign]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    found: dict[str, list[float]] = {}
    encoded: list[Any] = []
    watch_encoding(encoded)
    counts: dict[str, list[int]] = {}
    for name in WAYS:
        encoded.clear()
        found[name] = losses(name, target)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, len(encoded))
        counts[name] = every
    figures = evaluated(target)
    if dist.get_rank() == 0:
        (target / "losses.json").write_text(json.dumps(found))
        (target / "evaluated.json").write_text(json.dumps(figures))
        (target / "encoded.json").write_text(json.dumps(counts))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the gloo groups of DDP and of two device meshes sometimes abort a process that takes them down
