"""Several gloo processes against one process with the whole batch, and against the authors' code written out."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import distributed_worker
import pytest
import torch
from torch import Tensor

from napo_kernels import gather_pool, pool_layout


def make_problem(sizes: list[int], seed: int) -> dict:
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    b, n, d = sum(sizes), 3, 5
    items = torch.randint(0, 40, (b, n), generator=rng)
    return {
        "sizes": sizes,
        "chosen": 3 * draw(b) - 20,
        "rejected": 3 * draw(b, n) - 20,
        "scores": draw(b, n) - 4.8,
        "states": draw(b, d),
        "item_vectors": draw(b, n, d),
        "items": items,
        "users": torch.randint(0, b - 2, (b,), generator=rng),
        "ids": torch.arange(b),
        "picked": torch.randint(0, 40, (b,), generator=rng).tolist(),
        "histories": [torch.randint(0, 40, (int(i),), generator=rng).tolist() for i in range(b)],
    }


def run_ranks(sizes: list[int], problem: dict, folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    # Forked, since importing torch anew would take most of the test's time; the children keep to one thread.
    context = multiprocessing.get_context("fork")
    outs = [folder / f"rank{rank}.pt" for rank in range(len(sizes))]
    ranks = [
        context.Process(target=distributed_worker.main, args=(rank, str(folder / "rendezvous"), problem, str(out)))
        for rank, out in enumerate(outs)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(timeout=120)
    finally:
        for process in ranks:
            process.kill()
    assert [process.exitcode for process in ranks] == [0] * len(ranks)
    return [torch.load(out) for out in outs]


@pytest.mark.parametrize("sizes", [[5, 3], [4, 1, 6, 2]], ids=["2 ranks", "4 ranks"])
def test_ranks_with_unequal_batches_equal_one_process(sizes: list[int], tmp_path: Path) -> None:
    problem = make_problem(sizes, len(sizes))
    ranks = run_ranks(sizes, problem, tmp_path)
    for name, first in ranks[0].items():
        granularity, standardize = name.split("-")
        expected = distributed_worker.whole(problem, slice(None), granularity, standardize == "True")
        for key in first:
            parts = [rank[name][key] for rank in ranks]
            if key.startswith("loss"):
                got = torch.stack(parts).sum()
            elif key.startswith("state"):
                assert all(torch.equal(part, parts[0]) for part in parts), f"{name} {key}: ranks disagree"
                got = parts[0]
            else:
                got = torch.cat(parts)
            torch.testing.assert_close(got, expected[key], rtol=1e-6, atol=1e-6, msg=lambda m: f"{name} {key}: {m}")  # noqa: B023


def released_code(problem: dict, ranks: int) -> list[dict[str, Tensor]]:
    """The released computation with its loops, fp64, all ranks in one process (FIELD.md section 1)."""
    gamma0, alpha, rho = 1.0, 0.3, 0.7
    b = len(problem["rejected"])
    local = b // ranks
    similarity = problem["states"].double() @ problem["states"].double().T
    mbar = 0.0
    results: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for step in range(3):
        scores = problem["scores"].double() * (1 + step)
        rejected, used = problem["rejected"].double(), []
        for rank in range(ranks):
            for i in range(local):
                u = rank * local + i
                others = [v for v in range(b) if problem["ids"][v] != problem["ids"][u]]
                near = sorted(others, key=lambda v, u=u: -similarity[u, v].item())
                used.append([i, *near[: int(rho * (b - 1))]])  # i, not u: the local index into the global tensor
        means = [scores[torch.tensor(used[r * local : (r + 1) * local])].mean() for r in range(ranks)]
        mbar = sum(0.9 * mbar + 0.1 * m for m in means) / ranks
        for rank in range(ranks):
            gamma = gamma0 - alpha * (means[rank] - mbar) * gamma0
            chosen = problem["chosen"][rank * local : (rank + 1) * local].double().requires_grad_()
            losses = []
            for i in range(local):
                negatives = torch.cat([rejected[v] for v in used[rank * local + i]])
                a = -torch.log(torch.exp(negatives - chosen[i]).sum())
                losses.append(-torch.nn.functional.logsigmoid(a - gamma))
            loss = torch.stack(losses)
            loss.mean().backward()
            results[rank] |= {f"loss{step}": loss.detach(), f"chosen{step}": chosen.grad, f"mean{step}": mbar}
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_authors_compat_reproduces_the_released_code(ranks: int, tmp_path: Path) -> None:
    problem = make_problem([12 // ranks] * ranks, 7)
    expected = released_code(problem, ranks)
    if ranks == 1:
        got = [distributed_worker.authors(problem, slice(None))]
    else:
        got = [result["authors"] for result in run_ranks(problem["sizes"], problem, tmp_path)]
    for mine, theirs in zip(got, expected, strict=True):
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key].double(), value, rtol=1e-5, atol=1e-6, msg=lambda m: f"{key}: {m}")  # noqa: B023


def test_without_a_process_group_the_pool_is_the_batch() -> None:
    rows = torch.randn(3, 2)
    layout = pool_layout(3)
    assert layout == ((3,), 0)
    assert gather_pool(rows, layout) is rows
    with pytest.raises(ValueError, match="rows"):
        gather_pool(rows[:2], layout)
