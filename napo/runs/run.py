"""A run: its folder, stages, data and models."""

from __future__ import annotations

from napo.runs.kept import Keeping
from napo.runs.models import WithModels
from napo.runs.staging import Staged


class Run(Staged, Keeping, WithModels):
    """A run folder and its stages. The folder is made with the first thing written into it."""
