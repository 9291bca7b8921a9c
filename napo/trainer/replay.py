"""One loss over all micro-batches of an optimiser step, in the memory of one of them (GradCache)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from napo.trainer.collator import PreferenceBatch


@dataclasses.dataclass
class Replay:
    """Everything that the micro-batches of a step need to hand the gradient on. The first one was scored last, with its
    graph, and needs no second pass."""

    first: Tensor | None  # (S,) its log-probabilities; None once it has handed the gradient on
    random_states: list[list[Tensor]]  # of the others
    upstream: Sequence[Tensor]  # (S,) each: the gradient of the step's loss
    loss: Tensor

    def backward_of(self, position: int, score: Callable[[], Tensor], device: torch.device) -> Tensor:
        """A tensor whose gradient is what the step's loss has by way of this micro-batch: of one behind the first by
        scoring it again, with the same random numbers."""
        if position == 0:
            assert self.first is not None
            logps, self.first = self.first, None
            return (logps * self.upstream[0]).sum()
        now = _random_state(device)
        _set_random_state(self.random_states[position - 1], device)
        logps = score()
        _set_random_state(now, device)  # or the next step would draw the first one's numbers again
        return (logps * self.upstream[position]).sum()


def rehearse(
    batches: Sequence[PreferenceBatch],
    *,
    score: Callable[[PreferenceBatch], Tensor],  # (S,)
    reference: Callable[[PreferenceBatch], Tensor | None],  # (S,)
    losses: Callable[[Tensor, Tensor | None], Tensor],  # of the log-probabilities and references of all batches
    device: torch.device,
) -> Replay:
    """Score all micro-batches, the first one last and alone with its graph, and compute the loss over all of them."""
    random_states, others = [], []
    with torch.no_grad():
        references = [reference(batch) for batch in batches]
        for batch in batches[1:]:
            random_states.append(_random_state(device))
            others.append(score(batch))
    first = score(batches[0])
    leaf = torch.cat([first.detach(), *others]).requires_grad_()
    known = [part for part in references if part is not None]
    by_user = losses(leaf, torch.cat(known) if known else None)
    loss = by_user.sum() / sum(batch.mean_users for batch in batches)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return Replay(first, random_states, gradient.split([len(first), *map(len, others)]), loss.detach())


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
