"""Where training reports to beside ``log_history.json``: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from napo import ranks
from napo.options import UsageError

if TYPE_CHECKING:
    from transformers import TrainerCallback

REPORTERS = ("tensorboard", "wandb", "trackio")


def checked_reporters(names: str | None) -> tuple[str, ...]:
    """Reads names with commas between; checks that each is known and its package is installed."""
    found = tuple(name.strip() for name in (names or "").split(",") if name.strip())
    for name in found:
        if name not in REPORTERS:
            raise UsageError(f"report-to: expected one of {', '.join(REPORTERS)}; got {name!r}")
        if find_spec(name) is None:
            raise ValueError(f"report-to: {name} is not installed; run `pip install {name}`, or leave it out")
    return found


def reporters(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """Callbacks of the reporters that need a folder. The Trainer makes the others by name."""
    if "tensorboard" not in names or ranks.rank() > 0:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder)))]
