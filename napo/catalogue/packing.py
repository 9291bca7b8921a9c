"""Packed batches in which a title goes only up to its last choice.

The tokens after it are forced, so they are neither inputs nor targets; the same holds at nodes with one child. ``pack``
lays out what is left, as it does whole titles, and ``AllowedTokens`` tells which tokens each row chooses among.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from napo.catalogue.trie import Ints, Trie
from napo.scoring.packing import PackedBatch, pack
from napo_kernels import AllowedTokens


@dataclasses.dataclass(frozen=True)
class CatalogueBatch:
    """Sequences in the order that they were given in, prompt by prompt: titles, or children of nodes."""

    packed: PackedBatch  # its titles end with their last choices; its targets and pairs are not read
    rows: Tensor  # (R,) int64: indices into the flattened hidden states, one for each row of `allowed`
    allowed: AllowedTokens
    sharing: Tensor  # (S,) int64: items that have this title
    lengths: Tensor  # (S,) int64: tokens of the whole title, end token included

    @property
    def num_sequences(self) -> int:
        return self.allowed.num_sequences

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, without padding."""
        return self.packed.num_tokens

    @property
    def title_lengths(self) -> Tensor:  # (S,) int64
        """Tokens of every whole title, end tokens included."""
        return self.lengths

    def widened(self, width_multiple: int, pad_id: int = 0) -> CatalogueBatch:
        """The same batch with its rows padded, see `PackedBatch.widened`."""
        width = self.packed.input_ids.shape[1]
        packed = self.packed.widened(width_multiple, pad_id)
        more = packed.input_ids.shape[1] - width
        return dataclasses.replace(self, packed=packed, rows=self.rows + self.rows // width * more)

    def to(self, device: torch.device | str) -> CatalogueBatch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True), self.packed.to(device))

    def pin_memory(self) -> CatalogueBatch:
        """Called by a DataLoader with `pin_memory=True`."""
        return self._map(torch.Tensor.pin_memory, self.packed.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor], packed: PackedBatch) -> CatalogueBatch:
        tensors = (change(self.rows), self.allowed.map(change), change(self.sharing), change(self.lengths))
        return CatalogueBatch(packed, *tensors)


def pack_items(
    prompts: Sequence[Sequence[int]], items: Sequence[Sequence[int]], trie: Trie, **options: Any
) -> CatalogueBatch:
    """Prompts as token ids, each with the items whose titles are scored behind it.

    ``options`` are those of ``pack``. Under a ``max_length`` a title counts with the tokens that are computed, so a
    prompt may keep some that whole titles would have driven out.
    """
    if len(prompts) != len(items):
        raise ValueError(f"items: expected one list of items for each of {len(prompts)} prompts, got {len(items)}")
    flat = checked_items(list(itertools.chain.from_iterable(items)), trie)  # (S,)
    packed = pack(prompts, [[trie.choices(item) for item in group] for group in items], **options)
    nodes = np.fromiter(itertools.chain.from_iterable(map(trie.places, flat.tolist())), np.int64)  # (Q,)
    rows, allowed = rows_of_choices(
        packed, trie, nodes, np.arange(len(nodes)), packed.targets, packed.sequence_ids, len(flat)
    )
    return CatalogueBatch(
        packed=packed,
        rows=rows,
        allowed=allowed,
        sharing=torch.from_numpy(trie.sharing[flat]),
        lengths=torch.from_numpy(np.diff(trie.path_start)[flat]),
    )


def checked_items(items: Sequence[int], trie: Trie) -> Ints:
    """Numbers of items; ValueError where the catalogue has no such item."""
    found = np.array(items, np.int64)
    wrong = (found < 0) | (found >= trie.num_items)
    if wrong.any():
        raise ValueError(f"items: expected numbers in [0, {trie.num_items}) of the catalogue, got {found[wrong][0]}")
    return found


def pack_nodes(
    prompts: Sequence[Sequence[int]], nodes: Sequence[Sequence[int]], trie: Trie, **options: Any
) -> CatalogueBatch:
    """Prompts, each with nodes of the trie: the sequences are the children of each node, whose log-probabilities given
    their node are computed. Leaves have none. ``options`` are those of ``pack``."""
    behind = [[[*trie.prefix(node), 0] for node in group] for group in nodes]  # the 0 is no input, nor a target
    packed = pack(prompts, behind, **options)
    flat = np.fromiter(itertools.chain.from_iterable(nodes), np.int64)  # (S',)
    parent, children = trie.all_children(flat)  # (S,)
    lengths = np.fromiter((len(prefix) for group in behind for prefix in group), np.int64, len(flat))
    last = (np.cumsum(lengths) - 1)[parent]  # (S,) the pair of each child
    of_pair = np.zeros(int(lengths.sum()), np.int64)
    of_pair[np.cumsum(lengths) - 1] = flat
    ids = np.arange(len(children))
    rows, allowed = rows_of_choices(packed, trie, of_pair[last], last, trie.tokens[children], ids, len(children))
    return CatalogueBatch(
        packed=packed,
        rows=rows,
        allowed=allowed,
        sharing=torch.ones(len(children), dtype=torch.int64),
        lengths=torch.ones(len(children), dtype=torch.int64),
    )


def rows_of_choices(
    packed: PackedBatch,
    trie: Trie,
    nodes: Ints,  # (P,) where each pair chooses
    pairs: Ints,  # (P,) among those of `packed`
    targets: Ints | Tensor,  # (P,)
    sequence_ids: Ints | Tensor,  # (P,)
    num_sequences: int,
) -> tuple[Tensor, AllowedTokens]:
    """The rows with a choice, and what each chooses among. The last token of a prompt that is the beginning of another
    may stand inside a title there: one row of hidden states, two nodes, so two rows here."""
    at = packed.predicting_rows.numpy()[packed.pair_rows.numpy()[pairs]]  # (P,)
    branches = trie.start[nodes + 1] - trie.start[nodes] > 1
    keys, rows = np.unique(at[branches] * trie.num_nodes + nodes[branches], return_inverse=True)
    allowed = AllowedTokens.of(
        keys % trie.num_nodes,
        trie.sets,
        np.asarray(targets)[branches],
        rows=rows,
        sequence_ids=np.asarray(sequence_ids)[branches],
        num_sequences=num_sequences,
    )
    return torch.from_numpy(keys // trie.num_nodes), allowed
