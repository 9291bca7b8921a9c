"""Common parts of SFT and preference training: the Trainer's settings, and saving the result."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from napo import ranks
from napo.files import read_json, remove_at_once, replacing, write_json
from napo.finetuning.callbacks import DTYPE, BarCallback, CheckpointCallback, TimedCosine, TimeLimitCallback
from napo.language_models.loading import DTYPES
from napo.signals import Stopped, saving_first, stop_if_asked
from napo.trainer.checkpoints import WholeCheckpointTrainer


class Schedule(Protocol):
    """The options that both trainings have."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def max_minutes(self) -> float | None: ...


def steps_of(epochs: float, examples: int, together: int) -> int:
    """Steps of ``together`` examples for so many epochs, so that each example has its turn: the last step of an epoch
    takes what is left."""
    whole, part = divmod(epochs, 1.0)
    return max(int(whole) * math.ceil(examples / together) + math.ceil(round(part * examples / together, 6)), 1)


def begun_dtype(folder: Path, wanted: str, *, resume: bool) -> str:
    """What a training into ``folder`` computes in: where it goes on, what it began in, which ``auto`` may not mean on
    another machine."""
    file = _work(folder) / DTYPE
    return str(read_json(file)["dtype"]) if wanted == "auto" and resume and file.is_file() else wanted


def of_dtype(model: torch.nn.Module) -> str | None:
    """What to say of the dtype that the matmuls of ``model`` compute in."""
    if next(model.parameters()).dtype != torch.float16:
        return None
    return (
        "dtype: fp16 trains without loss scaling, and gradients below 6e-8 become 0; bf16 and fp32 reach further down"
    )


def settings(
    folder: Path,
    chosen: Schedule,
    *,
    steps: int,
    seed: int,
    model: torch.nn.Module,
    resume: bool = False,
    report_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Fields of TrainingArguments for so many steps of ``model``, whose adapter ``finish`` puts into ``folder``.

    ``resume``: checkpoints that are there are of this very training, which goes on at the last of them.
    """
    work = _work(folder)
    if not resume and ranks.rank() == 0:
        remove_at_once(work)
    return {
        "output_dir": str(work),
        "seed": seed,
        "data_seed": seed,
        "max_steps": steps,
        "learning_rate": chosen.learning_rate,
        "lr_scheduler_type": "cosine",
        # In the first step of a rise the rate is 0: a training of one step, or without a rise, has none.
        "warmup_steps": min(max(round(chosen.warmup * steps), 1), steps - 1) if chosen.warmup else 0,
        "weight_decay": 0.0,
        "max_grad_norm": chosen.max_grad_norm,
        "bf16": next(model.parameters()).dtype == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": min(max(steps // 50, 1), 20),
        "report_to": [name for name in report_to if name != "tensorboard"],  # which napo tells a folder
        "run_name": folder.name,
        # With 1 the Trainer, as it ends, deletes all checkpoints but the best: also the one that a stop has just saved.
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": True,
    }


def finish(trainer: WholeCheckpointTrainer, folder: Path, chosen: Schedule, *, keep: bool = False) -> Path:
    """Train, from the last checkpoint if there is one, then write the adapter, ``log_history.json`` and ``steps.json``,
    how many were done and planned, into ``folder``, which is whole or as it was. ``keep``: the checkpoints stay, for a
    caller who has more to do and would have to train again if killed meanwhile."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "accelerate: expected plain data parallelism (DDP), got FSDP or DeepSpeed, whose adapters this command "
            "cannot save; use NAPOTrainer in a script of your own (docs/distributed.md)"
        )
    trainer.remove_callback(PrinterCallback)  # the bar shows the loss, log_history.json keeps it
    computes_in = next(trainer.model.parameters()).dtype  # type: ignore[union-attr]
    checkpoints = CheckpointCallback(next(name for name, dtype in DTYPES.items() if dtype == computes_in))
    trainer.add_callback(checkpoints)
    schedule = limit = None
    if chosen.max_minutes is not None:
        warmup = chosen.warmup if trainer.args.max_steps > 1 else 0.0
        schedule = TimedCosine(trainer.args.max_steps, warmup, 60.0 * chosen.max_minutes)
        trainer.schedule = schedule
        limit = TimeLimitCallback(schedule)
        trainer.add_callback(limit)
    bar = BarCallback(folder.name, schedule)
    trainer.add_callback(bar)
    found = ranks.told(lambda: _last_checkpoint(_work(folder)))
    state = None if found is None else TrainerState.load_from_json(str(Path(found) / "trainer_state.json"))
    try:
        with saving_first(bar.stopping), bar.stack:  # which the Trainer does not end where it is stopped
            if state is not None and _ended_early(state):
                _take_best(trainer, state, Path(str(found)).parent)
            else:
                trainer.train(resume_from_checkpoint=found)
    except Stopped as stopped:
        if stopped.lost is not None:
            stopped.lost = _lost(folder, trainer)
        raise
    stop_if_asked()
    if checkpoints.stopped:  # another rank was asked
        raise Stopped(signal.SIGTERM)
    ranks.wait()
    if ranks.rank() > 0:
        return folder
    if limit is not None and limit.ended:
        _say_ended(trainer, folder, chosen)
    for name, parameter in trainer.model.named_parameters():  # type: ignore[union-attr]
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise ValueError(
                f"learning_rate: with {trainer.args.learning_rate:g} {name} became numbers that are not finite, in the "
                "last steps; expected finite ones; lower it"
            )
    with replacing(folder) as aside:
        trainer.model.save_pretrained(str(aside))  # type: ignore[union-attr, operator]
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in; origin.json says how it was made
        write_json(aside / "log_history.json", trainer.state.log_history)
        write_json(aside / "steps.json", {"done": trainer.state.global_step, "planned": trainer.args.max_steps})
    if not keep:
        remove_at_once(_work(folder))  # a part of it would be taken for checkpoints
    return folder


