"""Packed against unpacked on a real model in bf16, measured by what layouts of the unpacked way differ.

How far two layouts are apart depends on how much of their rounding they share, and so on the CPU: where a matmul rounds
each row alike wherever it stands, layouts agree closely and say nothing about bf16. So the yardstick is what they
differ from one another or, where that is more, from the same model in fp32. Layouts with the mistakes that
packing invites have to fail by the same yardstick.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_equality import padded_logps, plain_logps
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
        padded_logps(model, prompts, titles, "left"),
    ]
    packed = CandidateScorer(model)(batch)
    alone = pack(prompts, titles, pad_id=0, row_tokens=1)  # one user a row
    columns = torch.arange(alone.ends.shape[1]).expand_as(alone.ends)
    broken = [
        dataclasses.replace(alone, position_ids=columns),  # positions that do not restart behind the prompt
        dataclasses.replace(alone, ends=torch.full_like(alone.ends, len(columns[0]))),  # titles see those before them
    ]
    wrong = [CandidateScorer(model)(batch) for batch in broken]
    truth = plain_logps(model.float(), prompts, titles)

    def away(scores: torch.Tensor) -> float:
        return max(float((scores - layout).norm()) for layout in layouts)

    between = max(away(layout) for layout in layouts)
    rounding = max(float((layout - truth).norm()) for layout in layouts)
    print(
        f"packed {away(packed):.4f}, layouts {between:.4f}, their rounding {rounding:.4f}, that of packed "
        f"{(packed - truth).norm():.4f}, wrong {', '.join(f'{away(scores):.4f}' for scores in wrong)}, "
        f"of {truth.norm():.1f}"
    )
    assert away(packed) <= 2 * max(between, rounding)
    assert all(away(scores) > 2 * max(between, rounding) for scores in wrong)
