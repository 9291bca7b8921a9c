"""shared_negatives against a selection written as a sort of one user's owners at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from napo_kernels import neighbour_count, shared_negatives
from napo_kernels.native import shared_negatives as native_select


def oracle(
    states: Tensor, pool: Tensor, k: int, offset: int, groups: Tensor | None, pool_groups: Tensor | None
) -> Tensor:
    similarity = states.double() @ pool.double().T
    share = torch.zeros(similarity.shape, dtype=torch.bool)
    for u in range(len(states)):
        eligible = [v for v in range(len(pool)) if v != offset + u]
        if groups is not None:
            eligible = [v for v in eligible if groups[u] != pool_groups[v]]
        nearest = sorted(eligible, key=lambda v: (-similarity[u, v].item(), v))[:k]
        share[u, [*nearest, offset + u]] = True
    return share


def test_oracle(backend: str) -> None:
    for seed in range(40):
        rng = torch.Generator().manual_seed(seed)
        integer = lambda high: int(torch.randint(high, (), generator=rng))  # noqa: B023, E731
        users, extra, d = 1 + integer(40), integer(2) * integer(100), 1 + integer(9)
        owners, offset = users + extra, integer(extra + 1)
        # Small integers: similarities are exact, and many of them tie.
        pool = torch.randint(-2, 3, (owners, d), generator=rng).float()
        states = pool[offset : offset + users]
        k = [0, 1, owners - 1, integer(owners)][seed % 4] if owners > 1 else 0
        pool_groups = torch.randint(0, 1 + owners // 3, (owners,), generator=rng) if seed % 3 else None
        groups = None if pool_groups is None else pool_groups[offset : offset + users]
        expected = oracle(states, pool, k, offset, groups, pool_groups)
        got = shared_negatives(
            states,
            k,
            pool_states=pool,
            pool_offset=offset,
            group_ids=groups,
            pool_group_ids=pool_groups,
            backend=backend,
        )
        assert torch.equal(got, expected), (seed, users, owners, k)


def test_nobody_borrows(backend: str) -> None:
    """A rank may have no users of its own."""
    for owners, offset, k in ((7, 3, 4), (7, 7, 6), (3000, 3000, 20)):
        states, pool = torch.zeros(0, 2), torch.ones(owners, 2)
        for groups in ({}, {"group_ids": torch.zeros(0).long(), "pool_group_ids": torch.arange(owners)}):
            got = shared_negatives(states, k, pool_states=pool, pool_offset=offset, **groups, backend=backend)
            assert got.shape == (0, owners)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_large_rows_with_scores_of_all_magnitudes(backend: str, metric: str) -> None:
    rng = torch.Generator().manual_seed(3)
    pool = torch.randn(1500, 8, generator=rng) * torch.randn(1500, 1, generator=rng).mul(5).exp2()
    for k in (1, 700, 1050, 1498):
        got = shared_negatives(pool[:60], k, pool_states=pool, metric=metric, backend=backend)
        assert torch.equal(got.sum(1), torch.full((60,), k + 1))
        similarity = pool[:60].double() @ pool.double().T
        if metric == "cosine":
            similarity /= pool[:60].double().norm(dim=1)[:, None] * pool.double().norm(dim=1)
        size = pool[:60].double().norm(dim=1)[:, None] * pool.double().norm(dim=1) if metric == "dot" else 1.0
        similarity.diagonal().fill_(torch.inf)
        # Whatever was left out is at most as similar as what was taken, up to the rounding of fp32.
        worst_in = torch.where(got, similarity, torch.inf).amin(1, keepdim=True)
        assert (torch.where(got, -torch.inf, similarity) <= worst_in + 2e-6 * size).all()


def test_cuda_emulated(emulated_cuda: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of each size that has a kernel of its own, blocks of rows, ties; the same in any order of the threads."""
    rng = torch.Generator().manual_seed(5)
    monkeypatch.setattr(native_select, "_BLOCK", 1 << 13)
    pools = ((1, 0, 0), (255, 1, 100), (2049, 9, 1500), (5000, 0, 4999), (8300, 8297, 2000), (9, 9, 5))
    for owners, offset, k in pools:
        pool = torch.randint(-3, 4, (owners, 2), generator=rng).float()
        groups = torch.randint(0, 9, (owners,), generator=rng)
        users = slice(offset, offset + 3)
        arguments = {"pool_states": pool, "pool_offset": offset, "pool_group_ids": groups, "group_ids": groups[users]}
        expected = shared_negatives(pool[users], k, **arguments, backend="reference")
        for order in ("up", "down", "mixed"):
            emulated_cuda(order)
            assert torch.equal(shared_negatives(pool[users], k, **arguments), expected), (owners, k, order)


