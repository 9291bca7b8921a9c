"""The device that is measured: one per process, chosen by the command line."""

from __future__ import annotations

import torch

current = torch.device("cpu")


def use(name: str) -> None:
    global current
    current = torch.device(name)
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device is visible to torch; measure with --device cpu")


def on_gpu() -> bool:
    return current.type == "cuda"


def synchronise() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def answers() -> bool:
    """False once a kernel has left the device in an error state: this process can then do nothing more on it."""
    if not on_gpu():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
