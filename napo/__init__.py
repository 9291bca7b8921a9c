"""Preference optimisation of LLM recommenders: data, SASRec, SFT, NAPO training, evaluation, recommendation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from napo.trainer import NAPOConfig, NAPOTrainer

__all__ = ["NAPOConfig", "NAPOTrainer", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The trainer is imported when it is asked for: it brings transformers, which takes seconds."""
    if name in ("NAPOConfig", "NAPOTrainer"):
        from napo import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
