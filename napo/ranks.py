"""Several processes that train together, as torchrun and accelerate start them: the first one writes, all agree."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class FirstRankFailed(ValueError):
    """On the other ranks, where one has failed and has said why."""


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def only_one(command: str) -> None:
    """Refuse a command that several processes cannot do at the same time."""
    if size() > 1:
        raise ValueError(f"{command}: runs in one process, got {size()} ranks; start it without torchrun or accelerate")


def told(work: Callable[[], T]) -> T:
    """Run ``work`` on the first rank and return its result on all ranks; if it fails there, all fail."""
    if size() == 1:
        return work()
    import torch.distributed as dist

    _join()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            dist.broadcast_object_list([None, str(error)])
            raise
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise FirstRankFailed(box[1])
    return box[0]


def gathered(work: Callable[[], T]) -> list[T]:
    """What ``work`` returns on each rank, on all of them; where it fails on one, all fail."""
    if size() == 1:
        return [work()]
    import torch.distributed as dist

    _join()
    failure: Exception | None = None
    mine: list[Any] = [None, None]
    try:
        mine[0] = work()
    except Exception as error:
        failure, mine[1] = error, f"rank {rank()}: {error}"
    every: list[Any] = [None] * size()
    dist.all_gather_object(every, mine)
    if failure is not None:
        raise failure
    failed = next((error for _, error in every if error is not None), None)
    if failed is not None:
        raise FirstRankFailed(failed)
    return [value for value, _ in every]


def wait() -> None:
    """Until all ranks are here."""
    if size() > 1:
        import torch.distributed as dist

        _join()
        dist.barrier()


def largest(*values: float) -> list[float]:
    """The maximum of each value over all ranks."""
    if size() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    _join()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    agreed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return agreed.tolist()


def _join() -> None:
    """Start the process group as the Trainer will: with NCCL and one GPU per rank, or with gloo on CPUs."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    if not dist.is_initialized():
        PartialState._reset_state()  # an earlier state, made without other ranks, would be taken for ours
        PartialState(cpu=not torch.cuda.is_available())
