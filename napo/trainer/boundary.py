"""DynamicPO (arXiv 2605.00327): of a user's negatives those near the decision boundary, and how much each counts."""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH, WANTED = 0.5, 2.0
"""Betas move by up to half, and stay where the chosen answer is this much farther above than the others are below."""


def near_boundary(logps: Tensor, mask: Tensor) -> Tensor:
    """(B, 1 + N) log-probabilities, the chosen answer's first, and (B, N) which negatives there are -> (B, N): each
    one's share of the mean reward, 0 for those that are left out, times beta's factor.

    Near are the negatives that are as likely as the chosen answer or likelier; where there are none, the upper of three
    clusters. The farther the chosen answer is above a negative, and the nearer that one is to those that are left out,
    the larger is its beta.
    """
    chosen, rejected = logps[:, :1].double(), torch.where(mask, logps[:, 1:].double(), -torch.inf)
    above = rejected >= chosen  # (B, N)
    near = torch.where(above.any(1, keepdim=True), above, _upper_cluster(rejected)) & mask
    others = torch.where((mask & ~near).any(1, keepdim=True), mask & ~near, near)
    low = torch.where(others, rejected, 0.0).sum(1, keepdim=True) / others.sum(1, keepdim=True).clamp(min=1)
    up, down = chosen - rejected, rejected - low  # (B, N)
    far = ((up - down - WANTED) / (up.abs() + down.abs()).clamp(min=1e-9)).tanh()
    share = (1.0 + STRENGTH * far) / near.sum(1, keepdim=True).clamp(min=1)
    return torch.where(near, share, 0.0)


def _upper_cluster(values: Tensor) -> Tensor:
    """(B, N), -inf where there is nothing -> (B, N) which belong to the uppermost of the three clusters with the least
    squares. In a line a cluster has what lies between two cuts: all cuts are tried. Up to three values are a cluster
    each."""
    ordered, order = values.sort(dim=1, descending=True)
    there = ordered.isfinite()
    count = there.sum(1)[:, None, None]  # (B, 1, 1)
    v = torch.where(there, ordered, 0.0)
    first, second = (torch.nn.functional.pad(x.cumsum(1), (1, 0)) for x in (v, v * v))  # (B, N + 1)
    place = torch.arange(values.shape[1] + 1, device=values.device)
    length = place[None, :] - place[:, None]  # (N + 1, N + 1)
    sums = first[:, None, :] - first[:, :, None]  # (B, N + 1, N + 1) from place i up to place j
    spread = second[:, None, :] - second[:, :, None] - sums**2 / length.clamp(min=1)
    last = spread.gather(2, count.expand(-1, spread.shape[1], 1))[:, None, :, 0]  # (B, 1, N + 1) from j to the end
    cost = spread[:, :1].transpose(1, 2) + spread + last  # cuts at i and j
    allowed = (place[:, None] >= 1) & (length > 0) & (place[None, :] < count)
    best = torch.where(allowed, cost, torch.inf).flatten(1).argmin(1) // len(place)  # (B,) the first cut
    best = torch.where(count[:, 0, 0] >= 3, best, 1)
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, order, place[:-1] < best[:, None])
