"""Exact ranking of a whole catalogue, and greedy decoding that cannot leave it.

A title's log-probability is the sum over its choices, and no step raises it. So a node's log-probability bounds those
of all items below it: the best items are found by opening nodes, the best first, until no open node can hold a better
one. For small catalogues all nodes that branch are scored at once, in one pass per prompt.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napo.catalogue.packing import CatalogueBatch, pack_nodes
from napo.catalogue.trie import Trie

Floats = NDArray[np.float64]
Score = Callable[[CatalogueBatch], Tensor]  # a CatalogueScorer
NOT_A_NUMBER = "model: expected log-probabilities, got NaN; the weights or the prompts' hidden states have it"


@torch.no_grad()
def all_logps(
    score: Score, prompts: Sequence[Sequence[int]], trie: Trie, *, tokens_at_a_time: int = 4096, **options: Any
) -> Floats:  # (B, I)
    """The log-probability of every item behind every prompt. ``options`` are those of ``pack``.

    ``tokens_at_a_time``: the trie's tokens behind a prompt in one pass, at most, which bounds the memory of attention;
    a larger catalogue takes more passes, each of which encodes the prompts anew."""
    step = np.zeros((len(prompts), trie.num_nodes))
    for nodes in _pieces(trie, tokens_at_a_time):
        children = np.concatenate([np.asarray(trie.children(node)) for node in nodes])
        found = score(pack_nodes(prompts, [nodes] * len(prompts), trie, **options)).double().cpu().numpy()
        if np.isnan(found).any():
            raise ValueError(NOT_A_NUMBER)
        step[:, children] = found.reshape(len(prompts), -1)
    return np.add.reduceat(step[:, trie.path], trie.path_start[:-1], axis=1) - np.log(trie.sharing)


def _pieces(trie: Trie, tokens: int) -> Iterator[list[int]]:
    """The nodes that branch, in runs of at most so many tokens from the root to each; one node is always taken."""
    nodes = trie.branching_depth_first
    depths = trie.depths[nodes]
    begin = 0
    while begin < len(nodes):
        end = begin + max(int(np.searchsorted(np.cumsum(depths[begin:]), tokens, "right")), 1)
        yield nodes[begin:end].tolist()
        begin = end


@torch.no_grad()
def best_items(
    score: Score,
    prompts: Sequence[Sequence[int]],
    trie: Trie,
    k: int,
    *,
    exclude: Sequence[Collection[int]] | None = None,
    nodes_at_a_time: int = 32,
    **options: Any,
) -> list[list[tuple[int, float]]]:
    """The ``k`` most probable items behind each prompt, with their log-probabilities, the best first and of equal ones
    the lower number; exactly those that scoring every item would give.

    ``exclude``: for each prompt items that are not wanted. ``nodes_at_a_time``: at most so many nodes of a prompt are
    opened in one pass; every pass encodes the prompts anew. ``options`` are those of ``pack``."""
    if k < 1 or nodes_at_a_time < 1:
        name, value = ("k", k) if k < 1 else ("nodes_at_a_time", nodes_at_a_time)
        raise ValueError(f"{name}: expected at least 1, got {value}")
    if exclude is not None and len(exclude) != len(prompts):
        raise ValueError(f"exclude: expected one collection for each of {len(prompts)} prompts, got {len(exclude)}")
    walks = [_Walk(trie, k, frozenset(exclude[i]) if exclude is not None else frozenset()) for i in range(len(prompts))]
    while True:
        opened = [walk.open(nodes_at_a_time) for walk in walks]
        users = [user for user, nodes in enumerate(opened) if nodes]
        if not users:
            return [walk.result() for walk in walks]
        nodes = [[node for node, _ in opened[user]] for user in users]
        logps = iter(_by_node(score, [prompts[user] for user in users], nodes, trie, options))
        for user in users:
            for node, logp in opened[user]:
                walks[user].add(trie.children(node), logp + next(logps))


@torch.no_grad()
def greedy_items(
    score: Score, prompts: Sequence[Sequence[int]], trie: Trie, **options: Any
) -> tuple[NDArray[np.int64], Floats]:
    """The item that greedy decoding under the trie names for each prompt, and its log-probability. It is always an item
    of the catalogue, the first of equal titles; forced tokens take no pass. ``options`` are those of ``pack``."""
    at = np.full(len(prompts), trie.jumps[0])
    logps = np.zeros(len(prompts))
    while True:
        users = np.flatnonzero(np.diff(trie.start)[at]).tolist()
        if not users:
            break
        found = _by_node(score, [prompts[user] for user in users], [[int(at[user])] for user in users], trie, options)
        for user, of_children in zip(users, found, strict=True):
            best = int(of_children.argmax())
            logps[user] += of_children[best]
            at[user] = trie.jumps[trie.children(int(at[user]))[best]]
    items = np.array([trie.items_of(int(leaf))[0] for leaf in at], np.int64)
    return items, logps - np.log(trie.sharing[items])


class _Walk:
    """The best-first walk behind one prompt."""

    def __init__(self, trie: Trie, k: int, exclude: frozenset[int]) -> None:
        self.trie, self.k, self.exclude = trie, k, exclude
        self.nodes: list[tuple[float, int]] = []  # heap of (-log p, node) that are not opened yet
        self.items: list[tuple[float, int]] = []  # heap of the best k as (log p, -item), the worst first
        self.add(range(0, 1), np.zeros(1))

    def open(self, count: int) -> list[tuple[int, float]]:
        """At most ``count`` nodes that may hold one of the best items, and their log-probabilities."""
        opened: list[tuple[int, float]] = []
        while self.nodes and len(opened) < count and -self.nodes[0][0] >= self._bound():
            minus, node = heapq.heappop(self.nodes)
            opened.append((node, -minus))
        return opened

    def add(self, nodes: range, logps: Floats) -> None:
        bound = self._bound()
        for node, logp in zip(nodes, logps.tolist(), strict=True):
            if logp < bound:
                continue
            end = int(self.trie.jumps[node])
            if len(self.trie.children(end)):
                heapq.heappush(self.nodes, (-logp, end))
                continue
            items = self.trie.items_of(end)
            for item in items.tolist():
                if item not in self.exclude:
                    heapq.heappush(self.items, (logp - math.log(len(items)), -item))
                    if len(self.items) > self.k:
                        heapq.heappop(self.items)
            bound = self._bound()

    def result(self) -> list[tuple[int, float]]:
        return [(-minus, logp) for logp, minus in sorted(self.items, reverse=True)]

    def _bound(self) -> float:
        """The log-probability that an item must reach to be one of the best."""
        return self.items[0][0] if len(self.items) == self.k else -math.inf


def _by_node(
    score: Score,
    prompts: Sequence[Sequence[int]],
    nodes: Sequence[Sequence[int]],
    trie: Trie,
    options: dict[str, Any],
) -> Iterator[Floats]:
    """The log-probabilities of each node's children, node by node."""
    logps = score(pack_nodes(prompts, nodes, trie, **options)).double().cpu().numpy()
    if np.isnan(logps).any():
        raise ValueError(NOT_A_NUMBER)
    at = 0
    for group in nodes:
        for node in group:
            count = len(trie.children(node))
            yield logps[at : at + count]
            at += count
