"""The preference objectives as data. The command line reads their names, so nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A member of the family: how rewards are made and compared, and the defaults of its numbers.

    The reward is r = beta * s, or beta * (s - s_ref) with a reference; s is the sum of token log-probabilities, with
    ``average`` their mean. ``form`` says what the chosen reward is compared with: ``"softmax"`` the log-sum-exp of the
    negatives' rewards, ``"pairs"`` each negative on its own (the mean of the pairwise losses), ``"mean"`` their mean.
    ``boundary`` leaves of the negatives those near what the model takes for the chosen answer, each with a beta of its
    own (``napo.trainer.boundary``).
    """

    name: str
    form: Literal["softmax", "pairs", "mean"]
    reference: bool = False
    average: bool = False
    boundary: bool = False
    beta: float = 1.0
    gamma: float = 0.0  # margin
    alpha: float = 0.0  # how strongly the margin follows the recommender's confidence
    rho: float = 0.0  # share of the pool that negatives are borrowed from


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective(name="napo", form="softmax", gamma=1.0, alpha=0.3, rho=0.7),
        Objective(name="softmax", form="softmax"),
        Objective(name="sdpo", form="softmax", reference=True),
        Objective(name="dpo", form="pairs", reference=True, beta=0.1),
        Objective(name="simpo", form="pairs", average=True, beta=2.0, gamma=1.0),
        Objective(name="dmpo", form="mean", reference=True),
        Objective(name="dynamicpo", form="mean", reference=True, boundary=True),
    )
}
