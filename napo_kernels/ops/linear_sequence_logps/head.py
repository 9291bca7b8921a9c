"""The output head as the matmuls of ``linear_sequence_logps`` need it, and the pieces that its logits come in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from napo_kernels.dispatch import register
from napo_kernels.ops.linear_sequence_logps.arguments import Head, Options
from napo_kernels.rows import LogitMap

OP = register("linear_sequence_logps", "softmax_rows")

# Bytes of logits that exist at a time on a CPU: few, which are still in its caches when the second matmul reads them,
# but WIDTH columns as far as MOST_BYTES allow, since a sum of (rows, H) is read and written for each piece
# (studies/row_kernel.md).
CHUNK_BYTES = 4 << 20
MOST_BYTES = 12 << 20
WIDTH = 3072
# Of what forward stored and keeps for a head that trains, by default.
KEPT_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
# Rows at a time on a GPU: whole tiles of a matmul, and so many that the second one, whose output is only H wide, fills
# the GPU too: 1024 rows are 128 tiles of 128 x 256 at H 4096, 2048 rows at H 2048. At H 4096, V 128256 on an H200 two
# matmuls of all 8192 rows took 22.0 ms in pieces of 688 rows, and 21.6 in pieces of 1024 (studies/first_gpu.md).
GPU_ROWS, GPU_ROWS_NARROW, NARROW = 1024, 2048, 2048
# Rows at a time where the vocabulary is cut: the CPU's matmul packs the weight anew for each of these pieces, which
# some 500 rows hide, while the fp32 sum of the second products takes 4 H bytes a row.
ROWS = 2048
# Columns at a time are a multiple: where they were an odd multiple of 64, two threads took 17 % longer for the first
# matmul (oneDNN).
COLUMNS = 512


class OutputHead:
    """The head of the model as the matmuls need it."""

    def __init__(
        self,
        kernels: ModuleType,
        head: Head,
        options: Options,
    ) -> None:
        dtype = operand_dtype(kernels, head.hidden.dtype)
        hidden, weight = head.hidden.to(dtype), head.weight.to(dtype)
        lora_a, lora_b = (None if x is None else x.to(dtype) for x in (head.lora_a, head.lora_b))
        self.hidden, self.weight = unit_rows(hidden), unit_rows(weight)
        self.lora_a, self.lora_b = lora_a, None if lora_b is None else unit_rows(lora_b)
        self.low = None if lora_a is None else self.hidden @ lora_a.t()  # (R, r)
        self.lora_scale = options.lora_scale
        bias = None if head.bias is None else head.bias.contiguous()
        self.logit_map = LogitMap(options.logit_scale, bias, options.softcap)
        self.logits_dtype = torch.float32 if _widens(hidden) else hidden.dtype

    def logits(self, rows: slice, columns: slice, out: Tensor) -> None:
        hidden, weight = self.hidden[rows], self.weight[columns]
        if out.dtype == hidden.dtype:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        if self.low is not None and self.lora_b is not None:
            low, lora_b = self.low[rows].to(out.dtype), self.lora_b[columns].to(out.dtype)
            out.addmm_(low, lora_b.t(), alpha=self.lora_scale)

    def times_weight(self, stored: Tensor, columns: slice, out: Tensor | None, low_out: Tensor | None) -> None:
        """out = stored @ (weight + lora_scale * B @ A)[columns], low_out = stored @ B[columns]"""
        if out is not None:
            matmul_into(out, stored, self.weight[columns])
        if self.lora_a is not None and self.lora_b is not None:
            low = stored @ self.lora_b[columns]
            if out is not None:
                out.add_(low @ self.lora_a, alpha=self.lora_scale)
            if low_out is not None:
                low_out.copy_(low)


class Workspace:
    """Memory for the logits of a piece and for what the row kernel makes of them, the same where the dtype is the same.
    ``kept``, memory for all of the latter, one piece after the other, takes the place of what pieces would reuse."""

    def __init__(self, head: OutputHead, size: int, kept: Tensor | None = None) -> None:
        device, dtype = head.hidden.device, head.hidden.dtype
        self._keeps = kept is not None
        self._stored = torch.empty(size, dtype=dtype, device=device) if kept is None else kept
        same = head.logits_dtype == dtype
        self._logits = None if same else torch.empty(size, dtype=head.logits_dtype, device=device)

    def piece(self, num_rows: int, width: int, before: int) -> tuple[Tensor, Tensor]:
        """Logits and stored numbers, (num_rows, width) each, after pieces of ``before`` numbers."""
        size, first = num_rows * width, before if self._keeps else 0
        stored = self._stored[first : first + size].view(num_rows, width)
        return stored if self._logits is None else self._logits[:size].view(num_rows, width), stored


class Pieces:
    """(first, size) of the pieces of a range, all but the last of the same size."""

    def __init__(self, total: int, size: int) -> None:
        self.total, self.size = total, size

    @classmethod
    def within(cls, total: int, bytes_per_item: int, budget: int, tile: int = 16) -> Pieces:
        """Pieces of at most ``budget`` bytes, of whole tiles as far as two fit."""
        most = max(1, budget // max(1, bytes_per_item))
        if total <= most:
            return cls(total, total)
        size = -(-total // -(-total // most))
        if most >= 32:
            while 2 * tile > most:
                tile //= 2
            size = min(-(-size // tile) * tile, most // tile * tile)
        return cls(total, size)

    @property
    def count(self) -> int:
        return -(-self.total // max(1, self.size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.total, max(1, self.size)):
            yield first, min(self.size, self.total - first)


def pieces(
    hidden: Tensor, vocabulary: int, budget: int, by_columns: bool, width: int | None = None
) -> tuple[Pieces, Pieces]:
    """Rows and columns of the logits that exist at a time: some rows and all columns, or ``by_columns`` all rows (but
    ROWS at most) and some columns, ``width`` of them where that is planned already."""
    num_rows = hidden.shape[0]
    if not by_columns:
        by_rows = Pieces.within(num_rows, vocabulary * bytes_per_logit(hidden), budget, _gpu_rows(hidden))
        return by_rows, Pieces(vocabulary, vocabulary)
    rows = Pieces.within(num_rows, 1, ROWS)
    if width is not None:
        return rows, Pieces(vocabulary, width)
    return rows, column_pieces(hidden, rows.size, vocabulary, budget)


def column_pieces(hidden: Tensor, num_rows: int, vocabulary: int, budget: int) -> Pieces:
    """Columns of the logits of ``num_rows`` rows that exist at a time."""
    return Pieces.within(vocabulary, num_rows * bytes_per_logit(hidden), budget, COLUMNS)


def bytes_per_logit(hidden: Tensor) -> int:
    """Of a logit and of what the row kernel makes of it."""
    return hidden.dtype.itemsize + (4 if _widens(hidden) else 0)


def _widens(hidden: Tensor) -> bool:
    """CUDA's matmuls give fp32 for half operands; those of the CPU round to the operands' dtype."""
    return hidden.device.type == "cuda" and hidden.dtype.itemsize == 2


def operand_dtype(kernels: ModuleType, dtype: torch.dtype) -> torch.dtype:
    """Of the matmuls."""
    return dtype if kernels.ROUNDS_OPERANDS else torch.promote_types(dtype, torch.float32)


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def store_scale(dtype: torch.dtype, vocabulary: int) -> float:
    """A power of two that keeps sums over the vocabulary of numbers up to 1 within fp16."""
    return 2.0 ** -max(0, math.ceil(math.log2(vocabulary)) - 13) if dtype == torch.float16 else 1.0


def default_chunk(hidden: Tensor, vocabulary: int) -> int:
    """Bytes of logits, and of what the row kernel makes of them, that exist at a time."""
    if hidden.device.type != "cpu":
        return _gpu_rows(hidden) * max(1, vocabulary) * bytes_per_logit(hidden)
    wide = min(hidden.shape[0], ROWS) * WIDTH * bytes_per_logit(hidden)
    return max(CHUNK_BYTES, min(MOST_BYTES, wide))


def _gpu_rows(hidden: Tensor) -> int:
    return GPU_ROWS_NARROW if hidden.shape[1] <= NARROW else GPU_ROWS


def default_kept(hidden: Tensor) -> int:
    return KEPT_BYTES.get(hidden.device.type, KEPT_BYTES["cuda"])


def unit_rows(matrix: Tensor) -> Tensor:
    """``matrix`` with its rows contiguous, which the row kernels ask for: a copy in the unusual case alone."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
