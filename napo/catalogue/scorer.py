"""CatalogueScorer: log-probabilities that are normalised over the titles of a catalogue."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from napo.catalogue.packing import CatalogueBatch
from napo.scoring.head import read_head
from napo.scoring.packing import PackedBatch
from napo.scoring.scorer import CandidateScorer
from napo_kernels import catalogue_sequence_logps


class CatalogueScorer(CandidateScorer):
    """Scores a `CatalogueBatch` under a causal LM, through the model that DDP or FSDP wraps, as `CandidateScorer` does.

    The ``exp`` of an item's score is a probability over the catalogue: those of all items sum to 1 behind every prompt.
    With ``average`` it is the mean over the tokens of the whole title instead.
    """

    _unpacks = False

    def __init__(self, model: nn.Module, *, average: bool = False, cuda_graphs: bool = False) -> None:
        super().__init__(model, cuda_graphs=cuda_graphs)
        self._per_token = average

    def __call__(self, batch: CatalogueBatch) -> Tensor:  # type: ignore[override]
        """(S,) log-probabilities, in the order of the batch's sequences."""
        return super().__call__(batch)  # type: ignore[arg-type]

    def _score(self, napo_batch: CatalogueBatch, **_: Any) -> Tensor:  # type: ignore[override]
        return self._of_hidden(self._body(napo_batch.packed), napo_batch)

    def _sums(self, batch: PackedBatch) -> Tensor:  # (S,)
        """The comparison is with the model's own forward, which knows no catalogue."""
        scores: Tensor = self._enter(self._over_all_tokens, batch)
        return scores

    def _over_all_tokens(self, napo_batch: PackedBatch, **_: Any) -> Tensor:
        return CandidateScorer._of_hidden(self, self._body(napo_batch), napo_batch)

    def _of_hidden(self, hidden: Tensor, batch: CatalogueBatch) -> Tensor:  # type: ignore[override]
        hidden = hidden.flatten(0, 1).index_select(0, batch.rows)  # (R, H)
        head = read_head(self.causal_lm)
        logps = catalogue_sequence_logps(
            hidden,
            head.weight,
            batch.allowed,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            lora=head.lora,
        )
        logps = logps - batch.sharing.to(logps.dtype).log()
        return logps / batch.lengths if self._per_token else logps
