"""Preference optimisation of LLM recommenders: data, SASRec, SFT, NAPO training, evaluation, recommendation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from napo.recommend import Recommender
    from napo.trainer import NAPOConfig, NAPOTrainer

__all__ = ["NAPOConfig", "NAPOTrainer", "Recommender", "__version__"]
__version__ = "0.1.0"
_HOMES = {"NAPOConfig": "napo.trainer", "NAPOTrainer": "napo.trainer", "Recommender": "napo.recommend"}


def __getattr__(name: str) -> Any:
    """Names are imported when they are asked for: ``napo --help`` does not wait for torch and transformers."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
