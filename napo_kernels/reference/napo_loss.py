"""``napo_loss`` in plain PyTorch: the specification, with the letters of docs/design.md section 4.4.

Log-sums are kept as pairs (m, rest) that stand for beta * m + rest, m in the units of the log-probabilities.
Differences of m are taken before they are scaled, so log-probabilities near -1e4 keep their digits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from napo_kernels.problem import LossProblem, log_sum, weigh

# Elements of a (rows, B', N) block of the general form.
_BLOCK = 1 << 22


def losses(p: LossProblem, m: Tensor, rest: Tensor) -> Tensor:
    """loss_u = softplus(t_u) from the users' log-sum pairs: (B,). torch's softplus is cut off at t = 20."""
    return -logsigmoid(-_t(p, m, rest))


def chosen_gradient(p: LossProblem, grad: Tensor, m: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """g_u, with the upstream gradient ``grad`` (B,) in it, and ds+_u = -beta * g_u: (B,) each."""
    g = grad * torch.sigmoid(_t(p, m, rest))
    return g, -p.beta * g


def log_sums(p: LossProblem) -> tuple[Tensor, Tensor]:
    """lse_u as pairs m and rest, (B,) each; (-inf, -inf) where the negative set is empty."""
    if _per_owner(p):
        assert p.share is not None
        b = log_sum(p.rejected, _owner_margin(p), _owner_keep(p), p.beta)  # b_v: (B',), (B',)
        return log_sum(b[0][None, :], b[1][None, :], p.share & ~b[1].isneginf(), p.beta)  # lse_u
    m, rest = torch.empty_like(p.chosen), torch.empty_like(p.chosen)
    for rows, s, margin, keep in _blocks(p):
        m[rows], rest[rows] = log_sum(s.flatten(1), margin.flatten(1), keep.flatten(1), p.beta)
    return m, rest


def rejected_gradient(p: LossProblem, g: Tensor, m: Tensor, rest: Tensor) -> Tensor:
    """ds_vn = beta * sum_u g_u exp(beta s_vn + gamma_uvn - lse_u) over the users that have (v, n): (B', N)."""
    if _per_owner(p):
        assert p.share is not None
        owner_m, owner_rest = log_sum(p.rejected, _owner_margin(p), _owner_keep(p), p.beta)
        x = p.beta * (owner_m - m[:, None]) + (owner_rest - rest[:, None])  # b_v - lse_u
        c = weigh(g[:, None], x, p.share & ~owner_rest.isneginf()).sum(0)  # c_v: (B',)
        own = p.beta * (p.rejected - owner_m[:, None]) + (_owner_margin(p) - owner_rest[:, None])
        return p.beta * weigh(c[:, None], own, _owner_keep(p))
    d_rejected = torch.zeros_like(p.rejected)
    for rows, s, margin, keep in _blocks(p):
        x = p.beta * (s - m[rows, None, None]) + (margin - rest[rows, None, None])  # (b, B', N)
        weight = p.beta * weigh(g[rows, None, None], x, keep)
        d_rejected += weight[:, 0] if p.share is None else weight.sum(0)
    return d_rejected


def _t(p: LossProblem, m: Tensor, rest: Tensor) -> Tensor:
    t = p.beta * (m - p.chosen) + (rest + p.user_margin)
    none = rest.isneginf() | p.user_margin.isneginf()  # no negatives, whatever the chosen's probability is
    return torch.where(none & ~p.chosen.isnan(), -torch.inf, t)


def _per_owner(p: LossProblem) -> bool:
    return p.separable and p.share is not None and p.exclude is None


def _owner_margin(p: LossProblem) -> Tensor:
    return torch.zeros_like(p.rejected) if p.owner_margin is None else p.owner_margin


def _owner_keep(p: LossProblem) -> Tensor:
    """(B', N); a margin of -inf leaves its negative out."""
    kept = ~_owner_margin(p).isneginf()
    return kept if p.keep is None else p.keep & kept


def _blocks(p: LossProblem) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Row blocks of the general form: rows; s, margin and keep, each (b, B', N), or (B, 1, N) without ``share``."""
    keep = _owner_keep(p)
    if p.share is None:  # a user's only owner is itself
        yield slice(None), p.rejected[:, None], _owner_margin(p)[:, None], keep[:, None]
        return
    step = max(1, _BLOCK // max(1, p.rejected.numel()))
    for start in range(0, len(p.chosen), step):
        rows = slice(start, min(start + step, len(p.chosen)))
        shape = (rows.stop - rows.start, *p.rejected.shape)
        kept = p.share[rows, :, None] & keep  # (b, B', N)
        if p.full_keep is not None:
            kept = kept & _rows(p.full_keep, rows)
        if p.exclude is not None:
            kept = kept & ~_excluded(p.exclude, rows, p.rejected)
        margin = _owner_margin(p).expand(shape)
        if p.full_margin is not None:
            margin = margin + _rows(p.full_margin, rows)
        if p.user_states is not None and p.item_vectors is not None and p.line is not None:
            margin = margin + _pair_margin(p.user_states[rows], p.item_vectors, p.item_bias, p.line)
        yield rows, p.rejected.expand(shape), margin, kept & ~margin.isneginf()


def _pair_margin(user_states: Tensor, item_vectors: Tensor, item_bias: Tensor | None, line: Tensor) -> Tensor:
    """max(0, offset + slope * z_ue) with z_ue = user_u . item_e + bias_e: (b, B', N)."""
    z = torch.einsum("ud,vnd->uvn", user_states, item_vectors)
    if item_bias is not None:
        z = z + item_bias
    return (line[1] + line[0] * z).clamp(min=0.0)


def _rows(part: Tensor, rows: slice) -> Tensor:
    return part if part.shape[0] == 1 else part[rows]


def _excluded(exclude: Tensor, rows: slice, rejected: Tensor) -> Tensor:
    """The triples of these rows as a mask (b, B', N). Padding and triples out of range land in one spare place."""
    owners, n = rejected.shape
    count = (rows.stop - rows.start) * owners * n
    user, owner, negative = exclude.unbind(1)
    ours = (user >= rows.start) & (user < rows.stop) & (owner >= 0) & (owner < owners)
    ours &= (negative >= 0) & (negative < n)
    place = ((user - rows.start) * owners + owner) * n + negative
    mask = torch.zeros(count + 1, dtype=torch.bool, device=rejected.device)
    mask.index_fill_(0, torch.where(ours, place, count), True)
    return mask[:count].view(rows.stop - rows.start, owners, n)
