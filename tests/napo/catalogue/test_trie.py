"""The trie of a catalogue: what can follow what, where titles branch, and what need not be computed."""

from __future__ import annotations

import resource
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napo.catalogue import Trie, pack_items

END = 0
titles_of = st.lists(
    st.lists(st.integers(1, 4), max_size=5).map(lambda title: [*title, END]), min_size=1, max_size=12
)  # few tokens, so that titles begin alike, begin one another and are equal


@settings(deadline=None, max_examples=300)
@given(titles_of)
def test_every_node_is_a_beginning_and_lists_what_follows(titles):
    trie = Trie.of(titles)
    beginnings = {tuple(title[:n]) for title in titles for n in range(len(title) + 1)}
    assert {tuple(trie.prefix(node)) for node in range(trie.num_nodes)} == beginnings
    assert trie.num_nodes == len(beginnings)
    start, tokens = trie.sets
    for node in range(trie.num_nodes):
        before = tuple(trie.prefix(node))
        following = sorted({b[-1] for b in beginnings if b and b[:-1] == before})
        assert tokens[start[node] : start[node + 1]].tolist() == following
        assert [trie.prefix(child) for child in trie.children(node)] == [[*before, token] for token in following]
    for item, title in enumerate(titles):
        assert trie.title(item) == title
        assert trie.prefix(trie.leaves[item]) == title
        assert trie.items_of(trie.leaves[item]).tolist() == [i for i, other in enumerate(titles) if other == title]
        assert trie.sharing[item] == titles.count(title)


@settings(deadline=None, max_examples=300)
@given(titles_of)
def test_what_stands_behind_the_last_choice_is_forced(titles):
    trie = Trie.of(titles)
    for item, title in enumerate(titles):
        rivals = [other for other in titles if other != title]
        # The last token that some other title could have instead, after the same beginning.
        choices = [t for t in range(len(title)) if any(o[:t] == title[:t] and o[t] != title[t] for o in rivals)]
        assert trie.inputs[item] == max(choices, default=0)
        assert trie.choices(item) == title[: max(choices, default=0) + 1]
        assert [trie.prefix(node) for node in trie.places(item)] == [title[:t] for t in range(len(trie.choices(item)))]
    for node in range(trie.num_nodes):
        end = node
        while len(trie.children(end)) == 1:
            end = trie.children(end)[0]
        assert trie.jumps[node] == end


def test_a_title_that_begins_another_ends_in_a_leaf_of_its_own():
    trie = Trie.of([[5, END], [5, 6, END], [5, 6, 7, END], [5, END]])
    assert trie.branching.tolist() == [trie.places(2)[1], trie.places(2)[2]]
    assert trie.inputs.tolist() == [1, 2, 2, 1]
    assert trie.sharing.tolist() == [2, 1, 1, 2]


def test_one_title_and_one_token():
    alone = Trie.of([[3, 4, END]])
    assert alone.inputs.tolist() == [0] and not len(alone.branching) and alone.choices(0) == [3]
    only_end = Trie.of([[END], [3, END]])
    assert only_end.inputs.tolist() == [0, 0] and only_end.title(0) == [END]


@pytest.mark.parametrize(
    "titles, message",
    [
        ([], "titles: expected at least one, got none"),
        ([[1], []], "titles: expected an end token in every title, got none in title 1"),
        ([[1, -3]], "titles: expected token ids of at least 0, got -3"),
        ([[7, 0], [1, 2, 3, 0], [1, 2]], "titles: title 2 is the beginning of title 1, end token included; end every"),
    ],
)
def test_errors_name_the_title(titles, message):
    with pytest.raises(ValueError, match=message):
        Trie.of(titles)


def test_a_million_titles():
    """Some seconds and a few hundred MB: nothing has a cell for each node and token."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 1_000_000)
    flat = (rng.zipf(1.3, lengths.sum()) % 49_000 + 1).tolist()
    ends = np.cumsum(lengths).tolist()
    titles = [[*flat[begin:end], END] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    trie = Trie.of(titles)
    assert time.process_time() - began < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KiB
    for item in rng.integers(len(titles), size=100).tolist():
        assert trie.title(item) == titles[item]
        assert trie.prefix(trie.leaves[item]) == titles[item]
    assert trie.start[-1] == trie.num_nodes
    counts = np.diff(trie.start)
    assert (counts[trie.leaves] == 0).all() and (counts == 0).sum() == len(np.unique(trie.leaves))
    began = time.process_time()
    items = rng.integers(len(titles), size=(4, 20)).tolist()
    batch = pack_items([[1], [2], [3], [4]], items, trie, pad_id=0)
    assert time.process_time() - began < 5
    places = {(user, node) for user, row in enumerate(items) for item in row for node in trie.places(item)}
    assert batch.allowed.sizes.sum() == sum(counts[node] for _, node in places if counts[node] > 1)


@given(titles_of)
@settings(deadline=None, max_examples=50)
def test_depth_first_order_is_the_order_of_prefixes(titles):
    trie = Trie.of(titles)
    assert trie.depths.tolist() == [len(trie.prefix(node)) for node in range(trie.num_nodes)]
    expected = sorted(trie.branching.tolist(), key=trie.prefix)
    assert trie.branching_depth_first.tolist() == expected
