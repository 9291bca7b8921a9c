"""A language model, SASRec, sequential rules and popularity together: a linear combination of their scores.

Rules and popularity enter as the logarithm of their counts. Each part's scores are divided by their deviation within
the validation lists, and the weights are those that fit these lists best (``napo.evaluation.combine``). No mean is
taken off: the same number on all items of a user changes no ranking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napo.files import read_json
from napo.recommenders.protocol import Histories, Recommender, Shortening

FOLDER = "combinations"
LARGEST = 1e9
"""No weight and no deviation of scores is as large."""
COUNTED = ("rules", "popularity")
"""The parts whose scores are counts, of rules weighted ones."""
CONTROL = "sasrec+rules"
"""The combination without a language model, which one with it has to beat."""
FORMER_CONTROL = "sasrec+popularity"
"""That of an older napo, which had no rules."""


def combined_name(model: str) -> str:
    """The name of the combination of ``model``: a language model of the run, or "sasrec" for the control."""
    return CONTROL if model == "sasrec" else f"{model}+sasrec"


def parts_of(model: str) -> tuple[str, ...]:
    """The recommenders in the combination of ``model``."""
    return tuple(dict.fromkeys((model, "sasrec", *COUNTED)))


def comparable(name: str, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of the part ``name`` on the scale on which they are added: counts become logarithms."""
    return np.log1p(scores) if name in COUNTED else scores


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """``RUN/combinations/NAME.json``: what was fitted, to what, and what it was worth on the validation lists."""

    parts: dict[str, dict[str, Any]]  # of each part its weight, deviation and fingerprint
    validation: dict[str, dict[str, float]]
    """hr@1 and mrr of the parts, of the combination and of the control, these with weights of other users."""
    lists: dict[str, Any]

    @classmethod
    def read(cls, run_dir: Path, name: str) -> Fitted:
        path = run_dir / FOLDER / f"{name}.json"
        found = read_json(path)
        parts = parts_of(name.split("+")[0])
        try:
            fitted = cls(**found)
            numbers = [part[key] for part in fitted.parts.values() for key in ("weight", "deviation")]
            numbers += [of[key] for of in fitted.validation.values() for key in ("hr@1", "mrr")]
            whole = all(type(n) in (int, float) and abs(n) < LARGEST for n in numbers)  # NaN is not
            whole = whole and all(part["deviation"] > 0 for part in fitted.parts.values())
            whole = whole and tuple(fitted.parts) == parts and fitted.validation.keys() <= {*parts, CONTROL, name}
            whole = whole and name in fitted.validation
            whole = whole and all(type(part["fingerprint"]) is str for part in fitted.parts.values())
            whole = whole and type(fitted.lists["rows"]) is str
        except (TypeError, KeyError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{path}: not a combination that this napo fitted")
        return fitted


class Combination:
    """The sum of its parts' weighted scores."""

    def __init__(self, fitted: Fitted, parts: Mapping[str, Recommender]) -> None:
        self.fitted, self.parts = fitted, dict(parts)

    @property
    def protocol(self) -> dict[str, str]:
        weighted = " + ".join(f"{part['weight']:.3f} {name}" for name, part in self.fitted.parts.items())
        return {"score": f"{weighted}, each divided by its deviation; weights fitted on {self.fitted.lists['rows']}"}

    @property
    def most_items(self) -> int | None:
        limits = [part.most_items for part in self.parts.values() if part.most_items is not None]
        return min(limits, default=None)

    def left_out(self, history: Sequence[int], item_ids: Sequence[int]) -> str:
        found = (part.left_out(history, item_ids) for part in self.parts.values() if isinstance(part, Shortening))
        return next(filter(None, found), "")

    def combine(self, scores: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """The (n, C) scores of every part -> (n, C)."""
        parts = self.fitted.parts
        total = sum(comparable(name, scores[name]) * (of["weight"] / of["deviation"]) for name, of in parts.items())
        return np.asarray(total, np.float64)

    def scores(self, histories: Histories, item_ids: Any) -> NDArray[np.float64]:
        return self.combine({name: part.scores(histories, item_ids) for name, part in self.parts.items()})
