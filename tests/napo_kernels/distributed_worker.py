"""One rank of the tests in test_distributed.py: its share of the users, gloo, results into a file."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from napo_kernels import (
    DynamicMargin,
    false_negative_triples,
    gather_pool,
    napo_loss,
    neighbour_count,
    pool_layout,
    shared_negatives,
)


def whole(problem: dict, rows: slice, granularity: str, standardize: bool) -> dict[str, Tensor]:
    """Three steps on these rows of the global batch: losses summed over ranks / users, gradients, margin state."""
    margin = DynamicMargin(granularity=granularity, standardize=standardize)
    total = len(problem["chosen"])
    result: dict[str, Tensor] = {}
    for step in range(3):
        chosen = problem["chosen"][rows].clone().requires_grad_()
        rejected = (problem["rejected"][rows] + 0.1 * step).requires_grad_()
        vectors, scores = problem["item_vectors"][rows], problem["scores"][rows] * (1 + step)
        states, users, items = problem["states"][rows], problem["users"][rows], problem["items"][rows]
        layout = pool_layout(len(chosen))
        pool, pool_scores, pool_states, pool_users, pool_items, pool_vectors = (
            gather_pool(t, layout) for t in (rejected, scores, states, users, items, vectors)
        )
        share = shared_negatives(
            states,
            neighbour_count(total, 0.7),
            pool_states=pool_states,
            pool_offset=layout.offset,
            group_ids=users,
            pool_group_ids=pool_users,
        )
        exclude = false_negative_triples(problem["histories"][rows], problem["picked"][rows], pool_items)
        gamma = margin(pool_scores, share=share, user_states=states, item_vectors=pool_vectors)
        loss = napo_loss(chosen, pool, share=share, margin=gamma, exclude=exclude, reduction="sum") / total
        loss.backward()
        result |= {f"loss{step}": loss.detach(), f"chosen{step}": chosen.grad, f"rejected{step}": rejected.grad}
    return result | {f"state_{name}": value for name, value in margin.state_dict().items()}


def main(rank: int, rendezvous: str, problem: dict, out: str) -> None:
    torch.set_num_threads(1)
    sizes = problem["sizes"]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(sizes))
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    results = {
        f"{granularity}-{standardize}": whole(problem, rows, granularity, standardize)
        for granularity in ("batch", "user", "negative", "pair")
        for standardize in (False, True)
    }
    torch.save(results, out)
    dist.destroy_process_group()
