"""Log-probabilities of 1 + N titles behind one prompt that is encoded once, for any causal LM of transformers."""

from napo.extras import require

require("toolkit")

from napo.scoring.packing import PackedBatch, pack, width_multiple
from napo.scoring.scorer import CandidateScorer

__all__ = ["CandidateScorer", "PackedBatch", "pack", "width_multiple"]
