"""Checkpoints that are whole or not there: written aside, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from napo.files import named_errors, put_in_place

_ASIDE = "tmp-checkpoint"


class WholeCheckpointTrainer(Trainer):
    """The ``Trainer``, killed at any moment of a save, leaves the checkpoints before it and no part of a new one.

    ``resume_from_checkpoint=True`` therefore finds one that loads.
    """

    _saving = False
    schedule: Callable[[int], float] | None = None
    """The learning rate's factor at a step, in place of what ``lr_scheduler_type`` says."""

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        optimizer = optimizer or self.optimizer
        if self.schedule is not None and self.lr_scheduler is None and optimizer is not None:
            self.lr_scheduler = LambdaLR(optimizer, self.schedule)
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.should_save:
            shutil.rmtree(os.path.join(str(self.args.output_dir), _ASIDE), ignore_errors=True)
        return super().train(*args, **kwargs)

    def _load_callback_state(self) -> None:
        """The best checkpoint lies beside the one that training goes on at. The state names it by a path, and the
        ``Trainer`` forgets it where that is no more: the folder was moved, or is named from elsewhere."""
        super()._load_callback_state()
        if self.state.best_global_step is not None:
            beside = Path(super()._get_output_dir(None)) / f"checkpoint-{self.state.best_global_step}"
            if beside.is_dir():
                self.state.best_model_checkpoint = str(beside)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _ASIDE) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        aside = folder / _ASIDE
        with self._saving_aside(), named_errors(aside):
            super()._save_checkpoint(model, trial)
        name = f"checkpoint-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        is_best = best is not None and Path(best).parent == aside
        if is_best:  # of every rank
            self.state.best_model_checkpoint = str(folder / name)
        self._barrier()
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(str(aside / name / "trainer_state.json"))
            _flush_to_disk(aside / name)
            put_in_place(aside / name, folder / name)
            aside.rmdir()
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self._barrier()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    @contextlib.contextmanager
    def _saving_aside(self) -> Iterator[None]:
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # pushed from where it ends up
            super()._push_from_checkpoint(checkpoint_folder)

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()


def _flush_to_disk(folder: Path) -> None:
    """So that a machine that goes down after the rename does not leave a checkpoint of empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
