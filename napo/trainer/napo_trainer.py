"""``NAPOTrainer``: preference optimisation with one chosen and many rejected answers."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from napo.catalogue import CatalogueScorer, Trie
from napo.files import read_json, write_json
from napo.language_models.fused.lora import without_adapter
from napo.objectives import Objective
from napo.scoring import CandidateScorer, width_multiple
from napo.scoring.scorer import causal_lm_of, check_packable
from napo.trainer import card
from napo.trainer.card import base_model
from napo.trainer.checkpoints import WholeCheckpointTrainer
from napo.trainer.collator import Collator, PreferenceBatch
from napo.trainer.config import LOSS_OPTIONS, NAPOConfig
from napo.trainer.encoded import encode
from napo.trainer.losses import AuthorsMargin, mean_margin, pool_margin, preference_losses
from napo.trainer.models import load_model, load_reference, tokenizer_of
from napo.trainer.pool import Pool, authors_pool, build_pool, concatenate
from napo.trainer.references import (
    adapter_layers,
    adapter_parameters,
    is_below_its_adapter,
    reference_logps,
    weights_fingerprint,
)
from napo.trainer.rows import Encoder, Examples
from napo.trainer.sources import is_columns
from napo.trainer.step_metrics import StepMetrics
from napo_kernels import DynamicMargin

__all__ = ["NAPOConfig", "NAPOTrainer"]

MARGIN_FILE = "margin.pt"
RUN_FILE = "preference_run.json"  # beside the optimiser's state
HISTORY_FILE = "log_history.json"


class NAPOTrainer(WholeCheckpointTrainer):
    """Trains on preference rows ``{"prompt", "chosen", "rejected": [...]}`` (see ``napo.trainer.rows`` for the optional
    fields; a prompt or an answer may be text or token ids).

    ``model`` is a causal LM or its name; with ``peft_config`` it gets an adapter, with ``quantization_config`` it is
    loaded quantised. The tokenizer is the model's own unless ``processing_class`` is given. ``ref_model``, a model or
    its name, is the reference of the objectives that have one; without it that is the model as it stands at the start.
    ``compute_metrics`` gets an ``EvalPrediction``: ``predictions`` are the rewards of each row's answers (n, 1 + N),
    the chosen one first, -inf where a row has fewer; ``label_ids`` are 0, the place of the right one.

    ``item_vectors`` (items, D) and ``item_bias`` (items,) belong to ``granularity="pair"``. With the ``trie`` of a
    catalogue log-probabilities are normalised over its titles; ``chosen_id`` and ``rejected_ids`` then say which items
    the answers are. A loss that is not finite stops the run at the next logging or saving step, with the rows of the
    batch in ``nonfinite_rows-RANK.json``. Everything else is the ``Trainer``'s.
    """

    args: NAPOConfig
    model: Any
    objective: Objective

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: NAPOConfig | None = None,
        *,
        train_dataset: Sequence[dict[str, Any]] | None = None,
        eval_dataset: Sequence[dict[str, Any]] | dict[str, Sequence[dict[str, Any]]] | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        ref_model: PreTrainedModel | nn.Module | str | None = None,
        quantization_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        item_vectors: Tensor | np.ndarray | None = None,
        item_bias: Tensor | np.ndarray | None = None,
        trie: Trie | None = None,
    ) -> None:
        args = NAPOConfig(output_dir="napo-output") if args is None else args
        processing_class = tokenizer_of(model) if processing_class is None else processing_class
        model = load_model(model, args.model_init_kwargs, quantization_config, peft_config)
        self.ref_model = load_reference(ref_model, args.model_init_kwargs)
        if peft_config is not None:
            from peft import get_peft_model

            _check_has_no_adapter(model)
            set_seed(args.seed)  # the adapter's initial weights
            model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
        self.objective = args.resolved_objective
        self._check_reference(args)
        # Of a stream as many rows are read as the run takes.
        a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._most_rows = args.max_steps * a_step if args.max_steps > 0 else None
        self.margin = _margin_module(args, self.objective)
        by_pair = args.granularity == "pair" and isinstance(self.margin, DynamicMargin)
        if by_pair and item_vectors is None:
            raise ValueError(
                "item_vectors: granularity 'pair' needs the recommender's item vectors (items, D), got None"
            )
        if trie is not None and not args.packed:
            raise ValueError("packed: titles of a trie are scored packed, got packed=False; leave out one of the two")
        causal_lm = causal_lm_of(model)  # type: ignore[arg-type]
        if args.packed:
            check_packable(causal_lm)
        self.encoder = Encoder(
            tokenizer=processing_class,
            vocabulary=_vocabulary(causal_lm),
            positions=_positions(causal_lm),
            answer_end=args.answer_end,
            max_length=args.max_length,
            truncate_prompts=args.truncate_prompts,
            keep_prefix=args.keep_prefix,
            on_bad_row=args.on_bad_row,
            needs_states=self.objective.rho > 0.0,
            needs_scores=isinstance(self.margin, AuthorsMargin)
            or (isinstance(self.margin, DynamicMargin) and args.granularity != "pair"),
            items=_known_items(trie, item_vectors if by_pair else None),
        )
        self.collator = Collator(
            pad_id=_pad_id(processing_class),
            max_length=self.encoder.longest if args.truncate_prompts else None,
            keep_prefix=args.keep_prefix,
            exact_rho=self.objective.rho if args.exact else None,
            metric=args.metric,
            exclude_false_negatives=args.exclude_false_negatives,
            width_multiple=width_multiple(args.device),
            trie=trie,
        )
        super().__init__(
            model=model,  # type: ignore[arg-type]
            args=args,
            data_collator=self.collator,
            train_dataset=self._encode(args, "train_dataset", train_dataset),  # type: ignore[arg-type]
            eval_dataset={
                name: self._encode(args, f"eval_dataset[{name!r}]", rows) for name, rows in eval_dataset.items()
            }
            if isinstance(eval_dataset, dict) and not is_columns(eval_dataset)
            else self._encode(args, "eval_dataset", eval_dataset),  # type: ignore[arg-type]
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._fresh_adapter = is_below_its_adapter(self.model)
        self._check_distribution()
        # The loss below is that of the whole optimiser step: the Trainer must not divide it by the micro-batches.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.item_vectors = None if item_vectors is None else torch.as_tensor(item_vectors, device=args.device)
        self.item_bias = None if item_bias is None else torch.as_tensor(item_bias, device=args.device)
        if self.margin is not None:
            self.margin.to(args.device)
        self._scorers: dict[int, CandidateScorer] = {}
        self._step_metrics = {"train": StepMetrics(args.device), "eval": StepMetrics(args.device)}
        self._micro_batches: list[PreferenceBatch] = []
        self._position = 0
        self._replay: _Replay | None = None
        self._history_written = 0.0
        self._reference_weights: str | None = None  # fingerprint; None where there is no reference, or before training

    # Data

    def _encode(self, args: NAPOConfig, name: str, rows: Sequence[dict[str, Any]] | None) -> Examples | None:
        if rows is None or isinstance(rows, Examples):
            return rows
        options: dict[str, Any] = {
            "folder": Path(str(args.output_dir)),
            "keep": args.cache_rows,
            "processes": args.dataset_num_proc,
            "most": self._most_rows if name == "train_dataset" else None,
        }
        if args.cache_rows is False:
            return encode(self.encoder, name, rows, **options)
        # The other ranks of a machine find what its first one has kept.
        with args.main_process_first(desc="encoding rows"):
            return encode(self.encoder, name, rows, **options)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if isinstance(eval_dataset, str):
            named: Any = self.eval_dataset
            named[eval_dataset] = self._with_references(f"eval_dataset[{eval_dataset!r}]", named[eval_dataset])
        elif eval_dataset is not None:
            eval_dataset = self._with_references("eval_dataset", self._encode(self.args, "eval_dataset", eval_dataset))
        elif not isinstance(self.eval_dataset, dict):
            self.eval_dataset = self._with_references("eval_dataset", self.eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        examples = self._encode(self.args, "test_dataset", test_dataset)
        return super().get_test_dataloader(self._with_references("test_dataset", examples))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        examples: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or examples is None:
            return super()._get_train_sampler(train_dataset)
        lengths = [len(example.prompt) + sum(map(len, example.answers)) for example in examples.examples]
        return LengthGroupedSampler(self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths=lengths)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """In order, however training draws its rows: figures of users who borrow from one another depend on it."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _check_reference(self, args: NAPOConfig) -> None:
        if self.ref_model is None:
            return
        if not self.objective.reference:
            raise ValueError(
                f"ref_model: objective {self.objective.name!r} has no reference; leave it out, or choose one that has, "
                "as objective='sdpo' or 'dpo'"
            )
        if args.precompute_ref_log_probs is False:
            raise ValueError(
                "precompute_ref_log_probs: expected None or True with ref_model, whose log-probabilities are computed "
                "once, got False"
            )
        if args.packed:
            check_packable(causal_lm_of(self.ref_model))

    def _check_distribution(self) -> None:
        if self.args.world_size > 1 and not self.accelerator.even_batches:
            raise ValueError("accelerator_config.even_batches: expected True, so that all ranks bring as many users")
        if self.args.n_gpu > 1:
            raise ValueError(f"nn.DataParallel over {self.args.n_gpu} GPUs is not supported; start with torchrun")
        if self.args.exact and self.args.world_size > 1 and self.args.pool_ranks:
            raise ValueError("pool_ranks: expected False with exact, whose pool is one rank's micro-batch")
        if self.objective.reference and self.args.precompute_ref_log_probs is False and not self._fresh_adapter:
            raise ValueError(
                f"precompute_ref_log_probs: the reference of {self.objective.name} is the model as it stands, which "
                "switching its adapter off does not give (there is none, it was trained before, or other parameters "
                "train too); expected None or True"
            )
        if self.args.exact and self._precomputes:
            raise ValueError(
                "exact: borrowed answers have no precomputed reference; use a fresh adapter or exact=False"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "model: expected parameters that train, got none; load an adapter with "
                "PeftModel.from_pretrained(..., is_trainable=True), or give peft_config"
            )
        if self.state.global_step == 0:
            self._fix_reference()
        self._step_metrics["train"].restart()
        result = super().train(*args, **kwargs)
        self._write_history()
        return result

    def _fix_reference(self) -> None:
        """Settle what the reference is, just before the model begins to move away from it."""
        self._fresh_adapter = is_below_its_adapter(self.model)
        self._check_distribution()
        if self.ref_model is not None:
            self._reference_weights = weights_fingerprint(self.ref_model)
        elif self.objective.reference and not self._is_sharded:
            # Of a fresh adapter the first matrix is drawn anew in each process, and does nothing.
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

    @property
    def _precomputes(self) -> bool:
        wanted = self.args.precompute_ref_log_probs
        if self.ref_model is not None:
            return True
        return self.objective.reference and (not self._fresh_adapter if wanted is None else wanted)

    @property
    def _is_sharded(self) -> bool:
        """Whether ranks may hold parts of the weights only."""
        parts = any(hasattr(parameter, "full_tensor") for parameter in self.model.parameters())
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or parts

    def _with_references(self, name: str, examples: Any) -> Any:
        if examples is None or not self._precomputes or examples.ref_logps is not None:
            return examples
        if self._is_sharded and self.ref_model is None:
            raise ValueError(
                "precompute_ref_log_probs: the model is sharded; switch it off, or fill the cache in output_dir with a "
                "run of max_steps=1 in one process first"
            )
        reference = self.model if self.ref_model is None else self.ref_model.to(self.args.device)
        logps = reference_logps(
            reference,
            examples,
            self.collator,
            score=lambda batch: self._scored(reference, batch),
            average=self.objective.average,
            batch_size=self.args.per_device_eval_batch_size,
            device=self.args.device,
            folder=Path(str(self.args.output_dir)),
            weights=self._reference_weights,
            gone=self.ref_model is None and self.state.global_step > 0,
        )
        if logps is None:
            raise ValueError(
                f"{name}: expected rows that the trainer has had from the start, since the reference of "
                f"{self.objective.name} is the model before training, got others; add them to eval_dataset when the "
                "trainer is made, or train an adapter"
            )
        return examples.with_references(logps)

    # Log-probabilities

    def _scored(self, model: nn.Module, batch: PreferenceBatch) -> Tensor:  # (S,)
        scorer = self._scorers.get(id(model))
        if scorer is None:
            options: dict[str, Any] = {"average": self.objective.average, "cuda_graphs": self.args.cuda_graphs}
            scorer = self._scorers[id(model)] = (
                CandidateScorer(model, packed=self.args.packed, **options)
                if self.collator.trie is None
                else CatalogueScorer(model, **options)
            )
        with self.accelerator.autocast():
            return scorer(batch.packed)  # type: ignore[arg-type]

    def _reference(self, model: nn.Module, batch: PreferenceBatch) -> Tensor | None:  # (S,)
        if not self.objective.reference:
            return None
        if batch.ref_logps is not None:
            return batch.ref_logps
        adapted: Any = self.accelerator.unwrap_model(model)
        training = model.training
        model.eval()
        with torch.no_grad(), without_adapter(adapted):
            logps = self._scored(model, batch)
        model.train(training)
        return logps

    # The loss

    def _pool(self, batches: Sequence[PreferenceBatch]) -> Pool:
        local = concatenate([batch.users_and_negatives for batch in batches])
        training = self.model.training
        if self.args.authors_compat:
            return authors_pool(local, rho=self.objective.rho)
        return build_pool(
            local,
            rho=0.0 if self.args.exact else self.objective.rho,
            across_ranks=self.args.pool_ranks and training,
            metric=self.args.metric,
            exclude_false_negatives=self.args.exclude_false_negatives,
            shared_gradient=self.args.shared_gradient,
        )

    def _losses(
        self,
        batches: Sequence[PreferenceBatch],
        pool: Pool,
        logps: Tensor,  # (S,) of all batches, one after the other
        references: Tensor | None,  # (S,)
    ) -> Tensor:  # (B,)
        """The users' losses; what there is to log goes to the step metrics."""
        slots = _slots(batches)  # (B, 1 + N)
        seen = logps if references is None else logps - references
        chosen, own = seen[slots[:, 0]], seen[slots[:, 1:]]
        rejected = pool.gather(own.detach() if self.args.authors_compat else own)
        margin = pool_margin(self.margin, self.objective, pool, self.item_vectors, self.item_bias)
        losses = preference_losses(self.objective, chosen, rejected, pool, margin)
        if self.args.sft_weight:
            losses = losses + self.args.sft_weight * self._chosen_nll(batches, logps, slots[:, 0])
        metrics = self._step_metrics["train" if self.model.training else "eval"]
        metrics.add(
            losses=losses,
            chosen=chosen,
            rejected=own,
            logps=logps[slots],
            gamma=mean_margin(margin, pool),
            pool=pool,
            beta=self.objective.beta,
            rows=[row for batch in batches for row in batch.rows],
            tokens=sum(batch.packed.num_tokens for batch in batches),
        )
        return losses

    def _chosen_nll(self, batches: Sequence[PreferenceBatch], logps: Tensor, slots: Tensor) -> Tensor:  # (B,)
        """Negative log-likelihood of each chosen answer per token (RPO, arXiv 2404.19733, equation 1)."""
        if self.objective.average:
            return -logps[slots]
        lengths = torch.cat([batch.packed.title_lengths for batch in batches])  # (S,)
        return -logps[slots] / lengths[slots]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The part of the step's loss (the mean over all its users, on all ranks) that belongs to this micro-batch.

        Every rank has as many users, so dividing by the rank's own number and averaging gradients over the ranks, as
        DDP and FSDP do, divides by the global one.
        """
        batch: PreferenceBatch = inputs["batch"]
        if self.model.training and self.args.pool == "accumulated" and len(self._micro_batches) > 1:
            loss = self._replayed(model)
        else:
            losses = self._losses(
                [batch], self._pool([batch]), self._scored(model, batch), self._reference(model, batch)
            )
            users = sum(part.users for part in self._micro_batches) if self.model.training else batch.users
            loss = losses.sum() / users
        return (loss, {}) if return_outputs else loss

    def _replayed(self, model: nn.Module) -> Tensor:
        """GradCache: at the first micro-batch of a step all are scored without gradient and the loss is computed over
        all; each is then scored again, with the same random numbers, and hands the loss's gradient to the model."""
        if self._replay is None:
            self._replay = self._rehearse(model)
        _set_random_state(self._replay.random_states[self._position], self.args.device)
        return (self._scored(model, self._micro_batches[self._position]) * self._replay.upstream[self._position]).sum()

    def _rehearse(self, model: nn.Module) -> _Replay:
        random_states, logps, references = [], [], []
        with torch.no_grad():
            for batch in self._micro_batches:
                random_states.append(_random_state(self.args.device))
                logps.append(self._scored(model, batch))
                reference = self._reference(model, batch)
                if reference is not None:
                    references.append(reference)
        leaf = torch.cat(logps).requires_grad_()
        losses = self._losses(
            self._micro_batches, self._pool(self._micro_batches), leaf, torch.cat(references) if references else None
        )
        loss = losses.sum() / losses.shape[0]
        (gradient,) = torch.autograd.grad(loss, leaf)
        return _Replay(random_states, gradient.split([part.shape[0] for part in logps]), loss.detach())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._replay is not None:  # what was differentiated is not the loss
            loss = self._replay.loss / len(self._micro_batches)
        self._position += 1
        if self._position == len(self._micro_batches):
            self._replay = None
            if isinstance(self.margin, DynamicMargin):
                self.margin.commit()
        return loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self._micro_batches, self._position = [batch["batch"].to(device) for batch in batches], 0
        return [{"batch": batch} for batch in self._micro_batches], sum(batch.users for batch in self._micro_batches)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        batch: PreferenceBatch = self._prepare_inputs(inputs)["batch"]  # type: ignore[assignment]
        with torch.no_grad():
            logps, references = self._scored(model, batch), self._reference(model, batch)
            loss = self._losses([batch], self._pool([batch]), logps, references).sum() / batch.users
            if prediction_loss_only:
                return loss, None, None
            rewards = self.objective.beta * (logps if references is None else logps - references)[batch.slots]
        there = torch.nn.functional.pad(batch.users_and_negatives.mask, (1, 0), value=True)
        return loss, rewards.masked_fill(~there, -torch.inf), torch.zeros_like(batch.slots[:, 0])

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's mean of batch losses counts a short last batch like a full one: the figures are the users'."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = self._step_metrics["eval"]
        metrics.restart()
        if self.margin is not None:
            self.margin.eval()
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if self.margin is not None:
            self.margin.train()
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.drain().items()})
        return output

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.args.include_num_input_tokens_seen == "no":
            return
        packed = inputs["batch"].packed
        padding = self.args.include_num_input_tokens_seen == "all"
        tokens = torch.tensor(packed.input_ids.numel() if padding else packed.num_tokens, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum().item())

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six a parameter and token: forward and backward."""
        if not hasattr(self, "_parameters"):
            self._parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return 6 * self._parameters * inputs["batch"].packed.num_tokens

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.is_in_train and ("loss" in logs or "train_loss" in logs):
            self._stop_at_nonfinite()
            figures = self._step_metrics["train"].drain()
            figures.pop("loss", None)  # the Trainer's own, the same figure
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
        """``README.md`` in ``output_dir``: the Trainer's metadata, and what is known of the training below them."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        path = Path(str(self.args.output_dir)) / "README.md"
        data = ModelCard.load(path).data
        base = kwargs.get("finetuned_from") or base_model(self)
        title = kwargs.get("model_name") or getattr(data, "model_name", None) or path.parent.name
        path.write_text(f"---\n{data.to_yaml()}\n---\n\n{card.body(self, title, base)}", encoding="utf-8")

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_at_nonfinite()
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.margin is not None and self.args.should_save:
            torch.save(self.margin.state_dict(), os.path.join(output_dir, MARGIN_FILE))
        if self.args.should_save:
            write_json(Path(output_dir) / RUN_FILE, {"weights": self._reference_weights, "loss": self._loss_settings()})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._check_checkpoint(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.margin is not None and checkpoint is not None:
            path = os.path.join(checkpoint, MARGIN_FILE)
            self.margin.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _check_checkpoint(self, checkpoint: Path) -> None:
        """A resumed run is the same run: the same loss, from the same reference, with the optimiser's state."""
        if not (checkpoint / RUN_FILE).exists():
            raise ValueError(
                f"resume_from_checkpoint: expected a checkpoint with the optimiser's state and {RUN_FILE}, got "
                f"{checkpoint}, which save_only_model or another trainer has written; start a run with it as the model"
            )
        saved = read_json(checkpoint / RUN_FILE)
        for name, ours in self._loss_settings().items():
            theirs = saved["loss"].get(name)
            if theirs != ours:
                raise ValueError(
                    f"{name}: expected {theirs!r}, with which the run of {checkpoint} began, got {ours!r}; resume with "
                    "the same options, or start a run with it as the model"
                )
        if saved["weights"] != self._reference_weights:
            raise ValueError(
                f"model: expected the weights that the run of {checkpoint} began with, which are the reference of "
                f"{self.objective.name}, got others; resume with the model and adapter that it was started with"
            )

    def _loss_settings(self) -> dict[str, Any]:
        """The options that make the loss, the objective's own numbers filled in."""
        settings = {"objective": self.args.objective, **dataclasses.asdict(self.objective)}
        del settings["name"]
        return {**settings, **{name: getattr(self.args, name) for name in LOSS_OPTIONS}}


@dataclasses.dataclass
class _Replay:
    """What the micro-batches of a step need for their second pass."""

    random_states: list[list[Tensor]]
    upstream: Sequence[Tensor]  # (S,) each: the gradient of the step's loss
    loss: Tensor


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _slots(batches: Sequence[PreferenceBatch]) -> Tensor:  # (B, 1 + N)
    """The sequences of all batches, one after the other, by user and answer."""
    sequences = np.cumsum([0] + [batch.packed.num_sequences for batch in batches])
    return torch.cat([batch.slots + int(first) for batch, first in zip(batches, sequences, strict=False)])


def _margin_module(args: NAPOConfig, objective: Objective) -> AuthorsMargin | DynamicMargin | None:
    if args.authors_compat:
        return AuthorsMargin(objective.gamma, objective.alpha)
    if objective.alpha == 0.0:
        return None
    margin = DynamicMargin(objective.gamma, objective.alpha, args.margin_decay, args.granularity, args.standardize)
    margin.deferred = True  # one update an optimiser step, however many micro-batches it has
    return margin


def _check_has_no_adapter(model: nn.Module) -> None:
    """PEFT would put the new adapter in the place of the first, or train and save a mixture of both."""
    if adapter_layers(model):
        names = ", ".join(getattr(model, "peft_config", {"default": None}))
        raise ValueError(
            f"peft_config: expected a model without an adapter, got one with {names}; leave peft_config out to train "
            "that one (load it with is_trainable=True), or give model.merge_and_unload() to train a new one on top"
        )


def _vocabulary(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings for."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is not None and weight.ndim == 2 and len(weight):
        return len(weight)
    return int(model.config.get_text_config().vocab_size)  # sharded or packed in another shape


def _positions(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def _known_items(trie: Trie | None, item_vectors: Tensor | np.ndarray | None) -> int | None:
    """Item ids have to be below it; None where any ids will do."""
    if trie is not None and item_vectors is not None and len(item_vectors) != trie.num_items:
        raise ValueError(
            f"item_vectors: expected a row for each of the {trie.num_items} items of the trie, got {len(item_vectors)}"
        )
    return trie.num_items if trie is not None else None if item_vectors is None else len(item_vectors)


def _pad_id(tokenizer: Any) -> int:
    """Any id will do: nothing attends to padding."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
