"""Run by test_trainer_pool on two gloo processes: trains in every way that is compared with one process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trainer_cases import make_rows, tiny_model, trainer

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 5,
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-accumulated": {"pool": "accumulated", "gradient_accumulation_steps": 2},
    "ddp-pair": {"granularity": "pair", "standardize": True, "gradient_accumulation_steps": 1},
    "ddp-apart": {"pool_ranks": False},
    "authors": {"authors_compat": True, "learning_rate": 0.0},
    "fsdp2": {},
    "fsdp2-accumulated": {"pool": "accumulated", "gradient_accumulation_steps": 2},
}


def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(40, 4, generator=generator), torch.randn(40, generator=generator)


def rows_of_ranks(name: str) -> list[dict[str, Any]]:
    return make_rows(80, items=40, ragged=name != "authors")


def losses(name: str, folder: Path) -> list[float]:
    model = tiny_model()
    options = {**COMMON, **WAYS[name]}
    if options.get("granularity") == "pair":
        options["item_vectors"], options["item_bias"] = vectors()
    if name.startswith("fsdp2"):
        # accelerate on a CPU turns FSDP2 into DDP: shard by hand, and tell the Trainer that it is done.
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        model._is_distributed_loading_by_transformers = True
        model.config.distributed_config = SimpleNamespace(dp_replicate_size=1)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    run = trainer(folder / name, rows_of_ranks(name), model, **options)
    run.train()
    wrapped = isinstance(run.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert wrapped != name.startswith("fsdp2"), type(run.model_wrapped)
    if name.startswith("fsdp2"):
        assert all(isinstance(parameter, DTensor) for parameter in run.model.parameters())
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    found = {name: losses(name, target) for name in WAYS}
    if dist.get_rank() == 0:
        (target / "losses.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the gloo groups of DDP and of two device meshes sometimes abort a process that takes them down
