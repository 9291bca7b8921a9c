"""The run folder: stages that are finished or absent, never half there, and skipped when asked for again."""

from napo.runs.run import (
    KEPT_FILES,
    NAME,
    POPULARITY,
    Origin,
    Run,
    checked_model_name,
    fingerprint,
    sealed,
)

__all__ = ["KEPT_FILES", "NAME", "POPULARITY", "Origin", "Run", "checked_model_name", "fingerprint", "sealed"]
