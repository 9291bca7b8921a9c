from __future__ import annotations

import numpy as np
import pytest

from napo.evaluation import metrics


def test_a_tie_with_the_right_item_is_a_miss() -> None:
    scores = np.array([[0.1, 0.5, 0.3], [0.2, 0.2, 0.2], [0.2, 0.2, 0.2], [-1.0, -np.inf, -2.0], [0.0, 1.0, 1.0]])
    target = np.array([2, 0, 2, 0, 0])
    assert metrics.target_ranks(scores, target).tolist() == [2, 3, 3, 1, 3]
    # What is put first is the right item where the rank says so, and nowhere else.
    assert metrics.best_choices(scores, target, 1)[:, 0].tolist() == [1, 1, 0, 0, 1]


def test_ranks_and_lists_against_sorting_with_ties() -> None:
    """The right item stands in the list of the best at its rank, behind all that have its score."""
    random = np.random.default_rng(0)
    scores = random.integers(0, 4, (40, 30)).astype(float)
    among = random.random((40, 30)) < 0.8
    target, order = random.integers(0, 30, 40), random.permutation(30)
    ranks = metrics.target_ranks(scores, target, among)
    top = metrics.best_choices(scores, target, 20, among=among, order=order)
    for row in range(40):
        best = sorted(
            np.flatnonzero(among[row]), key=lambda item: (-scores[row, item], item == target[row], order[item])
        )
        assert [item for item in top[row] if item >= 0] == best[:20]
        assert ranks[row] == (best.index(target[row]) + 1 if among[row, target[row]] else 31)


def test_items_that_are_left_out_are_not_ranked() -> None:
    scores = np.array([[5.0, 4.0, 4.0, 1.0], [5.0, 4.0, 3.0, 3.0]])
    target = np.array([3, 2])
    assert metrics.target_ranks(scores, target).tolist() == [4, 4]
    for met, ranks in (([[0, 2], []], [2, 4]), ([[3, 1, 0], [0, 0, 1, 3]], [2, 1])):
        assert metrics.target_ranks(scores, target, metrics.unmet_items(met, target, 4)).tolist() == ranks
    # What is not ranked may hold anything; a right item that is not ranked is behind all.
    scores[0, 3] = scores[1, 3] = np.nan
    among = np.array([[True, True, True, False]] * 2)
    assert metrics.target_ranks(scores, target, among).tolist() == [5, 3]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_of_the_right_item_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match=r"right item's score is not finite: .* in row 1"):
        metrics.target_ranks(np.array([[1.0, 2.0], [value, 0.0]]), np.array([0, 0]))


def test_nan_of_any_candidate_is_an_error() -> None:
    with pytest.raises(ValueError, match="NaN in row 1, candidate 2"):
        metrics.target_ranks(np.array([[1.0, 2.0, 3.0], [1.0, 0.0, np.nan]]), np.array([0, 0]))


def test_ranking_figures_by_hand() -> None:
    figures = metrics.ranking_figures(np.array([1, 2, 6, 11]))
    assert figures["hr@1"] == 0.25
    assert figures["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 6 + 1 / 11) / 4)
    assert figures["ndcg@5"] == pytest.approx((1 + 1 / np.log2(3)) / 4)
    assert figures["ndcg@10"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(7)) / 4)


def test_unknown_users_stand_alone() -> None:
    groups = metrics.user_groups([7, 7, None, 3, None])
    assert groups[0] == groups[1]
    assert len(set(groups.tolist())) == 4


def test_interval_resamples_users_not_rows() -> None:
    random = np.random.default_rng(1)
    per_user = random.integers(0, 2, 100).astype(float)
    alone = metrics.interval(per_user, np.arange(100))
    # Nine identical rows more a user tell nothing new: the interval stays, where one over rows would shrink.
    repeated = metrics.interval(np.repeat(per_user, 10), np.repeat(np.arange(100), 10))
    assert repeated == pytest.approx(alone, abs=1e-12)
    as_rows = metrics.interval(np.repeat(per_user, 10), np.arange(1000))
    assert as_rows[1] - as_rows[0] < 0.5 * (alone[1] - alone[0])


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(60):
        values = (random.random(200) < 0.3).astype(float)
        low, high = metrics.interval(values, np.arange(200))
        covered += low <= 0.3 <= high
    assert 52 <= covered <= 60


def test_gini() -> None:
    assert metrics.gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert metrics.gini(np.array([0, 0, 0, 8])) == pytest.approx(0.75)
    assert metrics.gini(np.zeros(4)) == 0


def test_popularity_figures_by_hand() -> None:
    popularity = np.array([100, 10, 1, 0, 0])
    figures = metrics.popularity_figures(np.array([0, 0, 2, 3]), [[0], [1, 1], [2], []], popularity)
    assert figures["arp"] == (100 + 100 + 1) / 4
    assert figures["coverage"] == 3 / 5
    assert figures["unique_ratio"] == 3 / 4
    assert figures["top3_share"] == 1
    assert figures["tail_share"] == 0.5  # the head is only item 0
    assert figures["log_popularity_gap"] == pytest.approx((np.log(101) - np.log(11)) / 3)


def test_hits_by_popularity() -> None:
    popularity = np.array([4, 4, 2, 1, 1])
    assert metrics.popularity_buckets(np.arange(5), popularity).tolist() == [0, 1, 2, 2, 2]
    hits = metrics.hits_by_popularity(np.array([1, 2, 1]), np.array([0, 2, 3]), popularity)
    assert hits == {"head": {"n": 1, "hr@1": 1.0}, "tail": {"n": 2, "hr@1": 0.5}}


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_ir_measures(seed: int) -> None:
    """Random lists with many ties, some lists shorter than a cutoff; a tie with the right item is a miss."""
    import ir_measures
    from ir_measures import RR, R, Success, nDCG

    random = np.random.default_rng(seed)
    width = int(random.integers(12, 40))
    scores = random.integers(0, 6, (60, width)) / 4  # ties in float32 too, which trec_eval compares
    columns = random.integers(0, width, 60)
    ranks = metrics.target_ranks(scores, columns)
    # trec_eval gives a tie to the later name.
    names = [[f"a{c}" if c == column else f"d{c}" for c in range(width)] for column in columns]
    qrels = [ir_measures.Qrel(str(row), names[row][column], 1) for row, column in enumerate(columns)]
    run = [
        ir_measures.ScoredDoc(str(row), names[row][column], float(scores[row, column]))
        for row in range(60)
        for column in range(width)
    ]
    wanted = {Success @ k: f"hr@{k}" for k in (1, 5, 10, 20)} | {R @ k: f"recall@{k}" for k in (1, 5, 10, 20)}
    wanted |= {nDCG @ k: f"ndcg@{k}" for k in (1, 5, 10, 20)} | {RR: "mrr"}
    ours = {**metrics.cutoff_figures(ranks, (1, 5, 10, 20)), "mrr": metrics.ranking_figures(ranks)["mrr"]}
    theirs = ir_measures.calc_aggregate(list(wanted), qrels, run)
    for measure, name in wanted.items():
        assert ours[name] == pytest.approx(theirs[measure], abs=1e-9), name
    ranked = {str(row): metrics.cutoff_figures(ranks[row : row + 1], (10,))["mrr@10"] for row in range(60)}
    for value in ir_measures.iter_calc([RR @ 10], qrels, run):
        tied = (scores[int(value.query_id)] == scores[int(value.query_id), columns[int(value.query_id)]]).sum() > 1
        assert tied or ranked[value.query_id] == pytest.approx(
            value.value, abs=1e-9
        )  # its RR@10 has a tie rule of its own
