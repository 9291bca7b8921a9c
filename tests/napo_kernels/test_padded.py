"""Padded batches: against logits with labels shifted, and what padding may hold."""

from __future__ import annotations

import pytest
import torch

from napo_kernels import linear_sequence_logps, padded_tokens, sequence_logps

S, T, H, V = 3, 6, 4, 11


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(S, T, H, generator=generator)
    head = torch.randn(V, H, generator=generator)
    labels = torch.randint(0, V, (S, T), generator=generator)
    labels[torch.rand(S, T, generator=generator) < 0.4] = -100
    return states, head, labels


@pytest.mark.parametrize("average", [False, True])
def test_equal_to_logits_with_shifted_labels(average: bool) -> None:
    states, head, labels = case()
    labels[1] = -100  # a sequence without a label
    ours = linear_sequence_logps(weight=head, average=average, **padded_tokens(states, labels)._asdict())
    torch.testing.assert_close(ours, sequence_logps(states @ head.T, labels, shift=True, average=average))
    assert ours[1] == 0


def test_gradients_reach_the_states() -> None:
    states, head, labels = case(1)
    ours, theirs = states.clone().requires_grad_(), states.clone().requires_grad_()
    linear_sequence_logps(weight=head, **padded_tokens(ours, labels)._asdict()).sum().backward()
    sequence_logps(theirs @ head.T, labels, shift=True).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_neither_counts_nor_predicts(side: str) -> None:
    states, head, labels = case(2)
    labels = labels.clamp(min=0)  # everything is labelled, padding too, as labels = input_ids.clone() leaves it
    mask = torch.ones(S, T, dtype=torch.int64)
    for sequence in range(S):
        if sequence:
            mask[sequence, slice(0, sequence) if side == "left" else slice(-sequence, None)] = 0
    ours = linear_sequence_logps(weight=head, **padded_tokens(states, labels, mask)._asdict())
    for sequence in range(S):
        kept = mask[sequence].bool()
        alone = sequence_logps(states[sequence, kept][None] @ head.T, labels[sequence, kept][None], shift=True)
        torch.testing.assert_close(ours[sequence], alone[0])
    dirty = states.masked_fill(~mask.bool()[..., None], float("nan"))
    assert torch.equal(ours, linear_sequence_logps(weight=head, **padded_tokens(dirty, labels, mask)._asdict()))


def test_nothing_to_score() -> None:
    states, head, labels = case()
    tokens = padded_tokens(states, torch.full_like(labels, -100))
    assert linear_sequence_logps(weight=head, **tokens._asdict()).tolist() == [0.0] * S


def test_what_does_not_fit_is_named() -> None:
    states, _, labels = case()
    with pytest.raises(ValueError, match=r"^labels: expected shape \(3, 6\) of hidden_states, got \(3, 5\)"):
        padded_tokens(states, labels[:, 1:])
    with pytest.raises(ValueError, match=r"^attention_mask: expected shape \(3, 6\) of labels, got \(3, 5\)"):
        padded_tokens(states, labels, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"^hidden_states: expected shape"):
        padded_tokens(states[0], labels)
    with pytest.raises(ValueError, match=r"^labels: "):
        padded_tokens(states, labels.float())
