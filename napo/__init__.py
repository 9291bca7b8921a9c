"""Preference optimisation of LLM recommenders: data, SASRec, SFT, NAPO training, evaluation, recommendation."""

__version__ = "0.1.0"
