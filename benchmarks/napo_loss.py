"""shared_negatives + napo_loss, forward and backward, over pools of B' = 64 to 8192 users.

    python -m benchmarks run loss [--device cuda]

Against: vectorised torch, which gathers (B, (1 + K) N) negatives; torch.compile of it; and a loop over users in the
manner of the authors' code (with a log-sum-exp that does not overflow). Loss and gradients are compared with fp64, a
block of users at a time.

Work at B = B' users: 2 B B' D flops of similarities, two passes of B B' exponentials; bytes: the (B, B') mask of one
byte per entry is written once and read twice. The floor is the bare matmul of the similarities in fp32 plus those bytes
at the bandwidth of a copy, both measured in this run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from benchmarks import device
from benchmarks.comparison import Comparison, compare, distance, sweep
from benchmarks.options import command_line
from benchmarks.peers import compile_for
from benchmarks.report import Report
from benchmarks.timing import Variant, Variants, copy_bandwidth, interleave
from napo_kernels import PairMargin, napo_loss, neighbour_count, shared_negatives
from napo_kernels.dispatch import backends

D, RHO = 64, 0.7
TOLERANCE = 1e-4  # fp32
POOLS = (64, 256, 1024, 4096, 8192)
LOOP_UP_TO = 1024  # users; the loop's time grows as their square
KINDS = ("negative margin", "1% excluded", "pair margin")


@dataclass
class Problem:
    states: Tensor  # (B, D)
    chosen: Tensor  # (B,)
    rejected: Tensor  # (B, N)
    k: int
    arguments: dict[str, Any]


def problem(b: int, n: int, kind: str = "") -> Problem:
    rng = torch.Generator().manual_seed(b + n)
    draw = lambda *shape: torch.randn(*shape, generator=rng).to(device.current)  # noqa: E731
    states, chosen, rejected = draw(b, D), draw(b).sub(20).requires_grad_(), draw(b, n).mul(3).sub(25).requires_grad_()
    arguments: dict[str, Any] = {}
    if kind == "negative margin":
        arguments["margin"] = draw(b, n).abs()
    elif kind == "pair margin":
        arguments["margin"] = PairMargin(states, draw(b, n, D), draw(b, n), slope=-0.05, offset=1.0)
    elif kind == "1% excluded":  # sorted, as false_negative_triples makes them
        places = torch.randint(0, b * b * n, (b * b * n // 100,), generator=rng).unique()
        arguments["exclude"] = torch.stack((places // (b * n), places // n % b, places % n), 1).to(device.current)
    return Problem(states, chosen, rejected, neighbour_count(b, RHO), arguments)


def ours(p: Problem, backend: str | None = None) -> tuple[Tensor, ...]:
    share = shared_negatives(p.states, p.k, backend=backend)
    return _backward(napo_loss(p.chosen, p.rejected, share=share, backend=backend, **p.arguments), p)


def vectorised(states: Tensor, chosen: Tensor, rejected: Tensor, k: int) -> Tensor:
    similarity = states @ states.T
    similarity.fill_diagonal_(-torch.inf)
    nearest = similarity.topk(k, sorted=False).indices  # (B, K)
    negatives = torch.cat((rejected[:, None], rejected[nearest]), 1).flatten(1)  # (B, (1 + K) N)
    return softplus(torch.logsumexp(negatives - chosen[:, None], 1)).mean()


def loop(states: Tensor, chosen: Tensor, rejected: Tensor, k: int) -> Tensor:
    losses = []
    for u in range(len(states)):
        similarity = states[u] @ states.T
        similarity[u] = -torch.inf
        nearest = similarity.topk(k).indices
        negatives = torch.cat([rejected[u], rejected[nearest].flatten()])
        losses.append(-logsigmoid(-torch.logsumexp(negatives - chosen[u], 0)))
    return torch.stack(losses).mean()


def theirs(function: Callable[..., Tensor], p: Problem) -> tuple[Tensor, ...]:
    return _backward(function(p.states, p.chosen, p.rejected, p.k), p)


def _backward(loss: Tensor, p: Problem) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, (p.chosen, p.rejected))


def truth(p: Problem) -> tuple[Tensor, ...]:
    """Loss and gradients in fp64 from each user's list of negatives, in blocks of users. Who borrows from whom is
    taken from similarities in the states' own precision: in fp64, ties would be broken otherwise. If a negative counts
    the same for all who borrow it, an owner's negatives are summed once and the lists hold owners."""
    margin, excluded = p.arguments.get("margin"), p.arguments.get("exclude")
    b, n = p.rejected.shape
    chosen, rejected = (x.detach().double().requires_grad_() for x in (p.chosen, p.rejected))
    z = rejected if not isinstance(margin, Tensor) else rejected + margin.double()
    if excluded is None and not isinstance(margin, PairMargin):
        z = z.logsumexp(1, keepdim=True)  # (B, 1)
    listed = z.detach().requires_grad_()
    total = rejected.new_zeros(())
    grads = [torch.zeros_like(chosen), torch.zeros_like(listed)]
    for users in torch.arange(b, device=chosen.device).split(max(1, (1 << 22) // listed.numel())):
        similarity = p.states[users] @ p.states.T
        similarity[torch.arange(len(users), device=users.device), users] = -torch.inf
        nearest = similarity.topk(p.k, sorted=False).indices
        owners = torch.cat((users[:, None], nearest), 1)  # (c, 1 + K)
        negatives = listed[owners]  # (c, 1 + K, N), or (c, 1 + K, 1)
        if isinstance(margin, PairMargin):
            scores = p.states[users].double() @ margin.item_vectors.double().flatten(0, 1).T
            gamma = margin.offset + margin.slope * (scores.view(-1, b, n) + margin.item_bias.double())
            negatives = negatives + gamma.clamp(min=0).gather(1, owners[..., None].expand(-1, -1, n))
        if excluded is not None:
            kept = torch.ones(len(users), b, n, dtype=torch.bool, device=z.device)
            mine = excluded[(excluded[:, 0] >= users[0]) & (excluded[:, 0] <= users[-1])]
            kept[mine[:, 0] - users[0], mine[:, 1], mine[:, 2]] = False
            negatives = negatives.masked_fill(~kept.gather(1, owners[..., None].expand(-1, -1, n)), -torch.inf)
        loss = softplus(negatives.flatten(1).logsumexp(1) - chosen[users]).sum() / b
        total = total + loss.detach()
        for grad, more in zip(grads, torch.autograd.grad(loss, (chosen, listed)), strict=True):
            grad += more
    (d_rejected,) = torch.autograd.grad(z, rejected, grads[1]) if z is not rejected else (grads[1],)
    return total, grads[0], d_rejected


def checked_case(report: Report, case: str, p: Problem, others: Variants, floor: float) -> Comparison:
    expected = truth(p)

    def error(_: str, result: tuple[Tensor, ...]) -> float:
        return max(distance(got, right) for got, right in zip(result, expected, strict=True))

    variants: Variants = {"napo": lambda: ours(p)}
    if device.on_gpu():
        for name in ("triton", "cuda"):
            if backends()[name]["available"] and "napo_loss" in backends()[name]["ops"]:
                variants[f"napo, {name}"] = Variant(lambda name=name: ours(p, name), required=True)
    return compare(
        report,
        case,
        variants | others,
        error=error,
        tolerance=TOLERANCE,
        seconds=1.5,
        repeats=15,
        floor=floor,
    )


def floor_of(b: int, bandwidth: float) -> float:
    states = torch.randn(b, D, device=device.current)
    similarities = torch.empty(b, b, device=device.current)
    matmul = interleave({"mm": lambda: torch.mm(states, states.T, out=similarities)}, repeats=50)["mm"].best
    return matmul + 3 * b * b / bandwidth


def main(arguments: Sequence[str]) -> None:
    options = command_line(__doc__, arguments)
    report = Report("napo_loss", options)
    bandwidth = copy_bandwidth(1 << (20 if options.smoke else 30 if device.on_gpu() else 28))
    pools = (16, 24, 40) if options.smoke else POOLS
    compiled = compile_for(device.current, vectorised, smoke=options.smoke)

    cases: list[Comparison] = []

    def add(case: str, p: Problem, others: Variants, floor: float) -> None:
        cases.append(checked_case(report, case, p, others, floor))
        report.write()

    def against_others(b: int) -> None:
        if not report.has_time(f"B' {b}, N 8"):
            return
        p = problem(b, 8)
        others: Variants = {
            "vectorised torch": Variant(lambda: theirs(vectorised, p), required=True),
            "torch.compile of it": lambda: theirs(compiled, p),
        }
        if b <= LOOP_UP_TO:
            others["loop over users"] = Variant(lambda: theirs(loop, p), required=True)
        add(f"B' {b}, N 8", p, others, floor_of(b, bandwidth))

    large = 24 if options.smoke else 4096
    for b in pools[:-1]:
        against_others(b)
    floor = floor_of(large, bandwidth)
    for n in (1, 4, 16, 64):
        case = f"B' {large}, N {n}, napo alone"
        if report.has_time(case):
            add(case, problem(large, n), {}, floor)
    for kind in KINDS:
        case = f"B' {large}, N 8, {kind}"
        if report.has_time(case):
            add(case, problem(large, 8, kind), {}, floor)
    against_others(pools[-1])  # gigabytes for the vectorised way: left out first if time is short
    sweep(report, cases)
    report.finish()
