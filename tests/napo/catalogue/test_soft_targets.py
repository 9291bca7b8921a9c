"""Soft targets: the loss by its definition, and what it is at the ends of its range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_catalogue import catalogue, plain_logps, prompts_of
from tiny_models import assert_equal_gradients, tiny_model

from napo.catalogue import CatalogueScorer, SoftBatch, Trie, beginnings, pack_soft_targets

TARGETS = [3, 29, 27, 11, 5]


def teacher(titles: Sequence[Any], seed: int = 0) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(size=(len(TARGETS), len(titles))) * 3
    probabilities = np.exp(scores)
    return probabilities / probabilities.sum(1, keepdims=True)


def loss_of(model: torch.nn.Module, batch: SoftBatch) -> torch.Tensor:
    return -(CatalogueScorer(model)(batch.children) * batch.weights.double()).sum()


def by_definition(
    model: Any,
    titles: Sequence[list[int]],
    prompts: Sequence[list[int]],
    probabilities: np.ndarray,
    share: float,
) -> torch.Tensor:
    """At each token of each target, the cross-entropy between what the model and what title and teacher say."""
    total = torch.zeros((), dtype=torch.float64)
    for prompt, item, known in zip(prompts, TARGETS, probabilities, strict=True):
        title = titles[item]
        logits = model(torch.tensor([prompt + title])).logits[0].double()
        for t, token in enumerate(title):
            below: dict[int, float] = {}
            for other, mass in zip(titles, known, strict=True):
                if other[:t] == title[:t]:
                    below[other[t]] = below.get(other[t], 0.0) + mass
            z = logits[len(prompt) - 1 + t]
            whole = torch.logsumexp(z[sorted(below)], 0)
            says = sum(below.values()) > 0
            for child, mass in below.items():
                soft = share * mass / sum(below.values()) if says else 0.0
                total -= (soft + (1 - share if says else 1.0) * (child == token)) * (z[child] - whole)
    return total


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.usefixtures("true_softmax")
def test_loss_and_gradient_are_those_of_the_definition(name: str, share: float) -> None:
    model, titles = tiny_model(name, torch.float64), catalogue()
    prompts, probabilities = prompts_of((9, 17, 7, 12, 8)), teacher(titles)
    probabilities[3] = 0  # nothing is known of this one
    batch = pack_soft_targets(prompts, TARGETS, Trie.of(titles), probabilities, share=share, pad_id=0)
    loss, truth = loss_of(model, batch), by_definition(model, titles, prompts, probabilities, share)
    # Weights are float32, and shares below 1e-5 are divided among the others.
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(model, loss[None], truth[None], 1e-4)


@pytest.mark.usefixtures("true_softmax")
def test_a_teacher_that_is_sure_of_the_title_is_the_title() -> None:
    model, titles = tiny_model("llama", torch.float64), catalogue()
    prompts, trie = prompts_of((9, 17, 7, 12, 8)), Trie.of(titles)
    sure = np.zeros((len(TARGETS), len(titles)))
    sure[np.arange(len(TARGETS)), TARGETS] = 1
    alone = plain_logps(model, titles, prompts, [[item] for item in TARGETS])
    shared = torch.tensor([titles.count(titles[item]) for item in TARGETS]).log().sum()
    for probabilities, share in ((sure, 0.7), (teacher(titles), 0.0), (sure * 0, 1.0)):
        batch = pack_soft_targets(prompts, TARGETS, trie, probabilities, share=share, pad_id=0)
        torch.testing.assert_close(loss_of(model, batch), -(alone.sum() + shared), rtol=1e-6, atol=1e-6)
        assert batch.num_sequences == len(TARGETS)
        assert batch.title_lengths.tolist() == [len(titles[item]) for item in TARGETS]


def test_weights_of_every_choice_sum_to_one() -> None:
    titles = catalogue(seed=4, size=200)
    trie, probabilities = Trie.of(titles), teacher(titles, seed=2)
    batch = pack_soft_targets(prompts_of((4,) * 5), TARGETS, trie, probabilities, share=0.6, pad_id=0)
    allowed = batch.children.allowed
    rows = allowed.pair_slots[allowed.sequence_ids.argsort()]
    sums = torch.zeros(len(allowed.rows)).index_add(0, rows, batch.weights)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert len(batch.weights) > len(sums) > len(TARGETS)


def test_items_below_a_node_stand_together() -> None:
    titles = catalogue(seed=3, size=80)
    trie = Trie.of(titles)
    order, begin, end = trie.items_below
    assert sorted(order.tolist()) == list(range(len(titles)))
    for node in range(trie.num_nodes):
        prefix = trie.prefix(node)
        expected = {item for item, title in enumerate(titles) if title[: len(prefix)] == prefix}
        assert set(order[begin[node] : end[node]].tolist()) == expected and end[node] - begin[node] == len(expected)


def test_beginnings_of_windows() -> None:
    titles = catalogue()
    prompts, histories, targets = beginnings([[3, 0, 7], [5], [1, 2]], Trie.of(titles), header=[5, 6], first=[1, 0, 9])
    assert histories == [[3], [3, 0], [], [1]] and targets == [0, 7, 5, 2]
    assert prompts == [[5, 6, *(token for item in history for token in titles[item])] for history in histories]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"share": 1.5}, "share: expected a number between 0 and 1, got 1.5"),
        ({"probabilities": np.zeros((2, 3))}, r"probabilities: expected shape \(5, 30\), got \(2, 3\)"),
        ({"probabilities": np.full((5, 30), -1.0)}, "probabilities: expected numbers of at least 0"),
        ({"probabilities": np.full((5, 30), np.nan)}, "probabilities: expected numbers of at least 0"),
        ({"targets": [3, 0, 1, 2, 30]}, r"items: expected numbers in \[0, 30\) of the catalogue, got 30"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    titles = catalogue()
    given = {"probabilities": teacher(titles), "share": 0.5, "targets": TARGETS} | change
    with pytest.raises(ValueError, match=message):
        pack_soft_targets(prompts_of((4,) * 5), trie=Trie.of(titles), pad_id=0, **given)


def test_where_nothing_is_to_be_chosen() -> None:
    trie = Trie.of([[5, 6], [5, 6]])  # equal titles
    batch = pack_soft_targets([[3], [4]], [0, 1], trie, np.full((2, 2), 0.5), share=0.5, pad_id=0)
    assert len(batch.weights) == 0 and batch.title_lengths.tolist() == [2, 2]
    assert float(loss_of(tiny_model("llama", torch.float64), batch).detach()) == 0
