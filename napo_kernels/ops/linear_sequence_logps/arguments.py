"""Arguments and results of the four ops behind ``linear_sequence_logps``: these NamedTuples generate their schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from napo_kernels.rows import RowStats, Targets, Upstream, add_at


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
    logit_scale: float
    softcap: float  # 0: none
    lora_scale: float
    backend: str | None


class Output(NamedTuple):
    """Results of forward. The stored numbers are those that the row kernel makes of the logits."""

    logps: Tensor  # (S,)
    start: Tensor  # (R + 1,), with columns the distinct targets by row
    columns: Tensor  # (Q,)
    pair_target: Tensor  # (Q,) number of every pair's distinct target
    per_target: Tensor  # (2, Q) log p and slope
    per_row: Tensor  # (3, R) m, l, store_rescale
    context: Tensor  # (R, H) stored numbers times weight, empty unless keep_context
    low_context: Tensor  # (R, r) stored numbers times lora_b; this and the next two empty unless the plan keeps
    kept: Tensor  # (R V,) stored numbers, one column piece with all its rows after the other
    kept_scale: Tensor  # (pieces, R) turns those of each piece and row into p * slope


class Saved(NamedTuple):
    """Results of forward that every backward op needs."""

    sequence_ids: Tensor
    start: Tensor
    columns: Tensor
    pair_target: Tensor
    per_target: Tensor
    per_row: Tensor

    def upstream(self, grad: Tensor, average: bool) -> Upstream:
        """``grad`` (S,) as that of every distinct target: the sum over its pairs."""
        if average:
            grad = grad / lengths(self.sequence_ids, grad)
        target_grad = add_at(len(self.pair_target), self.pair_target, grad[self.sequence_ids])
        return Upstream(Targets(self.start, self.columns), RowStats(*self.per_target, *self.per_row), target_grad)


class Frozen(NamedTuple):
    """The part of the head that the gradient of the hidden states needs."""

    weight: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    context: Tensor


class Kept(NamedTuple):
    low_context: Tensor
    kept: Tensor
    kept_scale: Tensor


class Needed(NamedTuple):
    """Which gradients of the head are asked for."""

    need_weight: bool
    need_bias: bool
    need_lora: bool


def lengths(sequence_ids: Tensor, like: Tensor) -> Tensor:
    """Tokens of every sequence, at least 1, (S,)."""
    return add_at(len(like), sequence_ids, like.new_ones(len(sequence_ids))).clamp_(min=1.0)
