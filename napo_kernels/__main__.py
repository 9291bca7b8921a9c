"""``python -m napo_kernels``: the backends that run here, and why the others do not."""

import sys

import torch

import napo_kernels  # noqa: F401  (its ops register themselves)
from napo_kernels.dispatch import describe

print(f"{'torch':<14}{torch.__version__}")
print(f"{'python':<14}{sys.version.split()[0]}")
print(*describe(), sep="\n")
