"""The run folder: stages that are finished or absent, never half there, and skipped when asked for again.

From the ground up: ``names`` of what is in it, ``origin`` of a model, ``hashes`` of files, the ``lock`` of who writes;
the ``folder`` and its config.json, the ``stamps`` of stages, ``staging`` of their work, ``kept`` files, ``models``; and
``run``, which is all of these.
"""

from napo.runs.hashes import sealed
from napo.runs.names import KEPT_FILES, NAME, POPULARITY, SEQUENCES, checked_model_name
from napo.runs.origin import Origin
from napo.runs.run import Run
from napo.runs.staging import fingerprint

__all__ = [
    "KEPT_FILES",
    "NAME",
    "POPULARITY",
    "SEQUENCES",
    "Origin",
    "Run",
    "checked_model_name",
    "fingerprint",
    "sealed",
]
