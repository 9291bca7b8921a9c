"""The methods that evaluation and recommendation call on every kind of recommender."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from napo.language_models.bases import Bases
    from napo.recommenders.lower_layers import LowerLayers

Histories = Sequence[Sequence[int] | np.ndarray]
"""All item ids that each of n users met, oldest first; a model reads as many as it can."""

WIDTH_STEP = 16
"""Tokens, see ``ScoringOptions.equal_widths``. Matmuls of a number of rows that is a multiple of 8 gave a row the same
bits whatever stood beside it: in fp32 (MKL) and in bf16 (oneDNN), with 1 and 2 threads, on an AMD EPYC (Zen 5)."""

OWN_SCORE = {"score": "the model's score"}
"""``Recommender.protocol`` of a recommender without settings."""


class Recommender(Protocol):
    """Histories of item ids in, scores of item ids out."""

    def scores(self, histories: Histories, item_ids: Any) -> NDArray[np.float64]:
        """n histories and (n, C) item ids -> (n, C); the higher a score, the likelier the item comes next."""
        ...

    @property
    def protocol(self) -> Mapping[str, str]:
        """Describes a score and, if there is one, a prompt, for the records in ``metrics.json``."""
        ...

    @property
    def most_items(self) -> int | None:
        """How many items can be scored against one another; None for any number."""
        ...


@runtime_checkable
class Generator(Protocol):
    """A recommender that can also name its choice in words."""

    def answers(self, histories: Histories, item_ids: NDArray[np.int64]) -> list[str]:
        """The answers of greedy decoding, one line for each of n histories; ``item_ids`` (n, C) are the candidates."""
        ...

    def greedy_items(self, histories: Histories) -> NDArray[np.int64] | None:
        """The item that greedy decoding names for each of n histories where only titles of the catalogue can be said;
        None where it cannot be asked for."""
        ...

    def judge(self, answers: list[str], item_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
        """The item that each answer names, -1 where it is not valid, and the rule in words."""
        ...


@runtime_checkable
class Shortening(Protocol):
    """A recommender that cannot read a long history as it should."""

    def left_out(self, history: Sequence[int], item_ids: Sequence[int]) -> str:
        """What of a history was not read when these items were scored, in words; empty where nothing was."""
        ...


@dataclass(kw_only=True)
class ScoringOptions:
    """How language models score; other recommenders have no use for it."""

    average: bool = False
    """Mean instead of sum of a title's token log-probabilities."""
    tokens_per_batch: int = 2048
    """More tokens are faster and need more memory."""
    equal_widths: bool = False
    """Prompts are computed together only where they are padded to one width, a multiple of ``WIDTH_STEP``. A prompt's
    scores are then the same to the last bit in any batch, and a few more tokens are computed."""
    merged: bool = False
    """The adapter is added to the base's weights where they can hold it (``merge_adapter``): a tenth faster, and scores
    differ by rounding from those of the two apart."""
    lower: LowerLayers | None = None
    """Handed from one model of the same base to the next, for the same histories and items."""
    bases: Bases | None = None
    """Handed from one model to the next, so that those of the same base do not load it again. Only the last one that
    was loaded with it can be asked."""
