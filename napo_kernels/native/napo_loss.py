"""``napo_loss`` on the CPU and on CUDA: the kernels of the compiled module, and torch's matmul for the scores of a pair
margin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from napo_kernels.native import calls
from napo_kernels.problem import LossProblem

# Pair scores in memory at a time on CUDA, or as much as the mask takes where that is more: a block has rows enough to
# fill a GPU.
_BLOCK = 1 << 22


def log_sums(p: LossProblem) -> tuple[Tensor, Tensor]:
    """The users' log-sum pairs m and rest, (B,) each; (-inf, -inf) where a set is empty."""
    kernels = _Kernels(p, "user")
    if p.share is None:
        return kernels.owner_sums()
    m, rest = kernels.empty(kernels.users), kernels.empty(kernels.users)
    if p.separable:
        owner_m, owner_rest = kernels.owner_sums()
        kernels.call("separable_sums", owner_m, owner_rest, m, rest)
    else:
        for row, rows, score in kernels.blocks():
            kernels.call("general_sums", row, rows, score, m, rest)
    return m, rest


def rejected_gradient(p: LossProblem, g: Tensor, m: Tensor, rest: Tensor) -> Tensor:
    """beta * sum_u g_u exp(beta s_vn + gamma_uvn - lse_u): (B', N). ``g``, ``m`` and ``rest`` are (B,)."""
    kernels = _Kernels(p, "owner")
    g, m, rest = g.contiguous(), m.contiguous(), rest.contiguous()
    d_rejected = torch.zeros(p.rejected.shape, device=p.rejected.device)
    if p.share is None:
        kernels.call("owner_gradient", m, rest, g, d_rejected)
    elif p.separable:
        owner_m, owner_rest = kernels.owner_sums()
        c, scratch = kernels.empty(kernels.owners), kernels.scratch(kernels.users, kernels.owners)
        kernels.call("separable_gradient", owner_m, owner_rest, g, m, rest, scratch, c, d_rejected)
        kernels.call("owner_gradient", owner_m, owner_rest, c, d_rejected)
    else:
        for row, rows, score in kernels.blocks():
            scratch = kernels.scratch(rows, kernels.owners * kernels.n)
            kernels.call("general_gradient", row, rows, score, g, m, rest, scratch, d_rejected)
    return d_rejected


def losses(p: LossProblem, m: Tensor, rest: Tensor) -> Tensor:
    """As the reference's, on the CPU: one call in place of seven ops on B numbers."""
    users, out = [p.chosen.contiguous(), p.user_margin.contiguous(), m, rest], torch.empty_like(m)
    addresses = map(calls.address, (*users, out))
    calls.module().losses(len(out), p.beta, *addresses, torch.get_num_threads())
    return out


