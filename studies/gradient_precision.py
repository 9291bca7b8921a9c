"""How exact the gradient of a title's log-probability is in bfloat16, by how sure the model is of the title.

    OMP_NUM_THREADS=1 python studies/gradient_precision.py

Every row has one target. `push` moves the row's hidden state towards the target's row of the weight, so that the
probability of the target rises. The truth is the same computation in float64 on the same bfloat16 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels import linear_sequence_logps

R, H, V = 256, 576, 16384
PUSHES = (6.0, 13.0, 19.0, 26.0)


def case(push: float) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (R, H) and weight (V, H) in bfloat16, targets (R,)"""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=generator) / H**0.5
    targets = torch.randint(V, (R,), generator=generator)
    hidden = torch.randn(R, H, generator=generator) + push * weight[targets]
    return hidden.bfloat16(), weight.bfloat16(), targets


def by_autograd(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (R,) and their gradient (R, H) by a plain log-softmax, float32 or wider after the matmul."""
    hidden = hidden.clone().requires_grad_()
    logits = hidden @ weight.T
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1).gather(1, targets[:, None])[:, 0]
    logps.sum().backward()
    assert hidden.grad is not None
    return logps.detach(), hidden.grad


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    logps = linear_sequence_logps(hidden, weight, targets, sequence_ids=torch.arange(R), num_sequences=R)
    logps.sum().backward()
    assert hidden.grad is not None
    return logps.detach(), hidden.grad


def targets_left_in(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Two matmuls as ours, but the sum over the vocabulary has the target in it, and log p is z - lse with the
    target's logit in float32 and the others as the matmul rounds them."""
    logits = hidden @ weight.T
    lse = logits.float().logsumexp(1)
    logps = (hidden.float() * weight[targets].float()).sum(1) - lse
    stored = torch.exp(logits.float() - lse[:, None]).bfloat16()
    return logps, (weight[targets].float() - (stored @ weight).float()).bfloat16()


def distances(gradient: Tensor, truth: Tensor) -> float:
    """Median over the rows of the relative distance."""
    return float(((gradient.double() - truth).norm(dim=1) / truth.norm(dim=1)).median())


def main() -> None:
    print("| median p(target) | ours | plain log-softmax | target left in | highest log p: ours | target left in |")
    print("|---|---:|---:|---:|---:|---:|")
    for push in PUSHES:
        hidden, weight, targets = case(push)
        logps, truth = by_autograd(hidden.double(), weight.double(), targets)
        ways = [way(hidden, weight, targets) for way in (ours, by_autograd, targets_left_in)]
        errors = " | ".join(f"{distances(gradient, truth):.2g}" for _, gradient in ways)
        highest = " | ".join(f"{float(ways[i][0].max()):+.1e}" for i in (0, 2))
        print(f"| {float(logps.exp().median()):.6f} | {errors} | {highest} |")


if __name__ == "__main__":
    main()
