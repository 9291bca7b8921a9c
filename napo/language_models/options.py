"""The adapter's options. The command line describes them, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from napo.options import Range, check


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """The adapter of a fresh model."""

    r: Annotated[int, Range(1)] = 16
    """Rank of the adapter."""
    alpha: Annotated[int, Range(1)] = 32
    """The adapter is scaled by alpha / r."""
    dropout: Annotated[float, Range(0, 1)] = 0.0
    """Dropout on the adapter's input; above 0 the fused forward is off."""
    targets: str | Sequence[str] = "all-linear"
    """Names of linear layers, or "all-linear"; the head is never one."""
    top_layers: Annotated[int | None, Range(1)] = None
    """Adapters only on so many last layers, so that backward stops there; null: on all."""

    def __post_init__(self) -> None:
        check(self)
