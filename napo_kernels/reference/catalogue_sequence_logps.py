"""Log-probabilities over sets of allowed tokens in plain PyTorch, fp32 or fp64 (docs/design.md 4.6); any device.

With m the largest logit of a row's set and ``rest`` the sum of exp(z - m) over the others,

    log p_c = (z_c - m) - log(1 + rest)

whose two parts have the same sign: nothing cancels, no log p is positive, and 1 - p = -expm1(log p) is exact for p near
1 too. All sums have a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels.allowed import Gradients, Head, Logits, Plan, add_weight_gradient, sequence_sums, sums_of_pairs
from napo_kernels.rows import add_at

TAKES_HALF = False  # all inputs are fp32 or fp64


def forward(
    head: Head, plan: Plan, logits: Logits, *, num_sequences: int, logit_scale: float, softcap: float
) -> Tensor:  # (S,)
    """Fills ``logits``; a softcap of 0 stands for none."""
    (hidden, weight, bias), (z, slope, stats) = head, logits
    for part in plan.parts:
        h, w = hidden[part.rows], weight[part.columns]
        a = h @ w.t() if part.counts is None else torch.bmm(w, h.unsqueeze(2)).squeeze(2)  # (n, w)
        a *= logit_scale
        if bias is not None:
            a += bias[part.columns]
        if softcap:
            x = a / softcap
            a = softcap * torch.tanh(x)
            if slope is not None:
                slope[part.places].view(part.shape).copy_(1.0 / torch.cosh(x).square())
        if part.counts is not None:
            a.masked_fill_(torch.arange(part.shape[1], device=a.device) >= part.counts[:, None], -torch.inf)
        z[part.places].view(part.shape).copy_(a)
        m, at = a.max(1, keepdim=True)
        rest = torch.exp(a - m).scatter_(1, at, 0.0).sum(1)
        stats[0, part.slots] = m.squeeze(1)
        stats[1, part.slots] = torch.log1p(rest)
    return sequence_sums(logits, plan.pairs, num_sequences)


def backward(
    grad: Tensor,  # (S,)
    head: Head,
    plan: Plan,
    logits: Logits,
    grads: Gradients,
    *,
    logit_scale: float,
) -> None:
    """dz_c = G_c (1 - p_c) - (G - G_c) p_c with G_c the sum over a row's pairs with target c, G over all of them."""
    (hidden, weight, _), (z, slope, stats) = head, logits
    hidden_grad, weight_grad, bias_grad = grads
    of_place, of_slot = sums_of_pairs(grad, plan.pairs, logits)
    for part in plan.parts:
        m, log_sum, total = (x[part.slots, None] for x in (*stats, of_slot))
        mine = of_place[part.places].view(part.shape)
        logp = (z[part.places].view(part.shape) - m) - log_sum
        dz = -mine * torch.expm1(logp) - (total - mine) * torch.exp(logp)
        if slope is not None:
            dz *= slope[part.places].view(part.shape)
        if bias_grad is not None:
            bias_grad += add_at(
                len(bias_grad), part.columns.flatten(), (dz if part.counts is not None else dz.sum(0)).flatten()
            )
        dz *= logit_scale
        if hidden_grad is not None:
            w = weight[part.columns]
            hidden_grad[part.rows] = dz @ w if part.counts is None else torch.bmm(dz.unsqueeze(1), w).squeeze(1)
        if weight_grad is not None:
            add_weight_gradient(part, dz, hidden, weight_grad)
