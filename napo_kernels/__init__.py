"""Fused kernels for preference losses with one chosen and many rejected candidates."""

from napo_kernels.allowed import AllowedTokens
from napo_kernels.dispatch import backends
from napo_kernels.distributed import PoolLayout, gather_pool, pool_layout
from napo_kernels.false_negatives import false_negative_triples
from napo_kernels.ops.catalogue_sequence_logps import catalogue_sequence_logps
from napo_kernels.ops.dynamic_margin import DynamicMargin, PairMargin
from napo_kernels.ops.linear_sequence_logps import linear_sequence_logps
from napo_kernels.ops.napo_loss import napo_loss
from napo_kernels.ops.sequence_logps import sequence_logps
from napo_kernels.ops.shared_negatives import neighbour_count, shared_negatives
from napo_kernels.padded import PaddedTokens, padded_tokens

__all__ = [
    "AllowedTokens",
    "DynamicMargin",
    "PaddedTokens",
    "PairMargin",
    "PoolLayout",
    "backends",
    "catalogue_sequence_logps",
    "false_negative_triples",
    "gather_pool",
    "linear_sequence_logps",
    "napo_loss",
    "neighbour_count",
    "padded_tokens",
    "pool_layout",
    "sequence_logps",
    "shared_negatives",
]
