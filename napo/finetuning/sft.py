"""Supervised fine-tuning: the likelihood of the next title, on the packing that preference training uses.

By default on whole sequences: windows tile what each user watched, every title with another one before it is a target,
and its probability is normalised over the catalogue.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from napo import ranks
from napo.catalogue import (
    CatalogueBatch,
    CatalogueScorer,
    SoftBatch,
    Trie,
    beginnings,
    pack_soft_targets,
    pack_windows,
)
from napo.data.prepared import PreparedData
from napo.data.prompts import PromptEncoder, PromptSettings, PromptStyle, shows_candidates
from napo.data.windows import Tiling, Window, add_lists, draw_windows, met_items
from napo.files import write_json
from napo.finetuning.lengths import check_tokens, checked_length, cut_answer, of_examples, of_windows
from napo.finetuning.options import SFTOptions
from napo.finetuning.reporting import reporters
from napo.finetuning.settings import begun_dtype, finish, of_dtype, settings, steps_of
from napo.language_models.loading import (
    leave_out_auxiliary_loss,
    load_model,
    most_positions,
    pad_id,
    vocabulary_size,
)
from napo.recommenders.language_model import LanguageModel
from napo.recommenders.sasrec import SASRec
from napo.scoring import CandidateScorer, PackedBatch, pack, width_multiple
from napo.trainer.checkpoints import WholeCheckpointTrainer
from napo.trainer.filling import own_in_training
from napo.trainer.throughput import Throughput

Example = tuple[list[int], list[int]]  # prompt ids, answer ids
WindowExample = tuple[list[int], int]  # items, the place of the first target
Collator = Callable[[Sequence[Any]], dict[str, Any]]


def train_sft(
    data: PreparedData,
    run_dir: str | Path,
    options: SFTOptions | None = None,
    *,
    name: str = "sft",
    model: str | Path,
    style: PromptStyle = "history",
    init_from: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    report_to: Sequence[str] = (),
) -> Path:
    """Fine-tune ``model``, or the run's model ``init_from``, on the training rows of ``data`` into ``RUN/models/NAME``.

    Training stops early when the validation loss no longer falls; the best
    adapter is kept. Training with ``distill`` needs ``RUN/sasrec``; the validation loss is that of titles in any case.
    Returns the adapter's folder, which also holds ``log_history.json``. ``out`` takes the
    place of ``RUN/models/NAME``, and the checkpoints beside it stay; with ``resume`` those that are there are of this
    very training, which goes on.
    ``report_to``: of napo.finetuning.reporting.REPORTERS; TensorBoard's files go to ``RUN/logs/NAME``.
    """
    chosen = options or SFTOptions()
    loss_on = chosen.loss_in(style)
    say = _say(name)
    say(chosen.without_effect(style, init_from))
    models = Path(run_dir) / "models"
    folder = out or models / name
    adapter = models / init_from if init_from else None
    teacher = SASRec.load(Path(run_dir) / "sasrec", num_items=data.num_items) if chosen.distill else None
    lora = None if adapter else chosen.lora
    dtype = begun_dtype(folder, chosen.dtype, resume=resume)
    llm, tokenizer = load_model(model, dtype=dtype, adapter=adapter, lora=lora, trainable=True, seed=seed)
    encoder = PromptEncoder(tokenizer, data.titles, noun=data.noun, style=style)
    rng = np.random.default_rng(seed)
    fixed = np.random.default_rng(0)  # every model is validated on the same examples
    check_tokens(encoder, vocabulary_size(llm))
    positions = most_positions(llm)
    chosen = replace(chosen, max_length=checked_length(chosen.max_length, positions, encoder.prefix_length))
    trie, sizes, epochs = None, None, chosen.epochs
    for line in (of_dtype(llm), leave_out_auxiliary_loss(llm)):
        say(line)
    if loss_on == "sequences":
        if chosen.prompt_settings(style, data.history_length).normalise == "catalogue":
            trie = Trie.of(encoder.answers)
        (train, sizes), val = sequence_examples(data, encoder, chosen, trie, rng, fixed, positions=positions, say=say)
        epochs = 1.0  # all of them are in the examples
    elif loss_on == "titles":
        known = met_items(data)
        train, val = (
            title_examples(rows, encoder, known, chosen.min_history, limit, generator)
            for rows, limit, generator in ((data.train, chosen.examples, rng), (data.val, chosen.val_examples, fixed))
        )
    else:
        train = answer_examples(data.train, encoder, chosen.examples, rng)
        val = answer_examples(data.val, encoder, chosen.val_examples, fixed)
    if not train:
        raise ValueError(_why_none(data, chosen))
    if trie is None:
        for examples, kind in ((train, "examples"), (val, "validation examples")):
            say(of_examples(examples, chosen.max_length, encoder.prefix_length, kind))

    collate: Collator
    validate: Collator
    shared: dict[str, Any] = {"pad_id": pad_id(tokenizer, llm), "width_multiple": width_multiple(llm.device)}
    if trie is not None:
        collate = validate = WindowCollator(trie=trie, header=encoder.header, **shared)
        if teacher is not None:
            collate = SoftWindowCollator(
                trie=trie, header=encoder.header, **shared, teacher=teacher, share=chosen.distill
            )
    else:
        collate = validate = SFTCollator(max_length=chosen.max_length, keep_prefix=encoder.prefix_length, **shared)
    steps = steps_of(epochs, len(train), chosen.batch_size * ranks.size())
    trainer = SFTTrainer(
        model=llm,
        args=TrainingArguments(
            **settings(folder, chosen, steps=steps, seed=seed, model=llm, resume=resume, report_to=report_to),
            per_device_train_batch_size=chosen.batch_size,
            per_device_eval_batch_size=chosen.batch_size,
            eval_strategy="steps" if val else "no",
            save_strategy="steps" if val else "no",
            eval_steps=max(steps // chosen.evaluations, 1),
            save_steps=max(steps // chosen.evaluations, 1),
            load_best_model_at_end=bool(val),
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            # Windows of several epochs come in their order, each epoch's cut in its own places.
            train_sampling_strategy="sequential" if loss_on == "sequences" else "random",
        ),
        train_dataset=_Examples(train),
        eval_dataset=_Examples(val) if val else None,
        data_collator=collate,
        eval_collator=validate,
        lists=_val_lists(data, encoder, tokenizer, chosen.prompt_settings(style, data.history_length), chosen, fixed),
        callbacks=[
            *([EarlyStoppingCallback(early_stopping_patience=chosen.patience)] if val else []),
            *reporters(report_to, Path(run_dir) / "logs" / name),
        ],
    )
    finish(trainer, folder, chosen, keep=out is not None)
    if sizes is not None and ranks.rank() == 0:  # of the windows that had their turn, which come in their order
        done = sizes[: trainer.state.global_step * chosen.batch_size * ranks.size()]
        write_json(folder / "budget.json", {"windows": len(done), "tokens": sum(done)})
    return folder


def _say(name: str) -> Callable[[str | None], None]:
    """Says what is to be said of the model ``name``, once for all ranks."""

    def say(line: str | None) -> None:
        if line is not None and ranks.rank() == 0:
            print(f"{name}: {line}")

    return say


def _why_none(data: PreparedData, chosen: SFTOptions) -> str:
    """Of a training without an example."""
    if chosen.epochs < 1 and chosen.tokens is None and any(len(one) > 1 for one in data.training_sequences()):
        return f"epochs: {chosen.epochs:g} of {data.path} are less than one window; raise epochs, or give tokens"
    return f"data: {data.path} has no training rows that make an SFT example; prepare a larger data set"


def sequence_examples(
    data: PreparedData,
    encoder: PromptEncoder,
    chosen: SFTOptions,
    trie: Trie | None,
    rng: np.random.Generator,
    fixed: np.random.Generator,
    *,
    positions: int | None = None,
    say: Callable[[str | None], None] = lambda _: None,
) -> tuple[tuple[list[Any], list[int]], list[Any]]:
    """Windows to train on and the tokens of each; windows to validate on: with a ``trie`` as item ids, else as token
    ids. ``positions`` of the model. ``say``: what of the windows is cut off."""
    tiling = Tiling(
        titles=chosen.window,
        lengths=np.array([len(line) for line in encoder.lines]),
        header=len(encoder.header),
        max_length=chosen.max_length,
    )

    def example(window: Window, sequence: np.ndarray) -> WindowExample | Example:
        items = sequence[window.begin : window.end].tolist()
        if trie is not None:
            return items, window.target - window.begin
        shown = window.target - window.begin
        return encoder.prompt(items[:shown]), [token for item in items[shown:] for token in encoder.title(item)]

    sequences = data.training_sequences()
    windows, _ = tiling.budget(sequences, rng, epochs=chosen.epochs, tokens=chosen.tokens)
    windows = windows[: chosen.examples]
    sizes = [tiling.tokens(window, sequences[window.sequence]) for window in windows]
    held_out, first_targets = data.validation_sequences()
    judged = tiling.windows(held_out, first_targets)
    picked = [judged[index] for index in fixed.permutation(len(judged))[: chosen.val_examples]]
    inputs = tiling.lengths - 1 if trie is None else trie.inputs
    for some, of in ((windows, sequences), (picked, held_out)):
        line = of_windows(some, of, tiling, inputs, sys.maxsize if positions is None else positions)
        if some is windows:
            say(line)
    train = [example(window, sequences[window.sequence]) for window in windows]
    return (train, sizes), [example(window, held_out[window.sequence]) for window in picked]


def answer_examples(
    rows: pd.DataFrame, encoder: PromptEncoder, limit: int | None, rng: np.random.Generator
) -> list[Example]:
    """Prompt and next title of at most ``limit`` rows, drawn without replacement."""
    index = rng.permutation(len(rows))[:limit]
    history, following = rows["history"].to_numpy(), rows["next"].to_numpy()
    candidates = rows["candidates"].to_numpy() if "candidates" in rows else [None] * len(rows)
    return [(encoder.prompt(history[i], candidates[i]), encoder.title(int(following[i]))) for i in index]


def title_examples(
    rows: pd.DataFrame,
    encoder: PromptEncoder,
    known: Mapping[Any, set[int]],
    min_history: int,
    limit: int | None,
    rng: np.random.Generator,
) -> list[Example]:
    """Beginnings and the titles that follow of at most ``limit`` windows, which tile a user's sequence, so that no
    title is a target twice in an epoch. ``known``: the items that each user met, which no list holds as others."""
    picked = draw_windows(rows, limit, rng)
    if shows_candidates(encoder.style):
        picked = add_lists(picked, known, len(encoder.answers), min_history, rng)
    examples = []
    for row in picked.itertuples(index=False):
        titles = [*row.history, row.next]
        beginning = encoder.prompt(titles[:min_history], getattr(row, "candidates", None))
        examples.append((beginning, [token for item in titles[min_history:] for token in encoder.title(int(item))]))
    return examples


@dataclass(frozen=True)
class SFTCollator:
    """Examples -> one packed batch, several short examples a row, and how many titles there are of each example."""

    pad_id: int
    max_length: int
    keep_prefix: int
    width_multiple: int = 1  # of the rows

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        limit = self.max_length
        packed = pack(
            [prompt for prompt, _ in examples],
            [[cut_answer(prompt, answer, limit, self.keep_prefix)] for prompt, answer in examples],
            pad_id=self.pad_id,
            max_length=limit,
            keep_prefix=self.keep_prefix,
            width_multiple=self.width_multiple,
        )
        return {"packed": packed, "titles": [1] * len(examples)}  # an answer is one, whatever it lists


@dataclass(frozen=True, kw_only=True)
class WindowCollator:
    """Windows of items -> one packed batch, normalised over the catalogue."""

    trie: Trie
    header: list[int]
    pad_id: int
    width_multiple: int = 1  # of the rows

    def __call__(self, examples: Sequence[WindowExample]) -> dict[str, Any]:
        windows, firsts = [items for items, _ in examples], [first for _, first in examples]
        return {"packed": self._pack(windows, firsts), "titles": [len(items) - first for items, first in examples]}

    def _pack(self, windows: list[list[int]], firsts: list[int]) -> CatalogueBatch | SoftBatch:
        return pack_windows(
            windows,
            self.trie,
            header=self.header,
            first=firsts,
            pad_id=self.pad_id,
            width_multiple=self.width_multiple,
        )


@dataclass(frozen=True, kw_only=True)
class SoftWindowCollator(WindowCollator):
    """The same with soft targets: the ``teacher`` has this ``share`` of every target."""

    teacher: SASRec
    share: float

    def _pack(self, windows: list[list[int]], firsts: list[int]) -> SoftBatch:
        prompts, histories, targets = beginnings(windows, self.trie, header=self.header, first=firsts)
        return pack_soft_targets(
            prompts,
            targets,
            self.trie,
            self.teacher.probabilities(histories),
            share=self.share,
            pad_id=self.pad_id,
            width_multiple=self.width_multiple,
        )


class SFTTrainer(WholeCheckpointTrainer):
    """The transformers Trainer with the mean negative log-likelihood of the answers' tokens as its loss; forced tokens
    of a catalogue's titles count among them, with 0."""

    def __init__(
        self,
        *args: Any,
        eval_collator: Collator | None = None,
        lists: Callable[[nn.Module], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        """``eval_collator``: of the validation loss, if it is not that of training. ``lists``: figures of the
        model on validation lists, which are logged beside it."""
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._eval_collator = eval_collator
        self._lists = lists
        self._scorers: dict[int, CandidateScorer] = {}
        self._throughput: Throughput | None = None  # from the first training step on
        self._own: int | None = None  # examples of the step that do not fill it up; None: all

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = own_in_training(self, len(self.train_dataset))  # type: ignore[arg-type]
        self._own = None if counts is None else counts[self.args.process_index]
        return samples

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self._throughput is None:
            self._throughput = Throughput(model)
        packed = inputs["packed"]
        targets = 0 if isinstance(packed, PackedBatch) else packed.num_sequences
        self._throughput.add(tokens=packed.num_tokens, targets=targets)
        return super().training_step(model, inputs, num_items_in_batch)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All of it on every rank: they are few, and ranks agree on a loss that is that of one process."""
        examples: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        collate = self._eval_collator or self.data_collator
        return DataLoader(examples, batch_size=self.args.eval_batch_size, collate_fn=collate)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean over the tokens of all examples, however they lie in batches. The ``Trainer``'s own is one of the
        batches' means, where the last batch counts as much as the others."""
        model = self.accelerator.unwrap_model(self.model).eval()
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), self.compute_loss_context_manager():
            for inputs in dataloader:
                loss, tokens = self._summed(model, inputs)
                sums += torch.stack((loss.double(), tokens.double())).cpu()
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1])}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))  # type: ignore[arg-type]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._paused():
            figures = super().evaluate(*args, **kwargs)
            if self._lists is not None:
                self.log(self._lists(self.accelerator.unwrap_model(self.model)))
            return figures

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._paused():
            super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the throughput of the steps since the last time, where it logs their loss. A loss that is not finite
        ends the training before weights that are not are saved."""
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(
                    f"{name}: expected a finite one, got {logs[name]} in or before step {self.state.global_step}; "
                    f"lower learning_rate, which is {self.args.learning_rate:g}, or compute in another dtype"
                )
        if self._throughput is not None and "loss" in logs:
            logs |= self._throughput.drain()
        super().log(logs, start_time)

    def _paused(self) -> AbstractContextManager[None]:
        return nullcontext() if self._throughput is None else self._throughput.pause()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, tokens = self._summed(model, inputs, self._own)
        if self.args.world_size > 1:  # DDP takes the mean of the ranks' gradients, whose tokens differ in number
            dist.all_reduce(tokens)
            loss = loss * self.args.world_size
        loss = loss / tokens
        return (loss, {}) if return_outputs else loss

    def _summed(self, model: nn.Module, inputs: dict[str, Any], own: int | None = None) -> tuple[Tensor, Tensor]:
        """The negative log-likelihood of a batch, or of its first ``own`` examples, and the tokens that it is the sum
        over."""
        packed = inputs["packed"].to(self.args.device)
        scorer = self._scorer(model, packed)
        soft = isinstance(packed, SoftBatch)
        logps, lengths = scorer(packed.children) * packed.weights if soft else scorer(packed), packed.title_lengths
        if own is not None:
            titles = sum(inputs["titles"][:own])
            logps, lengths = logps * (packed.titles < titles) if soft else logps[:titles], lengths[:titles]
        return -logps.sum(), lengths.sum()

    def _scorer(self, model: nn.Module, packed: PackedBatch | CatalogueBatch | SoftBatch) -> Any:
        if id(model) not in self._scorers:
            kind = CandidateScorer if isinstance(packed, PackedBatch) else CatalogueScorer
            self._scorers[id(model)] = kind(model)
        return self._scorers[id(model)]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the Trainer's own guess reads input_ids from the inputs


class _Examples(Dataset):
    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


def _val_lists(
    data: PreparedData,
    encoder: PromptEncoder,
    tokenizer: Any,
    prompt: PromptSettings,
    chosen: SFTOptions,
    fixed: np.random.Generator,
) -> Callable[[nn.Module], dict[str, float]] | None:
    """Ranks the lists of ``val_lists`` validation rows; a tie with the right item counts as a miss."""
    rows = data.val.iloc[fixed.permutation(len(data.val))[: chosen.val_lists]]
    if not len(rows):
        return None
    histories, targets = [full.tolist() for full in rows["full_history"]], rows["next"].to_numpy()
    candidates = np.stack(rows["candidates"].tolist())

    def figures(model: nn.Module) -> dict[str, float]:
        ranker = LanguageModel(model, tokenizer, encoder, data.titles, prompt)
        scores, right = ranker.scores(histories, candidates), candidates == targets[:, None]
        ranks = (scores >= scores[right][:, None]).sum(1)
        return {"eval_hr@1": float((ranks == 1).mean()), "eval_mrr": float((1.0 / ranks).mean())}

    return figures