def test_equal_infinite_and_nan_scores(backend: str) -> None:
    pool = torch.tensor([[0.0], [-0.0], [0.0], [torch.inf], [torch.nan], [-torch.inf], [1.0]])
    share = shared_negatives(torch.ones(1, 1), 4, pool_states=pool, backend=backend)
    assert share.tolist() == [[True, True, True, True, False, False, True]]
    share = shared_negatives(torch.ones(1, 1), 6, pool_states=pool, backend=backend)
    assert share.all()
    assert shared_negatives(torch.zeros(5, 3), 2, backend=backend).sum(0).tolist() == [5, 5, 3, 1, 1]
    assert shared_negatives(torch.zeros(0, 3), 0, backend=backend).shape == (0, 0)


def test_refuses_what_makes_no_sense() -> None:
    states = torch.randn(4, 3)
    for arguments, name in [
        ({"k": 4}, "k:"),
        ({"k": -1}, "k:"),
        ({"k": 1, "pool_offset": 1}, "pool_states:"),
        ({"k": 1, "pool_states": torch.randn(5, 2)}, "pool_states:"),
        ({"k": 1, "pool_states": torch.randn(5, 3), "pool_offset": 2}, "pool_offset:"),
        ({"k": 1, "group_ids": torch.zeros(3, dtype=torch.long)}, "group_ids:"),
        ({"k": 1, "metric": "euclid"}, "metric:"),
        ({"k": 1, "backend": "tpu"}, "backend:"),
    ]:
        with pytest.raises(ValueError, match=name):
            shared_negatives(states, **arguments)


def test_neighbour_count_reads_the_decimal() -> None:
    assert neighbour_count(91, 0.7) == 63  # int(0.7 * 90) is 62
    assert [neighbour_count(16, rho) for rho in (0.0, 0.5, 0.7, 0.8, 1.0)] == [0, 7, 10, 12, 15]
    assert neighbour_count(1, 1.0) == neighbour_count(0, 0.5) == 0
    with pytest.raises(ValueError, match="rho"):
        neighbour_count(8, 1.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_on_a_gpu(backend: str) -> None:
    rng = torch.Generator().manual_seed(5)
    for owners, offset, k in ((1, 0, 0), (255, 1, 100), (2049, 9, 1500), (5000, 0, 4999), (8300, 200, 2000)):
        pool = torch.randint(-3, 4, (owners, 2), generator=rng).float()
        groups = torch.randint(0, 9, (owners,), generator=rng)
        users = slice(offset, offset + 3000)
        arguments = {"pool_states": pool, "pool_group_ids": groups, "group_ids": groups[users]}
        expected = shared_negatives(pool[users], k, pool_offset=offset, **arguments, backend="reference")
        there = {name: value.cuda() for name, value in arguments.items()}
        states = pool[users].cuda()
        torch.cuda.set_sync_debug_mode("error")  # nothing waits for the device
        try:
            got = shared_negatives(states, k, pool_offset=offset, **there, backend=backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(got.cpu(), expected), (owners, k)


@pytest.mark.gpu
def test_tf32_changes_no_neighbours(device: torch.device, gpu_backend: str) -> None:
    """Similarities that differ by less than TF32 tells apart; a model's matmuls may use it all the same."""
    states = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).to(device)
    expected = shared_negatives(states, 100, backend=gpu_backend)
    torch.set_float32_matmul_precision("high")
    try:
        got = shared_negatives(states, 100, backend=gpu_backend)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(got, expected)
