"""``shared_negatives``: chooses whose negatives each user borrows (docs/design.md section 4.3)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from napo_kernels import dispatch
from napo_kernels.checks import check_floats, check_integer, check_integers, check_shape, check_tensor
from napo_kernels.ops.registration import as_given, define, fake, fields

_OP = dispatch.register("shared_negatives")


class _Arguments(NamedTuple):
    states: Tensor  # (B, D)
    pool_states: Tensor  # (B', D)
    k: int
    pool_offset: int
    group_ids: Tensor | None  # (B,)
    pool_group_ids: Tensor | None  # (B',)


@define("shared_negatives", f"({fields(_Arguments)}, str? backend) -> Tensor")
def _op(*arguments: Any) -> Tensor:  # (B, B') bool
    a, backend = _Arguments(*arguments[:-1]), arguments[-1]
    selection = dispatch.kernels(_OP, a.states, backend)
    # Autocast would round the similarities to 8 bits of mantissa, and TF32 what they are made of to 10: neighbours
    # would change places.
    with as_given(a.states, full_precision=True):
        share: Tensor = selection.shared_negatives(*a)
    return share


@fake(_op)
def _(states: Tensor, pool_states: Tensor, *_: Any) -> Tensor:
    return states.new_empty((states.shape[0], pool_states.shape[0]), dtype=torch.bool)


def neighbour_count(pool_size: int, rho: float) -> int:
    """K = floor((B' - 1) * rho) with rho read as the decimal that was written: .7 of 90 is 63, where int() gives 62."""
    if not 0.0 <= rho <= 1.0:
        raise ValueError(f"rho: expected a share between 0 and 1, got {rho}")
    return math.floor(Fraction(str(float(rho))) * max(0, pool_size - 1))


def shared_negatives(
    states: Tensor,  # (B, D)
    k: int,
    *,
    pool_states: Tensor | None = None,  # (B', D)
    pool_offset: int = 0,
    group_ids: Tensor | None = None,  # (B,) int64
    pool_group_ids: Tensor | None = None,  # (B',) int64
    metric: str = "dot",
    backend: str | None = None,
) -> Tensor:  # (B, B') bool
    """The ``k`` owners of the pool whose states are most similar to each user's, as a boolean mask (B, B').

    User u is column ``pool_offset + u`` of the pool (by default the pool is the batch itself) and always has its own
    negatives. Columns with the user's group id are never borrowed; where fewer than ``k`` are left, all of them are.
    Equal similarities go to the lower index. ``metric`` is ``"dot"`` or ``"cosine"``, in full fp32 whatever
    ``torch.set_float32_matmul_precision`` says. No gradient.

    Examples:
        >>> shared_negatives(torch.eye(3), 1)
        tensor([[ True,  True, False],
                [ True,  True, False],
                [ True, False,  True]])
    """
    check_tensor("states", states, 2, "(B, D)")
    check_floats("states", states)
    if pool_states is None:
        if pool_offset != 0 or pool_group_ids is not None:
            raise ValueError("pool_states: pool_offset and pool_group_ids need it; without it the pool is the batch")
        pool_states, pool_group_ids = states, group_ids
    check_tensor("pool_states", pool_states, 2, f"(B', {states.shape[1]})", device=states.device)
    check_floats("pool_states", pool_states)
    check_shape("pool_states", pool_states, (pool_states.shape[0], states.shape[1]))
    users, owners = states.shape[0], pool_states.shape[0]
    check_integer("pool_offset", pool_offset, "a column of the pool", 0)
    if pool_offset + users > owners:
        raise ValueError(f"pool_offset: {pool_offset} + {users} users do not fit a pool of {owners}")
    most = max(0, owners - 1)
    check_integer("k", k, f"0 to B' - 1 = {most} neighbours", 0, most)
    if (group_ids is None) != (pool_group_ids is None):
        raise ValueError("group_ids, pool_group_ids: give both or neither when there is a pool")
    for name, ids, size in (("group_ids", group_ids, users), ("pool_group_ids", pool_group_ids, owners)):
        if ids is not None:
            check_tensor(name, ids, 1, f"({size},)", device=states.device)
            check_integers(name, ids)
            check_shape(name, ids, (size,))
    if metric not in ("dot", "cosine"):
        raise ValueError(f"metric: expected 'dot' or 'cosine', got {metric!r}")
    dispatch.check_backend(backend)

    dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
    states, pool_states = states.detach().to(dtype), pool_states.detach().to(dtype)
    if metric == "cosine":
        states, pool_states = normalize(states, dim=1), normalize(pool_states, dim=1)
    if group_ids is not None and pool_group_ids is not None:
        group_ids, pool_group_ids = group_ids.long(), pool_group_ids.long()
    share: Tensor = _op(states, pool_states, k, pool_offset, group_ids, pool_group_ids, backend)
    return share
