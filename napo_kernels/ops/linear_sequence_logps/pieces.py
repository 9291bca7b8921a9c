"""The plan of a call: the pieces in which the logits are computed, and whether forward keeps what it stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from napo_kernels.ops.linear_sequence_logps.arguments import Head
from napo_kernels.ops.registration import Size

# Bytes of logits that exist at a time on a CPU. Few are still in its caches when the second matmul reads them. But a
# piece has WIDTH columns as far as MOST_BYTES allow, since a sum of (rows, H) is read and written for each piece
# (studies/row_kernel.md).
CHUNK_BYTES = 4 << 20
MOST_BYTES = 12 << 20
WIDTH = 3072
# Bytes of stored numbers that forward keeps for a head that trains, by default.
KEPT_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
# Rows at a time on a GPU: whole tiles of a matmul, and so many that the second one, whose output is only H wide, fills
# the GPU too: 1024 rows are 128 tiles of 128 x 256 at H 4096, 2048 rows at H 2048. At H 4096, V 128256 on an H200 two
# matmuls of all 8192 rows took 22.0 ms in pieces of 688 rows, and 21.6 in pieces of 1024 (studies/first_gpu.md).
GPU_ROWS, GPU_ROWS_NARROW, NARROW = 1024, 2048, 2048
# Rows at a time where the vocabulary is cut: the CPU's matmul packs the weight anew for each of these pieces, which
# some 500 rows hide, while the fp32 sum of the second products takes 4 H bytes per row.
ROWS = 2048
# Columns at a time are a multiple: where they were an odd multiple of 64, two threads took 17 % longer for the first
# matmul (oneDNN).
COLUMNS = 512
# Numbers from one row of logits to the next on a GPU are a multiple: matmuls and wide loads want rows that begin at
# multiples of 16 bytes, and a vocabulary is odd as soon as a token was added to it.
PITCH = 64


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


class Plan(NamedTuple):
    """Sizes of the pieces. The public function makes the plan. If torch.compile traces it and nothing is kept, it
    leaves the sizes at 0 and the ops set them (`known`): else every number of rows would need a compilation of its
    own."""

    row_piece: Size  # forward: rows of the logits at a time
    column_piece: Size  # forward: columns of them at a time
    column_piece_again: Size  # backward where it computes the logits again, for all rows: columns at a time
    keeps: bool  # whether forward keeps the stored numbers, which spares backward a matmul and a pass
    budget: int  # bytes of logits that exist at a time, 0: the default

    @classmethod
    def of(cls, head: Head, chunk_bytes: int | None) -> Plan:
        plan = cls(0, 0, 0, keeps(head, chunk_bytes), chunk_bytes or 0)
        if torch.compiler.is_compiling() and not plan.keeps:
            return plan
        return plan.known(head.hidden, head.weight.shape[0])

    def known(self, hidden: Tensor, vocabulary: int) -> Plan:
        if self.column_piece:
            return self
        num_rows, budget = hidden.shape[0], self.budget or default_budget(hidden, vocabulary)
        again = 0 if self.keeps else _columns(hidden, num_rows, vocabulary, budget)
        if cuts_columns(hidden):
            rows = Pieces.within(num_rows, 1, ROWS).size
            columns = _columns(hidden, rows, vocabulary, budget)
        else:
            bytes_per_row = pitch(hidden, vocabulary) * bytes_per_logit(hidden)
            rows = Pieces.within(num_rows, bytes_per_row, budget, _gpu_rows(hidden)).size
            columns = vocabulary
        return self._replace(row_piece=rows, column_piece=columns, column_piece_again=again)


def cuts_columns(hidden: Tensor) -> bool:
    """Whether a piece of forward is all rows (ROWS at most) and some columns, instead of some rows and all columns.

    This avoids matmuls of few rows, which are slow on CPUs only. The kernels for GPUs do not serve it.
    """
    return hidden.device.type == "cpu"


def pitch(hidden: Tensor, width: int) -> int:
    """Numbers from one row of ``width`` logits, or of what is made of them, to the next."""
    return width if cuts_columns(hidden) else -(-width // PITCH) * PITCH


def _columns(hidden: Tensor, num_rows: int, vocabulary: int, budget: int) -> int:
    return Pieces.within(vocabulary, num_rows * bytes_per_logit(hidden), budget, COLUMNS).size


def keeps(head: Head, chunk_bytes: int | None) -> bool:
    """Whether forward keeps the stored numbers.

    They are kept for a head that trains, where they are no larger than KEPT_BYTES (``chunk_bytes`` where it is given)
    or than the weight's gradient. They are not kept for a bias that trains, whose gradient needs the logits themselves,
    nor where the number of rows is not known yet.
    """
    hidden, weight, bias, lora_a, lora_b = head
    trains_weight = weight.requires_grad
    trains_lora = any(x is not None and x.requires_grad for x in (lora_a, lora_b))
    if not torch.is_grad_enabled() or not (trains_weight or trains_lora) or (bias is not None and bias.requires_grad):
        return False
    (num_rows, width), vocabulary, itemsize = hidden.shape, weight.shape[0], hidden.dtype.itemsize
    if _depends_on_data(num_rows):
        return False
    most = chunk_bytes or KEPT_BYTES.get(hidden.device.type, KEPT_BYTES["cuda"])
    return num_rows * vocabulary * itemsize <= max(most, vocabulary * width * itemsize if trains_weight else 0)


def _depends_on_data(size: int) -> bool:
    """Whether torch.compile traces a size that no shape tells, such as the number of rows that a mask selects in the
    same graph."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # slow to import

    return guard_or_true(size == 0) and guard_or_true(size != 0)


def default_budget(hidden: Tensor, vocabulary: int) -> int:
    """Bytes of logits, and of the numbers that the row kernel makes of them, that exist at a time."""
    if hidden.device.type != "cpu":
        return _gpu_rows(hidden) * max(1, pitch(hidden, vocabulary)) * bytes_per_logit(hidden)
    wide = min(hidden.shape[0], ROWS) * WIDTH * bytes_per_logit(hidden)
    return max(CHUNK_BYTES, min(MOST_BYTES, wide))


def _gpu_rows(hidden: Tensor) -> int:
    return GPU_ROWS_NARROW if hidden.shape[1] <= NARROW else GPU_ROWS


def bytes_per_logit(hidden: Tensor) -> int:
    """Bytes of a logit and of the number that the row kernel makes of it."""
    return hidden.dtype.itemsize + (4 if widens(hidden) else 0)


def widens(hidden: Tensor) -> bool:
    """Whether matmuls give fp32 for half operands, as CUDA's do; those of the CPU round to the operands' dtype."""
    return hidden.device.type == "cuda" and hidden.dtype.itemsize == 2