def _lost(folder: Path, trainer: WholeCheckpointTrainer) -> str:
    """Where a training goes on that was stopped without saving."""
    work = _work(folder)
    found = get_last_checkpoint(str(work)) if work.is_dir() else None
    kept = 0 if found is None else int(Path(found).name.rpartition("-")[2])
    goes_on = f"goes on after step {kept:,} of {trainer.args.max_steps:,}" if kept else "begins at the first step again"
    return f"{folder.name} {goes_on}"


def _say_ended(trainer: WholeCheckpointTrainer, folder: Path, chosen: Schedule) -> None:
    """That time ended the training before its steps were done. ValueError where nothing was trained: in the first step
    of a rise the learning rate is 0."""
    done, planned = trainer.state.global_step, trainer.args.max_steps
    if done == 1 and chosen.warmup:
        remove_at_once(_work(folder))  # nobody would go on with it
        raise ValueError(
            f"max_minutes: {chosen.max_minutes:g} ended the training after step 1 of {planned}, whose learning rate is "
            "0, so that nothing was trained; expected time for more steps; raise it"
        )
    print(f"{folder.name}: --max-minutes ended the training after step {done:,} of {planned:,}")


def _last_checkpoint(work: Path) -> str | None:
    """Where to go on. ValueError where other ranks began: their steps, and the examples of each, are not these."""
    found = get_last_checkpoint(str(work)) if work.is_dir() else None
    if found is not None:
        began = max(len(list(Path(found).glob("rng_state_*.pth"))), 1)  # without a number where there is one rank
        if began != ranks.size():
            raise ValueError(
                f"ranks: expected {began}, with which the training of {found} began, got {ranks.size()}; start as many "
                f"as then, or delete {work} to begin anew"
            )
    return found


def _ended_early(state: TrainerState) -> bool:
    """Whether the training of a checkpoint was over with it: nothing had become better for long enough."""
    callbacks: Any = state.stateful_callbacks  # {name: what it was}, when read from a file
    kept = callbacks.get(EarlyStoppingCallback.__name__)
    if kept is None:
        return False
    attributes, arguments = kept["attributes"], kept["args"]
    return bool(attributes["early_stopping_patience_counter"] >= arguments["early_stopping_patience"])


def _take_best(trainer: WholeCheckpointTrainer, state: TrainerState, work: Path) -> None:
    """What is left to do of a training that had ended when the process did. The ``Trainer`` would go on with it."""
    state.best_model_checkpoint = str(work / f"checkpoint-{state.best_global_step}")
    trainer.state = state
    trainer._load_best_model()


def _work(folder: Path) -> Path:
    """Where the Trainer keeps its checkpoints meanwhile."""
    return folder.with_name(f".{folder.name}.work")
