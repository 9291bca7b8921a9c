"""Callbacks of the training loops: progress, checkpoints, and the end of the training."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from napo import ranks
from napo.files import write_json
from napo.progress import Bar, duration, if_long, progress
from napo.signals import stop_asked

CHECKPOINT_SECONDS = 300.0
DTYPE = "dtype.json"
"""Beside the checkpoints: what matmuls compute in."""
TIMED_STEPS = 3
"""The steps after the first, slower one from which the training's duration is estimated."""
WORTH_SAYING = 60.0
"""The estimate is shown if it is longer than so many seconds."""


class TimedCosine:
    """The factor of the learning rate where time bounds the training: a rise over the first ``warmup`` of it, then a
    cosine to 0.

    Progress is the larger of the share of the steps and the share of the seconds, so the rate has come down to 0 when
    either is used up, however fast the machine is. ``LambdaLR`` keeps this object's numbers in checkpoints: the seconds
    of a training that goes on are counted from where it stopped.
    """

    def __init__(self, steps: int, warmup: float, seconds: float) -> None:
        self.steps, self.warmup, self.seconds = steps, warmup, seconds
        self.used = 0.0

    @property
    def left(self) -> float:
        """Seconds until the time is used up."""
        return max(self.seconds - self.used, 0.0)

    def __call__(self, step: int) -> float:
        far = min(max(step / self.steps, self.used / self.seconds), 1.0)
        if far < self.warmup:
            return far / self.warmup
        return 0.5 * (1.0 + math.cos(math.pi * (far - self.warmup) / max(1.0 - self.warmup, 1e-9)))


class BarCallback(TrainerCallback):
    """Progress in steps, with the last loss that was logged beside it, and after a few steps how long all will take."""

    def __init__(self, name: str, schedule: TimedCosine | None = None) -> None:
        """``schedule``: of a training that time bounds."""
        self.name = name
        self.schedule = schedule
        self.stack = ExitStack()
        self.bar: Bar | None = None
        self.steps, self.timed_from = 0, 0.0
        self.first_rank = ranks.rank() == 0

    def stopping(self) -> str | None:
        """What to say where a signal asks to stop."""
        if not self.first_rank:
            return None
        return f"{self.name}: stopping{'' if self.bar is None else ': saves after this step'}"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        shown = progress(
            self.name,
            state.max_steps,
            unit="steps",
            done=state.global_step,
            may_end_earlier=True,
            most_seconds=None if self.schedule is None else self.schedule.left,
            quiet=not state.is_world_process_zero,
        )
        self.bar = self.stack.enter_context(shown)
        if state.global_step:
            self.bar.say(f"goes on after step {state.global_step:,} of {state.max_steps:,}, as it was saved")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is None:
            return
        self.bar.advance()
        self.steps += 1
        now = time.monotonic()
        if self.steps == 1:
            self.timed_from = now
        elif self.steps == 1 + TIMED_STEPS:
            took = (now - self.timed_from) / TIMED_STEPS
            left = state.max_steps - state.global_step
            if took * left > WORTH_SAYING:
                self.bar.say(self._estimate(left, took))

    def _estimate(self, left: int, took: float) -> str:
        text = f"{left:,} steps of {took:.2g} s to go"
        if self.schedule is not None and left * took > self.schedule.left:
            return f"{text}; --max-minutes ends the training in {duration(self.schedule.left)}, before all are done"
        text += f", about {duration(left * took)} without validation"
        return f"{text}; {if_long()}" if self.schedule is None else text

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


class TimeLimitCallback(TrainerCallback):
    """Ends training when its time is used up, with a last validation where there are any."""

    def __init__(self, schedule: TimedCosine) -> None:
        self.schedule = schedule
        self.last = 0.0
        self.ended = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        (used,) = ranks.largest(self.schedule.used + now - self.last)
        self.schedule.used, self.last = used, now
        if used >= self.schedule.seconds and state.global_step < state.max_steps:
            self.ended = control.should_training_stop = True
            control.should_log = True
            if args.eval_strategy != "no":  # else the weights of the last steps could not be the best
                control.should_evaluate = control.should_save = True


class CheckpointCallback(TrainerCallback):
    """A checkpoint every few minutes, and one before a training ends that was asked to stop. All ranks do it at the
    same step."""

    def __init__(self, dtype: str) -> None:
        """``dtype``: what matmuls compute in, which is kept beside the checkpoints."""
        self.dtype = dtype
        self.saved = time.monotonic()
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        stop, save = ranks.largest(stop_asked(), time.monotonic() - self.saved > CHECKPOINT_SECONDS)
        if stop or save:
            control.should_save = True
        if stop:
            self.stopped = True
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved = time.monotonic()
        if state.is_world_process_zero:
            write_json(Path(str(args.output_dir)) / DTYPE, {"dtype": self.dtype})
