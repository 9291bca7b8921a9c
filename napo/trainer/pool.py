"""The pool that negatives are borrowed from: users of one or more micro-batches, here and on the other ranks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from napo_kernels import PoolLayout, false_negative_triples, gather_pool, neighbour_count, shared_negatives


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsersAndNegatives:
    """What the loss needs to know of B users and their negatives, apart from log-probabilities."""

    mask: Tensor  # (B, N) bool, False for the padding of ragged N
    groups: Tensor  # (B,) int64, equal for rows of one user
    states: Tensor | None  # (B, D)
    scores: Tensor | None  # (B, N)
    rejected_ids: np.ndarray  # (B, N) int64, -1 for padding; on the host, where false negatives are looked up
    chosen_ids: np.ndarray  # (B,) int64
    histories: list[np.ndarray]  # B arrays of item ids
    ranks: tuple[int, ...] | None = None  # how many users each rank brings; None where all bring as many as this one

    @property
    def users(self) -> int:
        return self.mask.shape[0]

    def first(self, count: int, ranks: tuple[int, ...] | None = None) -> UsersAndNegatives:
        """The first ``count`` of the users. ``ranks``: how many each rank keeps, where they are not as many."""
        cut = self.map(lambda tensor: tensor[:count])
        return dataclasses.replace(
            cut,
            rejected_ids=self.rejected_ids[:count],
            chosen_ids=self.chosen_ids[:count],
            histories=self.histories[:count],
            ranks=ranks,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> UsersAndNegatives:
        """The same with every tensor replaced by ``function`` of it."""
        mapped: dict[str, Any] = {name: function(tensor) for name, tensor in _tensors(self).items()}
        return dataclasses.replace(self, **mapped)


def concatenate(parts: Sequence[UsersAndNegatives]) -> UsersAndNegatives:
    """The users of several micro-batches as one."""
    if len(parts) == 1:
        return parts[0]
    return dataclasses.replace(
        parts[0],
        ranks=_users_of_ranks(parts),
        rejected_ids=np.concatenate([part.rejected_ids for part in parts]),
        chosen_ids=np.concatenate([part.chosen_ids for part in parts]),
        histories=[history for part in parts for history in part.histories],
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in _tensors(parts[0])},
    )


def _users_of_ranks(parts: Sequence[UsersAndNegatives]) -> tuple[int, ...] | None:
    uneven = [part.ranks for part in parts if part.ranks is not None]
    if not uneven:
        return None
    full = sum(part.users for part in parts if part.ranks is None)
    return tuple(full + sum(counts) for counts in zip(*uneven, strict=True))


def _tensors(users: UsersAndNegatives) -> dict[str, Tensor]:
    values = {field.name: getattr(users, field.name) for field in dataclasses.fields(users)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """The B users of this rank, the B' owners that they borrow from, and who borrows from whom."""

    users: int
    layout: PoolLayout
    own: Tensor  # (B,) the column of the pool that is user u's own
    own_mask: Tensor  # (B, N) bool, False for padding and for false negatives among the user's own
    mask: Tensor  # (B', N) bool, False for padding; without ``share`` for false negatives too
    scored: Tensor  # (B', N) bool, False for padding alone: the margin's means are over all that is scored
    states: Tensor | None  # (B, D)
    scores: Tensor | None  # (B', N)
    rejected_ids: Tensor  # (B', N) int64, on the device
    share: Tensor | None = None  # (B, B') bool; None: own negatives only, and B' = B
    exclude: Tensor | None = None  # (E, 3) int64: the false negatives; None without ``share``, where ``mask`` has them
    doubled: Tensor | None = None  # (B, B') bool: owners that count twice (``authors_pool``)
    detached: bool = False  # columns B... are copies of the pool that carry no gradient

    def first(self, count: int | None) -> Pool:
        """The same for the first ``count`` of its users (None: all), for figures of these."""
        if count is None or count == self.users:
            return self
        share = None if self.share is None else self.share[:count]
        return dataclasses.replace(self, users=count, own=self.own[:count], own_mask=self.own_mask[:count], share=share)

    def gather(self, rejected: Tensor) -> Tensor:
        """The pool's log-probabilities (B', N) from this rank's (B, N), with gradient."""
        pool = gather_pool(rejected, self.layout)
        return torch.cat((rejected, pool.detach())) if self.detached else pool


