"""The model card: what the trainer knows, and nothing that it does not."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

from napo.data.texts import shown
from napo.trainer.rows import Examples

VERSIONS = ("napo", "torch", "transformers", "peft")
ALWAYS = ("learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")
NOT_TOLD = ("output_dir", "logging_dir", "hub_token", "push_to_hub_token", "run_name", "report_to", "disable_tqdm")
"""They belong to a machine or a person and say nothing about the model."""


def body(trainer: Any, title: str, base: str | None) -> str:
    """Everything below the card's metadata."""
    return "\n\n".join(
        [
            f"# {title}",
            _origin(trainer, base),
            "## Data",
            _data(trainer),
            "## Settings",
            _settings(trainer),
            "## Results",
            _results(trainer),
            "## Versions",
            ", ".join(f"{name} {version(name)}" for name in VERSIONS),
            "",
        ]
    )


def base_model(trainer: Any) -> str | None:
    """The name on the hub, or the last part of a folder, which nobody else has; None where it is not known."""
    name = str(getattr(trainer.model.config, "_name_or_path", "") or "")
    return (Path(name).name if Path(name).is_absolute() or Path(name).exists() else name) or None


def _origin(trainer: Any, base: str | None) -> str:
    what = f"`{base}`" if base else "a model that does not say where it was loaded from"
    how = "a PEFT adapter on" if hasattr(trainer.model, "peft_config") else "all trained weights of"
    numbers = {key: value for key, value in dataclasses.asdict(trainer.objective).items() if key != "name"}
    told = ", ".join(f"{key} {value}" for key, value in numbers.items())
    return (
        f"This is {how} {what}, trained on preferences with one chosen and many rejected answers by napo's "
        f"`NAPOTrainer`. Objective: {trainer.objective.name} ({told})."
    )


def _data(trainer: Any) -> str:
    lines = [_data_set("Trained on", trainer.train_dataset)]
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    lines += [_data_set(f"Evaluated on {name}".strip(), part) for name, part in sets.items()]
    known = [line for line in lines if line]
    return "\n".join([*known, "- The trainer does not know where the rows come from: say it here."])


def _data_set(what: str, examples: Any) -> str:
    if not isinstance(examples, Examples):
        return ""
    counts = [len(example.answers) - 1 for example in examples.examples]
    rejected = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    skipped = f"; {examples.skipped.total()} others could not be used" if examples.skipped else ""
    return f"- {what} {len(counts)} rows with {rejected} rejected answers each{skipped}."


def _settings(trainer: Any) -> str:
    """Options that are not at their default, and some that always matter."""
    args, default = trainer.args, type(trainer.args)(output_dir=trainer.args.output_dir)
    told = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        changed = value != getattr(default, field.name) and not field.name.startswith("_")
        if (field.name in ALWAYS or changed) and field.init and field.name not in NOT_TOLD:
            told[field.name] = getattr(value, "value", value)  # of an enumeration
    lines = [f"- {name}: {shown(value, 200)}" for name, value in told.items()]
    return "\n".join([*lines, f"- steps taken: {trainer.state.global_step}"])


def _results(trainer: Any) -> str:
    """The last figures of each kind in the log."""
    last: dict[str, tuple[float, int]] = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            if isinstance(value, (int, float)) and key not in ("step", "epoch"):
                last[key] = (value, entry.get("step", 0))
    judged = {
        key: found
        for key, found in last.items()
        if key.startswith("eval_") and not key.endswith(("_second", "_runtime"))
    }
    if not judged:
        return "The model was not evaluated while it was trained."
    rows = [f"| {shown(key)} | {value:.4g} | {step} |" for key, (value, step) in judged.items()]
    return "\n".join(["| figure | value | at step |", "| :-- | --: | --: |", *rows])
