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
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from napo.catalogue import CatalogueBatch, CatalogueScorer, Trie
from napo.language_models.loading import most_positions, pad_id, vocabulary_size
from napo.scoring import CandidateScorer, width_multiple
from napo.scoring.rope import border_of, most_tokens
from napo.scoring.scorer import causal_lm_of
from napo.trainer.checks import (
    check_config,
    check_lengths,
    check_models,
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
from napo.trainer.filling import own_counts, own_in_training
from napo.trainer.losses import (
    AuthorsMargin,
    chosen_nll,
    margin_module,
    mean_margin,
    pool_margin,
    preference_losses,
    unmoved,
)
from napo.trainer.models import (
    load_both,
    opening_tokens,
    tokenizer_of,
)
from napo.trainer.pool import Pool, authors_pool, build_pool, concatenate
from napo.trainer.references import is_below_its_adapter
from napo.trainer.referring import ReferringTrainer
from napo.trainer.replay import Replay, rehearse
from napo.trainer.rows import Encoder, Examples
from napo.trainer.sources import is_columns
from napo.trainer.step_metrics import StepMetrics
from napo_kernels import DynamicMargin

__all__ = ["NAPOConfig", "NAPOTrainer"]


class NAPOTrainer(ReferringTrainer):
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
        self.objective = args.resolved_objective
        self.margin = margin_module(args, self.objective)
        by_pair = args.granularity == "pair" and isinstance(self.margin, DynamicMargin)
        # What is seen without the models comes first: loading them can take minutes.
        check_reference(ref_model, self.objective, args)
        check_pairs_and_trie(args, trie, item_vectors, by_pair=by_pair)
        self.item_vectors, self.item_bias = item_numbers(item_vectors, item_bias, args.device)
        items = known_items(trie, self.item_vectors)
        processing_class = tokenizer_of(model) if processing_class is None else processing_class
        model, self.ref_model = load_both(args, model, ref_model, quantization_config, peft_config)
        models = [causal_lm_of(one) for one in (model, self.ref_model) if one is not None]
        check_models(args, models)
        self.encoder = self._encoder(args, processing_class, models, items)
        self.collator = self._collator(args, models[0], trie)
        # A stream is read only as far as the run needs rows.
        a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._most_rows = args.max_steps * a_step if args.max_steps > 0 else None
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
        for one in models:
            check_lengths(one, args, self.encoder.longest, self.train_dataset, self.eval_dataset)
        self._fresh_adapter = is_below_its_adapter(self.model)
        self._check_distribution()
        # The loss below is that of the whole optimiser step: the Trainer must not divide it by the micro-batches.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        if self.margin is not None:
            self.margin.to(args.device)
        self._scorers: dict[int, CandidateScorer] = {}
        self._step_metrics = {"train": StepMetrics(args.device), "eval": StepMetrics(args.device)}
        self._micro_batches: list[PreferenceBatch] = []
        self._position = 0
        self._replay: Replay | None = None

    # Data

    def _encoder(self, args: NAPOConfig, tokenizer: Any, models: list[PreTrainedModel], items: int | None) -> Encoder:
        return Encoder(
            tokenizer=tokenizer,
            vocabulary=min(map(vocabulary_size, models)),
            positions=min((most for most in map(most_positions, models) if most is not None), default=None),
            answer_end=args.answer_end,
            max_length=args.max_length,
            truncate_prompts=args.truncate_prompts,
            keep_prefix=opening_tokens(tokenizer) if args.keep_prefix is None else args.keep_prefix,
            on_bad_row=args.on_bad_row,
            needs_states=self.objective.rho > 0.0,
            needs_scores=isinstance(self.margin, AuthorsMargin)
            or (isinstance(self.margin, DynamicMargin) and args.granularity != "pair"),
            items=items,
        )

    def _collator(self, args: NAPOConfig, model: PreTrainedModel, trie: Trie | None) -> Collator:
        # Rows are checked against the border as they are; answers that are borrowed come behind another prompt.
        limits = [self.encoder.longest, most_tokens(border_of(model), packed=args.packed) if args.exact else None]
        return Collator(
            pad_id=pad_id(self.encoder.tokenizer, model),
            max_length=min((limit for limit in limits if limit is not None), default=None),
            truncates=args.truncate_prompts,
            keep_prefix=self.encoder.keep_prefix,
            exact_rho=self.objective.rho if args.exact else None,
            metric=args.metric,
            exclude_false_negatives=args.exclude_false_negatives,
            width_multiple=width_multiple(args.device),
            trie=trie,
        )

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
        check_states(name, examples, self.item_vectors)
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
        self._leave_step()
        if self.margin is not None:
            self.margin.train()
        if self.state.global_step == 0:
            self._fix_reference()
        result = super().train(*args, **kwargs)
        self._write_history()
        return result

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
        metrics: StepMetrics | None,
        count: int | None = None,
    ) -> Tensor:  # (B,)
        """The users' losses; their figures go into ``metrics``. Where ``count`` is given, the users behind the first so
        many are there to be borrowed from alone."""
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
        pool, losses = pool.first(count), losses[:count]
        if metrics is None:
            return losses
        metrics.add(
            losses=losses,
            chosen=chosen[:count],
            rejected=own[:count],
            logps=logps[slots[:count]],
            gamma=mean_margin(margin, pool),
            pool=pool,
            beta=self.objective.beta,
            rows=[row for batch in batches for row in batch.rows][:count],
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

        Dividing by the mean number of the ranks' users and averaging gradients over the ranks, as DDP and FSDP do,
        divides by the number of all.
        """
        batch: PreferenceBatch = inputs["batch"]
        # A batch that is not of the step at hand, as of somebody who calls this alone, is a step by itself, and moves
        # neither the margin nor the figures of the steps.
        by_hand = not any(part is batch for part in self._micro_batches)
        of_step = [batch] if by_hand else self._micro_batches
        if self.model.training and self.args.pool == "accumulated" and len(of_step) > 1:
            loss = self._replayed(model)
        else:
            logps, references = self._scored(model, batch), self._reference(model, batch)
            with unmoved(self.margin) if by_hand else nullcontext():
                metrics = None if by_hand else self._step_metrics["train"]
                losses = self._losses([batch], self._pool([batch]), logps, references, metrics)
            users = sum(part.mean_users for part in of_step) if self.model.training else batch.users
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
                losses=lambda logps, references: self._losses(
                    batches, self._pool(batches), logps, references, self._step_metrics["train"]
                ),
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
        if self._micro_batches:  # auto_find_batch_size begins anew in the middle of a step
            self._leave_step()
        batches = [batch["batch"] for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        own = None if self.args.authors_compat else own_in_training(self, len(self.train_dataset))  # type: ignore[arg-type]
        if batches and own is not None:
            batches[-1] = batches[-1].first(own[self.args.process_index], own)
        self._micro_batches, self._position = [batch.to(device) for batch in batches], 0
        return [{"batch": batch} for batch in self._micro_batches], sum(batch.users for batch in self._micro_batches)

    def _leave_step(self) -> None:
        """Forget what an interrupted step has left, the figures of steps that are run again, and the scorers: they hold
        the wrapper that the model had, and its memory for gradients."""
        self._scorers.clear()
        self._micro_batches, self._position, self._replay = [], 0, None
        if isinstance(self.margin, DynamicMargin):
            self.margin.discard()
        self._step_metrics["train"].restart()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        batch: PreferenceBatch = self._prepare_inputs(inputs)["batch"]  # type: ignore[assignment]
        with torch.no_grad():
            logps, references = self._scored(model, batch), self._reference(model, batch)
            users = self._users_of_its_own(batch)
            # The authors' pool is made of whole batches. Otherwise a user who fills up is nobody's neighbour. A rank
            # without users of its own still takes part in what the ranks agree on.
            pooled = batch if self.args.authors_compat else batch.first(users)
            losses = self._losses(
                [pooled], self._pool([pooled]), logps, references, self._step_metrics["eval"], count=users
            )
            loss = losses.sum() / max(users, 1)
            if prediction_loss_only:
                return loss, None, None
            own = batch.slots[:, : batch.own.shape[1]]  # borrowed answers stand behind them
            rewards = self.objective.beta * (logps if references is None else logps - references)[own]
        return loss, rewards.masked_fill(~batch.own, -torch.inf), torch.zeros_like(batch.slots[:, 0])

    def _users_of_its_own(self, batch: PreferenceBatch) -> int:
        """How many users of an evaluation's batch belong to the data set: in the last round the ranks' batches are
        filled up with its first rows, behind the others."""
        own = own_counts(self, self.accelerator.gradient_state.remainder, batch.users)
        return batch.users if own is None else own[self.args.process_index]

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The figures are means over users: the Trainer's mean of batch losses counts a short last batch like a full
        one."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = self._step_metrics["eval"]
        metrics.restart()
        margin = nn.Identity() if self.margin is None else self.margin
        margin.eval()
        try:
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        finally:  # whoever interrupts an evaluation may train on
            margin.train()
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
