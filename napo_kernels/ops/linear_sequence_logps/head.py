"""The output head as the matmuls of ``linear_sequence_logps`` need it."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from napo_kernels.dispatch import register
from napo_kernels.ops.linear_sequence_logps.arguments import Head, Options
from napo_kernels.ops.linear_sequence_logps.pieces import pitch, widens
from napo_kernels.rows import LogitMap, LowRank

OP = register("linear_sequence_logps")


class OutputHead:
    """The head of the model as the matmuls need it."""

    def __init__(self, kernels: ModuleType, head: Head, options: Options) -> None:
        dtype = operand_dtype(kernels, head.hidden.dtype)
        hidden, weight = head.hidden.to(dtype), head.weight.to(dtype)
        lora_a, lora_b = (None if x is None else x.to(dtype) for x in (head.lora_a, head.lora_b))
        self.hidden, self.weight = unit_rows(hidden), unit_rows(weight)
        self.lora_a = lora_a
        low = None if lora_a is None else self.hidden @ lora_a.t()  # (R, r)
        self.low_rank = LowRank(low, None if lora_b is None else unit_rows(lora_b), options.lora_scale)
        bias = None if head.bias is None else head.bias.contiguous()
        self.logit_map = LogitMap(options.logit_scale, bias, options.softcap)
        self.logits_dtype = torch.float32 if widens(hidden) else hidden.dtype

    def logits(self, rows: slice, columns: slice, out: Tensor) -> None:
        hidden, weight = self.hidden[rows], self.weight[columns]
        if out.dtype == hidden.dtype:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        low, lora_b, scale = self.low_rank
        if low is not None and lora_b is not None:
            out.addmm_(low[rows].to(out.dtype), lora_b[columns].to(out.dtype).t(), alpha=scale)

    def times_weight(self, stored: Tensor, columns: slice, out: Tensor | None, low_out: Tensor | None) -> None:
        """out = stored @ (weight + lora_scale * B @ A)[columns], low_out = stored @ B[columns]"""
        if out is not None:
            matmul_into(out, stored, self.weight[columns])
        if self.lora_a is not None and self.low_rank.lora_b is not None:
            low = stored @ self.low_rank.lora_b[columns]
            if out is not None:
                out.add_(low @ self.lora_a, alpha=self.low_rank.scale)
            if low_out is not None:
                low_out.copy_(low)


class Workspace:
    """Memory for the logits of a piece and for what the row kernel makes of them, the same where the dtype is the same.
    ``num_rows`` and ``width`` are those of the largest piece. ``kept``, memory for all of the latter, one piece after
    the other, takes the place of what pieces would reuse."""

    def __init__(self, head: OutputHead, num_rows: int, width: int, kept: Tensor | None = None) -> None:
        self._like = head.hidden
        size, device, dtype = num_rows * pitch(head.hidden, width), head.hidden.device, head.hidden.dtype
        self._keeps = kept is not None
        self._stored = torch.empty(size, dtype=dtype, device=device) if kept is None else kept
        same = head.logits_dtype == dtype
        self._logits = None if same else torch.empty(size, dtype=head.logits_dtype, device=device)

    def piece(self, num_rows: int, width: int, rows_before: int = 0, columns_before: int = 0) -> tuple[Tensor, Tensor]:
        """Logits and stored numbers, (num_rows, width) each. The other two say where the latter are kept: after so many
        rows of these columns, and after all rows of the columns before."""
        step = pitch(self._like, width)
        first = rows_before * step + columns_before if self._keeps else 0
        stored = lines(self._stored, first, num_rows, width, step)
        return stored if self._logits is None else lines(self._logits, 0, num_rows, width, step), stored


def lines(memory: Tensor, first: int, num_rows: int, width: int, step: int) -> Tensor:
    """(num_rows, width), whose rows begin ``step`` numbers apart from ``first`` on."""
    return memory[first : first + num_rows * step].view(num_rows, step)[:, :width]


def operand_dtype(kernels: ModuleType, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the matmuls' operands."""
    return dtype if kernels.ROUNDS_OPERANDS else torch.promote_types(dtype, torch.float32)


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def store_scale(dtype: torch.dtype, vocabulary: int) -> float:
    """A power of two that keeps sums over the vocabulary of numbers up to 1 within fp16."""
    return 2.0 ** -max(0, math.ceil(math.log2(vocabulary)) - 13) if dtype == torch.float16 else 1.0


def unit_rows(matrix: Tensor) -> Tensor:
    """``matrix`` with its rows contiguous, which the row kernels ask for: a copy in the unusual case only."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
