"""From examples to the batch of a training step: packed tokens, and the users and negatives of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from napo.catalogue import CatalogueBatch, Trie, pack_items
from napo.scoring import PackedBatch, pack
from napo.trainer.pool import UsersAndNegatives
from napo.trainer.rows import Example, fits
from napo_kernels import false_negative_triples, neighbour_count, shared_negatives


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """B users with their answers; sequences are numbered user by user, the chosen answer first."""

    packed: PackedBatch | CatalogueBatch
    users_and_negatives: UsersAndNegatives
    slots: Tensor  # (B, 1 + N) the sequence of each answer; the chosen one's in place of padding
    own: Tensor  # (B, 1 + n) bool, True for the row's own answers; with borrowed ones n is less than N
    ref_logps: Tensor | None  # (S,)
    rows: list[int]  # their numbers in the data set

    @property
    def users(self) -> int:
        return len(self.rows)

    @property
    def mean_users(self) -> float:
        """Of the ranks. Whoever takes the mean of the ranks' gradients divides each rank's sum of losses by this."""
        ranks = self.users_and_negatives.ranks
        return self.users if ranks is None else sum(ranks) / len(ranks)

    def first(self, count: int, ranks: tuple[int, ...] | None = None) -> PreferenceBatch:
        """The first ``count`` users; the sequences, and their numbers, stay those of all. ``ranks``: how many each rank
        keeps of its own, where they are not as many."""
        return dataclasses.replace(
            self,
            users_and_negatives=self.users_and_negatives.first(count, ranks),
            slots=self.slots[:count],
            own=self.own[:count],
            rows=self.rows[:count],
        )

    def to(self, device: Any) -> PreferenceBatch:
        """The same on ``device``; the copies never wait for work that the device still has to do."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True), self.packed.to(device))

    def pin_memory(self) -> PreferenceBatch:
        """Called by a DataLoader with ``pin_memory=True``."""
        return self._map(Tensor.pin_memory, self.packed.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor], packed: PackedBatch | CatalogueBatch) -> PreferenceBatch:
        references = None if self.ref_logps is None else change(self.ref_logps)
        return dataclasses.replace(
            self,
            packed=packed,
            users_and_negatives=self.users_and_negatives.map(change),
            slots=change(self.slots),
            own=change(self.own),
            ref_logps=references,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collator:
    """Collates examples. With ``exact_rho`` users get the answers that they borrow as answers of their own. With a
    ``trie`` answers are the titles of its items, by their ids, and go only up to their last choice."""

    pad_id: int
    max_length: int | None = None  # most tokens of prompt and answer together
    truncates: bool = False  # prompts that are longer; without it there are none
    keep_prefix: int = 0
    exact_rho: float | None = None
    metric: str = "dot"
    exclude_false_negatives: bool = True
    width_multiple: int = 1  # of packed rows
    trie: Trie | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, PreferenceBatch]:
        own = np.asarray([len(example.answers) for example in examples])[:, None] > np.arange(examples[0].width + 1)
        if self.exact_rho is not None:
            examples = self._borrow(examples, self.exact_rho)
        width = examples[0].width
        counts = np.asarray([len(example.answers) for example in examples])
        first = np.cumsum(counts) - counts
        place = np.arange(width + 1)
        there = place < counts[:, None]  # (B, 1 + N)
        users_and_negatives = UsersAndNegatives(
            mask=torch.from_numpy(there[:, 1:]),
            groups=torch.tensor([example.group for example in examples]),
            states=_stack([example.state for example in examples]),
            scores=_stack([_pad(example.scores, width, 0.0) for example in examples]),
            rejected_ids=np.stack([_padded(example.rejected_ids, width, -1) for example in examples]),
            chosen_ids=np.asarray([example.chosen_id for example in examples], dtype=np.int64),
            histories=[example.history for example in examples],
        )
        references = [example.ref_logps for example in examples if example.ref_logps is not None]
        batch = PreferenceBatch(
            packed=self._pack(examples),
            users_and_negatives=users_and_negatives,
            slots=torch.from_numpy(first[:, None] + np.where(there, place, 0)),
            own=torch.from_numpy(own),
            ref_logps=torch.from_numpy(np.concatenate(references)) if len(references) == len(examples) else None,
            rows=[example.row for example in examples],
        )
        return {"batch": batch}

    def _pack(self, examples: Sequence[Example]) -> PackedBatch | CatalogueBatch:
        prompts = [example.prompt for example in examples]
        options: dict[str, Any] = {
            "pad_id": self.pad_id,
            "max_length": self.max_length if self.truncates else None,
            "keep_prefix": self.keep_prefix,
            "width_multiple": self.width_multiple,
        }
        if self.trie is None:
            return pack(prompts, [example.answers for example in examples], **options)
        items = [[example.chosen_id, *example.rejected_ids.tolist()] for example in examples]
        return pack_items(prompts, items, self.trie, **options)

    def _borrow(self, examples: Sequence[Example], rho: float) -> list[Example]:
        """Every user with its neighbours' answers behind its own, less its false negatives and what is too long behind
        its prompt."""
        neighbours = neighbour_count(len(examples), rho)
        width = examples[0].width * (1 + neighbours)
        if neighbours == 0:
            return list(examples)
        states = _stack([example.state for example in examples])
        assert states is not None, "rows were checked for user states"
        groups = torch.tensor([example.group for example in examples])
        share = shared_negatives(states, neighbours, group_ids=groups, metric=self.metric).fill_diagonal_(False)
        ids = np.stack([_padded(example.rejected_ids, examples[0].width, -1) for example in examples])
        keep = np.ones((len(examples), *ids.shape), dtype=bool)
        if self.exclude_false_negatives:
            chosen = [example.chosen_id for example in examples]
            triples = false_negative_triples([example.history for example in examples], chosen, torch.from_numpy(ids))
            keep[tuple(triples.numpy().T)] = False
        borrowed = []
        shortened_to = self.keep_prefix if self.truncates else None
        for user, example in enumerate(examples):
            owners = [int(owner) for owner in share[user].nonzero()[:, 0]]
            taken = [
                (examples[owner], n)
                for owner in owners
                for n in range(len(examples[owner].rejected_ids))
                if keep[user, owner, n]
                and fits(example.prompt, len(examples[owner].answers[1 + n]), self.max_length, shortened_to)
            ]
            scores = None
            if example.scores is not None:
                theirs = [owner.scores[n] for owner, n in taken if owner.scores is not None]
                scores = np.append(example.scores, theirs).astype(np.float32)
            borrowed.append(
                dataclasses.replace(
                    example,
                    answers=example.answers + [owner.answers[1 + n] for owner, n in taken],
                    rejected_ids=np.append(example.rejected_ids, [owner.rejected_ids[n] for owner, n in taken]).astype(
                        np.int64
                    ),
                    scores=scores,
                    width=width,
                )
            )
        return borrowed


def _padded(values: np.ndarray, width: int, filler: float) -> np.ndarray:
    return np.pad(values, (0, width - len(values)), constant_values=filler)


def _pad(values: np.ndarray | None, width: int, filler: float) -> np.ndarray | None:
    return None if values is None else _padded(values, width, filler)


def _stack(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
    """None unless every row has one."""
    there = [array for array in arrays if array is not None]
    return torch.from_numpy(np.stack(there)) if len(there) == len(arrays) else None


def slots_of(batches: Sequence[PreferenceBatch]) -> Tensor:  # (B, 1 + N)
    """The sequences of all batches, one after the other, by user and answer."""
    sequences = np.cumsum([0] + [batch.packed.num_sequences for batch in batches])
    return torch.cat([batch.slots + int(first) for batch, first in zip(batches, sequences, strict=False)])
