"""What the four ops behind ``linear_sequence_logps`` take and give: their schemas are made of these NamedTuples."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from napo_kernels.ops.registration import Size
from napo_kernels.rows import RowStats, Targets, add_at


class Head(NamedTuple):
    hidden: Tensor  # (R, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,) fp32
    lora_a: Tensor | None  # (r, H)
    lora_b: Tensor | None  # (V, r)


class Tokens(NamedTuple):
    targets: Tensor  # (Q,)
    rows: Tensor | None  # (Q,), None: row q for target q
    sequence_ids: Tensor  # (Q,)


class Options(NamedTuple):
    num_sequences: int
    average: bool
    keep_context: bool
    keep_columns: Size  # width of the column pieces of which forward keeps the stored numbers, 0: none
    logit_scale: float
    softcap: float  # 0: none
    lora_scale: float
    chunk_bytes: int  # 0: the default
    backend: str | None


class Output(NamedTuple):
    """What forward gives. The stored numbers are those that the row kernel makes of the logits."""

    logps: Tensor  # (S,)
    start: Tensor  # (R + 1,), with columns the distinct targets by row
    columns: Tensor  # (Q,)
    pair_target: Tensor  # (Q,) number of every pair's distinct target
    per_target: Tensor  # (2, Q) log p and slope
    per_row: Tensor  # (3, R) m, l, store_rescale
    context: Tensor  # (R, H) stored numbers times weight, empty unless keep_context
    low_context: Tensor  # (R, r) stored numbers times lora_b; this and the next two empty unless keep_columns
    kept: Tensor  # (R V,) stored numbers, one column piece with all its rows after the other
    kept_scale: Tensor  # (pieces, R) turns those of each piece and row into p * slope


class Saved(NamedTuple):
    """What every backward op needs of the forward."""

    sequence_ids: Tensor
    start: Tensor
    columns: Tensor
    pair_target: Tensor
    per_target: Tensor
    per_row: Tensor

    @property
    def plan(self) -> Targets:
        return Targets(self.start, self.columns)

    @property
    def stats(self) -> RowStats:
        return RowStats(*self.per_target, *self.per_row)

    def target_grad(self, grad: Tensor, average: bool) -> Tensor:
        """Upstream gradient of every distinct target: the sum over its pairs, (Q,)."""
        if average:
            grad = grad / lengths(self.sequence_ids, grad)
        return add_at(len(self.pair_target), self.pair_target, grad[self.sequence_ids])


class Frozen(NamedTuple):
    """What the gradient of the hidden states needs of the head."""

    weight: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    context: Tensor


class Kept(NamedTuple):
    low_context: Tensor
    kept: Tensor
    kept_scale: Tensor


class Needed(NamedTuple):
    """Which gradients of the head are."""

    need_weight: bool
    need_bias: bool
    need_lora: bool


def lengths(sequence_ids: Tensor, like: Tensor) -> Tensor:
    """Tokens of every sequence, at least 1, (S,)."""
    return add_at(len(like), sequence_ids, like.new_ones(len(sequence_ids))).clamp_(min=1.0)
