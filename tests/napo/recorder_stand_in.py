"""Replaces CUDA graphs on a CPU: its replay writes into the same tensors as the recording did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class StandIn:
    """Like `graphs.Recorder`; a replay computes again and overwrites the recording's results."""

    recorded = 0

    def rehearse(self, compute: Callable[[], None]) -> None:
        compute()

    def record(self, compute: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        StandIn.recorded += 1
        graded = torch.is_grad_enabled()
        result = compute()
        result = result.clone() if torch.is_tensor(result) else result

        def replay() -> None:
            with torch.set_grad_enabled(graded):
                again = compute()
            if torch.is_tensor(result):
                result.copy_(again)

        return replay, result
