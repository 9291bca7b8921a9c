"""A teacher's probabilities over the catalogue beside the title that followed (docs/design.md, soft targets).

A title is a way down the trie, and at each of its choices the teacher has a probability for every child: the mass of
the items below the child, of those below the node. The loss is the cross-entropy with these, mixed with the title's own
choice. So the model learns from one title what else could have followed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napo.catalogue.packing import CatalogueBatch, checked_items, rows_of_choices
from napo.catalogue.trie import Ints, Trie
from napo.scoring.packing import pack

Floats = NDArray[np.float64]
SILENT = 1e-9
"""A teacher that gives all items below a node no more than this together says nothing about them."""
LEAST = 1e-5
"""Children to whom the teacher gives less of a choice are left out, and their mass is divided among the others."""


@dataclasses.dataclass(frozen=True)
class SoftBatch:
    """T titles. The sequences of ``children`` are the S children that can be chosen on their ways."""

    children: CatalogueBatch
    weights: Tensor  # (S,) float32: those of each choice of a title sum to 1
    titles: Tensor  # (S,) int64: on whose way each child is, ascending
    title_lengths: Tensor  # (T,) int64: tokens of every whole title, end tokens included

    @property
    def num_sequences(self) -> int:
        return len(self.title_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, without padding."""
        return self.children.num_tokens

    def to(self, device: torch.device | str) -> SoftBatch:
        """The same batch with its tensors on `device`."""
        tensors = (self.weights, self.titles, self.title_lengths)
        return SoftBatch(self.children.to(device), *(tensor.to(device, non_blocking=True) for tensor in tensors))

    def pin_memory(self) -> SoftBatch:
        """Called by a DataLoader with `pin_memory=True`."""
        tensors = (self.weights, self.titles, self.title_lengths)
        return SoftBatch(self.children.pin_memory(), *(tensor.pin_memory() for tensor in tensors))


def pack_soft_targets(
    prompts: Sequence[Sequence[int]],
    targets: Sequence[int],
    trie: Trie,
    probabilities: Floats,
    *,
    share: float,
    **options: Any,
) -> SoftBatch:
    """Prompts as token ids, each with the item that followed and a teacher's ``probabilities`` (T, I) of all items.

    ``share``: the teacher's part of every choice, between 0 and 1; the title's own has the rest. A row of zeros is no
    teacher: its title has all. ``options`` are those of ``pack``.
    """
    if probabilities.shape != (len(targets), trie.num_items):
        raise ValueError(
            f"probabilities: expected shape {(len(targets), trie.num_items)}, got {tuple(probabilities.shape)}"
        )
    if not np.isfinite(probabilities).all() or probabilities.min(initial=0) < 0:
        raise ValueError("probabilities: expected numbers of at least 0, got others among them")
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    checked_items(targets, trie)
    packed = pack(prompts, [[trie.choices(item)] for item in targets], **options)
    ways = [np.array(trie.places(item)) for item in targets]
    nodes = np.concatenate(ways) if ways else np.zeros(0, np.int64)  # (Q,) where each token is chosen
    title = np.repeat(np.arange(len(targets)), list(map(len, ways)))  # (Q,)
    branching = np.flatnonzero(trie.start[nodes + 1] - trie.start[nodes] > 1)
    parent, child = trie.all_children(nodes[branching])  # (S',)
    pair = branching[parent]  # (S',) of the Q choices
    soft = _shares(trie, probabilities, title[pair], child, pair, len(nodes))
    soft = np.where(soft < LEAST, 0.0, soft)
    said = np.bincount(pair, soft, len(nodes)).astype(float)[pair]
    soft = np.divide(soft, said, out=np.zeros_like(soft), where=said > 0)
    own = trie.tokens[child] == packed.targets.numpy()[pair]
    weights = share * soft + own * np.where(said > 0, 1 - share, 1.0)
    kept = np.flatnonzero(weights)
    pair, child = pair[kept], child[kept]
    rows, allowed = rows_of_choices(
        packed, trie, nodes[pair], pair, trie.tokens[child], np.arange(len(kept)), len(kept)
    )
    ones = torch.ones(len(kept), dtype=torch.int64)
    return SoftBatch(
        children=CatalogueBatch(packed=packed, rows=rows, allowed=allowed, sharing=ones, lengths=ones),
        weights=torch.from_numpy(weights[kept].astype(np.float32)),
        titles=torch.from_numpy(title[pair]),
        title_lengths=torch.from_numpy(np.diff(trie.path_start)[list(targets)]),
    )


def _shares(
    trie: Trie,
    probabilities: Floats,
    title: Ints,  # (S',)
    child: Ints,  # (S',)
    pair: Ints,  # (S',)
    num_pairs: int,
) -> Floats:
    """(S',) what each child has of its choice by the teacher; 0 for all of a choice about which it says nothing."""
    order, begin, end = trie.items_below
    mass = np.zeros((len(probabilities), trie.num_items + 1))
    np.cumsum(probabilities[:, order], axis=1, out=mass[:, 1:])
    of_child = mass[title, end[child]] - mass[title, begin[child]]
    of_choice = np.bincount(pair, of_child, num_pairs)[pair]
    return np.divide(of_child, of_choice, out=np.zeros_like(of_child), where=of_choice > SILENT)
