"""The type of the fixture ``napo``."""

from __future__ import annotations

from collections.abc import Callable

Call = Callable[..., tuple[int, str, str]]
"""``napo(*ARGUMENTS)`` runs the command line in this process: (exit code, stdout, stderr)."""
