"""NAPO's loss in a training loop of your own, without a trainer: a model of transformers, padded batches, PyTorch.

Two ways to the log-probabilities of the answers, which give the same numbers:

- ``logits``: the model computes its logits as ever, and ``sequence_logps`` reads them;
- ``hidden``: the model stops before its head, ``padded_tokens`` picks the hidden states that predict an answer's token,
  and ``linear_sequence_logps`` multiplies these with the head. Logits never exist as a whole.

    python examples/plain_loop.py --model my-model --way hidden --steps 20

Without --model it trains a tiny model with random weights, in seconds on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from napo_kernels import (
    DynamicMargin,
    linear_sequence_logps,
    napo_loss,
    padded_tokens,
    sequence_logps,
    shared_negatives,
)

NEGATIVES = 3
NEIGHBOURS = 1


def encode(tokenize: Callable[[str], list[int]], prompt: str, answers: Sequence[str], end: int) -> list[dict[str, Any]]:
    """A sequence for each answer: prompt and answer, of which the answer alone has labels."""
    before = tokenize(prompt)
    made = []
    for answer in answers:
        ids = [*tokenize(answer), end]
        made.append({"input_ids": [*before, *ids], "labels": [-100] * len(before) + ids})
    return made


def pad(sequences: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """What transformers' collators make of sequences of different lengths."""
    width = max(len(one["input_ids"]) for one in sequences)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for one in sequences:
        more = width - len(one["input_ids"])
        columns["input_ids"].append([*one["input_ids"], *[pad_id] * more])
        columns["attention_mask"].append([1] * len(one["input_ids"]) + [0] * more)
        columns["labels"].append([*one["labels"], *[-100] * more])
    return {name: torch.tensor(rows) for name, rows in columns.items()}


def logps_from_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:  # (S,)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return sequence_logps(logits, batch["labels"], shift=True)


def logps_from_hidden(model: Any, batch: dict[str, Tensor]) -> Tensor:  # (S,)
    states = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    tokens = padded_tokens(states, batch["labels"], batch["attention_mask"])
    return linear_sequence_logps(weight=model.get_output_embeddings().weight, **tokens._asdict())


WAYS = {"logits": logps_from_logits, "hidden": logps_from_hidden}


def train(model: Any, rows: Sequence[dict[str, Any]], batch: dict[str, Tensor], *, way: str, steps: int) -> list[float]:
    """``rows``: B users with their states and the recommender's scores of their N rejected titles. ``batch``: their
    B (1 + N) sequences, user by user, the chosen one first. Returns the losses."""
    margin = DynamicMargin(gamma=1.0, alpha=0.3)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    states = torch.tensor([row["user_state"] for row in rows])  # (B, D)
    scores = torch.tensor([row["rejected_scores"] for row in rows])  # (B, N)
    losses = []
    for _ in range(steps):
        logps = WAYS[way](model, batch).view(len(rows), -1)  # (B, 1 + N)
        share = shared_negatives(states, k=NEIGHBOURS)  # (B, B): whose negatives each user borrows
        gamma = margin(scores, share=share)
        loss = napo_loss(logps[:, 0], logps[:, 1:], share=share, margin=gamma, beta=1.0)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def some_rows() -> list[dict[str, Any]]:
    titles = ["Toy Story", "Heat", "Casino", "Babe", "Se7en", "Jumanji", "Nixon", "Ran"]
    made = []
    for user in range(4):
        chosen, *rejected = (titles[(user + step) % len(titles)] for step in range(1 + NEGATIVES))
        made.append(
            {
                "prompt": f"Movies watched, in order:\n{titles[user - 1]}\n",
                "chosen": chosen,
                "rejected": rejected,
                "user_state": [float(user % 2), 1.0 - user % 2],
                "rejected_scores": [0.1 * user - 0.2 * step for step in range(NEGATIVES)],
            }
        )
    return made


def tiny() -> tuple[Any, Callable[[str], list[int]], int]:
    """A model with random weights that reads bytes; 0 pads, 1 ends."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=260, **sizes)), lambda text: [2 + byte for byte in text.encode()], 1


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description="NAPO's loss in a loop of your own.")
    parser.add_argument("--model", help="a folder or a name on the hub, of the Llama kind; a tiny one if left out")
    parser.add_argument("--way", choices=WAYS, default="hidden")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    if options.model is None:
        model, tokenize, end = tiny()
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model, end = AutoModelForCausalLM.from_pretrained(options.model), tokenizer.eos_token_id

        def tokenize(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = some_rows()
    sequences = [one for row in rows for one in encode(tokenize, row["prompt"], [row["chosen"], *row["rejected"]], end)]
    losses = train(model, rows, pad(sequences, pad_id=0), way=options.way, steps=options.steps)
    print(f"{options.way}: loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main()
