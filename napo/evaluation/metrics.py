"""Ranking, popularity and diversity figures, and intervals that resample users. NumPy only; n rows, C candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
DRAWS = 5000
TIES = "a tie with the right item counts as a miss"
"""The rule of ``target_ranks`` and ``best_choices``, for records."""
HEAD = 0.2
"""The share of the catalogue, most popular first, that is not the tail."""


def target_ranks(
    scores: NDArray[np.float64], target: NDArray[np.int64], among: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """(n, C) scores, (n,) column of the right item -> (n,) its rank, 1 the best. A tie with the right item counts as a
    miss: who gives all items one score is right about none.

    ``among`` (n, C): which columns are ranked; None: all. Where the right item is not ranked its rank is C + 1.
    """
    scores = np.asarray(scores, np.float64)
    rows = np.arange(len(scores))
    ranked = np.ones(scores.shape, bool) if among is None else among
    own, is_ranked = scores[rows, target], ranked[rows, target]
    wrong = np.flatnonzero(is_ranked & ~np.isfinite(own))
    if len(wrong):
        raise ValueError(f"scores: the right item's score is not finite: {own[wrong[0]]} in row {wrong[0]}")
    _check_numbers(scores, ranked)
    # The right item itself is one of those whose score is as high.
    return np.where(is_ranked, ((scores >= own[:, None]) & ranked).sum(1), scores.shape[1] + 1)


def best_choices(
    scores: NDArray[np.float64],
    target: NDArray[np.int64],
    depth: int,
    *,
    among: NDArray[np.bool_] | None = None,
    order: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """(n, depth) the columns with the best scores, the best first; -1 where there are no more.

    By the rule of ``target_ranks``: of equal scores the right item comes last, so that it stands at its rank. The
    others come by their place in ``order`` (C,), which says nothing of the items; None: as they are listed.
    """
    ranked = np.ones(scores.shape, bool) if among is None else among
    _check_numbers(scores, ranked)
    values = np.where(ranked, scores, -np.inf)
    place = np.arange(scores.shape[1]) if order is None else order
    found = np.full((len(values), depth), -1, np.int64)
    depth = min(depth, scores.shape[1])
    bounds = -np.partition(-values, depth - 1, axis=1)[:, depth - 1]
    for row, own in enumerate(target):
        columns = np.flatnonzero((values[row] >= bounds[row]) & ranked[row])
        best = columns[np.lexsort((place[columns], columns == own, -values[row, columns]))[:depth]]
        found[row, : len(best)] = best
    return found


def _check_numbers(scores: NDArray[np.float64], ranked: NDArray[np.bool_]) -> None:
    wrong = np.argwhere(np.isnan(scores) & ranked)
    if len(wrong):
        raise ValueError(f"scores: expected numbers, got NaN in row {wrong[0][0]}, candidate {wrong[0][1]}")


def unmet_items(
    histories: Sequence[Sequence[int] | NDArray[np.int64]], target: NDArray[np.int64], num_items: int
) -> NDArray[np.bool_]:
    """(n, num_items) which items a user has not met. The right item is one of them, also where it was met."""
    unmet = np.ones((len(target), num_items), bool)
    for row, history in enumerate(histories):
        unmet[row, np.asarray(history, np.int64)] = False
    unmet[np.arange(len(target)), target] = True
    return unmet


def ranking_figures(ranks: NDArray[np.int64]) -> dict[str, float]:
    """hr@1, mrr, ndcg@5, ndcg@10 of one relevant item a row."""
    return {
        "hr@1": float((ranks == 1).mean()),
        "mrr": float((1.0 / ranks).mean()),
        "ndcg@5": float(gains(ranks, 5).mean()),
        "ndcg@10": float(gains(ranks, 10).mean()),
    }


def gains(ranks: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """(n,) DCG@k of one relevant item a row, which is NDCG@k: the ideal is 1."""
    return np.where(ranks <= k, 1 / np.log2(ranks + 1.0), 0.0)


def cutoff_figures(ranks: NDArray[np.int64], cutoffs: Sequence[int]) -> dict[str, float]:
    """hr, recall, ndcg and mrr at each cutoff, of one relevant item a row; ranks beyond the cutoff count 0."""
    figures: dict[str, float] = {}
    for k in cutoffs:
        hits = float((ranks <= k).mean())
        figures |= {f"hr@{k}": hits, f"recall@{k}": hits, f"ndcg@{k}": float(gains(ranks, k).mean())}
        figures[f"mrr@{k}"] = float(np.where(ranks <= k, 1.0 / ranks, 0.0).mean())
    return figures


def limited_rows(count: int, limit: int | None) -> NDArray[np.int64]:
    """``limit`` of ``count`` rows, the same ones for every model, run and seed; None takes all."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, limit, replace=False))


