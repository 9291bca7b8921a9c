"""The output head as the matmuls of ``linear_sequence_logps`` need it, and the pieces that its logits come in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from napo_kernels.rows import LogitMap

# Bytes of logits that exist at a time: on a CPU what its last cache holds (studies/row_kernel.md), on a GPU enough to
# fill it.
CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}
# Rows at a time where the vocabulary is cut: the CPU's matmul packs the weight anew for each of these pieces, which
# some 500 rows hide, while the fp32 sum of the second products takes 4 H bytes a row.
ROWS = 2048


class OutputHead:
    """The head of the model as the matmuls need it."""

    def __init__(
        self,
        kernel: str,
        hidden: Tensor,  # (R, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        lora_a: Tensor | None,  # (r, H)
        lora_b: Tensor | None,  # (V, r)
        logit_scale: float,
        softcap: float,
        lora_scale: float,
    ) -> None:
        if kernel.startswith("napo_kernels.reference"):  # the specification rounds nothing
            wide = torch.promote_types(hidden.dtype, torch.float32)
            hidden, weight = hidden.to(wide), weight.to(wide)
            lora_a, lora_b = (None if x is None else x.to(wide) for x in (lora_a, lora_b))
        self.hidden, self.weight = unit_rows(hidden), unit_rows(weight)
        self.lora_a, self.lora_b = lora_a, None if lora_b is None else unit_rows(lora_b)
        self.low = None if lora_a is None else self.hidden @ lora_a.t()  # (R, r)
        self.lora_scale = lora_scale
        self.logit_map = LogitMap(logit_scale, None if bias is None else bias.contiguous(), softcap)
        # CUDA's matmuls give fp32 for half operands; those of the CPU round to the operands' dtype
        half_on_gpu = hidden.device.type == "cuda" and hidden.dtype.itemsize == 2
        self.logits_dtype = torch.float32 if half_on_gpu else hidden.dtype
        self.bytes_per_logit = hidden.dtype.itemsize + (4 if half_on_gpu else 0)

    def workspace(self, size: int) -> tuple[Tensor, Tensor]:
        """Memory for logits and for what the row kernel makes of them: the same where the dtype is the same."""
        logits = torch.empty(size, dtype=self.logits_dtype, device=self.hidden.device)
        same = self.logits_dtype == self.hidden.dtype
        return logits, logits if same else torch.empty(size, dtype=self.hidden.dtype, device=self.hidden.device)

    def logits(self, rows: slice, columns: slice, memory: Tensor) -> Tensor:
        hidden, weight = self.hidden[rows], self.weight[columns]
        out = memory[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        if out.dtype == hidden.dtype:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        if self.low is not None and self.lora_b is not None:
            low, lora_b = self.low[rows].to(out.dtype), self.lora_b[columns].to(out.dtype)
            out.addmm_(low, lora_b.t(), alpha=self.lora_scale)
        return out

    def times_weight(self, stored: Tensor, columns: slice, out: Tensor) -> None:
        """out = stored @ (weight + lora_scale * B @ A)[columns]"""
        weight = self.weight[columns]
        if out.dtype == stored.dtype:
            torch.mm(stored, weight, out=out)
        else:
            out.copy_(stored @ weight)
        if self.lora_a is not None and self.lora_b is not None:
            out.add_((stored @ self.lora_b[columns]) @ self.lora_a, alpha=self.lora_scale)

    def pieces(self, vocabulary: int, budget: int, by_columns: bool) -> tuple[Pieces, Pieces]:
        """Rows and columns of the logits that exist at a time: some rows and all columns, or ``by_columns`` all rows
        (but ROWS at most) and some columns."""
        num_rows = len(self.hidden)
        if not by_columns:
            return Pieces(num_rows, vocabulary * self.bytes_per_logit, budget), Pieces(vocabulary, 1, vocabulary)
        rows = Pieces(num_rows, 1, ROWS)
        return rows, Pieces(vocabulary, rows.size * self.bytes_per_logit, budget)


class Pieces:
    """(first, size) of pieces of at most ``budget`` bytes, all but the last of the same size."""

    def __init__(self, total: int, bytes_per_item: int, budget: int) -> None:
        self.total = self.size = total
        most = max(1, budget // max(1, bytes_per_item))
        if total > most:
            self.size = -(-total // -(-total // most))
            if most >= 32:  # whole tiles of the matrix units
                self.size = min(-(-self.size // 16) * 16, most // 16 * 16)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.total, max(1, self.size)):
            yield first, min(self.size, self.total - first)


def default_chunk(hidden: Tensor) -> int:
    return CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])


def unit_rows(matrix: Tensor) -> Tensor:
    """``matrix`` with its rows contiguous, which the row kernels ask for: a copy in the unusual case alone."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
