"""``authors_compat`` against a script of its own, written from what the authors' released trainer computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trainer_cases import distance, make_rows, step_gradients, tiny_model, tiny_tokenizer, trainer

STEPS, BATCH, ACCUMULATION = 20, 4, 2
GAMMA, ALPHA, RHO, BETA, RATE = 1.0, 0.3, 0.7, 1.0, 1e-3
ROWS = make_rows(STEPS * BATCH * ACCUMULATION, ragged=False)


def sequence_logps(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """Full logits of every position, the sum over the answer's tokens, end token included."""
    logits = model(torch.tensor([prompt + answer])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)[range(len(answer)), answer].sum()


def negatives_of(
    rows: list[dict[str, Any]], rejected: Tensor, first: int, users: int, rho: float = RHO
) -> tuple[list[Tensor], float]:
    """For the ``users`` rows of a rank, from ``first`` on: the log-probabilities of their negatives among those of all
    ranks' rows, and the mean score of all of these."""
    with torch.no_grad():  # their gather: no negative gets a gradient, own ones included
        gathered = rejected.clone()
    states = torch.tensor([row["user_state"] for row in rows], dtype=rejected.dtype)
    similarity = states @ states.T
    count = int(rho * (len(rows) - 1))
    negatives, scores = [], []
    for index in range(users):
        user = first + index
        others = [v for v, other in enumerate(rows) if other["user_id"] != rows[user]["user_id"]]
        nearest = sorted(others, key=lambda v: -float(similarity[user, v]))[:count]
        taken = [index, *nearest]  # "own" by the index on the rank, so on others than the first those of the first
        negatives.append(torch.cat([gathered[v] for v in taken]))
        scores += [score for v in taken for score in rows[v]["rejected_scores"]]
    return negatives, sum(scores) / len(scores)


def authors_loss(rows: list[dict[str, Any]], chosen: Tensor, rejected: Tensor, ema: float) -> tuple[Tensor, float]:
    """One micro-batch on one rank; returns the loss and the moving average after it."""
    negatives, mean = negatives_of(rows, rejected, 0, len(rows))
    ema = 0.9 * ema + 0.1 * mean
    return softmax_loss(chosen, negatives, GAMMA - ALPHA * (mean - ema) * GAMMA), ema


def softmax_loss(chosen: Tensor, negatives: list[Tensor], gamma: float) -> Tensor:
    losses = []
    for plus, minus in zip(chosen, negatives, strict=True):
        inside = -torch.log(torch.exp(BETA * (minus - plus)).sum()) - gamma
        losses.append(-torch.log(torch.sigmoid(inside)))
    return torch.stack(losses).mean()


def logps_table(model: torch.nn.Module, rows: list[dict[str, Any]]) -> Tensor:  # (B, 1 + N)
    tokenizer = tiny_tokenizer()
    logps = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for answer in (row["chosen"], *row["rejected"]):
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            logps.append(sequence_logps(model, prompt, ids))
    return torch.stack(logps).view(len(rows), -1)


def independent_run(model: torch.nn.Module, steps: int = STEPS) -> list[float]:
    """AdamW, cosine decay without warm-up: the loss of the first optimiser steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    history, ema, rows = [], 0.0, iter(ROWS)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1.0 + math.cos(math.pi * step / STEPS))
        total = 0.0
        for _ in range(ACCUMULATION):
            batch = [next(rows) for _ in range(BATCH)]
            table = logps_table(model, batch)
            loss, ema = authors_loss(batch, table[:, 0], table[:, 1:], ema)
            (loss / ACCUMULATION).backward()
            total += float(loss.detach()) / ACCUMULATION
        optimizer.step()
        optimizer.zero_grad()
        history.append(total)
    return history


def test_gradient_of_a_step_is_the_authors(tmp_path: Path) -> None:
    """In fp32, through the kernels. With our own margin the gradient is another one."""
    model, batch = tiny_model(torch.float64), ROWS[:BATCH]
    table = logps_table(model, batch)
    authors_loss(batch, table[:, 0], table[:, 1:], 0.0)[0].backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    (found,) = step_gradients(tmp_path / "authors", ROWS, authors_compat=True)
    (ours,) = step_gradients(tmp_path / "ours", ROWS, granularity="batch")
    assert distance(found, expected) < 1e-5
    assert distance(ours, expected) > 1e-3


def test_twenty_steps_follow_the_authors_code(tmp_path: Path) -> None:
    model, ours = tiny_model(torch.float64), tiny_model(torch.float64)
    expected = independent_run(model)
    run = trainer(
        tmp_path,
        ROWS,
        ours,
        authors_compat=True,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    assert max(expected) - min(expected) > 0.5
    for (name, a), (_, b) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=name)


def test_our_own_way_differs_from_the_authors(tmp_path: Path) -> None:
    """The quirks show: with a gradient on negatives and a margin of our own the first steps already part."""
    expected = independent_run(tiny_model(torch.float64), steps=3)
    options = {"max_steps": 3, "gradient_accumulation_steps": ACCUMULATION, "learning_rate": RATE}
    run = trainer(tmp_path, ROWS, tiny_model(torch.float64), granularity="batch", **options)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) > 1e-2