def build_pool(
    local: UsersAndNegatives,
    *,
    rho: float,
    across_ranks: bool = True,
    metric: str = "dot",
    exclude_false_negatives: bool = True,
    shared_gradient: bool = True,
) -> Pool:
    """The pool of the users at hand (all ranks' where ``across_ranks``) and each user's share of it.

    Without ``shared_gradient`` the pool is this rank's users followed by everybody's negatives once more: users have
    their own from the former and borrow from the latter.
    """
    layout, everyone, rejected_ids = _everyone(local, across_ranks and rho > 0.0)
    device, own = local.mask.device, np.arange(local.users) + layout.offset
    triples = np.zeros((0, 3), dtype=np.int64)
    if exclude_false_negatives:
        found = false_negative_triples(local.histories, torch.from_numpy(local.chosen_ids), rejected_ids)
        triples = found.numpy()
    is_own = triples[:, 1] == own[triples[:, 0]]
    users, _, negatives = _put(triples[is_own], device).unbind(1)
    own_mask = local.mask.index_put((users, negatives), local.mask.new_zeros(()))
    neighbours = neighbour_count(everyone.users, rho)
    if neighbours == 0:
        return Pool(
            users=local.users,
            layout=PoolLayout((local.users,), 0),
            own=torch.arange(local.users, device=device),
            own_mask=own_mask,
            mask=own_mask,
            scored=local.mask,
            states=local.states,
            scores=local.scores,
            rejected_ids=_put(local.rejected_ids, device),
        )

    share, mask, scores = _share(local, everyone, layout, neighbours, metric), everyone.mask, everyone.scores
    if not shared_gradient:
        itself = torch.eye(local.users, dtype=torch.bool, device=device)
        columns = torch.arange(everyone.users, device=device)
        share = torch.cat((itself, share & (columns != _put(own, device)[:, None])), dim=1)
        mask = torch.cat((local.mask, mask))
        scores = None if scores is None or local.scores is None else torch.cat((local.scores, scores))
        rejected_ids = torch.cat((torch.from_numpy(local.rejected_ids), rejected_ids))
        triples[:, 1] = np.where(is_own, triples[:, 0], triples[:, 1] + local.users)
        own = np.arange(local.users)
    return Pool(
        users=local.users,
        layout=layout,
        own=_put(own, device),
        own_mask=own_mask,
        mask=mask,
        scored=mask,
        states=local.states,
        scores=scores,
        rejected_ids=_put(rejected_ids, device),
        share=share,
        exclude=_put(triples, device) if len(triples) else None,
        detached=not shared_gradient,
    )


def authors_pool(local: UsersAndNegatives, *, rho: float) -> Pool:
    """The pool as the authors' released code has it, false negatives and quirks included: K by truncation, and
    on ranks above 0 a user's "own" negatives are those of rank 0's user of the same index, counted twice where that one
    is a neighbour as well."""
    layout, everyone, rejected_ids = _everyone(local, across=True)
    share = _share(local, everyone, layout, int(rho * (everyone.users - 1)), "dot")
    device = local.mask.device
    columns, index = torch.arange(everyone.users, device=device), torch.arange(local.users, device=device)[:, None]
    neighbours = share & (columns != index + layout.offset)
    taken_for_own = columns == index
    return Pool(
        users=local.users,
        layout=layout,
        own=index[:, 0] + layout.offset,
        own_mask=local.mask,
        mask=everyone.mask,
        scored=everyone.mask,
        states=local.states,
        scores=everyone.scores,
        rejected_ids=_put(rejected_ids, device),
        share=neighbours | taken_for_own,
        doubled=neighbours & taken_for_own if layout.offset else None,
    )


def _everyone(local: UsersAndNegatives, across: bool) -> tuple[PoolLayout, UsersAndNegatives, Tensor]:
    """Where this rank's users lie in the pool, the tensors of the whole pool, and its item ids on the host.

    Every rank knows what the others bring, so that it need not be exchanged: as many users as itself (accelerate's
    ``even_batches``), or in the last step of an epoch those that are left.
    """
    rejected_ids = torch.from_numpy(local.rejected_ids)
    if not across or not dist.is_initialized() or dist.get_world_size() == 1:
        return PoolLayout((local.users,), 0), local, rejected_ids
    sizes = local.ranks or (local.users,) * dist.get_world_size()
    layout = PoolLayout(sizes, sum(sizes[: dist.get_rank()]))
    everyone = local.map(lambda tensor: gather_pool(tensor, layout))
    return layout, everyone, gather_pool(rejected_ids, layout, group=_hosts(dist.group.WORLD))


@functools.cache
def _hosts(world: Any) -> Any:
    """The group of the ranks' hosts: they can exchange numbers before their devices have finished the last step."""
    return dist.new_group(backend="gloo")


def _put(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Copied to the device without waiting for its current work."""
    return torch.as_tensor(values).to(device, non_blocking=True)


def _share(
    local: UsersAndNegatives, everyone: UsersAndNegatives, layout: PoolLayout, neighbours: int, metric: str
) -> Tensor:
    assert local.states is not None, "rows were checked for user states"
    return shared_negatives(
        local.states,
        neighbours,
        pool_states=everyone.states,
        pool_offset=layout.offset,
        group_ids=local.groups,
        pool_group_ids=everyone.groups,
        metric=metric,
    )
