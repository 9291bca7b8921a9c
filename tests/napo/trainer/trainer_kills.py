"""Run by test_trainer_resume: one process imports everything, then every training is a fork that may be killed."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
from peft import LoraConfig
from trainer_cases import make_rows, trainer
from transformers import TrainerCallback, TrainerState

STEPS = 8


def train(folder: Path, prepare: Callable[[], list[TrainerCallback]]) -> None:
    """Trains to the end from the last checkpoint that is there; the adapter's final weights go to ``folder/final``."""
    resume = any(path.name.startswith("checkpoint-") for path in folder.glob("*"))
    run = trainer(
        folder,
        make_rows(20),  # 5 micro-batches and 3 optimiser steps an epoch, the last of one micro-batch
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3),
        callbacks=prepare(),
        train_sampling_strategy="random",
        pool="accumulated",
        standardize=True,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        warmup_steps=2,
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        logging_steps=3,
    )
    run.train(resume_from_checkpoint=resume or None)
    run.save_model(str(folder / "final"))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            die()


def die_in_torch_save(name: str) -> list[TrainerCallback]:
    """Killed when half of the file is written, in the second checkpoint."""
    whole, seen = torch.save, []

    def half(value: Any, file: Any, *arguments: Any, **options: Any) -> None:
        if os.path.basename(str(file)) == name:
            seen.append(file)
        if len(seen) < 2:
            return whole(value, file, *arguments, **options)
        buffer = io.BytesIO()
        whole(value, buffer)
        Path(file).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
        die()

    torch.save = half
    return []


def die_in_weights() -> list[TrainerCallback]:
    """Killed when half of the adapter is written, in the second checkpoint."""
    whole, seen = peft.peft_model.safe_save_file, []

    def half(tensors: Any, file: Any, *arguments: Any, **options: Any) -> None:
        whole(tensors, file, *arguments, **options)
        seen.append(file)
        if len(seen) == 2:
            os.truncate(file, os.path.getsize(file) // 2)
            die()

    peft.peft_model.safe_save_file = half
    return []


def die_before_state() -> list[TrainerCallback]:
    save = TrainerState.save_to_json

    def dying(self: TrainerState, path: str) -> None:
        if self.global_step == 4:
            die()
        save(self, path)

    TrainerState.save_to_json = dying
    return []


def die_around_rename(after: bool) -> list[TrainerCallback]:
    replace = os.replace

    def dying(source: Any, target: Any, *arguments: Any, **options: Any) -> None:
        last = str(target).endswith("checkpoint-6")
        if last and not after:
            die()
        replace(source, target, *arguments, **options)
        if last:
            die()

    os.replace = dying
    return []


def fork(work: Callable[[], None]) -> int:
    """Exit status of ``work`` in a process of its own; minus the signal where one ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    step = random.SystemRandom().randrange(1, STEPS)
    deaths: dict[str, Callable[[], list[TrainerCallback]]] = {
        "step": lambda: [DieAt(step)],
        "weights": die_in_weights,
        "optimizer": lambda: die_in_torch_save("optimizer.pt"),
        "state": die_before_state,
        "before-rename": lambda: die_around_rename(after=False),
        "after-rename": lambda: die_around_rename(after=True),
    }
    report: dict[str, Any] = {"step": step, "whole": fork(lambda: train(target / "whole", list)), "statuses": {}}
    for name, death in deaths.items():
        killed = fork(lambda name=name, death=death: train(target / name, death))
        left = sorted(path.name for path in (target / name).glob("*") if path.name != "log_history.json")
        resumed = fork(lambda name=name: train(target / name, list))
        report["statuses"][name] = {"killed": killed, "left": left, "resumed": resumed}
    (target / "report.json").write_text(json.dumps(report))