def user_groups(user_ids: Array | list) -> NDArray[np.int64]:
    """(n,) codes of the users; rows whose user is not known are users of their own."""
    import pandas as pd

    codes, unique = pd.factorize(np.asarray(user_ids, dtype=object), use_na_sentinel=True)
    unknown = codes < 0
    codes = codes.astype(np.int64)
    codes[unknown] = len(unique) + np.arange(unknown.sum())
    return codes


def interval(
    values: NDArray[np.float64], groups: NDArray[np.int64], *, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of (n,) values, resampling users with all their rows (bootstrap)."""
    low, high = intervals(values[:, None], groups, seed=seed, level=level)[0]
    return float(low), float(high)


def intervals(
    values: NDArray[np.float64], groups: NDArray[np.int64], *, seed: int = 0, level: float = 0.95
) -> NDArray[np.float64]:
    """(n, P) values -> (P, 2), the intervals of the means of its columns, all from the same draws of users."""
    _, groups = np.unique(groups, return_inverse=True)
    counts = np.bincount(groups)
    users = len(counts)
    sums = np.zeros((users, values.shape[1]))
    np.add.at(sums, groups, values)
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, DRAWS, block := max(1, 2**23 // users)):  # 64 MiB of draws at a time
        size = min(block, DRAWS - start)
        draws = random.multinomial(users, np.full(users, 1 / users), size=size).astype(np.float64)  # (size, users)
        means.append((draws @ sums) / (draws @ counts)[:, None])
    return np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2], axis=0).T


def per_user_mean(values: NDArray[np.float64], groups: NDArray[np.int64]) -> float:
    """Every user counts once, however many rows it has."""
    _, groups = np.unique(groups, return_inverse=True)
    return float((np.bincount(groups, values) / np.bincount(groups)).mean())


def gini(counts: Array) -> float:
    """0: every item is recommended equally often; towards 1: always the same one."""
    ordered = np.sort(np.asarray(counts, dtype=np.float64))
    if ordered.sum() == 0:
        return 0.0
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))


def popularity_figures(
    recommended: NDArray[np.int64], histories: list[list[int]], popularity: NDArray[np.int64]
) -> dict[str, float]:
    """Bias and diversity of one recommended item a row; ``popularity`` (items,) counts training interactions."""
    counts = np.bincount(recommended, minlength=len(popularity))
    ranked = np.argsort(-popularity, kind="stable")
    tail = np.ones(len(popularity), dtype=bool)
    tail[ranked[: int(np.ceil(HEAD * len(popularity)))]] = False
    logs = np.log1p(popularity)
    own = np.array([logs[history].mean() if len(history) else np.nan for history in histories])
    return {
        "arp": float(popularity[recommended].mean()),
        "log_popularity_gap": float(np.nanmean(logs[recommended] - own)),
        "gini": gini(counts),
        "coverage": float((counts > 0).mean()),
        "tail_share": float(tail[recommended].mean()),
        "top3_share": float(np.sort(counts)[-3:].sum() / len(recommended)),
        "unique_ratio": float((counts > 0).sum() / len(recommended)),
    }


def popularity_buckets(items: NDArray[np.int64], popularity: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) 0, 1 or 2 for head, middle, tail: each holds a third of the training interactions."""
    ranked = np.argsort(-popularity, kind="stable")
    mass = np.cumsum(popularity[ranked]) - popularity[ranked]  # interactions of more popular items
    bucket = np.empty(len(popularity), dtype=np.int64)
    bucket[ranked] = np.minimum(3 * mass // max(int(popularity.sum()), 1), 2)
    return bucket[items]


BUCKETS = ("head", "middle", "tail")


def hits_by_popularity(
    ranks: NDArray[np.int64], targets: NDArray[np.int64], popularity: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """hr@1 by how popular the right item is."""
    buckets = popularity_buckets(targets, popularity)
    return {
        name: {"n": int((buckets == code).sum()), "hr@1": float((ranks[buckets == code] == 1).mean())}
        for code, name in enumerate(BUCKETS)
        if (buckets == code).any()
    }
