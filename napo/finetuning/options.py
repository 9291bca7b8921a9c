"""Options of the two trainings of a run's language model. The command line describes them, so nothing heavy is imported
here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from napo.data.prompts import Normalise, PromptSettings
from napo.data.styles import PromptStyle, continues
from napo.language_models.options import LoraOptions
from napo.options import Range, check

LossOn = Literal["sequences", "answer", "titles"]
NegativesFrom = Literal["uniform", "popularity", "sasrec", "mixed"]
DType = Literal["auto", "bf16", "fp16", "fp32"]
Granularity = Literal["batch", "user", "negative", "pair"]
PoolOf = Literal["batch", "accumulated"]
Neighbours = Literal["similar", "random"]
WINDOW, WINDOWS, USERS = 20, 4, 8
"""Of preference training: titles of a window, and windows or else users of a micro-batch, where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class SFTOptions:
    """How to fine-tune; the defaults suit whole sequences and a small model on a CPU."""

    loss_on: LossOn | None = None
    """"sequences": every title of whole sequences (style "history" alone). "answer": the next title of prepared rows.
    "titles": every title of a row's prompt that an answer continues (not in the style "candidates"). null: "sequences"
    in the style "history", "answer" in the others."""
    normalise: Normalise | None = None
    """"catalogue": of a title's next tokens only those count that go on with a title of the catalogue ("sequences"
    alone). "vocabulary": a softmax over all tokens. null: "catalogue" where it can be."""
    distill: Annotated[float, Range(0, 1)] = 0.0
    """Share of each target that the run's SASRec has, with its probabilities over the catalogue (knowledge
    distillation). The title that followed has the rest, with 0 all. Needs normalise "catalogue"."""
    history: Annotated[int, Range(1)] = 20
    """For "sequences": so many titles are shown at evaluation and recommendation; else as many as the data's rows."""
    window: Annotated[int, Range(2)] = 40
    """For "sequences": titles of a window."""
    min_history: Annotated[int, Range(0)] = 0
    """For "titles": the first so many titles of a window are no targets."""
    examples: Annotated[int | None, Range(1)] = None
    """At most so many windows or rows, drawn at random; null: all."""
    tokens: Annotated[int | None, Range(1)] = None
    """For "sequences": train on windows of so many tokens together, in place of epochs; null: as epochs says."""
    epochs: Annotated[float, Range(above=0)] = 1.0
    """How often all examples are trained on."""
    max_minutes: Annotated[float | None, Range(above=0)] = None
    """Training ends after so many minutes, with the learning rate brought down to 0 by then; null: no bound."""
    batch_size: Annotated[int, Range(1)] = 4
    """Windows or rows in a step, on each rank."""
    learning_rate: Annotated[float, Range(0)] = 2e-3
    """Peak rate of AdamW; a cosine brings it down to 0."""
    warmup: Annotated[float, Range(0, 1)] = 0.05
    """Share of the steps in which the rate rises."""
    max_grad_norm: Annotated[float, Range(0)] = 1.0
    """Longer gradients are shortened to it; 0: none is."""
    max_length: Annotated[int, Range(1)] = 512
    """Tokens of prompt and answer, where the oldest titles go first; or of a window, which then has fewer titles."""
    val_examples: Annotated[int, Range(0)] = 32
    """So many windows or rows of validation users are drawn for the validation loss."""
    val_lists: Annotated[int, Range(0)] = 0
    """So many of the validation rows' lists are ranked at each evaluation as well, for the log."""
    evaluations: Annotated[int, Range(1)] = 4
    """Of the validation loss, evenly spread over the steps."""
    patience: Annotated[int, Range(1)] = 2
    """Evaluations without improvement after which training stops."""
    dtype: DType = "auto"
    """What matmuls compute in."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """The adapter, where a fresh one begins."""

    def __post_init__(self) -> None:
        check(self)

    def loss_in(self, style: PromptStyle) -> LossOn:
        """What is trained on in this style; ValueError where it cannot be."""
        chosen = self.loss_on or ("sequences" if style == "history" else "answer")
        if chosen == "sequences" and style != "history":
            raise ValueError(f"loss_on: 'sequences' needs the style history, got style {style!r}; use 'answer'")
        if chosen == "titles" and not continues(style):
            raise ValueError(
                f"loss_on: 'titles' needs a style that answers continue, got style {style!r}; use 'answer'"
            )
        if self.normalise == "catalogue" and chosen != "sequences":
            raise ValueError(f"normalise: 'catalogue' needs loss_on 'sequences', got {chosen!r}; use 'vocabulary'")
        if self.distill and (chosen != "sequences" or self.normalise == "vocabulary"):
            raise ValueError(
                f"distill: {self.distill:g} needs loss_on 'sequences' and normalise 'catalogue', got {chosen!r} and "
                f"{self.normalise or 'vocabulary'!r}; set distill=0"
            )
        if self.tokens is not None and chosen != "sequences":
            raise ValueError(f"tokens: needs loss_on 'sequences', got {chosen!r}; use epochs or examples")
        return chosen

    def without_effect(self, style: PromptStyle, init_from: str | None) -> str | None:
        """What to say of options that were changed and change nothing."""
        loss_on, plain = self.loss_in(style), SFTOptions()
        needs = {"history": "sequences", "window": "sequences", "min_history": "titles"}
        lines = [
            f"{name}: {getattr(self, name)} has no effect with loss_on {loss_on!r}, but with {needed!r}"
            for name, needed in needs.items()
            if needed != loss_on and getattr(self, name) != getattr(plain, name)
        ]
        if self.tokens is not None and self.epochs != plain.epochs:
            lines.append(f"epochs: {self.epochs:g} has no effect with tokens")
        if init_from is not None and self.lora != plain.lora:
            lines.append(f"lora: has no effect with --init-from, the adapter of {init_from} is trained on as it is")
        return "; ".join(lines) or None

    def prompt_settings(self, style: PromptStyle, row_history: int) -> PromptSettings:
        """Those of a model that is trained so. ``row_history``: titles that the prompts of prepared rows show."""
        if self.loss_in(style) != "sequences":
            return PromptSettings(style=style, history=row_history)
        return PromptSettings(style=style, history=self.history, normalise=self.normalise or "catalogue")


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """What to train on and how. The numbers of the objective that are null are its own (``napo.objectives``)."""

    users: Annotated[int | None, Range(1)] = None
    """At most so many training rows (windows, with prefixes), drawn at random; null: all."""
    tokens: Annotated[int | None, Range(1)] = None
    """With windows of whole sequences: windows of so many tokens together, negatives not counted; null: all."""
    count_negatives: bool = False
    """Negatives' tokens count among tokens as well, with those that exact adds."""
    prefixes: bool | None = None
    """Train on every title of a window from its min_history-th on, not on its last one alone: the prompts are
    beginnings of one another, so a window's preferences cost one prompt (not in the style "candidates"). null: in the
    style "history", where windows are whole sequences cut up."""
    window: Annotated[int | None, Range(2)] = None
    """In the style "history": windows of so many titles tile whole sequences. null: of 20 where prefixes is null; where
    prefixes is true, windows are the prepared rows."""
    min_history: Annotated[int, Range(0)] = 1
    """With prefixes: so many titles are shown by the shortest prompt of a window."""
    negatives: Annotated[int, Range(1)] = 4
    """Rejected titles a row, drawn from the items that the user never met."""
    negatives_from: NegativesFrom = "uniform"
    """How negatives are drawn: "uniform"; "popularity", in proportion to the interactions of training users; "sasrec",
    uniformly from the negatives_best items that SASRec scores highest; "mixed", half from sasrec and the rest uniform.
    In styles that show candidates the negatives are those of the list."""
    negatives_best: Annotated[int, Range(1)] = 100
    """Of so many items are the negatives "sasrec" and "mixed"."""
    epochs: Annotated[float, Range(above=0)] = 1.0
    """How often all rows are trained on."""
    max_minutes: Annotated[float | None, Range(above=0)] = None
    """Training ends after so many minutes, with the learning rate brought down to 0 by then; null: no bound."""
    batch_size: Annotated[int | None, Range(1)] = None
    """Users, or windows, in a micro-batch, on each rank; null: 4 windows, or 8 users."""
    accumulation: Annotated[int, Range(1)] = 1
    """Micro-batches in an optimiser step."""
    pool: PoolOf = "accumulated"
    """Users share negatives within a micro-batch, or within all of an optimiser step."""
    learning_rate: Annotated[float, Range(0)] = 5e-5
    """Peak rate of AdamW; a cosine brings it down to 0."""
    warmup: Annotated[float, Range(0, 1)] = 0.05
    """Share of the steps in which the rate rises."""
    max_grad_norm: Annotated[float, Range(0)] = 1.0
    """Longer gradients are shortened to it; 0: none is."""
    max_length: Annotated[int, Range(1)] = 512
    """Tokens of prompt and longest title; the oldest titles go first."""
    beta: Annotated[float | None, Range(above=0)] = None
    """Reward per unit of log-probability; null: the objective's own."""
    gamma: float | None = None
    """Margin between chosen and rejected, or its base value where it is dynamic; null: the objective's own."""
    alpha: float | None = None
    """How strongly the margin follows SASRec's scores, 0 for a constant margin; null: the objective's own."""
    rho: Annotated[float | None, Range(0, 1)] = None
    """Share of the pool's users that negatives are borrowed from, 0 for none; null: the objective's own."""
    neighbours: Neighbours = "similar"
    """Whom users borrow from: those with the most similar states of SASRec, or any."""
    exact: bool = False
    """Score borrowed titles behind the borrower's own prompt, which computes each of them anew."""
    shared_gradient: bool = True
    """Let gradient flow through borrowed negatives."""
    authors_compat: bool = False
    """NAPO as its authors released it, where no negative has a gradient."""
    average: bool | None = None
    """The mean of a title's token log-probabilities in place of their sum; null: the objective's own."""
    sft_weight: Annotated[float, Range(0)] = 0.0
    """Weight of the chosen title's negative log-likelihood per token, beside the preference loss."""
    granularity: Granularity = "negative"
    """What the dynamic margin is computed for."""
    dtype: DType = "auto"
    """What matmuls compute in."""

    def __post_init__(self) -> None:
        check(self)
        if self.negatives_from in ("sasrec", "mixed") and self.negatives_best < self.negatives:
            raise ValueError(
                f"negatives_best: expected at least negatives ({self.negatives}), got {self.negatives_best}"
            )
        if self.neighbours == "random" and self.granularity == "pair":
            raise ValueError("neighbours: 'random' leaves no states for granularity 'pair'; use 'negative'")
        if self.count_negatives and self.tokens is None:
            raise ValueError("count_negatives: needs tokens, got none; set tokens")
        if self.window is not None and self.prefixes is False:
            raise ValueError(f"window: {self.window} needs prefixes, got prefixes off; set prefixes=true")
        if self.tokens is not None and self.window is None and self.prefixes is not None:
            raise ValueError("tokens: needs windows of whole sequences, got prepared rows; leave out prefixes")

    def in_style(self, style: PromptStyle) -> PreferenceOptions:
        """The same with what is null and depends on the style decided; ValueError where it cannot be."""
        if self.prefixes and not continues(style):
            raise ValueError(f"prefixes: needs a style that answers continue, got style {style!r}; leave it off")
        if self.window is not None and style != "history":
            raise ValueError(f"window: needs the style history, got style {style!r}; leave it out")
        if self.tokens is not None and style != "history":
            raise ValueError(f"tokens: needs the style history, got style {style!r}; use users")
        prefixes, window = self.prefixes, self.window
        if prefixes is None:
            prefixes = style == "history"
            window = (window or WINDOW) if prefixes else None
        size = (WINDOWS if prefixes else USERS) if self.batch_size is None else self.batch_size
        return replace(self, prefixes=prefixes, window=window, batch_size=size)
