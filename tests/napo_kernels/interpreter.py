"""Scripts that run Triton's kernels in its interpreter, in a process of their own: it is chosen at import."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def why_not() -> str | None:
    found = {name: tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy")}
    if found["triton"] < (3, 7) and found["numpy"] >= (2, 4):
        return f"the interpreter of triton {version('triton')} needs numpy < 2.4; numpy is {version('numpy')}"
    return None


def run(script: str) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    path = ROOT / "tests" / "napo_kernels" / script
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{path.parent}", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpreted: ok" in done.stdout
