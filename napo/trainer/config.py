"""``NAPOConfig``: the ``TrainingArguments`` of preference optimisation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from transformers import TrainingArguments

from napo.objectives import OBJECTIVES, Objective
from napo_kernels.ops.dynamic_margin import GRANULARITIES

# Options beside the objective's own that make the loss what it is; a resumed run keeps them.
LOSS_OPTIONS = (
    "sft_weight",
    "granularity",
    "margin_decay",
    "standardize",
    "metric",
    "pool",
    "pool_ranks",
    "exact",
    "exclude_false_negatives",
    "shared_gradient",
    "authors_compat",
)

# What ``authors_compat`` has its own way for.
NOT_THE_AUTHORS = ("granularity", "margin_decay", "standardize", "metric", "shared_gradient", "pool_ranks")

_NO_LABELS = "answers are the labels"
_NO_PREDICTIONS = "compute_metrics gets the rewards of all rows at once, and nothing else"
WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the loss compares answers and smooths no labels"),
    "label_names": (None, _NO_LABELS),
    "length_column_name": ("length", "lengths are counted in tokens here"),
    "average_tokens_across_devices": (True, "the loss is the mean over all ranks' users"),
    "include_for_metrics": ([], _NO_PREDICTIONS),
    "batch_eval_metrics": (False, _NO_PREDICTIONS),
    "eval_do_concat_batches": (True, _NO_PREDICTIONS),
    "eval_use_gather_object": (False, _NO_PREDICTIONS),
}
"""Fields of ``TrainingArguments`` that have no effect here: the only accepted value, and why."""


@dataclasses.dataclass
class NAPOConfig(TrainingArguments):
    """``TrainingArguments`` and what preference optimisation adds. Numbers left at None are the objective's own
    (``napo.objectives.OBJECTIVES``)."""

    # Given as JSON on a command line (HfArgumentParser).
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    objective: str = dataclasses.field(
        default="softmax",
        metadata={
            "help": f"One of {', '.join(OBJECTIVES)}. 'napo' needs in every row user_state (unless rho=0) and "
            "rejected_scores (unless alpha=0)."
        },
    )
    beta: float | None = dataclasses.field(default=None, metadata={"help": "Reward per unit of log-probability."})
    gamma: float | None = dataclasses.field(default=None, metadata={"help": "Margin (its base value where dynamic)."})
    alpha: float | None = dataclasses.field(
        default=None, metadata={"help": "How strongly the margin follows rejected_scores; 0 for a constant margin."}
    )
    rho: float | None = dataclasses.field(
        default=None, metadata={"help": "Share of the pool to borrow negatives from; 0 for own negatives only."}
    )
    average: bool | None = dataclasses.field(
        default=None, metadata={"help": "Mean token log-probabilities instead of their sum."}
    )
    sft_weight: float = dataclasses.field(
        default=0.0,
        metadata={
            "help": "Weight of the chosen answer's negative log-likelihood beside the loss (RPO). As in RPO's equation "
            "1 it is the mean over users of each answer's mean over its tokens; TRL's loss 'sft' is the mean over all "
            "the batch's tokens, where long answers count for more."
        },
    )
    granularity: str = dataclasses.field(
        default="negative", metadata={"help": "What the margin is computed for: batch, user, negative or pair."}
    )
    margin_decay: float = dataclasses.field(default=0.9, metadata={"help": "Decay of the running mean score."})
    standardize: bool = dataclasses.field(default=False, metadata={"help": "Standardise rejected_scores."})
    metric: str = dataclasses.field(default="dot", metadata={"help": "Similarity of user states: dot or cosine."})
    pool: Literal["batch", "accumulated"] = dataclasses.field(
        default="batch",
        metadata={"help": "Borrow within a micro-batch, or within all micro-batches of an optimiser step."},
    )
    pool_ranks: bool = dataclasses.field(default=True, metadata={"help": "Borrow from all ranks' users."})
    exact: bool = dataclasses.field(
        default=False,
        metadata={"help": "Score borrowed answers under the borrower's own prompt (pool of one micro-batch)."},
    )
    exclude_false_negatives: bool = dataclasses.field(
        default=True, metadata={"help": "Leave out negatives that the user has in history_ids or has chosen."}
    )
    shared_gradient: bool = dataclasses.field(
        default=True, metadata={"help": "Let gradient flow through borrowed negatives."}
    )
    authors_compat: bool = dataclasses.field(
        default=False, metadata={"help": "NAPO exactly as its authors released it, quirks included."}
    )
    precompute_ref_log_probs: bool | None = dataclasses.field(
        default=None,
        metadata={
            "help": "The reference is the model as it stands at the start. True: its log-probabilities are computed "
            "once and cached in output_dir. False: at every step with the adapter switched off, which needs a fresh "
            "adapter. None: False where the adapter is fresh, else True."
        },
    )
    packed: bool = dataclasses.field(
        default=True,
        metadata={
            "help": "Encode a prompt once for all its answers. False: each answer alone behind its prompt, slower, for "
            "models whose layers carry a state from token to token (Mamba, Bloom and the like)."
        },
    )
    max_length: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Most tokens of prompt and answer together; the model's positions are a limit too."},
    )
    truncate_prompts: bool = dataclasses.field(
        default=False, metadata={"help": "Shorten prompts beyond max_length instead of refusing their rows."}
    )
    keep_prefix: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Tokens at the front of a prompt that a truncation keeps. None: those that the tokenizer puts in "
            "front of every text."
        },
    )
    answer_end: Literal["eos", "newline"] = dataclasses.field(
        default="eos", metadata={"help": "The token that ends an answer given as text."}
    )
    on_bad_row: Literal["error", "skip"] = dataclasses.field(
        default="error", metadata={"help": "Stop at a row that cannot be used, or skip, count and report it."}
    )
    dataset_num_proc: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Processes that encode rows. None: one; from 20,000 rows of text on one a core, at most 8."},
    )
    cache_rows: bool | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Keep encoded rows in output_dir, and take them from there where rows, tokenizer and options are "
            "the same. None: from 2,000 rows of text on."
        },
    )
    cuda_graphs: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Record the model's forward and backward for each shape of packed rows and replay them: a small "
            "model's step is bound by launches. One GPU, no dropout, no gradient checkpointing; else it says why not."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = dataclasses.field(
        default=None, metadata={"help": "For from_pretrained, where the model is given by name."}
    )
    learning_rate: float = dataclasses.field(default=1e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = dataclasses.field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = dataclasses.field(default=0.05, metadata={"help": "Warm-up: steps, or a share below 1."})
    logging_steps: float = dataclasses.field(default=10, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool = dataclasses.field(default=False, metadata={"help": "Rows are read whole."})
    # The filter reads the loss back at every step; napo looks at it when it logs, and stops.
    logging_nan_inf_filter: bool = dataclasses.field(default=False, metadata={"help": "Leave off: see NAPOTrainer."})
    # The head works outside the wrapped module's forward, where DDP's search for unused parameters would miss it.
    ddp_find_unused_parameters: bool | None = dataclasses.field(default=False, metadata={"help": "Leave off."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_what_has_no_effect()
        _one_of("objective", self.objective, tuple(OBJECTIVES))
        _one_of("pool", self.pool, ("batch", "accumulated"))
        _one_of("on_bad_row", self.on_bad_row, ("error", "skip"))
        _one_of("answer_end", self.answer_end, ("eos", "newline"))
        _one_of("metric", self.metric, ("dot", "cosine"))
        _one_of("granularity", self.granularity, GRANULARITIES)
        objective = self.resolved_objective
        for name, value, least in (
            ("dataset_num_proc", self.dataset_num_proc, 1),
            ("max_length", self.max_length, 2),
            ("keep_prefix", self.keep_prefix, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, or None, got {value}")
        _within("beta", objective.beta, objective.beta > 0.0, "a number above 0")
        _within("gamma", objective.gamma, objective.gamma >= 0.0, "0 or more")
        _within("alpha", objective.alpha, objective.alpha >= 0.0, "0 or more")
        _within("rho", objective.rho, 0.0 <= objective.rho <= 1.0, "a share from 0 to 1")
        _within("sft_weight", self.sft_weight, self.sft_weight >= 0.0, "0 or more")
        _within("margin_decay", self.margin_decay, 0.0 <= self.margin_decay < 1.0, "0 or more and less than 1")
        self._refuse_what_is_no_number()
        self._refuse_what_the_objective_ignores(objective)
        if objective.form != "softmax" and objective.rho > 0.0:
            raise ValueError(f"rho: {objective.name} has no shared negatives, expected 0, got {objective.rho}")
        if objective.form != "softmax" and objective.alpha != 0.0:
            raise ValueError(f"alpha: {objective.name} has a constant margin, expected 0, got {objective.alpha}")
        if self.authors_compat and (
            self.objective != "napo" or self.pool != "batch" or self.exact or objective.average
        ):
            raise ValueError(
                "authors_compat: needs objective 'napo', pool 'batch', exact False and average None or False"
            )
        if self.exact and (self.pool != "batch" or objective.rho == 0.0):
            raise ValueError(
                "exact: needs pool 'batch' and rho above 0, since borrowed answers are encoded with their batch"
            )
        if self.exact and self.granularity == "pair":
            raise ValueError("granularity: 'pair' does not go with exact; use 'negative'")

    def _refuse_what_has_no_effect(self) -> None:
        for name, (expected, why) in WITHOUT_EFFECT.items():
            value = getattr(self, name, expected)
            if value != expected:
                raise ValueError(f"{name}: expected {expected!r}, since {why}, got {value!r}; leave it out")
        if self.packed and self.neftune_noise_alpha:
            raise ValueError(
                "neftune_noise_alpha: expected None, since NEFTune's noise becomes less with the length of a row and a "
                f"packed row holds several users, got {self.neftune_noise_alpha}; leave it out, or set packed=False"
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy: expected 'random', 'sequential' or 'group_by_length', got 'batch_rebalance', "
                "which gives ranks different numbers of users"
            )
        for name in ("cp_size", "sp_size"):
            size = getattr(self.parallelism_config, name, 1) or 1
            if size > 1:
                raise ValueError(
                    f"parallelism_config.{name}: expected 1, since answers share a row with their prompt, got {size}; "
                    "spread users over the ranks instead"
                )

    def _refuse_what_is_no_number(self) -> None:
        """transformers compares some of its numbers with limits, which no NaN is beyond, and others with nothing."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            clips_nothing = field.name == "max_grad_norm" and value == math.inf
            if isinstance(value, float) and not math.isfinite(value) and not clips_nothing:
                raise ValueError(f"{field.name}: expected a finite number, got {value}")

    def _refuse_what_the_objective_ignores(self, objective: Objective) -> None:
        constant = (
            objective.alpha == 0.0,
            f"the margin of {self.objective} is constant with alpha {objective.alpha:g}",
        )
        authors = (self.authors_compat, "authors_compat=True does as the authors' code")
        own = (objective.rho == 0.0, "no negative is borrowed with rho 0")
        exact = (self.exact, "borrowed answers are scored under the borrower's prompt with exact=True")
        reference = (not objective.reference, f"{self.objective} has no reference")
        whole = (not self.truncate_prompts, "no prompt is shortened without truncate_prompts=True")
        ignored: tuple[tuple[str, Any, tuple[bool, str]], ...] = (
            ("granularity", "negative", constant),
            ("margin_decay", 0.9, constant),
            ("standardize", False, constant),
            *((name, NAPOConfig.__dataclass_fields__[name].default, authors) for name in NOT_THE_AUTHORS),
            ("metric", "dot", own),
            ("shared_gradient", True, own),
            ("shared_gradient", True, exact),
            ("precompute_ref_log_probs", None, reference),
            ("keep_prefix", None, whole),
        )
        for name, default, (without_effect, why) in ignored:
            value = getattr(self, name)
            if without_effect and value != default:
                raise ValueError(f"{name}: expected {default!r}, since {why}, got {value!r}; leave it out")

    @property
    def resolved_objective(self) -> Objective:
        """The objective with this config's numbers."""
        given = {name: getattr(self, name) for name in ("beta", "gamma", "alpha", "rho", "average")}
        return dataclasses.replace(
            OBJECTIVES[self.objective], **{name: value for name, value in given.items() if value is not None}
        )


def _within(name: str, value: float, holds: bool, expected: str) -> None:
    """A NaN is within nothing."""
    if not holds or math.isinf(value):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")


def options_table() -> str:
    """The options that ``NAPOConfig`` adds to ``TrainingArguments`` or changes, as docs/trainer.md lists them."""
    lines = ["| option | default | what it does |", "| :-- | :-- | :-- |"]
    for field in dataclasses.fields(NAPOConfig):
        if field.name in NAPOConfig.__annotations__:
            default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            lines.append(f"| `{field.name}` | {default} | {field.metadata['help']} |")
    return "\n".join(lines)
