"""The kernels of ``sequence_logps`` in plain PyTorch, its specification (docs/design.md, section 4.1).

They compute in fp32 or fp64, on any device and for any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from napo_kernels.rows import TokenStats, log_p


def token_forward(
    logits: Tensor,  # (S, T, V)
    labels: Tensor,  # (S, T)
    ignore_index: int,
) -> TokenStats:
    valid = labels != ignore_index
    column = labels.masked_fill(~valid, 0).unsqueeze(-1)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z_v = z.gather(-1, column)
    others = z.scatter(-1, column, -torch.inf)
    m = others.amax(-1, keepdim=True)
    shift = m.masked_fill(m == -torch.inf, 0.0)
    total = torch.exp(others - shift).sum(-1, keepdim=True)
    logp = log_p((shift - z_v) + total.log(), z_v)
    top = torch.maximum(m, z_v)
    # A sum of nothing is 0 relative to any number; exp(shift - top) would overflow for another.
    shift = torch.where(m == -torch.inf, top.masked_fill(top == -torch.inf, 0.0), shift)
    log_sum = (torch.exp(shift - top) * total + torch.exp(z_v - top)).log()
    return TokenStats(*(x.squeeze(-1).masked_fill(~valid, 0.0) for x in (logp, top, log_sum)))


def token_backward(
    logits: Tensor,  # (S, T, V)
    labels: Tensor,  # (S, T)
    ignore_index: int,
    stats: TokenStats,  # what token_forward gave
    grad: Tensor,  # (S,)
    out: Tensor,  # (S, T, V), may be logits
    *,
    out_is_zero: bool,
) -> None:
    """dlogits = G (onehot - p), with 1 - p = -expm1(log p) at the label; 0 where ignored."""
    logp, m, log_sum = stats
    valid = labels != ignore_index
    g = grad[:, None, None]
    gradient = -g * torch.exp((logits.to(logp.dtype) - m.unsqueeze(-1)) - log_sum.unsqueeze(-1))
    gradient.scatter_(-1, labels.masked_fill(~valid, 0).unsqueeze(-1), -g * torch.expm1(logp).unsqueeze(-1))
    out.copy_(gradient.masked_fill_(~valid.unsqueeze(-1), 0.0))
