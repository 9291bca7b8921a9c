"""Parts that Triton kernels of log-probabilities share: block sizes, the map of a logit, and log p."""

# Triton kernels take untyped arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns of a row that one program holds at a time
# Columns at a time and warps of the kernels that walk through whole rows: each thread has one 16-byte load of bf16, and
# the next under way. More columns per thread cost registers, so that fewer programs run at a time.
WALK_BLOCK, WALK_WARPS = 2048, 8
# Statistics of rows and targets lie one behind the other in a block, and their count differs from step to step. Each is
# read a number at a time, so kernels are not compiled anew for each way in which these addresses may be aligned.
STATISTICS = (
    "row_max_ptr",
    "row_log_sum_ptr",
    "rescale_ptr",
    "logp_ptr",
    "target_z_ptr",
    "target_logp_ptr",
    "target_slope_ptr",
    "slope_ptr",
)
_WIDE = 16
# How far exponents may lie from 0 at the largest logit: e^40 times any weight is far from the ends of fp32 and bf16.
REACH: tl.constexpr = tl.constexpr(40.0)


@triton.jit
def map_logit(a, bias_ptr, columns, mask, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """z = softcap * tanh((scale * a + bias) / softcap) and its slope 1 - tanh^2, without cancellation in either."""
    z = scale * a.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=mask, other=0.0)
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_CAP:
        x = z / softcap
        e = tl.exp(-2.0 * tl.abs(x))
        inverse = 1.0 / (1.0 + e)
        slope = 4.0 * e * inverse * inverse
        far = tl.where(x < 0.0, -1.0, 1.0) * (1.0 - e) * inverse
        s = x * x
        p = ((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1
        near = x + x * s * (p * s - 3.33332819422e-1)
        z = softcap * tl.where(tl.abs(x) < 0.625, near, far)
    return z, slope


@triton.jit
def log1p(u):
    """log(1 + u) for u >= 0 without losing small u (Kahan)."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0 without losing small x (Kahan)."""
    w = tl.exp(x)
    inner = (w != 1.0) & (w > 0.0)
    precise = (w - 1.0) * (x / tl.where(inner, tl.log(tl.where(inner, w, 0.5)), 1.0))
    return tl.where(w == 1.0, x, tl.where(w - 1.0 == -1.0, -1.0, precise))


@triton.jit
def log_p(x, z):
    """log p of a target whose logit is z, x below the log-sum-exp of all else; never above 0."""
    return tl.where(z == float("inf"), float("nan"), -(tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))))


@triton.jit
def origin_of(m, shift, top):
    """What the sum of the columns of no target is relative to, once ``top``, the row's largest logit, is known. Where
    m, the largest of these columns, is -inf, their sum is 0 relative to any number; exp(shift - top) would overflow for
    another."""
    return tl.where(m == float("-inf"), tl.where(top == float("-inf"), 0.0, top), shift)


def column_block(columns: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(columns)))


def padded_width(*matrices: Tensor) -> int:
    """Columns of each row that may be read and written: as many as it has, or the next multiple of 16 where the numbers
    up to there are padding. Loads whose mask ends at any other column are one number wide."""
    width = matrices[0].shape[1]
    most = -(-width // _WIDE) * _WIDE
    for x in matrices:
        last = x.storage_offset() + (x.shape[0] - 1) * x.stride(0) + most
        if x.stride(0) % _WIDE or x.stride(0) < most or last * x.element_size() > x.untyped_storage().nbytes():
            return width
    return most


def block_of_logits(most: int, has_cap: bool) -> int:
    """Columns that rows_forward holds at a time: a softcap takes registers, of which half as many columns leave
    enough."""
    return most // 2 if has_cap else most
