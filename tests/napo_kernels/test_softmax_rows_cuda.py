"""The CUDA sources of the row kernel compile where nvcc is found; what they compute is tested on a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_compiles(tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-I", str(ROOT / "csrc"), "-c", "-o", str(tmp_path / "rows.o")]
    source = str(ROOT / "csrc" / "cuda" / "softmax_rows.cu")
    run = subprocess.run([*command, source], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "rows.o").stat().st_size > 0
