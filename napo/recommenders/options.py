"""SASRec's options. The command line describes them, so nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from napo.options import Range, check


@dataclass(kw_only=True)
class SASRecOptions:
    """How SASRec is built and trained."""

    dim: Annotated[int, Range(1)] = 64
    """Size of a user state and of an item vector."""
    blocks: Annotated[int, Range(1)] = 1
    """Transformer blocks."""
    heads: Annotated[int, Range(1)] = 2
    """Attention heads."""
    max_length: Annotated[int, Range(1)] = 50
    """Number of the last items of a history that the model reads."""
    dropout: Annotated[float, Range(0, 1)] = 0.3
    """Dropout on embeddings, attention output and feed-forward output."""
    loss: Literal["auto", "ce", "sampled", "bce", "gbce"] = "auto"
    """"ce" over the catalogue; "sampled" softmax; "bce" or "gbce" with negatives; "auto": ce up to 20,000 items."""
    negatives: Annotated[int, Range(1)] = 512
    """Number of negatives for the losses other than ce; drawn uniformly, shared by a batch."""
    gbce_t: Annotated[float, Range(0, 1)] = 0.75
    """Calibration of gBCE (Petrov & Macdonald 2023): 0 is BCE, 1 is fully calibrated."""
    learning_rate: Annotated[float, Range(above=0)] = 3e-3
    """Learning rate of AdamW, after a short warm-up."""
    weight_decay: Annotated[float, Range(0)] = 0.01
    """Weight decay of AdamW."""
    batch_size: Annotated[int, Range(1)] = 64
    """Subsequences in a batch."""
    max_epochs: Annotated[int, Range(1)] = 200
    """Most epochs, if validation still improves."""
    max_minutes: Annotated[float | None, Range(above=0)] = None
    """Training ends after the epoch in which so many minutes have passed; null: no bound."""
    patience: Annotated[int, Range(1)] = 5
    """Epochs without a better validation NDCG@10 after which training ends."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, dropout and sampled negatives."""

    def __post_init__(self) -> None:
        check(self)
        if self.dim % self.heads:
            raise ValueError(f"dim: expected a multiple of heads={self.heads}, got {self.dim}")
