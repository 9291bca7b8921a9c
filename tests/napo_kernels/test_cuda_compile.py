"""The CUDA sources compile where nvcc is found; what they compute is tested in an emulator and on a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles(source: Path, tmp_path: Path) -> None:
    """For every architecture of a wheel, without spilled registers and in the shared memory that needs no asking."""
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90, 100)]
    command = ["nvcc", "-std=c++17", *targets, "--threads=0", "-Xptxas=-v", "-I", str(ROOT / "csrc"), "-c", str(source)]
    run = subprocess.run([*command, "-o", str(tmp_path / "o")], capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "o").stat().st_size > 0
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", run.stderr)]
    assert len(spilled) >= 3 and not any(spilled)
    assert max(map(int, re.findall(r"(\d+) bytes smem", run.stderr))) <= 48 << 10
