"""A small catalogue of titles for tiny models, and the log-probabilities over it by their definition."""

from __future__ import annotations

import math

import torch
from tiny_models import VOCAB

END = 1


def catalogue(seed=0, size=30, tokens=(2, 9)):
    """Few tokens, so that titles begin alike; some begin others, some are equal, one is only its end token."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, n: torch.randint(low, high, (n,), generator=generator).tolist()  # noqa: E731
    titles = [[*draw(*tokens, draw(1, 6, 1)[0]), END] for _ in range(size - 4)]
    long = next(title for title in titles if len(title) > 3)
    return [*titles, [*long[:2], END], [*long[:-1], *draw(2, VOCAB, 3), END], list(long), [END]]


def prompts_of(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def plain_logps(model, titles, prompts, items):
    """The definition: the model's own forward on prompt and whole title, at each token a softmax over the tokens that
    continue some title of the catalogue, and equal titles share."""
    out = []
    for prompt, group in zip(prompts, items, strict=True):
        for title in (titles[item] for item in group):
            logits = model(torch.tensor([prompt + title])).logits[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logp = torch.full((), -math.log(titles.count(title)), dtype=logits.dtype)
            for t, token in enumerate(title):
                following = sorted({other[t] for other in titles if len(other) > t and other[:t] == title[:t]})
                z = logits[len(prompt) - 1 + t]
                logp = logp + z[token] - torch.logsumexp(z[following], 0)
            out.append(logp)
    return torch.stack(out)
