"""``napo_loss`` on the CPU: the kernels of the compiled module, and torch's matmul for the scores of a pair margin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from napo_kernels.backends import compiled
from napo_kernels.problem import LossProblem

# Pair scores in memory at a time.
_BLOCK = 1 << 21


def log_sums(p: LossProblem) -> tuple[Tensor, Tensor]:
    """The users' log-sum pairs m and rest, (B,) each; (-inf, -inf) where a set is empty."""
    kernels = _Kernels(p)
    if p.share is None:
        return kernels.owner_sums()
    m, rest = torch.empty_like(p.chosen), torch.empty_like(p.chosen)
    if p.separable:
        owner_m, owner_rest = kernels.owner_sums()
        kernels.call("separable_sums", owner_m, owner_rest, m, rest)
    else:
        for row, rows, score in kernels.blocks():
            kernels.call("general_sums", row, rows, score, m, rest)
    return m, rest


def rejected_gradient(p: LossProblem, g: Tensor, m: Tensor, rest: Tensor) -> Tensor:
    """beta * sum_u g_u exp(beta s_vn + gamma_uvn - lse_u): (B', N). ``g``, ``m`` and ``rest`` are (B,)."""
    kernels = _Kernels(p)
    g = g.contiguous()
    d_rejected = torch.zeros(p.rejected.shape)
    if p.share is None:
        kernels.call("owner_gradient", m, rest, g, d_rejected)
    elif p.separable:
        owner_m, owner_rest = kernels.owner_sums()
        c = torch.empty(p.rejected.shape[0])
        kernels.call("separable_gradient", owner_m, owner_rest, g, m, rest, c, d_rejected)
        kernels.call("owner_gradient", owner_m, owner_rest, c, d_rejected)
    else:
        for row, rows, score in kernels.blocks():
            kernels.call("general_gradient", row, rows, score, g, m, rest, d_rejected)
    return d_rejected


class _Kernels:
    """The compiled kernels on one problem, whose tensors it keeps alive, contiguous where a kernel wants them so."""

    def __init__(self, p: LossProblem) -> None:
        module = compiled()
        assert module is not None  # resolve() has seen to it
        self.users, (self.owners, self.n) = p.chosen.shape[0], p.rejected.shape
        margin = torch.zeros(p.rejected.shape) if p.owner_margin is None else p.owner_margin
        if p.keep is not None:
            margin = torch.where(p.keep, margin, -torch.inf)
        bounds = place = None
        if p.exclude is not None:
            triples = p.exclude.contiguous()
            bounds = torch.empty((self.users, 2), dtype=torch.int64)
            place = torch.empty(len(triples), dtype=torch.int32)
            shape = (self.users, self.owners, self.n)
            module.index_excluded(triples.data_ptr(), len(triples), *shape, bounds.data_ptr(), place.data_ptr())
        share = None if p.share is None else p.share.contiguous()
        self.tensors = [p.rejected.contiguous(), margin.contiguous(), share, bounds, place]
        sizes = (self.users, self.owners, self.n, p.beta)
        self.kernels = module.NapoLoss(*sizes, *(_address(t) for t in self.tensors), torch.get_num_threads())

        for name, part in (("set_full_margin", p.full_margin), ("set_full_keep", p.full_keep)):
            if part is not None:
                self.tensors.append(part)
                strides = (0 if size == 1 else stride for size, stride in zip(part.shape, part.stride(), strict=True))
                getattr(self.kernels, name)(part.data_ptr(), *strides)
        self.user_states, self.item_vectors = p.user_states, p.item_vectors
        if p.line is not None:
            bias = None if p.item_bias is None else p.item_bias.contiguous()
            self.tensors.append(bias)
            self.kernels.set_pair_margin(_address(bias), *p.line.tolist())

    def call(self, name: str, *arguments: Any) -> None:
        """Runs a kernel; tensors become addresses."""
        getattr(self.kernels, name)(*(_address(a) if a is None or isinstance(a, Tensor) else a for a in arguments))

    def owner_sums(self) -> tuple[Tensor, Tensor]:
        m, rest = torch.empty(self.owners), torch.empty(self.owners)
        self.call("owner_sums", m, rest)
        return m, rest

    def blocks(self) -> Iterator[tuple[int, int, Tensor | None]]:
        """First row, number of rows and pair scores (rows, B' N) of the general form's blocks."""
        if self.user_states is None or self.item_vectors is None:
            yield 0, self.users, None
            return
        items = self.item_vectors.reshape(self.owners * self.n, -1).T
        step = max(1, _BLOCK // max(1, self.owners * self.n))
        score = torch.empty((min(step, self.users), self.owners * self.n))
        for row in range(0, self.users, step):
            rows = min(step, self.users - row)
            yield row, rows, torch.mm(self.user_states[row : row + rows], items, out=score[:rows])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
