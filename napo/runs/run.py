"""A run: its folder, stages, data and models."""

from __future__ import annotations

from napo.runs.kept import Keeping
from napo.runs.models import WithModels
from napo.runs.staging import Staged


class Run(Staged, Keeping, WithModels):
    """A run folder and its stages. The folder is made with the first thing written into it."""

    @property
    def dataset(self) -> str | None:
        """What the demo called the data that it prepared, where that is the data of this run: a demo of an older napo
        also left its name, and its data, in the run of other data that it then refused."""
        stamp, known = self.stamp("prepare"), self.config.get("data_sha256")
        if stamp is not None and known is not None and stamp["outputs"].get("data", known) != known:
            return None
        return self.config.get("dataset") or None
