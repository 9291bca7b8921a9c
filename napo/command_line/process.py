"""What commands do before they compute: load data, set up the process. Imports wait until they are needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from napo.progress import on_a_terminal

if TYPE_CHECKING:
    from napo.data.prepared import PreparedData


def load(path: Path) -> PreparedData:
    """Load the prepared data before torch is imported, so that a wrong path is answered at once."""
    from napo.data.prepared import PreparedData

    return PreparedData.load(path)


def prepare_process(threads: int | None) -> None:
    """Set the threads, and keep the libraries' messages out of our own lines."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if on_a_terminal(sys.stdout) else "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers.utils import logging

    if threads is not None:
        torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
