"""From padded batches, as transformers lays them out, to what ``linear_sequence_logps`` takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from napo_kernels.checks import check_floats, check_index, check_integer, check_tensor


class PaddedTokens(NamedTuple):
    """The labels of S padded sequences, one after the other, and the hidden states that predict them."""

    hidden: Tensor  # (Q, H)
    targets: Tensor  # (Q,) int64
    sequence_ids: Tensor  # (Q,) int64
    num_sequences: int
    rows: None = None
    """Each label has a row of its own, so ``linear_sequence_logps`` needs none."""


def padded_tokens(
    hidden_states: Tensor,  # (S, T, H): the model's last, before the head
    labels: Tensor,  # (S, T) int64
    attention_mask: Tensor | None = None,  # (S, T), 0 at padding
    *,
    ignore_index: int = -100,
) -> PaddedTokens:
    """The tokens of a padded batch that are scored. ``labels`` mean the same as in transformers: ``labels[s, t]`` is
    the token at t, predicted at t - 1, or ``ignore_index`` where it does not count (a prompt, padding).

    ``linear_sequence_logps(weight=head.weight, **tokens._asdict())`` scores it. With an ``attention_mask`` padding
    neither counts nor predicts, on whichever side it stands, whatever its labels are. The first token of a sequence is
    never scored. On a GPU this waits once for the number of labels.

    Examples:
        >>> import torch
        >>> tokens = padded_tokens(torch.zeros(2, 3, 4), torch.tensor([[-100, 5, 6], [-100, 7, -100]]))
        >>> tokens.targets, tokens.sequence_ids
        (tensor([5, 6, 7]), tensor([0, 0, 1]))
    """
    check_tensor("hidden_states", hidden_states, 3, "(S, T, H)")
    check_floats("hidden_states", hidden_states)
    check_index("labels", labels, 2, "(S, T)", device=hidden_states.device)
    if labels.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"labels: expected shape {tuple(hidden_states.shape[:2])} of hidden_states, got {tuple(labels.shape)}"
        )
    check_integer("ignore_index", ignore_index, "an integer of 64 bits", -(2**63))
    counts = labels[:, 1:] != ignore_index  # (S, T - 1)
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, 2, "(S, T)", device=hidden_states.device)
        if attention_mask.shape != labels.shape:
            raise ValueError(
                f"attention_mask: expected shape {tuple(labels.shape)} of labels, got {tuple(attention_mask.shape)}"
            )
        there = attention_mask != 0
        counts = counts & there[:, 1:] & there[:, :-1]
    sequences, places = counts.nonzero(as_tuple=True)
    return PaddedTokens(
        hidden=hidden_states[sequences, places],
        targets=labels[sequences, places + 1],
        sequence_ids=sequences,
        num_sequences=len(labels),
    )
