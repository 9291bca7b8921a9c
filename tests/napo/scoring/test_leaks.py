"""Attention never leaks between titles or users: other scores do not change by a bit."""

from __future__ import annotations

import pytest
import torch
from test_equality import END
from tiny_models import VOCAB, tiny_model

from napo.scoring import CandidateScorer, pack


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2"])
@pytest.mark.parametrize("row_tokens", [1, 60, 1000])
@pytest.mark.parametrize("share", [False, True])
@torch.no_grad()
def test_changing_one_title_changes_no_other_score(name, row_tokens, share):
    model = tiny_model(name)
    score = CandidateScorer(model)
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(2, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(n) for n in (9, 16, 7, 11)]
    # first tokens differ and ascend, so that the layout stays when later tokens change
    titles = [[[2 + 3 * i, *draw(3), END] for i in range(4)] for _ in prompts]

    def scores(titles):
        return score(pack(prompts, titles, pad_id=0, row_tokens=row_tokens, share_prefixes=share)).view(4, 4)

    before = scores(titles)
    for user in range(4):
        for i in range(4):
            changed = [[list(title) for title in group] for group in titles]
            changed[user][i][1:4] = [(token + 1) % VOCAB for token in changed[user][i][1:4]]
            after = scores(changed)
            same = after == before
            assert not same[user, i]
            same[user, i] = True
            assert same.all(), f"title {i} of user {user} changed {(~same).nonzero().tolist()}"


@torch.no_grad()
def test_changing_one_prompt_changes_no_other_user():
    model = tiny_model("llama")
    score = CandidateScorer(model)
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: torch.randint(2, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(9) for _ in range(4)]
    titles = [[[*draw(3), END] for _ in range(3)] for _ in prompts]
    before = score(pack(prompts, titles, pad_id=0, row_tokens=1000)).view(4, 3)
    for user in range(4):
        changed = [draw(9) if u == user else prompt for u, prompt in enumerate(prompts)]
        same = score(pack(changed, titles, pad_id=0, row_tokens=1000)).view(4, 3) == before
        assert not same[user].any()
        same[user] = True
        assert same.all()
