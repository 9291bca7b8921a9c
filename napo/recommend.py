"""Recommendations for one history of titles: SASRec retrieves, the language model ranks, alone or with SASRec."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from napo.data.prepared import PreparedData
from napo.recommenders.protocol import ScoringOptions
from napo.recommenders.registry import available, best_combination, find
from napo.runs import Run

PREFERRED = ("napo", "sft")
RETRIEVER = "sasrec"
"""Proposes what is ranked: it scores the whole catalogue at once."""


@dataclass(frozen=True)
class Recommendation:
    item: int
    title: str
    score: float
    """Log-probability of the title, SASRec's score, or the weighted sum of both."""


def find_titles(titles: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Item ids of titles as people type them: case does not matter, and the start of one title is enough."""
    folded = [title.casefold() for title in titles]
    exact = {title: item for item, title in reversed(list(enumerate(folded)))}
    found = []
    for text in wanted:
        key = text.strip().casefold()
        if key in exact:
            found.append(exact[key])
            continue
        starts = [item for item, title in enumerate(folded) if key and title.startswith(key)]
        if len(starts) == 1:
            found.append(starts[0])
            continue
        near = [titles[item] for item in starts[:5]]
        near = near or [titles[exact[title]] for title in difflib.get_close_matches(key, folded, n=3, cutoff=0.6)]
        hint = f"did you mean {' or '.join(repr(title) for title in near)}?" if near else "see items.parquet of the run"
        raise ValueError(f"history: expected a title of the catalogue; got {text!r}; {hint}")
    return found


def recommend(
    run: Run,
    history: Sequence[str],
    *,
    top: int = 10,
    model: str | None = None,
    retrieve: int = 100,
    data: PreparedData | None = None,
) -> list[Recommendation]:
    """The ``top`` titles to follow ``history`` (oldest first), by the run's ``model``. None: the best
    combination with SASRec that won on validation lists (``napo combine``); without one ``napo``, else the newest.

    SASRec proposes ``retrieve`` items that are not in the history, the model ranks them; in the styles with candidates
    the prompt has room for 20.
    """
    kept = run.catalogue()
    titles = kept.titles
    items = find_titles(titles, history)
    if not items:
        raise ValueError("history: expected at least one title; got none")
    if top < 1:
        raise ValueError(f"top: expected at least 1; got {top}")
    offered = [RETRIEVER, *run.model_names(), *(name for name in available(run) if "+" in name)]
    alone = [name for name in offered if "+" not in name]
    name = model or best_combination(run) or next((name for name in PREFERRED if name in alone), alone[-1])
    if name not in offered:
        raise ValueError(f"model: {run.path} has no {name!r}; it has {', '.join(offered)}")
    data = data or kept
    ranker = find(run, name).load(run, data, ScoringOptions())
    pool = ranker.most_items or max(top, retrieve)
    proposed = _retrieve(run, data, items, len(titles), pool)
    scores = _checked(name, ranker.scores([items], proposed[None])[0])
    order = np.argsort(-scores, kind="stable")[:top]
    return [Recommendation(int(proposed[i]), titles[proposed[i]], float(scores[i])) for i in order]


def _retrieve(run: Run, data: PreparedData, items: list[int], num_items: int, pool: int) -> np.ndarray:
    """The retriever's best ``pool`` items outside the history, best first."""
    if RETRIEVER not in available(run):
        raise ValueError(f"run: {run.path} has no sasrec, which retrieves what is ranked; run `napo sasrec` first")
    rest = np.setdiff1d(np.arange(num_items), items)
    scores = find(run, RETRIEVER).load(run, data, ScoringOptions()).scores([items], rest[None])[0]
    scores = _checked(RETRIEVER, scores)
    return rest[np.argsort(-scores, kind="stable")[:pool]]


def _checked(name: str, scores: np.ndarray) -> np.ndarray:
    """NaN has no place in an order, and would be sorted last without a word."""
    if np.isnan(scores).any():
        raise ValueError(f"model: {name} gives {int(np.isnan(scores).sum())} of {len(scores)} titles the score NaN")
    return scores
