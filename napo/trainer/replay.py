"""One loss over all micro-batches of an optimiser step, in the memory of one of them (GradCache)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from napo.trainer.collator import PreferenceBatch


@dataclasses.dataclass
class Replay:
    """Everything that the micro-batches of a step need for their second pass."""

    random_states: list[list[Tensor]]
    upstream: Sequence[Tensor]  # (S,) each: the gradient of the step's loss
    loss: Tensor

    def backward_of(self, position: int, score: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Scores a micro-batch again with the same random numbers. The gradient of what is returned is that of the
        step's loss."""
        _set_random_state(self.random_states[position], device)
        return (score() * self.upstream[position]).sum()


def rehearse(
    batches: Sequence[PreferenceBatch],
    *,
    score: Callable[[PreferenceBatch], Tensor],  # (S,)
    reference: Callable[[PreferenceBatch], Tensor | None],  # (S,)
    losses: Callable[[Tensor, Tensor | None], Tensor],  # of the log-probabilities and references of all batches
    device: torch.device,
) -> Replay:
    """Score all micro-batches without gradient and compute the loss over all of them."""
    random_states, logps, references = [], [], []
    with torch.no_grad():
        for batch in batches:
            random_states.append(_random_state(device))
            logps.append(score(batch))
            known = reference(batch)
            if known is not None:
                references.append(known)
    leaf = torch.cat(logps).requires_grad_()
    by_user = losses(leaf, torch.cat(references) if references else None)
    loss = by_user.sum() / by_user.shape[0]
    (gradient,) = torch.autograd.grad(loss, leaf)
    return Replay(random_states, gradient.split([part.shape[0] for part in logps]), loss.detach())


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
