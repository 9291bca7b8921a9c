"""The trie of a catalogue: which tokens can follow the beginning of a title (docs/design.md 4.6).

Nodes are numbered level by level, 0 is the root, and the children of a node are neighbours, in the order of their
tokens. So one array of tokens and one of first children hold everything: node n > 0 is the child that ``tokens[n]``
leads to, and the children of n are the nodes ``start[n]`` to ``start[n + 1] - 1``. A title ends in a leaf.

- A node **branches** where it has two children or more. Only there does a title's probability change: a node with one
  child gives it probability 1, so its token is **forced**.
- The tokens after a title's last branching node decide nothing. ``inputs`` is the number of tokens before the last
  choice: only these need to be computed.
- Items with equal titles share a leaf, and its probability in equal parts: n of them get log p - log n each. So the
  probabilities of all items sum to 1.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Trie:
    """N nodes and the I items whose titles they spell."""

    tokens: Ints  # (N,) the token that leads to each node, -1 for the root
    start: Ints  # (N + 1,) the first child of each node
    parents: Ints  # (N,) -1 for the root
    leaves: Ints  # (I,) the node in which each item's title ends
    path_start: Ints  # (I + 1,)
    path: Ints  # (all tokens,) the nodes of each title after the root, one per token: path[path_start[i] + t]
    inputs: Ints  # (I,) tokens of each title before its last choice
    sharing: Ints  # (I,) items that have this item's title
    jumps: Ints  # (N,) where each node leads without a choice: the first branching node or leaf from it on

    @classmethod
    def of(cls, titles: Sequence[Sequence[int]]) -> Trie:
        """The trie of titles as token ids, each with its end token, item by item."""
        lengths = np.fromiter(map(len, titles), np.int64, len(titles))  # (I,)
        if not len(titles):
            raise ValueError("titles: expected at least one, got none")
        if not lengths.all():
            raise ValueError(f"titles: expected an end token in every title, got none in title {lengths.argmin()}")
        path_start = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.fromiter(itertools.chain.from_iterable(titles), np.int64, int(path_start[-1]))
        if flat.min() < 0:
            raise ValueError(f"titles: expected token ids of at least 0, got {flat.min()}")
        path, tokens, parents = _grow(flat, path_start)
        leaves = path[path_start[1:] - 1]
        counts = np.bincount(parents[1:], minlength=len(tokens))  # (N,)
        if counts[leaves].any():
            short = int(counts[leaves].argmax())
            long = int(np.searchsorted(path_start, np.flatnonzero(parents[path] == leaves[short])[0], "right") - 1)
            raise ValueError(
                f"titles: title {short} is the beginning of title {long}, end token included; end every title with a "
                "token that stands nowhere else in a title"
            )
        start = np.concatenate([[0], np.cumsum(counts)]) + 1
        return cls(
            tokens=tokens,
            start=start,
            parents=parents,
            leaves=leaves,
            path_start=path_start,
            path=path,
            inputs=_inputs(counts, parents, path, path_start),
            sharing=np.bincount(leaves, minlength=len(tokens))[leaves],
            jumps=_jumps(counts, start),
        )

    @property
    def num_items(self) -> int:
        return len(self.leaves)

    @property
    def num_nodes(self) -> int:
        return len(self.tokens)

    @property
    def branching(self) -> Ints:
        """The nodes with two children or more."""
        return np.flatnonzero(np.diff(self.start) > 1)

    @functools.cached_property
    def depths(self) -> Ints:  # (N,)
        """The number of tokens from the root to each node."""
        depths = np.zeros(self.num_nodes, np.int64)
        within = np.arange(len(self.path)) - np.repeat(self.path_start[:-1], np.diff(self.path_start))
        depths[self.path] = within + 1
        return depths

    @functools.cached_property
    def branching_depth_first(self) -> Ints:
        """``branching`` so that the nodes below a node follow it: those with a common beginning stand together."""
        _, before = self._depth_first(np.ones(self.num_nodes, np.int64))
        return self.branching[np.argsort(before[self.branching])]

    @functools.cached_property
    def items_below(self) -> tuple[Ints, Ints, Ints]:
        """The items (I,) so that those below a node stand together, and where those of each node begin and end (N,)."""
        counts, before = self._depth_first(np.bincount(self.leaves, minlength=self.num_nodes))
        return np.argsort(before[self.leaves], kind="stable"), before, before + counts

    def _depth_first(self, own: Ints) -> tuple[Ints, Ints]:
        """Of numbers (N,), one a node: their sums over each node and those below it, and over the nodes that come
        before it where those below a node follow it."""
        levels = np.searchsorted(self.depths, np.arange(self.depths[-1] + 2))  # nodes are numbered level by level
        spans = [slice(a, b) for a, b in itertools.pairwise(levels.tolist())][1:]
        sums, before = own.copy(), np.zeros(self.num_nodes, np.int64)
        for level in reversed(spans):
            np.add.at(sums, self.parents[level], sums[level])
        for level in spans:
            parents, running = self.parents[level], np.cumsum(sums[level]) - sums[level]
            before[level] = before[parents] + own[parents] + running - running[self.start[parents] - level.start]
        return sums, before

    def title(self, item: int) -> list[int]:
        """The tokens of an item's title, end token included."""
        return self.tokens[self._path(item)].tolist()

    def choices(self, item: int) -> list[int]:
        """The title as far as its last choice, that token included; its first token where nothing is to be chosen."""
        return self.tokens[self._path(item)[: self.inputs[item] + 1]].tolist()

    def places(self, item: int) -> list[int]:
        """The node at which each token of ``choices`` is chosen."""
        return [0, *self._path(item)[: self.inputs[item]].tolist()]

    def prefix(self, node: int) -> list[int]:
        """The tokens from the root to a node."""
        tokens = []
        while node:
            tokens.append(int(self.tokens[node]))
            node = int(self.parents[node])
        return tokens[::-1]

    def items_of(self, leaf: int) -> Ints:
        """The items whose title ends in this leaf, ascending."""
        first, end = np.searchsorted(self._ordered[1], [leaf, leaf + 1])
        return self._ordered[0][first:end]

    def children(self, node: int) -> range:
        return range(int(self.start[node]), int(self.start[node + 1]))

    def all_children(self, nodes: Ints) -> tuple[Ints, Ints]:
        """The children of many nodes, node by node: the place in ``nodes`` of the parent of each, and the child."""
        counts = self.start[nodes + 1] - self.start[nodes]
        offsets = np.cumsum(counts) - counts - self.start[nodes]
        return np.repeat(np.arange(len(nodes)), counts), np.arange(counts.sum()) - np.repeat(offsets, counts)

    @functools.cached_property
    def sets(self) -> tuple[Ints, Ints]:
        """The tokens that can follow each node as CSR: those of node n are ``tokens[start[n]:start[n + 1]]``."""
        return self.start - 1, self.tokens[1:]

    @functools.cached_property
    def _ordered(self) -> tuple[Ints, Ints]:
        """The items by their leaves, and these."""
        order = np.argsort(self.leaves, kind="stable")
        return order, self.leaves[order]

    def _path(self, item: int) -> Ints:
        return self.path[self.path_start[item] : self.path_start[item + 1]]


