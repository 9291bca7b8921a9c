"""``napo_loss`` in Triton. The places of a row of the problem are i = owner * N + negative, in [0, B' N).

The separable form is the general one on the owners' log-sums, with one "negative" per owner. Excluded triples become a
mask of a block of rows, so they take the general form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from napo_kernels.problem import LossProblem, log_sum, weigh

# Users and places that a program of the gradient holds at a time, and its warps. With everything that a margin may have
# each term keeps several numbers and addresses: 4 terms a thread leave registers for many programs at a time.
GRADIENT_ROWS, GRADIENT_BLOCK, GRADIENT_WARPS = 16, 64, 8
# Places of the (rows, B' N) temporaries of the general form: 16 MiB of scores, enough rows to fill a GPU.
_BLOCK_PLACES = 1 << 22


@triton.jit
def _margins(
    margin_ptr,
    share_ptr,
    full_margin_ptr,
    full_keep_ptr,
    score_ptr,
    line_ptr,
    u,
    i,
    first_row,
    users,
    places,
    owners,
    n,
    margin_u,
    margin_v,
    margin_n,
    keep_u,
    keep_v,
    keep_n,
    FULL_MARGIN: tl.constexpr,
    FULL_KEEP: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Margins of users u (rows, 1) for the places i (1, columns), -inf where a negative is not in the user's set. The
    masks and margins of both are those of a block of rows that begins at ``first_row``; ``share`` is whole."""
    inside = (u < users) & (i < places)
    v, j = (i // n).to(tl.int64), i % n  # 64 bits: a stride may be that of a large tensor's outer dimension
    r = u - first_row
    keep = tl.load(share_ptr + u * owners + v, mask=inside, other=0) != 0
    margin = tl.load(margin_ptr + i, mask=i < places, other=0.0)
    keep = keep & (margin != float("-inf"))
    if FULL_KEEP:
        at = full_keep_ptr + r * keep_u + v * keep_v + j * keep_n
        keep = keep & (tl.load(at, mask=inside, other=0) != 0)
    if FULL_MARGIN:
        margin = margin + tl.load(full_margin_ptr + r * margin_u + v * margin_v + j * margin_n, mask=inside, other=0.0)
    if PAIR:
        z = tl.load(score_ptr + r * places + i, mask=inside, other=0.0)
        of_pair = tl.load(line_ptr + 1) + tl.load(line_ptr) * z
        margin = margin + tl.where(of_pair < 0.0, 0.0, of_pair)  # a NaN passes, which tl.maximum drops
    return tl.where(keep, margin, float("-inf"))


@triton.jit
def log_sums_kernel(
    s_ptr,  # (B' N) log-probabilities
    margin_ptr,  # (B' N) -inf where masked
    share_ptr,  # (B, B') uint8
    full_margin_ptr,
    full_keep_ptr,
    score_ptr,  # (rows, B' N)
    line_ptr,  # (2,)
    m_ptr,  # (B,) out
    rest_ptr,  # (B,) out
    beta,
    first_row,
    users,  # end of this block of rows
    places,
    owners,
    n,
    margin_u,
    margin_v,
    margin_n,
    keep_u,
    keep_v,
    keep_n,
    FULL_MARGIN: tl.constexpr,
    FULL_KEEP: tl.constexpr,
    PAIR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    u = first_row + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    none = float("-inf")
    m = tl.full((ROWS,), none, dtype=tl.float32)
    peak = tl.full((ROWS,), none, dtype=tl.float32)
    empty = tl.full((ROWS,), 1, dtype=tl.int32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, places, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        margin = _margins(
            margin_ptr, share_ptr, full_margin_ptr, full_keep_ptr, score_ptr, line_ptr, u[:, None], i, first_row, users,
            places, owners, n, margin_u, margin_v, margin_n, keep_u, keep_v, keep_n, FULL_MARGIN, FULL_KEEP, PAIR
        )  # fmt: skip
        s = tl.load(s_ptr + i, mask=i < places, other=0.0)
        # The running sum is total * exp(beta * m + peak); 0 stands for an origin that is still -inf.
        # A NaN is left out of both maxima, so that it stays in the total.
        s = tl.where(margin == none, none, s)
        empty = tl.minimum(empty, tl.min((margin == none).to(tl.int32), 1))
        new_m = tl.maximum(m, tl.max(tl.where(s == s, s, none), 1))
        origin = tl.where(new_m == none, 0.0, new_m)
        term = beta * (s - origin[:, None]) + margin
        old = beta * (m - origin) + peak
        new_peak = tl.maximum(old, tl.max(tl.where(term == term, term, none), 1))
        zero = tl.where(new_peak == none, 0.0, new_peak)
        total = total * tl.exp(old - zero) + tl.sum(tl.exp(term - zero[:, None]), 1)
        m, peak = new_m, new_peak
    tl.store(m_ptr + u, m, mask=u < users)
    of_nothing = tl.where(empty == 1, none, 0.0)
    rest = tl.where(total == 0.0, of_nothing, peak + tl.log(total))
    tl.store(rest_ptr + u, tl.where((total == total) & (m < float("inf")), rest, float("nan")), mask=u < users)


@triton.jit
def gradient_kernel(
    s_ptr,
    margin_ptr,
    share_ptr,
    full_margin_ptr,
    full_keep_ptr,
    score_ptr,
    line_ptr,
    m_ptr,  # (B,)
    rest_ptr,  # (B,)
    g_ptr,  # (B,)
    out_ptr,  # (B' N), added to
    beta,
    first_row,
    users,
    places,
    owners,
    n,
    margin_u,
    margin_v,
    margin_n,
    keep_u,
    keep_v,
    keep_n,
    FULL_MARGIN: tl.constexpr,
    FULL_KEEP: tl.constexpr,
    PAIR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out_i += sum_u g_u exp(beta (s_i - m_u) + margin_ui - rest_u): a program has its places of every row, in order,
    so the sums are the same from run to run."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(s_ptr + i, mask=i < places, other=0.0)
    total = tl.load(out_ptr + i, mask=i < places, other=0.0)
    for start in range(first_row, users, ROWS):
        u = start + tl.arange(0, ROWS)
        margin = _margins(
            margin_ptr, share_ptr, full_margin_ptr, full_keep_ptr, score_ptr, line_ptr, u[:, None].to(tl.int64),
            i[None, :], first_row, users, places, owners, n, margin_u, margin_v, margin_n, keep_u, keep_v, keep_n,
            FULL_MARGIN, FULL_KEEP, PAIR
        )  # fmt: skip
        m = tl.load(m_ptr + u, mask=u < users, other=0.0)
        rest = tl.load(rest_ptr + u, mask=u < users, other=0.0)
        g = tl.load(g_ptr + u, mask=u < users, other=0.0)
        x = beta * (s[None, :] - m[:, None]) + (margin - rest[:, None])
        nothing = (margin == float("-inf")) | (g[:, None] == 0.0)
        total += tl.sum(tl.where(nothing, 0.0, g[:, None] * tl.exp(x)), 0)
    tl.store(out_ptr + i, total, mask=i < places)


def log_sums(p: LossProblem) -> tuple[Tensor, Tensor]:
    """The users' log-sum pairs m and rest, (B,) each; (-inf, -inf) where a set is empty."""
    margin = _margin(p)
    if p.share is None:
        return _owner_sums(p, margin)
    m, rest = torch.empty_like(p.chosen), torch.empty_like(p.chosen)
    if p.separable and p.exclude is None:
        owner_m, owner_rest = _owner_sums(p, margin)
        for arguments in _blocks(p, owner_m, owner_rest, 1):
            _launch_sums(arguments, m, rest)
    else:
        for arguments in _blocks(p, p.rejected, margin, p.rejected.shape[1]):
            _launch_sums(arguments, m, rest)
    return m, rest


def rejected_gradient(p: LossProblem, g: Tensor, m: Tensor, rest: Tensor) -> Tensor:
    """beta * sum_u g_u exp(beta s_vn + gamma_uvn - lse_u): (B', N). ``g``, ``m`` and ``rest`` are (B,)."""
    margin = _margin(p)
    if p.share is not None and not (p.separable and p.exclude is None):
        out = torch.zeros_like(p.rejected, memory_format=torch.contiguous_format)
        for arguments in _blocks(p, p.rejected, margin, p.rejected.shape[1]):
            _launch_gradient(arguments, g, m, rest, out)
        return p.beta * out
    c, owner_m, owner_rest = g, m, rest
    if p.share is not None:
        owner_m, owner_rest = _owner_sums(p, margin)
        c = torch.zeros_like(owner_m)
        for arguments in _blocks(p, owner_m, owner_rest, 1):
            _launch_gradient(arguments, g, m, rest, c)
    own = p.beta * (p.rejected - owner_m[:, None]) + (margin - owner_rest[:, None])
    return p.beta * weigh(c[:, None], own, ~margin.isneginf())


def _margin(p: LossProblem) -> Tensor:
    """(B', N), -inf where masked."""
    margin = torch.zeros_like(p.rejected) if p.owner_margin is None else p.owner_margin
    return margin if p.keep is None else torch.where(p.keep, margin, -torch.inf)


def _owner_sums(p: LossProblem, margin: Tensor) -> tuple[Tensor, Tensor]:
    return log_sum(p.rejected, margin, ~margin.isneginf(), p.beta)  # (B', N): small, so torch's own kernels do


def _blocks(p: LossProblem, s: Tensor, margin: Tensor, n: int) -> Iterator[dict[str, Any]]:
    """Kernel arguments of each block of rows."""
    assert p.share is not None
    users, owners = p.share.shape
    s, margin, share = s.contiguous(), margin.contiguous(), p.share.contiguous().view(torch.uint8)
    pair = p.user_states is not None
    blocked = pair or p.exclude is not None  # temporaries that grow with the rows
    step = max(1, _BLOCK_PLACES // max(1, owners * n)) if blocked else max(1, users)
    for row in range(0, users, step):
        stop = min(row + step, users)
        keep, full_margin, score = _rows(p.full_keep, row, stop), _rows(p.full_margin, row, stop), s
        if p.exclude is not None:
            kept = ~_excluded(p.exclude, row, stop, owners, n)
            keep = kept if keep is None else kept & keep
        if p.user_states is not None and p.item_vectors is not None:
            score = p.user_states[row:stop] @ p.item_vectors.flatten(0, 1).T
            if p.item_bias is not None:
                score += p.item_bias.reshape(-1)
        arguments: dict[str, Any] = {
            "s_ptr": s,
            "margin_ptr": margin,
            "share_ptr": share,
            "full_margin_ptr": s if full_margin is None else full_margin,
            "full_keep_ptr": share if keep is None else keep.view(torch.uint8),
            "score_ptr": score,
            "line_ptr": s if p.line is None else p.line,
            "beta": p.beta,
            "first_row": row,
            "users": stop,
            "places": owners * n,
            "owners": owners,
            "n": n,
            "FULL_MARGIN": full_margin is not None,
            "FULL_KEEP": keep is not None,
            "PAIR": pair,
        }
        yield arguments | _strides("margin", full_margin) | _strides("keep", keep)


def _rows(part: Tensor | None, row: int, stop: int) -> Tensor | None:
    return part if part is None or part.shape[0] == 1 else part[row:stop]


def _strides(name: str, part: Tensor | None) -> dict[str, int]:
    strides = (0, 0, 0) if part is None else tuple(0 if part.shape[d] == 1 else part.stride(d) for d in range(3))
    return dict(zip((f"{name}_u", f"{name}_v", f"{name}_n"), strides, strict=True))


def _excluded(exclude: Tensor, row: int, stop: int, owners: int, n: int) -> Tensor:
    """The triples of these rows as a mask (rows, B', N); padding and triples out of range land in one spare place."""
    user, owner, negative = exclude.unbind(1)
    ours = (user >= row) & (user < stop) & (owner >= 0) & (owner < owners) & (negative >= 0) & (negative < n)
    count = (stop - row) * owners * n
    mask = torch.zeros(count + 1, dtype=torch.bool, device=exclude.device)
    mask.index_fill_(0, torch.where(ours, ((user - row) * owners + owner) * n + negative, count), True)
    return mask[:count].view(stop - row, owners, n)


def _launch_sums(arguments: dict[str, Any], m: Tensor, rest: Tensor) -> None:
    count = arguments["users"] - arguments["first_row"]
    rows, block = 1, min(2048, triton.next_power_of_2(arguments["places"]))
    log_sums_kernel[(triton.cdiv(count, rows),)](**arguments, m_ptr=m, rest_ptr=rest, ROWS=rows, BLOCK=block)


def _launch_gradient(arguments: dict[str, Any], g: Tensor, m: Tensor, rest: Tensor, out: Tensor) -> None:
    grid = (triton.cdiv(arguments["places"], GRADIENT_BLOCK),)
    tensors = {"g_ptr": g.contiguous(), "m_ptr": m.contiguous(), "rest_ptr": rest.contiguous(), "out_ptr": out}
    sizes = {"ROWS": GRADIENT_ROWS, "BLOCK": GRADIENT_BLOCK, "num_warps": GRADIENT_WARPS}
    gradient_kernel[grid](**arguments, **tensors, **sizes)
