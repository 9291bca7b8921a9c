"""Fits a combination of recommenders, only on rows of validation users."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napo.data.candidates import seeded_list
from napo.data.prepared import PreparedData
from napo.evaluation import metrics
from napo.files import text_hash
from napo.recommenders.combination import CONTROL, Fitted, combined_name, comparable, parts_of
from napo.recommenders.protocol import ScoringOptions
from napo.recommenders.registry import find
from napo.runs import Run

FOLDS = 5
PER_USER = 5
RIDGE = 1.0
"""A pull of the weights to 0, as weak as one row in a list of hundreds: lists that they separate keep them finite."""


@dataclass(frozen=True)
class ValidationLists:
    """n lists of C candidates, the right one among them."""

    users: NDArray[np.int64]  # (n,)
    histories: list[NDArray[np.int64]]
    candidates: NDArray[np.int64]  # (n, C)
    columns: NDArray[np.int64]  # (n,) where the right item stands

    @classmethod
    def of(cls, data: PreparedData, per_user: int = PER_USER) -> ValidationLists:
        """The last titles of each validation sequence that nothing was trained on, each among items that the user had
        not met, drawn by the rule of the prepared lists."""
        if not len(data.val):
            raise ValueError(f"data: {data.path} has no validation rows to fit weights on; prepare it with val_users")
        count, seed = len(data.val["candidates"].iloc[0]), int(data.meta["options"].get("seed", 0))
        sequences, first_targets = data.validation_sequences()
        users, histories, lists = [], [], []
        for user, (sequence, first) in enumerate(zip(sequences, first_targets, strict=True)):
            for place in range(max(first, len(sequence) - per_user), len(sequence)):
                users.append(user)
                histories.append(sequence[:place])
                lists.append(seeded_list(sequence[:place], int(sequence[place]), data.num_items, count, seed))
        candidates = np.array(lists, np.int64)
        targets = np.array([sequences[u][len(h)] for u, h in zip(users, histories, strict=True)], np.int64)
        return cls(np.array(users, np.int64), histories, candidates, (candidates == targets[:, None]).argmax(1))


def fit_combination(run: Run, data: PreparedData, model: str) -> Fitted:
    """The run's ``model`` with SASRec, sequential rules and popularity, or "sasrec" with the latter two only.

    Its quality is measured with weights that were fitted to other users, and so is that of the control, which has no
    language model.
    """
    lists = ValidationLists.of(data)
    name, parts = combined_name(model), parts_of(model)
    kinds = {part: find(run, part) for part in parts}
    raw = []
    for part, kind in kinds.items():
        raw.append(comparable(part, kind.load(run, data, ScoringOptions()).scores(lists.histories, lists.candidates)))
    scores = np.stack(raw, -1)  # (n, C, P)
    deviations = np.maximum((scores - scores.mean(1, keepdims=True)).std((0, 1)), 1e-12)
    scaled = scores / deviations
    weights = fit_weights(scaled, lists.columns)
    control = [part in parts_of("sasrec") for part in parts]
    validation = {part: scores[..., index] for index, part in enumerate(parts)} | {
        CONTROL: cross_validated(scaled[..., control], lists.columns, lists.users),
        name: cross_validated(scaled, lists.columns, lists.users),
    }
    text = json.dumps([lists.candidates.tolist(), lists.columns.tolist()])
    return Fitted(
        parts={
            part: {"weight": float(w), "deviation": float(d), "fingerprint": kinds[part].fingerprint(run)}
            for part, w, d in zip(parts, weights, deviations, strict=True)
        },
        validation={which: _quality(of, lists.columns) for which, of in validation.items()},
        lists={
            "rows": f"{len(lists.columns)} rows of {len(set(lists.users.tolist()))} validation users",
            "sha256": text_hash(text),
        },
    )


def fit_weights(scores: NDArray[np.float64], columns: NDArray[np.int64], ridge: float = RIDGE) -> NDArray[np.float64]:
    """(n, C, P) scores, (n,) column of the right item -> (P,) weights of greatest likelihood, where a list's choice is
    a softmax over its weighted scores. The likelihood has one peak; Newton's steps are halved where they overshoot."""
    right = np.take_along_axis(scores, columns[:, None, None], 1)  # (n, 1, P)
    away = scores - right  # (n, C, P)

    def loss(w: NDArray[np.float64]) -> float:
        z = away @ w
        top = z.max(1)
        return float((top + np.log(np.exp(z - top[:, None]).sum(1))).sum() + ridge / 2 * w @ w)

    weights = np.zeros(scores.shape[-1])
    for _ in range(100):
        z = away @ weights
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)  # (n, C)
        mean = np.einsum("nc,ncp->np", p, away)
        gradient = mean.sum(0) + ridge * weights
        hessian = np.einsum("nc,ncp,ncq->pq", p, away, away) - mean.T @ mean + ridge * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        before = loss(weights)
        while loss(weights - step) > before and np.abs(step).max() > 1e-12:
            step /= 2
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            break
    return weights


def cross_validated(
    scores: NDArray[np.float64], columns: NDArray[np.int64], users: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(n, C) combined scores, each user's with weights that were fitted to the users of the other folds."""
    _, codes = np.unique(users, return_inverse=True)
    fold = np.random.default_rng(0).permutation(codes.max() + 1)[codes] % FOLDS
    combined = np.empty(scores.shape[:2])
    for number in range(FOLDS):
        mine = fold == number
        combined[mine] = scores[mine] @ fit_weights(scores[~mine], columns[~mine])
    return combined


def _quality(scores: NDArray[np.float64], columns: NDArray[np.int64]) -> dict[str, float]:
    figures = metrics.ranking_figures(metrics.target_ranks(scores, columns))
    return {name: figures[name] for name in ("hr@1", "mrr")}


def summary(fitted: Fitted) -> list[str]:
    """A few lines for a terminal."""
    rows: Any = fitted.validation.items()
    lines = [f"{part:<20} HR@1 {of['hr@1']:.3f}  MRR {of['mrr']:.3f}" for part, of in rows]
    weights = ", ".join(f"{part} {of['weight']:.3f}" for part, of in fitted.parts.items())
    return [f"on {fitted.lists['rows']}; the combination with weights of other users:", *lines, f"weights: {weights}"]
