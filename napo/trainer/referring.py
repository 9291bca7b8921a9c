"""The trainer's reference: when it is settled, where its log-probabilities come from, and what cannot have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from napo.language_models.fused.lora import without_adapter
from napo.trainer.checks import check_distribution
from napo.trainer.collator import PreferenceBatch
from napo.trainer.records import RecordingTrainer
from napo.trainer.references import (
    adapter_parameters,
    in_evaluation,
    is_below_its_adapter,
    reference_logps,
    weights_fingerprint,
)


class ReferringTrainer(RecordingTrainer):
    """Adds the reference to the ``Trainer``. Its subclass sets the attributes and scores."""

    ref_model: nn.Module | None
    _fresh_adapter: bool
    _scorers: dict[int, Any]  # by the model's ``id``

    def _scored(self, model: nn.Module, batch: PreferenceBatch) -> Tensor:  # (S,)
        raise NotImplementedError

    def _fix_reference(self) -> None:
        """Settle what the reference is, just before the model begins to move away from it."""
        self._fresh_adapter = is_below_its_adapter(self.model)
        self._check_distribution()
        if self.ref_model is not None:
            self._reference_weights = weights_fingerprint(self.ref_model)
        elif self.objective.reference and not self._is_sharded:
            # A fresh adapter's first matrix is drawn anew in each process, and does nothing yet.
            moving = adapter_parameters(self.model) if self._fresh_adapter else frozenset()
            self._reference_weights = weights_fingerprint(self.model, moving)
        if self._precomputes:
            self.train_dataset = self._with_references("train_dataset", self.train_dataset)
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {
                    name: self._with_references(f"eval_dataset[{name!r}]", part)
                    for name, part in self.eval_dataset.items()
                }
            else:
                self.eval_dataset = self._with_references("eval_dataset", self.eval_dataset)

    def _check_distribution(self) -> None:
        check_distribution(
            self.args,
            self.objective,
            even_batches=self.accelerator.even_batches,
            fresh_adapter=self._fresh_adapter,
            precomputes=self._precomputes,
        )

    @property
    def _precomputes(self) -> bool:
        wanted = self.args.precompute_ref_log_probs
        if self.ref_model is not None:
            return True
        return self.objective.reference and (not self._fresh_adapter if wanted is None else wanted)

    @property
    def _is_sharded(self) -> bool:
        """Whether ranks may hold only parts of the weights."""
        parts = any(hasattr(parameter, "full_tensor") for parameter in self.model.parameters())
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or parts

    def _with_references(self, name: str, examples: Any) -> Any:
        if examples is None or not self._precomputes or examples.ref_logps is not None:
            return examples
        if self._is_sharded and self.ref_model is None:
            raise ValueError(
                "precompute_ref_log_probs: expected False, with a fresh adapter, where the model is sharded; or give "
                "the model a second time, as ref_model, which each rank holds whole"
            )
        with self._reference_at_hand() as reference:
            logps = reference_logps(
                reference,
                examples,
                self.collator,
                score=lambda batch: self._scored(self._brought(reference), batch),
                average=self.objective.average,
                batch_size=max(self.args.per_device_eval_batch_size, self.args.per_device_train_batch_size),
                device=self.args.device,
                folder=Path(str(self.args.output_dir)),
                weights=self._reference_weights,
                gone=self.ref_model is None and self.state.global_step > 0,
                computed=f"{self.args.bf16} {self.args.fp16} {self.args.packed}",
            )
        if logps is None:
            raise ValueError(
                f"{name}: expected rows that the trainer has had from the start, since the reference of "
                f"{self.objective.name} is the model before training, got others; add them to eval_dataset when the "
                "trainer is made, or train an adapter"
            )
        return examples.with_references(logps)

    @contextmanager
    def _reference_at_hand(self) -> Iterator[nn.Module]:
        """A reference of its own goes back to where it was, with its scorer: training needs the memory."""
        reference: nn.Module = self.model if self.ref_model is None else self.ref_model
        place = next(reference.parameters()).device
        try:
            yield reference
        finally:
            if self.ref_model is not None:
                self._scorers.pop(id(reference), None)
                _move(reference, place)

    def _brought(self, reference: nn.Module) -> nn.Module:
        """Only where something is to be computed, which is not so where the cache has it all."""
        if self.ref_model is not None:
            _move(reference, self.args.device)
        return reference

    def _reference(self, model: nn.Module, batch: PreferenceBatch) -> Tensor | None:  # (S,)
        if not self.objective.reference:
            return None
        if batch.ref_logps is not None:
            return batch.ref_logps
        adapted: Any = self.accelerator.unwrap_model(model)
        with torch.no_grad(), in_evaluation(model), without_adapter(adapted):
            return self._scored(model, batch)


def _move(model: nn.Module, device: torch.device) -> None:
    if next(model.parameters()).device != device:  # quantised weights do not like to be moved
        model.to(device)
