"""How the user gets at the command, for messages that say what to type."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def call(arguments: Sequence[str]) -> str:
    """The command line of ``napo`` with these arguments: by name where the shell finds this one, else as it was called,
    such as ``.venv/bin/napo``."""
    begun, found = Path(sys.argv[0]), shutil.which("napo")
    if begun.name == "napo":
        program = ["napo"] if found is not None and Path(found).resolve() == begun.resolve() else [sys.argv[0]]
    else:  # python -m napo, or a file of the package that torchrun started
        program = ["napo"] if found is not None else [sys.executable, "-m", "napo"]
    return shlex.join([*program, *arguments])