def _grow(flat: Ints, path_start: Ints) -> tuple[Ints, Ints, Ints]:
    """Level by level: the nodes of a level are its distinct pairs of parent and token, in their order."""
    path = np.empty_like(flat)
    tokens, parents = [np.array([-1])], [np.array([-1])]
    longer, at = np.arange(len(path_start) - 1), np.zeros(len(path_start) - 1, np.int64)  # items, and where they are
    vocabulary, made = int(flat.max()) + 1, 1
    for depth in itertools.count():
        here = np.diff(path_start)[longer] > depth
        longer, at = longer[here], at[here]
        if not len(longer):
            break
        places = path_start[longer] + depth
        pairs, of_item = np.unique(at * vocabulary + flat[places], return_inverse=True)
        tokens.append(pairs % vocabulary)
        parents.append(pairs // vocabulary)
        at = made + of_item
        path[places] = at
        made += len(pairs)
    return path, np.concatenate(tokens), np.concatenate(parents)


def _inputs(counts: Ints, parents: Ints, path: Ints, path_start: Ints) -> Ints:
    """(I,) the depth of the last node of each title that branches, 0 where none does."""
    depth = np.arange(len(path)) - np.repeat(path_start[:-1], np.diff(path_start))
    return np.maximum.reduceat(np.where(counts[parents[path]] > 1, depth, 0), path_start[:-1])


def _jumps(counts: Ints, start: Ints) -> Ints:
    """Children have larger numbers than their parents, so a few rounds of pointer doubling follow every chain."""
    jumps = np.where(counts == 1, start[:-1], np.arange(len(counts)))
    while True:
        further = jumps[jumps]
        if np.array_equal(further, jumps):
            return jumps
        jumps = further
