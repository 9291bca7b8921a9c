"""``NAPOTrainer``: preference optimisation with one chosen and many rejected answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from napo.catalogue import CatalogueBatch, CatalogueScorer, Trie
from napo.language_models.fused.lora import without_adapter
from napo.language_models.loading import most_positions, pad_id, vocabulary_size
from napo.scoring import CandidateScorer, width_multiple
from napo.scoring.scorer import causal_lm_of, check_packable
from napo.trainer.checks import (
    check_auxiliary_loss,
    check_config,
    check_distribution,
    check_has_no_adapter,
    check_lengths,
    check_pairs_and_trie,
    check_reference,
    check_states,
    check_titles,
    check_trains,
    item_numbers,
    known_items,
)
from napo.trainer.collator import Collator, PreferenceBatch, slots_of
from napo.trainer.config import NAPOConfig
from napo.trainer.encoded import encode
from napo.trainer.losses import AuthorsMargin, chosen_nll, margin_module, mean_margin, pool_margin, preference_losses
from napo.trainer.models import (
    load_model,
    load_reference,
    opening_tokens,
    tokenizer_of,
)
from napo.trainer.pool import Pool, authors_pool, build_pool, concatenate
from napo.trainer.records import RecordingTrainer
from napo.trainer.references import adapter_parameters, is_below_its_adapter, reference_logps, weights_fingerprint
from napo.trainer.replay import Replay, rehearse
from napo.trainer.rows import Encoder, Examples
from napo.trainer.sources import is_columns
from napo.trainer.step_metrics import StepMetrics
from napo_kernels import DynamicMargin

__all__ = ["NAPOConfig", "NAPOTrainer"]


class NAPOTrainer(RecordingTrainer):
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

    margin: AuthorsMargin | DynamicMargin | None

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
        check_config(args, model, ref_model)
        processing_class = tokenizer_of(model) if processing_class is None else processing_class
        model = load_model(model, args.model_init_kwargs, quantization_config, peft_config)
        self.ref_model = load_reference(ref_model, args.model_init_kwargs)
        if peft_config is not None:
            from peft import get_peft_model

            check_has_no_adapter(model)
            set_seed(args.seed)  # the adapter's initial weights
            model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
        self.objective = args.resolved_objective
        check_reference(self.ref_model, self.objective, args)
        # A stream is read only as far as the run needs rows.
        a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._most_rows = args.max_steps * a_step if args.max_steps > 0 else None
        self.margin = margin_module(args, self.objective)
        by_pair = args.granularity == "pair" and isinstance(self.margin, DynamicMargin)
        check_pairs_and_trie(args, trie, item_vectors, by_pair=by_pair)
        self.item_vectors, self.item_bias = item_numbers(item_vectors, item_bias, args.device)
        causal_lm = causal_lm_of(model)  # type: ignore[arg-type]
        if args.packed:
            check_packable(causal_lm)
        scored_by = [causal_lm, *([] if self.ref_model is None else [causal_lm_of(self.ref_model)])]  # type: ignore[arg-type]
        keep_prefix = opening_tokens(processing_class) if args.keep_prefix is None else args.keep_prefix
        check_auxiliary_loss(causal_lm)
        self.encoder = Encoder(
            tokenizer=processing_class,
            vocabulary=min(map(vocabulary_size, scored_by)),
            positions=min((most for most in map(most_positions, scored_by) if most is not None), default=None),
            answer_end=args.answer_end,
            max_length=args.max_length,
            truncate_prompts=args.truncate_prompts,
            keep_prefix=keep_prefix,
            on_bad_row=args.on_bad_row,
            needs_states=self.objective.rho > 0.0,
            needs_scores=isinstance(self.margin, AuthorsMargin)
            or (isinstance(self.margin, DynamicMargin) and args.granularity != "pair"),
            items=known_items(trie, self.item_vectors),
        )
        self.collator = Collator(
            pad_id=pad_id(processing_class, causal_lm),
            max_length=self.encoder.longest,
            truncates=args.truncate_prompts,
            keep_prefix=keep_prefix,
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
        check_lengths(causal_lm, args, self.encoder.longest, self.train_dataset, self.eval_dataset)
        self._fresh_adapter = is_below_its_adapter(self.model)
        self._check_distribution()
        # The loss below is that of the whole optimiser step: the Trainer must not divide it by the micro-batches.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        check_states(self.train_dataset, self.item_vectors)
        if self.margin is not None:
            self.margin.to(args.device)
        self._scorers: dict[int, CandidateScorer] = {}
        self._step_metrics = {"train": StepMetrics(args.device), "eval": StepMetrics(args.device)}
        self._micro_batches: list[PreferenceBatch] = []
        self._position = 0
        self._replay: Replay | None = None

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
        # The other ranks of a machine find what its first one has kept.
        with nullcontext() if args.cache_rows is False else args.main_process_first(desc="encoding rows"):
            examples = encode(self.encoder, name, rows, **options)
        self.encoder.report_shortened(name, examples)
        if self.collator.trie is not None:
            check_titles(name, examples, self.collator.trie)
        return examples

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
        """Evaluation keeps the order of the rows: figures of users who borrow from one another depend on it."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        check_trains(self.model)
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
        """The users' losses; their figures go to the step metrics."""
        slots = slots_of(batches)  # (B, 1 + N)
        seen = logps if references is None else logps - references
        chosen, own = seen[slots[:, 0]], seen[slots[:, 1:]]
        rejected = pool.gather(own.detach() if self.args.authors_compat else own)
        margin = pool_margin(self.margin, self.objective, pool, self.item_vectors, self.item_bias)
        losses = preference_losses(self.objective, chosen, rejected, pool, margin, logps[slots])
        if self.args.sft_weight:
            lengths = torch.cat([batch.packed.title_lengths for batch in batches])  # (S,)
            nll = chosen_nll(logps, lengths, slots[:, 0], average=self.objective.average)
            losses = losses + self.args.sft_weight * nll
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
        # A batch that is not of the step at hand, as of somebody who calls this alone, is a step by itself.
        of_step = self._micro_batches if any(part is batch for part in self._micro_batches) else [batch]
        if self.model.training and self.args.pool == "accumulated" and len(of_step) > 1:
            loss = self._replayed(model)
        else:
            losses = self._losses(
                [batch], self._pool([batch]), self._scored(model, batch), self._reference(model, batch)
            )
            users = sum(part.users for part in of_step) if self.model.training else batch.users
            loss = losses.sum() / users
        return (loss, {}) if return_outputs else loss

    def _replayed(self, model: nn.Module) -> Tensor:
        """GradCache: at the first micro-batch of a step all are scored, this one with its graph and the others without,
        and the loss is computed over all. This one hands the loss's gradient to the model at once; the others are
        scored again, with the same random numbers."""
        batches = self._micro_batches
        if self._replay is None:
            self._replay = rehearse(
                batches,
                score=lambda batch: self._scored(model, batch),
                reference=lambda batch: self._reference(model, batch),
                losses=lambda logps, references: self._losses(batches, self._pool(batches), logps, references),
                device=self.args.device,
            )
        position = self._position
        return self._replay.backward_of(position, lambda: self._scored(model, batches[position]), self.args.device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._replay is not None:  # the tensor that was differentiated is not the loss
            loss = self._replay.loss / len(self._micro_batches)
        self._position += 1
        if self._position == len(self._micro_batches):
            self._replay, self._micro_batches = None, []
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
            mine = batch.first(self._users_of_its_own(batch))
            loss = logps.new_zeros(())
            if mine.users:
                loss = self._losses([mine], self._pool([mine]), logps, references).sum() / mine.users
            if prediction_loss_only:
                return loss, None, None
            own = batch.slots[:, : batch.own.shape[1]]  # borrowed answers stand behind them
            rewards = self.objective.beta * (logps if references is None else logps - references)[own]
        return loss, rewards.masked_fill(~batch.own, -torch.inf), torch.zeros_like(batch.slots[:, 0])

    def _users_of_its_own(self, batch: PreferenceBatch) -> int:
        """How many users of an evaluation's batch belong to the data set: in the last round the ranks' batches are
        filled up with its first rows, behind the others."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return batch.users
        return min(max(state.remainder - batch.users * self.args.process_index, 0), batch.users)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The figures are means over users: the Trainer's mean of batch losses counts a short last batch like a full
        one."""
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
        rows = packed.packed if isinstance(packed, CatalogueBatch) else packed
        tokens = torch.tensor(rows.input_ids.numel() if padding else packed.num_tokens, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum().item())

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six per parameter and token, for forward and backward together."""
        if not hasattr(self, "_parameters"):
            self._parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return 6 * self._parameters * inputs["batch"].packed.num_tokens
