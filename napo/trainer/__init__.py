"""``NAPOTrainer`` and ``NAPOConfig``: preference optimisation with one chosen and many rejected answers per row."""

from napo.extras import require

require("toolkit")

from napo.trainer.config import NAPOConfig
from napo.trainer.napo_trainer import NAPOTrainer

__all__ = ["NAPOConfig", "NAPOTrainer"]
