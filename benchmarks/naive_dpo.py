"""Preference training as it is usually written: the baselines that the others are measured against.

S-DPO's way: every title is a full sequence behind its own copy of the prompt, all of them go through the model in one
right-padded forward, the logits of every position are taken to fp32 and through log_softmax, and a reference model
(the same model without its adapter) goes through all of it once more. SimPO's way is the same without the reference
and with averages. TRL's trainers know only pairs: N negatives are N pairs, each with its own copy of the chosen title.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

IGNORED = -100


def concatenated(
    prompts: Sequence[Sequence[int]],
    titles: Sequence[Sequence[Sequence[int]]],
    pad_id: int,
    device: torch.device | str = "cpu",
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
    return ids.to(device), mask.to(device), labels.to(device)


def sequence_logps(model: Any, ids: Tensor, mask: Tensor, labels: Tensor, *, answers_only: bool = False) -> Tensor:
    """(S,) sums of the titles' token log-probs; `answers_only` computes logits where a title token is predicted."""
    labels = labels[:, 1:]
    wanted = labels != IGNORED
    if answers_only:
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = causal_lm.model(input_ids=ids, attention_mask=mask, use_cache=False)[0][:, :-1]
        logits = wide(causal_lm.lm_head(hidden[wanted]))
        logps = logits.log_softmax(-1).gather(1, labels[wanted][:, None])[:, 0]
        return logps.new_zeros(len(ids)).index_add(0, wanted.nonzero()[:, 0], logps)
    logits = wide(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1])
    logps = logits.log_softmax(-1).gather(2, labels.clamp_min(0)[..., None])[..., 0]
    return (logps * wanted).sum(-1)


def wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def naive_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Sequence[int]],
    titles: Sequence[Sequence[Sequence[int]]],
    *,
    pad_id: int,
    beta: float = 1.0,
    gamma: float = 0.0,
    reference: bool = True,
    average: bool = False,
    pairs: bool = False,
    answers_only: bool = False,
    micro_batches: int = 1,
) -> Tensor:
    """One optimiser step on a PEFT model; every prompt has the same number of titles, the chosen one first.

    `pairs`: N losses of one negative each instead of one loss over N. `micro_batches`: the number of parts, one after
    the other, if the users do not fit at once."""
    device = next(model.parameters()).device
    optimizer.zero_grad()
    total = torch.zeros((), device=device)
    size = -(-len(prompts) // micro_batches)
    for first in range(0, len(prompts), size):
        some, groups = prompts[first : first + size], titles[first : first + size]
        if pairs:
            some = [prompt for prompt, group in zip(some, groups, strict=True) for _ in group[1:]]
            groups = [[group[0], negative] for group in groups for negative in group[1:]]
        ids, mask, labels = concatenated(some, groups, pad_id, device)
        logps = sequence_logps(model, ids, mask, labels, answers_only=answers_only)
        if reference:
            with torch.no_grad(), model.disable_adapter():
                frozen = sequence_logps(model, ids, mask, labels, answers_only=answers_only)
            logps = logps - frozen
        if average:
            logps = logps / (labels != IGNORED).sum(1)
        rewards = beta * logps.view(len(some), -1)
        losses = softplus((rewards[:, 1:] - rewards[:, :1]).logsumexp(-1) + gamma)
        loss = losses.mean() * (min(size, len(prompts) - first) / len(prompts))
        loss.backward()
        total += loss.detach()
    optimizer.step()
    return total
