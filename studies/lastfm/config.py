"""What the study trains and how much of it: all that is chosen is in this file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from napo.assets import SMOLLM2


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Where a data set comes from. ``source``: a reader of ``napo prepare``."""

    source: str
    prepare: Mapping[str, Any] = field(default_factory=dict)
    asset: bool = False
    """The package index has it; the others are brought along."""


DATASETS = {
    "lastfm": Dataset(source="llara"),
    "steam": Dataset(source="llara"),
    "ml-100k": Dataset(source="recbole", prepare={"test_users": 400, "val_users": 100, "rows_per_user": 3}, asset=True),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything."""

    budget: int = 500_000
    """Tokens of SFT. An epoch of LastFM has about 250,000."""
    trial: int | None = None
    """Tokens that each preference trial computes, negatives included, and SFT continued; None: 3/20 of the budget."""
    val_lists: int | None = 800
    """Validation lists on which every model is judged; None: all."""
    test_lists: int | None = None
    """Test lists; None: all."""
    catalogue_rows: int = 0
    """Test rows for which the whole catalogue is ranked as well; 0: none."""
    inside_batches: int = 8
    """Micro-batches whose gradients are taken apart."""
    protocol_a: bool = False
    """SFT with the candidates in the prompt as well, judged by greedy answers: the protocol of the paper."""
    model: str = SMOLLM2
    sasrec: Mapping[str, Any] = field(default_factory=dict)
    sft: Mapping[str, Any] = field(
        default_factory=lambda: {"val_examples": 64, "val_lists": 200, "evaluations": 6, "patience": 3}
    )
    preferences: Mapping[str, Any] = field(
        default_factory=lambda: {
            "prefixes": True,
            "window": 40,
            "min_history": 1,
            "batch_size": 2,
            "negatives": 4,
            "negatives_from": "sasrec",
            "learning_rate": 2e-4,
            "sft_weight": 0.5,
            "count_negatives": True,
        }
    )
    """Of every trial, where the trial does not say otherwise. Two windows of 40 titles are 78 users at most: the
    demo's batch of four windows of 20."""

    @property
    def trial_tokens(self) -> int:
        return self.budget * 3 // 20 if self.trial is None else self.trial

    def sft_options(self, **more: Any) -> dict[str, Any]:
        return {**self.sft, "tokens": self.budget, **more}

    def preference_options(self, trial: Trial) -> dict[str, Any]:
        return {**self.preferences, "tokens": self.trial_tokens, **trial.options}


SFT, CONTROL, CANDIDATES = "sft", "sft-longer", "sft-candidates"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training from the SFT checkpoint. ``part``: "main" is judged on test lists too, and so is "repeat", the main
    part again; "more" is judged on validation lists alone, which choose what "best" is."""

    name: str
    objective: str = "napo"
    """One of the toolkit's, or "sft": SFT continued."""
    options: Mapping[str, Any] = field(default_factory=dict)
    part: Literal["main", "repeat", "more"] = "more"
    asks: str = ""
    seed: int | None = None
    """None: the seed of the run."""


CONTINUED = Trial(name=CONTROL, objective="sft", part="main", asks="SFT continued for as many tokens")
REPEATS = (1, 2)
"""Seeds with which the main trials and the control are trained again, from the same SFT checkpoint."""


def repeat(trial: Trial, seed: int) -> Trial:
    """What is judged on validation lists alone is so again."""
    part: Literal["repeat", "more"] = "repeat" if trial.part == "main" else "more"
    return replace(trial, name=f"{trial.name}-seed{seed}", part=part, seed=seed, asks=f"{trial.name} again")


def repeated(name: str) -> str:
    """The trial that ``name`` is a repeat of, or ``name`` itself."""
    return re.sub(r"-seed\d+$", "", name)


def _rate(name: str, rate: float) -> list[Trial]:
    """Other rates for the objectives that are compared and for the control, as many for each."""
    return [
        Trial(
            name=f"{trained}-{name}",
            objective=objective,
            options={"learning_rate": rate},
            asks=f"learning rate {rate:g}",
        )
        for trained, objective in (
            *((objective, objective) for objective in ("napo", "sdpo", "simpo", "softmax")),
            (CONTROL, "sft"),
        )
    ]


def _step(micro: int, accumulation: int, pool: str = "batch") -> dict[str, Any]:
    """A step of 16 windows, whatever the pool."""
    return {"batch_size": micro, "accumulation": accumulation, "pool": pool, "learning_rate": 5e-4}


# By importance: a budget that ends early has answered the first questions.
MAIN: tuple[Trial, ...] = (
    Trial(name="napo", part="main", asks="the toolkit's default"),
    Trial(name="simpo", objective="simpo", part="main", asks="no reference, no sharing, pairs"),
    Trial(name="sdpo", objective="sdpo", part="main", asks="a reference, no sharing, no margin"),
    Trial(name="napo-alone", options={"rho": 0.0}, part="main", asks="without sharing"),
    Trial(name="napo-marginless", options={"gamma": 0.0, "alpha": 0.0}, part="main", asks="without margin"),
    Trial(name="softmax", objective="softmax", part="main", asks="without sharing and margin"),
    Trial(
        name="napo-authors", options={"authors_compat": True}, part="main", asks="as released: no negative's gradient"
    ),
)
MORE: tuple[Trial, ...] = (
    Trial(name="dmpo", objective="dmpo", asks="the mean of the negatives"),
    Trial(name="dynamicpo", objective="dynamicpo", asks="DMPO with negatives near the boundary"),
    Trial(name="dpo", objective="dpo", asks="pairs with a reference"),
    Trial(name="napo-detached", options={"shared_gradient": False}, asks="gradient for own negatives only"),
    Trial(name="napo-constant", options={"alpha": 0.0}, asks="a constant margin"),
    *(
        Trial(name=f"napo-{of}", options={"granularity": of}, asks=f"margin by {of}")
        for of in ("batch", "user", "pair")
    ),
    Trial(name="napo-random", options={"neighbours": "random"}, asks="sharing among random users"),
    Trial(name="napo-few", options={"rho": 0.04}, asks="sharing among 3 users"),
    Trial(name="napo-exact", options={"rho": 0.04, "exact": True}, asks="the same, exact"),
    Trial(name="napo-uniform", options={"negatives_from": "uniform"}, asks="uniform negatives"),
    Trial(name="napo-popular", options={"negatives_from": "popularity"}, asks="negatives by popularity"),
    Trial(name="sdpo-uniform", objective="sdpo", options={"negatives_from": "uniform"}, asks="uniform negatives"),
    Trial(name="simpo-uniform", objective="simpo", options={"negatives_from": "uniform"}, asks="uniform negatives"),
    *(Trial(name=f"napo-n{n}", options={"negatives": n}, asks=f"{n} negatives") for n in (1, 2, 8, 19)),
    *(
        Trial(name=f"{objective}-bare", objective=objective, options={"sft_weight": 0.0}, asks="no SFT term")
        for objective in ("napo", "sdpo", "simpo")
    ),
    *_rate("slow", 5e-5),
    *_rate("fast", 5e-4),
    *_rate("faster", 1e-3),
    Trial(name="napo-pool78", options=_step(2, 8), asks="16 windows a step, pool 78"),
    Trial(name="napo-pool156", options=_step(4, 4), asks="16 windows a step, pool 156"),
    Trial(name="napo-pool624", options=_step(4, 4, "accumulated"), asks="16 windows a step, pool 624"),
    Trial(name="napo-step16", options={**_step(4, 4), "rho": 0.0}, asks="16 windows a step, no sharing"),
)
# All trials of one seed come before those of the next one: each seed is a whole comparison.
TRIALS = (*MAIN, *(repeat(trial, seed) for seed in REPEATS for trial in (CONTINUED, *MAIN)), *MORE)


def selected(names: str | None) -> tuple[Trial, ...]:
    """``names``: some of them, or repeats of some, separated by commas; None: all."""
    if names is None:
        return TRIALS
    known = {trial.name: trial for trial in TRIALS}
    for again in (repeat(trial, seed) for trial in MORE for seed in REPEATS):
        known[again.name] = again
    wanted = names.split(",")
    for name in wanted:
        if name not in known:
            raise ValueError(f"trials: no trial {name!r}; expected some of {', '.join(known)}")
    return tuple(replace(known[name]) for name in wanted)
