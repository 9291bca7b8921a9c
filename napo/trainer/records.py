"""A run writes these beside the weights: its log, a model card, the rows of a batch whose loss is not finite, and the
settings that a resumed run must share."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

from napo.files import write_json
from napo.objectives import Objective
from napo.trainer import card
from napo.trainer.checkpoints import WholeCheckpointTrainer
from napo.trainer.checks import RUN_FILE, check_checkpoint
from napo.trainer.collator import Collator
from napo.trainer.config import LOSS_OPTIONS, NAPOConfig
from napo.trainer.step_metrics import StepMetrics

logger = logging.getLogger(__name__)

HISTORY_FILE = "log_history.json"
MARGIN_FILE = "margin.pt"


class RecordingTrainer(WholeCheckpointTrainer):
    """Adds to the ``Trainer``'s log and checkpoints. Its subclass sets the attributes."""

    args: NAPOConfig
    model: Any
    objective: Objective
    margin: nn.Module | None
    collator: Collator
    item_vectors: Tensor | None
    item_bias: Tensor | None
    _step_metrics: dict[str, StepMetrics]  # "train" and "eval"
    _reference_weights: str | None = None  # fingerprint; None where there is no reference, or before training
    _history_written = 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.is_in_train and ("loss" in logs or "train_loss" in logs):
            self._stop_at_nonfinite()
            figures = self._step_metrics["train"].drain()
            figures.pop("loss", None)  # the Trainer logs the same figure
            logs.update(figures)
        super().log(logs, start_time)
        if time.monotonic() - self._history_written > 5.0:
            self._write_history()

    def _stop_at_nonfinite(self) -> None:
        stop, rows = self._step_metrics["train"].nonfinite_rows()
        if not stop:
            return
        path = Path(str(self.args.output_dir)) / f"nonfinite_rows-{self.args.process_index}.json"
        if rows:
            write_json(path, {"global_step": self.state.global_step, "train_dataset_rows": rows})
        raise FloatingPointError(
            f"loss: not finite in or before step {self.state.global_step}; the rows of the batch are in "
            f"{path.with_name('nonfinite_rows-*.json')}; lower the learning rate, or look at the rows"
        )

    def _write_history(self) -> None:
        """The log so far as a JSON list, for reports and plots."""
        self._history_written = time.monotonic()
        if self.args.should_save:
            write_json(Path(str(self.args.output_dir)) / HISTORY_FILE, self.state.log_history)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """``README.md`` in ``output_dir``: the Trainer's metadata, then a description of the training."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        path = Path(str(self.args.output_dir)) / "README.md"
        data = ModelCard.load(path).data
        base = kwargs.get("finetuned_from") or card.base_model(self)
        title = kwargs.get("model_name") or getattr(data, "model_name", None) or path.parent.name
        path.write_text(f"---\n{data.to_yaml()}\n---\n\n{card.body(self, title, base)}", encoding="utf-8")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_at_nonfinite()
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights; those of a checkpoint with the margin's running figures, by which their loss is measured."""
        super().save_model(output_dir, _internal_call)
        if self._saving and self.margin is not None and output_dir is not None and self.args.should_save:
            torch.save(self.margin.state_dict(), os.path.join(output_dir, MARGIN_FILE))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            write_json(Path(output_dir) / RUN_FILE, {"weights": self._reference_weights, "loss": self._loss_settings()})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            check_checkpoint(Path(checkpoint), self._loss_settings(), self._reference_weights, self.objective.name)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not self._load_margin(checkpoint):
            raise ValueError(
                f"resume_from_checkpoint: expected a checkpoint with {MARGIN_FILE}, got {checkpoint}; copy "
                "the whole folder, or resume from another one"
            )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is not None and not self._load_margin(best):
            logger.warning("%s has no %s; the margin keeps the figures of the last step", best, MARGIN_FILE)

    def _load_margin(self, checkpoint: str) -> bool:
        """Whether the margin's figures, where it has any, are there."""
        path = os.path.join(checkpoint, MARGIN_FILE)
        if self.margin is not None and os.path.exists(path):
            self.margin.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return self.margin is None or os.path.exists(path)

    def _loss_settings(self) -> dict[str, Any]:
        """The options that make the loss, the objective's own numbers filled in."""
        settings = {"objective": self.args.objective, **dataclasses.asdict(self.objective)}
        del settings["name"]
        return {**settings, **{name: getattr(self.args, name) for name in LOSS_OPTIONS}, **self._contents()}

    def _contents(self) -> dict[str, str | None]:
        """Hashes of what else the loss is made from."""
        trie = self.collator.trie
        arrays = {
            "trie": None if trie is None else np.concatenate((trie.tokens, trie.start)),
            "item_vectors": None if self.item_vectors is None else self.item_vectors.cpu().numpy(),
            "item_bias": None if self.item_bias is None else self.item_bias.cpu().numpy(),
        }
        return {
            name: None if array is None else sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
            for name, array in arrays.items()
        }
