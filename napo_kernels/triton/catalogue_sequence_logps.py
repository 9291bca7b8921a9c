"""catalogue_sequence_logps in Triton, for NVIDIA and AMD GPUs; functions as in reference/.

Four launches forward, three backward for a frozen head and five for one that trains, whatever the number of sets: what
this op computes is small, and a GPU waits for launches. Logits of rows that share a set are tiles of a matmul, those of
other rows are dot products; both gather the columns of the head that the sets name. No kernel adds with atomics: every
sum has one owner and one order.
"""

# Triton kernels take untyped arguments.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from napo_kernels.allowed import LANES, TILE_COLUMNS, TILE_ROWS, Gradients, Head, Logits, Plan
from napo_kernels.triton.softmax_rows import column_block, expm1, log1p, map_logit

TAKES_HALF = True  # hidden states and weight may be fp16, bf16 or fp32, each of its own

DEPTH_BYTES = 128  # of rows of hidden states and weight that a tile multiplies at a time; gradients: half the numbers
WIDTH = 128  # columns of hidden states or weight that a program of the backward matmuls computes
TILE_WARPS = 4
GATHERED = 16  # columns of the head, or entries of a token, that are gathered at a time
GATHERED_WIDTH = 256  # their columns of hidden states
BLOCK = 1024  # logits of a slot that one program holds at a time for its statistics
GRADIENT_BLOCK, PAIRS = 256, 16  # logits, and pairs with which they are compared, for their gradient
SEQUENCES = 128  # of one program
# What differs from step to step, and is read a number at a time: kernels are not compiled anew for its multiples of 16.
STATISTICS = ("max_ptr", "log_sum_ptr")
COUNTS = ("count", "first_slot", "places_before", "tile_columns", "tile_places")
# fp32 operands: three products of TF32 keep fp32's precision on the tensor cores of NVIDIA; AMD has none for it.
PRECISION = "ieee" if torch.version.hip else "tf32x3"
# Triton's interpreter multiplies the bits of bf16 as if they were integers.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


# ---- pieces --------------------------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b in fp32. Products of two bf16 or two fp16 numbers are exact in fp32."""
    if INTERPRETED:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    elif a.dtype == b.dtype:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def _gradient_dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b for an fp32 a. Where b is bf16, a is the sum of two bf16 numbers, which is a to 16 bits, more than
    the result is rounded to."""
    if b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        total = _dot(high, b, total, PRECISION)
        total = _dot((a - high.to(tl.float32)).to(tl.bfloat16), b, total, PRECISION)
    else:
        total = _dot(a, b, total, PRECISION)
    return total


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def tile_logits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    rows_ptr,
    columns_ptr,
    tiles_ptr,
    z_ptr,
    slope_ptr,
    hidden_stride,
    weight_stride,
    width,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program a tile of rows that share a set."""
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 7
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    in_rows = i < tl.load(tile_ptr + 1)
    in_columns = j < tl.load(tile_ptr + 4)
    rows = tl.load(rows_ptr + tl.load(tile_ptr) + i, mask=in_rows, other=0)
    columns = tl.load(columns_ptr + tl.load(tile_ptr + 3) + j, mask=in_columns, other=0)
    k = tl.arange(0, DEPTH)
    row_ptr = hidden_ptr + rows[:, None] * hidden_stride + k[None, :]
    column_ptr = weight_ptr + columns[None, :] * weight_stride + k[:, None]
    a = tl.zeros((ROWS, COLUMNS), tl.float32)
    for c in range(0, width, DEPTH):
        deep = k < width - c
        h = tl.load(row_ptr + c, mask=in_rows[:, None] & deep[None, :], other=0.0)
        w = tl.load(column_ptr + c, mask=in_columns[None, :] & deep[:, None], other=0.0)
        a = _dot(h, w, a, PRECISION)
    inside = in_rows[:, None] & in_columns[None, :]
    z, slope = map_logit(a, bias_ptr, columns[None, :], in_columns[None, :], scale, softcap, HAS_BIAS, HAS_CAP)
    at = tl.load(tile_ptr + 6) + i[:, None] * tl.load(tile_ptr + 5) + j[None, :]
    tl.store(z_ptr + at, z, mask=inside)
    if HAS_CAP:
        tl.store(slope_ptr + at, slope, mask=inside)


