"""Packed against unpacked on a real model in bf16, measured by what layouts of the unpacked way differ.

One by one and padded on the right share most of their rounding; a batch padded on the left, as generation has it,
rounds on its own, and so does a packed one. All are equally far from the log-probs of the model in fp32.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from test_scoring_equality import plain_logps
from transformers import AutoModelForCausalLM, AutoTokenizer

from napo import assets
from napo.scoring import CandidateScorer, pack

TITLES = ["Toy Story", "Star Wars", "Star Trek: First Contact", "Fargo", "The Godfather", "Return of the Jedi", "Alien"]
PROMPTS = [
    "Movies watched, in order:\nBabe\nTwelve Monkeys\nDead Man Walking\nSeven\n",
    "Movies watched, in order:\nThe Usual Suspects\nMighty Aphrodite\nBraveheart\nTaxi Driver\nApollo 13\nHeat\n",
    "Movies watched, in order:\nAmadeus\n",
]


@pytest.mark.slow
@pytest.mark.skipif(not (assets.cache_dir() / "smollm2-135m").exists(), reason="SmolLM2-135M is not in the asset cache")
@torch.no_grad()
def test_within_twice_what_two_unpacked_layouts_differ() -> None:
    folder = assets.resolve_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    newline = tokenizer("\n")["input_ids"]
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    titles = [[tokenizer(title)["input_ids"] + newline for title in TITLES] for _ in prompts]
    batch = pack(prompts, titles, pad_id=0)
    layouts = [
        plain_logps(model, prompts, titles),  # one by one
        CandidateScorer(model, packed=False)(batch),  # padded on the right
        padded_on_the_left(model, prompts, titles),
    ]
    packed = CandidateScorer(model)(batch)
    between = max((first - second).norm() for first, second in itertools.combinations(layouts, 2))
    away = max((packed - layout).norm() for layout in layouts)
    print(f"layouts {between:.4f}, packed {away:.4f}, of {packed.norm():.1f}")
    assert 0 < away <= 2 * between


def padded_on_the_left(model: torch.nn.Module, prompts: list[list[int]], titles: list[list[list[int]]]) -> torch.Tensor:
    """(S,) log-probs, all sequences in one batch that ends in one column, as for generation."""
    pairs = [(prompt, title) for prompt, own in zip(prompts, titles, strict=True) for title in own]
    width = max(len(prompt) + len(title) for prompt, title in pairs)
    ids, mask = torch.zeros(2, len(pairs), width, dtype=torch.long)
    for row, (prompt, title) in enumerate(pairs):
        ids[row, width - len(prompt) - len(title) :] = torch.tensor(prompt + title)
        mask[row, width - len(prompt) - len(title) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float().log_softmax(-1)
    return torch.stack(
        [
            logits[row, width - len(title) - 1 : -1].gather(1, torch.tensor(title)[:, None]).sum()
            for row, (_, title) in enumerate(pairs)
        ]
    )
