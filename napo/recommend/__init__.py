"""Recommendations of a run: from Python, and for whole files of users."""

from napo.recommend.catalogue import Catalogue, UnknownItem
from napo.recommend.files import FileReport, check_files, recommend_file
from napo.recommend.recommender import (
    Asked,
    Query,
    Recommendation,
    Recommendations,
    Recommender,
    Unknown,
    best_model,
    models_offered,
)

__all__ = [
    "Asked",
    "Catalogue",
    "FileReport",
    "Query",
    "Recommendation",
    "Recommendations",
    "Recommender",
    "Unknown",
    "UnknownItem",
    "best_model",
    "check_files",
    "models_offered",
    "recommend_file",
]
