"""shared_negatives + napo_loss, forward and backward, against vectorised torch and a loop over users.

    OMP_NUM_THREADS=2 python benchmarks/bench_napo_loss.py
    python benchmarks/bench_napo_loss.py --device cuda  # Triton and CUDA C++ against vectorised torch

Work of the kernels at B = B' users: 2 B B' D flops of similarities, two passes of B B' exponentials; bytes: the (B, B')
mask of one byte an entry is written once and read twice. `bytes_per_entry` is peak memory over B B'.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import Report, interleave, peak_memory, require_close
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from napo_kernels import PairMargin, napo_loss, neighbour_count, shared_negatives

D, RHO = 64, 0.7


@dataclass
class Problem:
    states: Tensor  # (B, D)
    chosen: Tensor  # (B,)
    rejected: Tensor  # (B, N)
    k: int
    arguments: dict[str, Any]


def problem(b: int, n: int, kind: str, device: str = "cpu") -> Problem:
    rng = torch.Generator().manual_seed(b + n)
    draw = lambda *shape: torch.randn(*shape, generator=rng).to(device)  # noqa: E731
    states, chosen, rejected = draw(b, D), draw(b).sub(20).requires_grad_(), draw(b, n).mul(3).sub(25).requires_grad_()
    arguments: dict[str, Any] = {}
    if kind == "negative margin":
        arguments["margin"] = draw(b, n).abs()
    elif kind == "pair margin":
        arguments["margin"] = PairMargin(states, draw(b, n, D), draw(b, n), slope=-0.05, offset=1.0)
    elif kind == "1% excluded":  # sorted, as false_negative_triples makes them
        places = torch.randint(0, b * b * n, (b * b * n // 100,), generator=rng).unique().to(device)
        arguments["exclude"] = torch.stack((places // (b * n), places // n % b, places % n), 1)
    return Problem(states, chosen, rejected, neighbour_count(b, RHO), arguments)


def ours(p: Problem, backend: str | None = None) -> tuple[Tensor, ...]:
    share = shared_negatives(p.states, p.k, backend=backend)
    return _backward(napo_loss(p.chosen, p.rejected, share=share, backend=backend, **p.arguments), p)


def vectorised(p: Problem) -> tuple[Tensor, ...]:
    similarity = p.states @ p.states.T
    similarity.fill_diagonal_(-torch.inf)
    nearest = similarity.topk(p.k, sorted=False).indices  # (B, K)
    negatives = torch.cat((p.rejected[:, None], p.rejected[nearest]), 1).flatten(1)  # (B, (1 + K) N)
    return _backward(softplus(torch.logsumexp(negatives - p.chosen[:, None], 1)).mean(), p)


def loop(p: Problem) -> tuple[Tensor, ...]:
    """A row at a time, in the manner of the authors' code (with a log-sum-exp that does not overflow)."""
    losses = []
    for u in range(len(p.states)):
        similarity = p.states[u] @ p.states.T
        similarity[u] = -torch.inf
        nearest = similarity.topk(p.k).indices
        negatives = torch.cat([p.rejected[u], p.rejected[nearest].flatten()])
        losses.append(-logsigmoid(-torch.logsumexp(negatives - p.chosen[u], 0)))
    return _backward(torch.stack(losses).mean(), p)


def _backward(loss: Tensor, p: Problem) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, (p.chosen, p.rejected))


def compare(report: Report, case: str, p: Problem, others: dict[str, Callable[[Problem], Any]], repeats: int) -> None:
    ways = {"napo": None} if p.states.device.type == "cpu" else {"napo": "cuda", "napo in triton": "triton"}
    expected = {name: run(p) for name, run in others.items()}
    for name, result in expected.items():
        for way, backend in ways.items():
            for what, got, right in zip(("loss", "d_chosen", "d_rejected"), ours(p, backend), result, strict=True):
                require_close(f"{case}, {way}, {name}: {what}", got, right, relative=1e-4)
    del expected
    variants: dict[str, Callable[[], Any]] = {way: lambda b=backend: ours(p, b) for way, backend in ways.items()}
    variants |= {name: lambda run=run: run(p) for name, run in others.items()}
    timings = interleave(variants, repeats=repeats)
    for name, timing in timings.items():
        facts: dict[str, Any] = {}
        if name in ways:
            facts["bytes_per_entry"] = peak_memory(variants[name]) / len(p.states) ** 2
        else:
            facts["napo_is_faster"] = timing.median / timings["napo"].median
        report.add(case, name, timing, **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    device = arguments.device
    report = Report("bench_napo_loss")
    for kind in ("negative margin", "1% excluded", "pair margin"):
        compare(report, f"B 4096, N 8, {kind}", problem(4096, 8, kind, device), {}, arguments.repeats)
    for n in (4, 16, 64):
        compare(report, f"B 4096, N {n}", problem(4096, n, "", device), {}, arguments.repeats)
    compiled = torch.compile(vectorised, dynamic=True)
    for b in (64, 256, 1024, 4096, 8192):
        others: dict[str, Callable[[Problem], Any]] = {}
        if b <= 1024:
            others |= {"loop": loop, "vectorised torch, compiled": compiled}
        if b <= 4096:
            others |= {"vectorised torch": vectorised}
        compare(report, f"B {b}, N 8", problem(b, 8, "", device), others, 3 if b >= 1024 else 9)
    report.write()


if __name__ == "__main__":
    main()
