"""Preference optimisation of LLM recommenders: data, SASRec, SFT, NAPO training, evaluation, recommendation."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Recommender"]


def __getattr__(name: str) -> Any:
    """Names are imported when they are asked for: ``napo --help`` does not wait for torch."""
    if name == "Recommender":
        from napo.recommend import Recommender

        return Recommender
    raise AttributeError(f"module 'napo' has no attribute {name!r}")
