"""The fuzzers of `make fuzz` still reach what they are for: a few seconds of each.

An op or a reader that is called with arguments it does not have refuses them, which alone is no finding.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = [
    "sequence_logps",
    "linear_sequence_logps",
    "napo_loss",
    "shared_negatives",
    "masked_attention",
    "rms_norm",
    "silu_product",
]


def run(folder: Path, program: str, *arguments: str) -> str:
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("op", OPS)
def test_problems_of_an_op_are_computed(op: str, tmp_path: Path) -> None:
    said = run(tmp_path, "fuzz_ops.py", "--seconds", "0.01", "--ops", op)
    right = re.search(r"(\d+) right", said)
    assert right is not None and int(right[1]) >= 5, said


def test_damaged_files_are_tried(tmp_path: Path) -> None:
    said = run(tmp_path, "fuzz_readers.py", "--seconds", "2")
    assert sum(map(int, re.findall(r"(\d+) [\w-]+ (?:read|refused)", said))) >= 30, said


def test_files_of_a_run_are_changed(tmp_path: Path) -> None:
    said = run(tmp_path, "fuzz_runs.py", "--seconds", "1", "--only", "combinations")
    found = re.search(r"^(\d+) changes: .*?(\d+) refused, (\d+) said", said, re.MULTILINE)
    assert found is not None and int(found[1]) >= 10 and int(found[2]) and int(found[3]), said
