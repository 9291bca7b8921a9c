"""Preference training as it is usually written: the baseline that the others are measured against.

S-DPO's way: every title is a full sequence behind its own copy of the prompt, all of them go through the model in one
right-padded forward, the logits of every position are taken to fp32 and through log_softmax, and a reference model
(the same model without its adapter) goes through all of it once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def concatenated(
    prompts: Sequence[Sequence[int]], titles: Sequence[Sequence[Sequence[int]]], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, attention mask and labels, (S, T) each, of all titles."""
    sequences = [(list(p), list(t)) for p, group in zip(prompts, titles, strict=True) for t in group]
    width = max(len(p) + len(t) for p, t in sequences)
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    labels = torch.full((len(sequences), width), IGNORED)
    for row, (prompt, title) in enumerate(sequences):
        length = len(prompt) + len(title)
        ids[row, :length] = torch.tensor(prompt + title)
        mask[row, :length] = 1
        labels[row, len(prompt) : length] = torch.tensor(title)
    return ids, mask, labels


def sequence_logps(model: Any, ids: Tensor, mask: Tensor, labels: Tensor, *, answers_only: bool = False) -> Tensor:
    """(S,) sums of the titles' token log-probs; `answers_only` computes logits where a title token is predicted."""
    labels = labels[:, 1:]
    wanted = labels != IGNORED
    if answers_only:
        causal_lm = model.get_base_model()
        hidden = causal_lm.model(input_ids=ids, attention_mask=mask, use_cache=False)[0][:, :-1]
        logits = causal_lm.lm_head(hidden[wanted]).float()
        logps = logits.log_softmax(-1).gather(1, labels[wanted][:, None])[:, 0]
        return torch.zeros(len(ids)).index_add(0, wanted.nonzero()[:, 0], logps)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(2, labels.clamp_min(0)[..., None])[..., 0]
    return (logps * wanted).sum(-1)


def naive_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Sequence[int]],
    titles: Sequence[Sequence[Sequence[int]]],
    *,
    pad_id: int,
    beta: float = 1.0,
    reference: bool = True,
    answers_only: bool = False,
) -> Tensor:
    """One optimiser step of S-DPO on a PEFT model; every prompt has the same number of titles, the chosen one first."""
    batch = concatenated(prompts, titles, pad_id)
    logps = sequence_logps(model, *batch, answers_only=answers_only)
    if reference:
        with torch.no_grad(), model.disable_adapter():
            reference_logps = sequence_logps(model, *batch, answers_only=answers_only)
        logps = logps - reference_logps
    rewards = beta * logps.view(len(prompts), -1)
    loss = torch.nn.functional.softplus((rewards[:, 1:] - rewards[:, :1]).logsumexp(-1)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
