"""Packed against unpacked on a real model in bf16, measured by what two layouts of the unpacked way differ."""

from __future__ import annotations

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
@pytest.mark.xfail(
    # From the fp32 log-probs: one by one 0.43, padded 0.42, packed 0.55, packed in an fp32 model 0.0002 (norms over 21
    # titles). Two unpacked layouts share most of their rounding (0.16 apart), packed rounds on its own (0.47 apart).
    reason="packed rounds independently of the unpacked way, whose two layouts share most of their rounding",
    strict=False,
)
@torch.no_grad()
def test_within_twice_what_two_unpacked_layouts_differ():
    folder = assets.resolve_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    newline = tokenizer("\n")["input_ids"]
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    titles = [[tokenizer(title)["input_ids"] + newline for title in TITLES] for _ in prompts]
    batch = pack(prompts, titles, pad_id=0)
    one_by_one = plain_logps(model, prompts, titles)
    padded = CandidateScorer(model, packed=False)(batch)
    packed = CandidateScorer(model)(batch)
    layouts = (padded - one_by_one).norm()
    print(f"padded {layouts:.4f}, packed {(packed - one_by_one).norm():.4f}, of {one_by_one.norm():.1f}")
    assert 0 < (packed - one_by_one).norm() <= 2 * layouts
