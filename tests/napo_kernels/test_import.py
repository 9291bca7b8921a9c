"""What `import napo_kernels` takes with it."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import torch

before = set(sys.modules)
import napo_kernels

print(*sorted(set(sys.modules) - before))
"""


def test_dynamo_is_imported_by_what_compiles() -> None:
    """It takes two seconds, and the command `napo --help` and every worker would pay them."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert "napo_kernels.ops.napo_loss" in done.stdout.split()
    assert not {"torch._dynamo", "torch._inductor", "triton"} & set(done.stdout.split())
