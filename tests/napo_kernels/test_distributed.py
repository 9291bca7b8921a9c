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
    # Forked, since importing torch anew would take most of the test's time; the children keep to one thread. With CUDA
    # autograd has threads for devices, which do not outlive a fork.
    context = multiprocessing.get_context("fork" if torch.version.cuda is None else "spawn")
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


def test_without_a_process_group_the_pool_is_the_batch() -> None:
    rows = torch.randn(3, 2)
    layout = pool_layout(3)
    assert layout == ((3,), 0)
    assert gather_pool(rows, layout) is rows
    with pytest.raises(ValueError, match="rows"):
        gather_pool(rows[:2], layout)