def chosen_gradient(p: LossProblem, grad: Tensor, m: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference's, on the CPU."""
    users = [x.contiguous() for x in (p.chosen, p.user_margin, m, rest, grad)]
    g, d_chosen = torch.empty_like(users[0]), torch.empty_like(users[0])
    addresses = map(calls.address, (*users, g, d_chosen))
    calls.module().chosen_gradient(len(g), p.beta, *addresses, torch.get_num_threads())
    return g, d_chosen


class _Kernels:
    """The compiled kernels on one problem, whose tensors it keeps alive, contiguous where a kernel wants them so.

    On CUDA the excluded triples are sorted by user for sums, by owner for gradients: ``excluded_by``.
    """

    def __init__(self, p: LossProblem, excluded_by: str) -> None:
        self.users, (self.owners, self.n) = p.chosen.shape[0], p.rejected.shape
        self.device, self.where = p.rejected.device, calls.where(p.rejected)
        margin = torch.zeros_like(p.rejected) if p.owner_margin is None else p.owner_margin
        if p.keep is not None:
            margin = torch.where(p.keep, margin, -torch.inf)
        bounds = index = None
        if p.exclude is not None and p.share is not None:
            shape = (self.users, self.owners, self.n)
            if self.where["cuda"]:
                bounds, index = _sorted_on_device(p.exclude, shape, excluded_by)
            else:
                bounds, index = _indexed_by_user(p.exclude, shape)
        share = None if p.share is None else p.share.contiguous()
        self.tensors = [p.rejected.contiguous(), margin.contiguous(), share, bounds, index]
        sizes = (self.users, self.owners, self.n, p.beta)
        self.kernels = calls.module().LossKernels(
            *sizes, *map(calls.address, self.tensors), self.where["cuda"], self.where["queue"]
        )

        for name, part in (("set_full_margin", p.full_margin), ("set_full_keep", p.full_keep)):
            if part is not None:
                self.tensors.append(part)
                strides = (0 if size == 1 else stride for size, stride in zip(part.shape, part.stride(), strict=True))
                getattr(self.kernels, name)(part.data_ptr(), *strides)
        self.user_states, self.item_vectors = p.user_states, p.item_vectors
        if p.user_states is not None and p.item_vectors is not None:
            width = p.user_states.shape[1]
            pair = [None if x is None else x.contiguous() for x in (p.user_states, p.item_vectors, p.item_bias, p.line)]
            self.tensors += pair
            states, items, bias, line = map(calls.address, pair)
            self.kernels.set_pair_margin(states, items, width, bias, line)

    def call(self, name: str, *arguments: Any) -> None:
        """Runs a kernel; tensors become addresses."""
        getattr(self.kernels, name)(*(calls.address(a) if a is None or isinstance(a, Tensor) else a for a in arguments))

    def empty(self, size: int) -> Tensor:
        return torch.empty(size, device=self.device)

    def scratch(self, users: int, terms: int) -> Tensor:
        return self.empty(self.kernels.gradient_scratch(users, terms))

    def owner_sums(self) -> tuple[Tensor, Tensor]:
        m, rest = self.empty(self.owners), self.empty(self.owners)
        self.call("owner_sums", m, rest)
        return m, rest

    def blocks(self) -> Iterator[tuple[int, int, Tensor | None]]:
        """First row, number of rows and pair scores (rows, B' N) of the general form's blocks. The CPU's kernels make
        the scores themselves: torch's matmul would take four fifths of the time (csrc/cpu/shared_negatives.cpp)."""
        if self.user_states is None or self.item_vectors is None or not self.where["cuda"]:
            yield 0, self.users, None
            return
        places = self.owners * self.n
        items = self.item_vectors.flatten(0, 1).T
        step = max(1, max(_BLOCK, self.users * self.owners // 4) // max(1, places))
        score = torch.empty((min(step, self.users), places), device=self.device)
        for row in range(0, self.users, step):
            rows = min(step, self.users - row)
            yield row, rows, torch.mm(self.user_states[row : row + rows], items, out=score[:rows])


def _indexed_by_user(exclude: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """``Excluded`` of csrc/cpu/napo_loss.h: bounds (B, 2) and places (E,)."""
    triples = exclude.contiguous()
    bounds = torch.empty((shape[0], 2), dtype=torch.int64)
    place = torch.empty(len(triples), dtype=torch.int32)
    calls.module().index_excluded(triples.data_ptr(), len(triples), *shape, bounds.data_ptr(), place.data_ptr())
    return bounds, place


def _sorted_on_device(exclude: Tensor, shape: tuple[int, int, int], by: str) -> tuple[Tensor, Tensor]:
    """``SortedTriples`` of csrc/cuda/napo_loss.h: bounds (groups + 1,) and keys (E,). Nothing waits for the device, so
    what is out of range cannot be an error: it goes to the end with the padding, behind all bounds."""
    user, owner, negative = exclude.unbind(1)
    users, owners, n = shape
    valid = (user >= 0) & (user < users) & (owner >= 0) & (owner < owners) & (negative >= 0) & (negative < n)
    (group, groups), (other, others) = (user, users), (owner, owners)
    if by == "owner":
        (group, groups), (other, others) = (other, others), (group, groups)
    key = torch.where(valid, (group * others + other) * n + negative, groups * others * n).sort().values
    return torch.searchsorted(key, torch.arange(groups + 1, device=key.device) * (others * n)), key
