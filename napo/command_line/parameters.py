"""Parameters that several commands share, and their values."""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class Score(str, Enum):
    sum = "sum"
    average = "average"


class MetItems(str, Enum):
    exclude = "exclude"
    include = "include"


class UnknownItems(str, Enum):
    """The choices of ``napo.recommend.Unknown``, which is not imported before a command runs."""

    error = "error"
    skip = "skip"


class Split(str, Enum):
    val = "val"
    test = "test"


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """Checks a parameter's value. The names stay in one list, where they are defined."""

    def check(value: str) -> str:
        if value not in names:
            raise typer.BadParameter(f"expected one of {', '.join(names)}; got {value!r}")
        return value

    return check


RunFolder = Annotated[Path, typer.Option("--run", "--run-dir", help="Run folder; made if it is not there.")]
ExistingRun = Annotated[Path, typer.Option("--run", "--run-dir", help="Run folder, from the training.")]
DataFolder = Annotated[Path, typer.Option("--data", help="Prepared data set, from `napo prepare`.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a finished result that was made with other options.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; the default is every core.", min=1)]
ReportTo = Annotated[
    str | None,
    typer.Option(help="Also report to these, with commas between: tensorboard (in RUN/logs), wandb, trackio."),
]
Options = dict[str, Any]
"""A stage's options from ``--config``, flags and ``--set`` (``napo.command_line.flags``)."""
