"""Supervised fine-tuning: the likelihood of the next title, on the packing that preference training uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from napo.data.prepared import PreparedData
from napo.data.prompts import PromptEncoder, PromptStyle, continues, shows_candidates
from napo.data.windows import add_lists, draw_windows, met_items
from napo.finetuning.callbacks import BarCallback
from napo.finetuning.settings import finish, settings
from napo.language_models.loading import LoraOptions, load_model
from napo.scoring import CandidateScorer, PackedBatch, pack, width_multiple
from napo.trainer.checkpoints import WholeCheckpointTrainer

Example = tuple[list[int], list[int]]  # prompt ids, answer ids


@dataclass(frozen=True, kw_only=True)
class SFTOptions:
    """How to fine-tune; the defaults suit a small model on a CPU."""

    loss_on: Literal["answer", "titles"] = "answer"
    """"answer": the next title. "titles": every title of a prompt that an answer continues, which is training text
    itself: ten times the targets for little more than the cost of one (not in the style "candidates")."""
    min_history: int = 0  # for "titles": the first so many titles of a window are no targets
    examples: int | None = None  # at most so many, drawn at random; None: all
    epochs: float = 1.0
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup: float = 0.05  # share of the steps
    max_grad_norm: float = 1.0
    max_length: int = 512  # tokens of prompt and answer; the oldest titles go first
    val_examples: int = 64
    evaluations: int = 4  # of the validation loss, evenly spread over the steps
    patience: int = 2  # evaluations without improvement after which training stops
    dtype: str = "auto"
    lora: LoraOptions = field(default_factory=LoraOptions)

    def __post_init__(self) -> None:
        if self.loss_on not in ("answer", "titles"):
            raise ValueError(f"loss_on: expected answer or titles, got {self.loss_on!r}")


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
) -> Path:
    """Fine-tune ``model``, or the run's model ``init_from``, on the training rows of ``data`` into ``RUN/models/NAME``.

    Training stops early when the validation loss no longer falls; the best
    adapter is kept. Returns the adapter's folder, which also holds ``log_history.json``. ``out`` takes the
    place of ``RUN/models/NAME``; with ``resume`` the checkpoints beside it are of this very training, which goes on.
    """
    chosen = options or SFTOptions()
    if chosen.loss_on == "titles" and not continues(style):
        raise ValueError(f"loss_on: 'titles' needs a style that answers continue, got style {style!r}; use 'answer'")
    models = Path(run_dir) / "models"
    folder = out or models / name
    adapter = models / init_from if init_from else None
    lora = None if adapter else chosen.lora
    llm, tokenizer = load_model(model, dtype=chosen.dtype, adapter=adapter, lora=lora, trainable=True, seed=seed)
    encoder = PromptEncoder(tokenizer, data.titles, noun=data.noun, style=style)
    rng = np.random.default_rng(seed)
    fixed = np.random.default_rng(0)  # every model is validated on the same examples
    if chosen.loss_on == "titles":
        known = met_items(data)
        train, val = (
            title_examples(rows, encoder, known, chosen.min_history, limit, generator)
            for rows, limit, generator in ((data.train, chosen.examples, rng), (data.val, chosen.val_examples, fixed))
        )
    else:
        train = answer_examples(data.train, encoder, chosen.examples, rng)
        val = answer_examples(data.val, encoder, chosen.val_examples, fixed)
    if not train:
        raise ValueError(f"data: {data.path} has no training rows that make an SFT example; prepare a larger data set")

    steps = max(round(chosen.epochs * len(train) / chosen.batch_size), 1)
    trainer = SFTTrainer(
        model=llm,
        args=TrainingArguments(
            **settings(folder, chosen, steps=steps, seed=seed, model=llm, resume=resume),
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
        ),
        train_dataset=_Examples(train),
        eval_dataset=_Examples(val) if val else None,
        data_collator=SFTCollator(
            pad_id=int(tokenizer.pad_token_id),
            max_length=chosen.max_length,
            keep_prefix=encoder.prefix_length,
            width_multiple=width_multiple(llm.device),
        ),
        callbacks=_callbacks(name, chosen.patience if val else None),
    )
    return finish(trainer, folder)


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
    """Examples -> one packed batch, several short examples a row."""

    pad_id: int
    max_length: int
    keep_prefix: int
    width_multiple: int = 1  # of the rows

    def __call__(self, examples: Sequence[Example]) -> dict[str, PackedBatch]:
        limit = self.max_length
        packed = pack(
            [prompt for prompt, _ in examples],
            [[answer[: limit - min(len(prompt), self.keep_prefix + 1)]] for prompt, answer in examples],
            pad_id=self.pad_id,
            max_length=limit,
            keep_prefix=self.keep_prefix,
            width_multiple=self.width_multiple,
        )
        return {"packed": packed}


class SFTTrainer(WholeCheckpointTrainer):
    """The transformers Trainer with the mean negative log-likelihood of the answers' tokens as its loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._scorers: dict[int, CandidateScorer] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        packed = inputs["packed"].to(self.args.device)
        scorer = self._scorers.setdefault(id(model), CandidateScorer(model))
        loss = -scorer(packed).sum() / packed.targets.numel()
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the Trainer's own guess reads input_ids from the inputs


class _Examples(Dataset):
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def _callbacks(name: str, patience: int | None) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [BarCallback(name)]
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=patience))
    return callbacks
