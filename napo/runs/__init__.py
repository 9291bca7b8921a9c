"""The run folder: stages that are finished or absent, never half there, and skipped when asked for again."""

from napo.runs.hashes import sealed
from napo.runs.names import KEPT_FILES, NAME, POPULARITY, checked_model_name
from napo.runs.origin import Origin
from napo.runs.run import Run, fingerprint

__all__ = ["KEPT_FILES", "NAME", "POPULARITY", "Origin", "Run", "checked_model_name", "fingerprint", "sealed"]