@triton.jit
def own_logits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    rows_ptr,
    sizes_ptr,
    columns_ptr,
    lanes_ptr,
    z_ptr,
    slope_ptr,
    hidden_stride,
    weight_stride,
    width,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program so many logits of rows with sets of their own: dot products, and -inf where no logit counts."""
    group_ptr = lanes_ptr + tl.program_id(0).to(tl.int64) * 6
    lane = tl.arange(0, LANES)
    of_slot = tl.load(group_ptr + 2)
    within = tl.load(group_ptr + 1) + lane
    in_group = lane < tl.load(group_ptr + 3)
    slots = tl.load(group_ptr) + within // of_slot
    inside = in_group & (within % of_slot < tl.load(sizes_ptr + slots, mask=in_group, other=0))
    rows = tl.load(rows_ptr + slots, mask=inside, other=0)
    columns = tl.load(columns_ptr + tl.load(group_ptr + 5) + lane, mask=inside, other=0)
    k = tl.arange(0, DEPTH)
    total = tl.zeros((LANES, DEPTH), tl.float32)
    for c in range(0, width, DEPTH):
        mask = inside[:, None] & (k < width - c)[None, :]
        h = tl.load(hidden_ptr + rows[:, None] * hidden_stride + (c + k)[None, :], mask=mask, other=0.0)
        w = tl.load(weight_ptr + columns[:, None] * weight_stride + (c + k)[None, :], mask=mask, other=0.0)
        total += h.to(tl.float32) * w.to(tl.float32)
    a = tl.sum(total, 1)
    z, slope = map_logit(a, bias_ptr, columns, inside, scale, softcap, HAS_BIAS, HAS_CAP)
    at = tl.load(group_ptr + 4) + lane
    tl.store(z_ptr + at, tl.where(inside, z, float("-inf")), mask=in_group)
    if HAS_CAP:
        tl.store(slope_ptr + at, slope, mask=in_group)


@triton.jit(do_not_specialize_on_alignment=STATISTICS)
def slot_stats_kernel(z_ptr, places_ptr, sizes_ptr, max_ptr, log_sum_ptr, COLUMNS: tl.constexpr):
    """One program a slot: m, and log(1 + the sum of exp(z - m) over all logits but one that is m), in one read. A NaN
    reaches the sum, whatever m makes of it."""
    s = tl.program_id(0).to(tl.int64)
    first = tl.load(places_ptr + s)
    size = tl.load(sizes_ptr + s)
    m = tl.full((), float("-inf"), tl.float32)
    rest = tl.full((), -1.0, tl.float32)  # so far there is not even the one
    for c in range(0, size, COLUMNS):
        at = c + tl.arange(0, COLUMNS)
        inside = at < size
        z = tl.load(z_ptr + first + at, mask=inside, other=float("-inf"))
        here = tl.max(z)
        others = inside & (z != here)
        of_block = tl.sum(tl.where(others, tl.exp(z - here), 0.0)) + tl.sum((inside & (z == here)).to(tl.float32)) - 1.0
        new = tl.maximum(m, here)
        kept = tl.where(m == float("-inf"), 0.0, tl.exp(m - new))
        added = tl.where(here == float("-inf"), 0.0, tl.exp(here - new))
        rest = tl.where(here <= m, rest + (of_block + 1.0) * added, (rest + 1.0) * kept + of_block)
        m = new
    tl.store(max_ptr + s, m)
    tl.store(log_sum_ptr + s, log1p(rest))


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=STATISTICS)
def sequence_sums_kernel(
    z_ptr,
    max_ptr,
    log_sum_ptr,
    pair_places_ptr,
    pair_slots_ptr,
    start_ptr,
    pairs_ptr,
    logps_ptr,
    count,
    SEQUENCES: tl.constexpr,
):
    """One program so many sequences: the sum of their pairs' log p = (z - m) - log(1 + rest)."""
    s = tl.program_id(0).to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)
    inside = s < count
    first = tl.load(start_ptr + s, mask=inside, other=0)
    last = tl.load(start_ptr + s + 1, mask=inside, other=0)
    total = tl.zeros((SEQUENCES,), tl.float32)
    for n in range(0, tl.max(last - first)):
        has = first + n < last
        pair = tl.load(pairs_ptr + first + n, mask=has, other=0)
        slot = tl.load(pair_slots_ptr + pair, mask=has, other=0)
        z = tl.load(z_ptr + tl.load(pair_places_ptr + pair, mask=has, other=0), mask=has, other=0.0)
        m = tl.load(max_ptr + slot, mask=has, other=0.0)
        total += (z - m) - tl.load(log_sum_ptr + slot, mask=has, other=0.0)
    tl.store(logps_ptr + s, total, mask=inside)


