"""The held-out rows of a split that are judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from napo.data.prepared import PreparedData
from napo.evaluation import metrics


@dataclass(frozen=True)
class HeldOut:
    """n rows."""

    frame: pd.DataFrame  # as they were prepared
    numbers: NDArray[np.int64]  # (n,) position in the split
    users: NDArray[np.int64]  # (n,) codes; rows of one user share one
    histories: list[list[int]]  # whole; a model looks at as many as it can
    targets: NDArray[np.int64]  # (n,)

    @classmethod
    def of(cls, data: PreparedData, split: str, limit: int | None) -> HeldOut:
        """``limit``: so many rows, always the same ones; None: all. ValueError where the split has none."""
        frame: pd.DataFrame = getattr(data, split)
        numbers = metrics.limited_rows(len(frame), limit)
        if len(numbers) == 0:
            raise ValueError(f"split: {split} has no rows")
        frame = frame.iloc[numbers]
        return cls(
            frame=frame,
            numbers=numbers,
            users=metrics.user_groups(frame["user_id"].tolist()),
            histories=[[int(item) for item in history] for history in frame["full_history"]],
            targets=frame["next"].to_numpy(dtype=np.int64),
        )
