"""What the training loops show while they run, and when they save."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from napo.progress import Bar, progress
from napo.signals import stop_asked

CHECKPOINT_SECONDS = 300.0


class BarCallback(TrainerCallback):
    """One progress bar in steps, with the last loss that was logged beside it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stack = ExitStack()
        self.bar: Bar | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = self.stack.enter_context(progress(self.name, state.max_steps, unit="steps"))
        self.bar.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.advance()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for key, label in (("eval_loss", "validation"), ("loss", "loss")):
            if self.bar is not None and logs and key in logs:
                self.bar.note(f"{label} {logs[key]:.3f}")
                break

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stack.close()


class CheckpointCallback(TrainerCallback):
    """A checkpoint every few minutes, and one before a training ends that was asked to stop."""

    def __init__(self) -> None:
        self.saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        stop = stop_asked()
        if stop or time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            control.should_save = True
        if stop:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved = time.monotonic()