# ---- backward ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize_on_alignment=STATISTICS)
def logits_gradient_kernel(
    grad_ptr,
    z_ptr,
    slope_ptr,
    max_ptr,
    log_sum_ptr,
    places_ptr,
    sizes_ptr,
    start_ptr,
    pairs_ptr,
    pair_places_ptr,
    sequence_ids_ptr,
    dz_ptr,
    HAS_CAP: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One program a slot: dz_c = G_c (1 - p_c) - (G - G_c) p_c, with G_c of the pairs with target c and G of all pairs,
    times the slope; 0 where no logit counts. G and G_c are summed in the same order, so that they are equal where all
    pairs have one target."""
    s = tl.program_id(0).to(tl.int64)
    first = tl.load(places_ptr + s)
    places = tl.load(places_ptr + s + 1) - first
    size = tl.load(sizes_ptr + s)
    m = tl.load(max_ptr + s)
    log_sum = tl.load(log_sum_ptr + s)
    begin = tl.load(start_ptr + s)
    end = tl.load(start_ptr + s + 1)
    for c in range(0, places, COLUMNS):
        columns = c + tl.arange(0, COLUMNS)
        inside = columns < size
        mine = tl.zeros((COLUMNS,), tl.float32)
        whole = tl.zeros((COLUMNS,), tl.float32)
        for q in range(begin, end, PAIRS):
            at = q + tl.arange(0, PAIRS)
            pair = tl.load(pairs_ptr + at, mask=at < end, other=0)
            g = tl.load(grad_ptr + tl.load(sequence_ids_ptr + pair, mask=at < end, other=0), mask=at < end, other=0.0)
            target = tl.load(pair_places_ptr + pair, mask=at < end, other=0) - first
            mine += tl.sum(tl.where(target[:, None] == columns[None, :], g[:, None], 0.0), 0)
            whole += tl.sum(tl.where(columns[None, :] >= 0, g[:, None], 0.0), 0)
        z = tl.load(z_ptr + first + columns, mask=inside, other=0.0)
        logp = (z - m) - log_sum
        dz = -mine * expm1(logp) - (whole - mine) * tl.exp(logp)
        if HAS_CAP:
            dz *= tl.load(slope_ptr + first + columns, mask=inside, other=0.0)
        tl.store(dz_ptr + first + columns, tl.where(inside, dz, 0.0), mask=columns < places)


@triton.jit
def tile_hidden_kernel(
    dz_ptr,
    weight_ptr,
    rows_ptr,
    columns_ptr,
    tiles_ptr,
    out_ptr,
    weight_stride,
    width,
    scale,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program the rows of a tile and a block of hidden columns: dz W over all columns of the set. Tiles that do not
    begin at the set's first column have nothing to do."""
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 7
    num_columns = tl.load(tile_ptr + 5)
    if tl.load(tile_ptr + 4) == num_columns:
        i = tl.arange(0, ROWS)
        j = tl.arange(0, COLUMNS)
        k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        in_rows = i < tl.load(tile_ptr + 1)
        rows = tl.load(rows_ptr + tl.load(tile_ptr) + i, mask=in_rows, other=0)
        first = tl.load(tile_ptr + 3)
        dz_row_ptr = dz_ptr + tl.load(tile_ptr + 6) + i[:, None] * num_columns
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for c in range(0, num_columns, COLUMNS):
            in_columns = c + j < num_columns
            columns = tl.load(columns_ptr + first + c + j, mask=in_columns, other=0)
            dz = tl.load(dz_row_ptr + (c + j)[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0)
            w_ptr = weight_ptr + columns[:, None] * weight_stride + k[None, :]
            w = tl.load(w_ptr, mask=in_columns[:, None] & (k < width)[None, :], other=0.0)
            total = _gradient_dot(dz, w, total, PRECISION)
        inside = in_rows[:, None] & (k < width)[None, :]
        out = (scale * total).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * width + k[None, :], out, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def own_hidden_kernel(
    dz_ptr,
    weight_ptr,
    rows_ptr,
    sizes_ptr,
    columns_ptr,
    places_ptr,
    out_ptr,
    first_slot,
    places_before,
    weight_stride,
    width,
    scale,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a row with a set of its own and a block of hidden columns. Its columns lie as far apart as its
    places, ``places_before`` places earlier."""
    s = tl.program_id(0).to(tl.int64) + first_slot
    first = tl.load(places_ptr + s)
    size = tl.load(sizes_ptr + s)
    j = tl.arange(0, COLUMNS)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((COLUMNS, WIDTH), tl.float32)
    for c in range(0, size, COLUMNS):
        inside = c + j < size
        columns = tl.load(columns_ptr + (first - places_before) + c + j, mask=inside, other=0)
        dz = tl.load(dz_ptr + first + c + j, mask=inside, other=0.0)
        mask = inside[:, None] & (k < width)[None, :]
        w = tl.load(weight_ptr + columns[:, None] * weight_stride + k[None, :], mask=mask, other=0.0)
        total += dz[:, None] * w.to(tl.float32)
    out = (scale * tl.sum(total, 0)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.load(rows_ptr + s) * width + k, out, mask=k < width)


@triton.jit
def tile_weight_kernel(
    dz_ptr,
    hidden_ptr,
    rows_ptr,
    tiles_ptr,
    tile_sums_ptr,
    tile_bias_ptr,
    hidden_stride,
    width,
    NEED_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program the columns of a tile and a block of hidden columns: dz^T h, and the sum of dz, over all rows of the
    set. Tiles that do not begin at the set's first row have nothing to do."""
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 7
    num_rows = tl.load(tile_ptr + 2)
    if tl.load(tile_ptr + 1) == num_rows:
        i = tl.arange(0, ROWS)
        j = tl.arange(0, COLUMNS)
        k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        slot = tl.load(tile_ptr)
        in_columns = j < tl.load(tile_ptr + 4)
        num_columns = tl.load(tile_ptr + 5)
        dz_column_ptr = dz_ptr + tl.load(tile_ptr + 6) + j[:, None]
        total = tl.zeros((COLUMNS, WIDTH), tl.float32)
        of_bias = tl.zeros((COLUMNS,), tl.float32)
        for r in range(0, num_rows, ROWS):
            in_rows = r + i < num_rows
            mask = in_columns[:, None] & in_rows[None, :]
            dz = tl.load(dz_column_ptr + (r + i)[None, :] * num_columns, mask=mask, other=0.0)
            of_bias += tl.sum(dz, 1)
            if NEED_WEIGHT:
                rows = tl.load(rows_ptr + slot + r + i, mask=in_rows, other=0)
                h_ptr = hidden_ptr + rows[:, None] * hidden_stride + k[None, :]
                h = tl.load(h_ptr, mask=in_rows[:, None] & (k < width)[None, :], other=0.0)
                total = _gradient_dot(dz, h, total, PRECISION)
        column = tl.load(tile_ptr + 3) + j
        if NEED_WEIGHT:
            inside = in_columns[:, None] & (k < width)[None, :]
            tl.store(tile_sums_ptr + column[:, None] * width + k[None, :], total, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(tile_bias_ptr + column, of_bias, mask=in_columns)


@triton.jit(do_not_specialize=COUNTS)
def token_sums_kernel(
    dz_ptr,
    hidden_ptr,
    rows_ptr,
    start_ptr,
    entries_ptr,
    entry_slots_ptr,
    tile_sums_ptr,
    tile_bias_ptr,
    weight_out_ptr,
    bias_out_ptr,
    tile_columns,
    tile_places,
    hidden_stride,
    width,
    scale,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a token and a block of hidden columns. The entries of `columns` that name the token ascend: first
    those of tiles, whose sums over rows are there, then those of rows with sets of their own, each with one logit."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    end = tl.load(start_ptr + token + 1)
    total = tl.zeros((ENTRIES, WIDTH), tl.float32)
    of_bias = tl.zeros((ENTRIES,), tl.float32)
    for e in range(tl.load(start_ptr + token), end, ENTRIES):
        at = e + tl.arange(0, ENTRIES)
        entry = tl.load(entries_ptr + at, mask=at < end, other=0)
        of_tile = (at < end) & (entry < tile_columns)
        alone = (at < end) & (entry >= tile_columns)
        dz = tl.load(dz_ptr + tile_places + (entry - tile_columns), mask=alone, other=0.0)
        if NEED_WEIGHT:
            deep = (k < width)[None, :]
            tile_ptr = tile_sums_ptr + entry[:, None] * width + k[None, :]
            total += tl.load(tile_ptr, mask=of_tile[:, None] & deep, other=0.0)
            slot = tl.load(entry_slots_ptr + (entry - tile_columns), mask=alone, other=0)
            row = tl.load(rows_ptr + slot, mask=alone, other=0)
            h_ptr = hidden_ptr + row[:, None] * hidden_stride + k[None, :]
            total += dz[:, None] * tl.load(h_ptr, mask=alone[:, None] & deep, other=0.0).to(tl.float32)
        if NEED_BIAS:
            of_bias += dz + tl.load(tile_bias_ptr + entry, mask=of_tile, other=0.0)
    if NEED_WEIGHT:
        out = (scale * tl.sum(total, 0)).to(weight_out_ptr.dtype.element_ty)
        tl.store(weight_out_ptr + token * width + k, out, mask=k < width)
    if NEED_BIAS:  # known when compiled, as the other one is not  # noqa: SIM102
        if tl.program_id(1) == 0:
            tl.store(bias_out_ptr + token, tl.sum(of_bias))


# ---- host functions ------------------------------------------------------------------------------------------------


def forward(
    head: Head, plan: Plan, logits: Logits, *, num_sequences: int, logit_scale: float, softcap: float
) -> Tensor:  # (S,)
    """Fills ``logits``; a softcap of 0 stands for none."""
    hidden, weight = _unit_rows(head.hidden), _unit_rows(head.weight)
    bias = None if head.bias is None else head.bias.contiguous()
    z, slope, (row_max, log_sum) = logits
    width = hidden.shape[1]
    of_head = (hidden, weight, z if bias is None else bias)
    tail = (z if slope is None else slope, hidden.stride(0), weight.stride(0), width, logit_scale, softcap)
    flags = {"HAS_BIAS": bias is not None, "HAS_CAP": slope is not None}
    if len(plan.tiles):
        tile_logits_kernel[(len(plan.tiles),)](
            *of_head,
            plan.rows,
            plan.columns,
            plan.tiles,
            z,
            *tail,
            **flags,
            PRECISION=PRECISION,
            ROWS=TILE_ROWS,
            COLUMNS=TILE_COLUMNS,
            DEPTH=DEPTH_BYTES // max(hidden.itemsize, weight.itemsize),
            num_warps=TILE_WARPS,
        )
    if len(plan.lanes):
        own_logits_kernel[(len(plan.lanes),)](
            *of_head,
            plan.rows,
            plan.sizes,
            plan.columns,
            plan.lanes,
            z,
            *tail,
            **flags,
            LANES=LANES,
            DEPTH=column_block(width, GATHERED_WIDTH),
        )
    if len(plan.rows):
        block = column_block(_widest(plan), BLOCK)
        slot_stats_kernel[(len(plan.rows),)](
            z, plan.places, plan.sizes, row_max, log_sum, COLUMNS=block, num_warps=_warps(block)
        )
    logps = z.new_empty(num_sequences)
    if num_sequences:
        sequence_sums_kernel[(triton.cdiv(num_sequences, SEQUENCES),)](
            z,
            row_max,
            log_sum,
            plan.pair_places,
            plan.pair_slots,
            plan.sequence_start,
            plan.sequence_pairs,
            logps,
            num_sequences,
            SEQUENCES=SEQUENCES,
        )
    return logps


def backward(
    grad: Tensor,  # (S,)
    head: Head,
    plan: Plan,
    logits: Logits,
    grads: Gradients,
    *,
    logit_scale: float,
) -> None:
    if not len(plan.rows):
        return
    z, slope, (row_max, log_sum) = logits
    dz = torch.empty_like(z)
    block = column_block(_widest(plan), GRADIENT_BLOCK)
    logits_gradient_kernel[(len(plan.rows),)](
        grad,
        z,
        z if slope is None else slope,
        row_max,
        log_sum,
        plan.places,
        plan.sizes,
        plan.slot_start,
        plan.slot_pairs,
        plan.pair_places,
        plan.sequence_ids,
        dz,
        HAS_CAP=slope is not None,
        COLUMNS=block,
        PAIRS=PAIRS,
        num_warps=_warps(4 * block),
    )
    if grads.hidden is not None:
        _hidden_gradient(dz, head, plan, grads.hidden, logit_scale)
    if grads.weight is not None or grads.bias is not None:
        _head_gradient(dz, head, plan, grads, logit_scale)


def _hidden_gradient(dz: Tensor, head: Head, plan: Plan, out: Tensor, logit_scale: float) -> None:
    weight, width = _unit_rows(head.weight), head.hidden.shape[1]
    if len(plan.tiles):
        block = column_block(width, WIDTH)
        tile_hidden_kernel[(len(plan.tiles), triton.cdiv(width, block))](
            dz,
            weight,
            plan.rows,
            plan.columns,
            plan.tiles,
            out,
            weight.stride(0),
            width,
            logit_scale,
            PRECISION=PRECISION,
            ROWS=TILE_ROWS,
            COLUMNS=DEPTH_BYTES // 2 // weight.itemsize,
            WIDTH=block,
            num_warps=TILE_WARPS,
        )
    slots, places, columns = _shared(plan)
    if slots < len(plan.rows):
        block = column_block(width, GATHERED_WIDTH)
        own_hidden_kernel[(len(plan.rows) - slots, triton.cdiv(width, block))](
            dz,
            weight,
            plan.rows,
            plan.sizes,
            plan.columns,
            plan.places,
            out,
            slots,
            places - columns,
            weight.stride(0),
            width,
            logit_scale,
            COLUMNS=GATHERED,
            WIDTH=block,
        )


def _head_gradient(dz: Tensor, head: Head, plan: Plan, grads: Gradients, logit_scale: float) -> None:
    """The sums over rows that share a set first, then those of every token, by a list of the places that name it."""
    hidden, num_tokens, width = _unit_rows(head.hidden), len(head.weight), head.hidden.shape[1]
    _, places, columns = _shared(plan)
    trains = grads.weight is not None
    tile_sums = dz.new_empty((columns, width) if trains else 0)
    tile_bias = dz.new_empty(columns)
    if len(plan.tiles):
        block = column_block(width, WIDTH)
        tile_weight_kernel[(len(plan.tiles), triton.cdiv(width, block) if trains else 1)](
            dz,
            hidden,
            plan.rows,
            plan.tiles,
            tile_sums,
            tile_bias,
            hidden.stride(0),
            width,
            NEED_WEIGHT=trains,
            PRECISION=PRECISION,
            ROWS=DEPTH_BYTES // 2 // hidden.itemsize,
            COLUMNS=TILE_COLUMNS,
            WIDTH=block,
            num_warps=2 * TILE_WARPS,
        )
    tokens, entries = torch.sort(plan.columns, stable=True)
    start = torch.searchsorted(tokens, torch.arange(num_tokens + 1, device=tokens.device))
    own_places = torch.arange(places, plan.num_places, device=tokens.device)
    slots = torch.searchsorted(plan.places, own_places, right=True) - 1
    block = column_block(width, GATHERED_WIDTH)
    token_sums_kernel[(num_tokens, triton.cdiv(width, block) if trains else 1)](
        dz,
        hidden,
        plan.rows,
        start,
        entries,
        slots,
        tile_sums,
        tile_bias,
        dz if grads.weight is None else grads.weight,
        dz if grads.bias is None else grads.bias,
        columns,
        places,
        hidden.stride(0),
        width,
        logit_scale,
        NEED_WEIGHT=trains,
        NEED_BIAS=grads.bias is not None,
        ENTRIES=GATHERED,
        WIDTH=block,
    )


def _shared(plan: Plan) -> tuple[int, int, int]:
    """Slots, places and columns of the blocks with a set of their own. They come first."""
    groups = list(zip(plan.shapes[::3], plan.shapes[1::3], plan.shapes[2::3], strict=True))
    shared = [(n, n * w, w) for n, w, own in groups if not own]
    slots, places, columns = (sum(each) for each in zip(*shared, strict=True)) if shared else (0, 0, 0)
    return slots, places, columns


def _widest(plan: Plan) -> int:
    return max(plan.shapes[1::3])


def _warps(columns: int) -> int:
    return max(1, min(4, columns // 256))


def _unit_rows(matrix: Tensor) -> Tensor:
    """``matrix`` with its rows contiguous: a copy in the unusual case only."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
