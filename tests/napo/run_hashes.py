"""Runs of before hashes of their files were noted: what a file says by itself has to be enough."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from napo.runs import Run


def without_hashes(run: Run) -> None:
    run.configure(kept_sha256={})
    shutil.rmtree(run.path / "stages", ignore_errors=True)
