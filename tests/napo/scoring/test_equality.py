"""Packed scores and gradients equal those of titles computed one at a time behind their prompt."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, gradients, tiny_model

from napo.scoring import CandidateScorer, pack

END = 1
LENGTHS = [(9, [3, 5, 1, 4]), (17, [2, 2, 6]), (7, [4]), (12, [1, 3, 3, 3, 2])]  # prompt, titles: ragged N and L


def ragged_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(length) for length, _ in LENGTHS]
    titles = [[[*draw(length - 1), END] for length in lengths] for _, lengths in LENGTHS]
    titles[0][1][:2] = titles[0][0][:2]  # a shared beginning
    titles[3][2] = list(titles[3][1])  # a title drawn twice
    return prompts, titles


def plain_logps(model, prompts, titles):
    """Every title a sequence of its own, through the model's own forward: the definition."""
    out = []
    for prompt, group in zip(prompts, titles, strict=True):
        for title in group:
            logits = model(torch.tensor([prompt + title])).logits[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            out.append(logps[torch.arange(len(title)), torch.tensor(title)].sum())
    return torch.stack(out)


@pytest.mark.usefixtures("true_softmax")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "alone"])
@pytest.mark.parametrize(
    "dtype, tolerance, grad_tolerance",
    [(torch.float32, 1e-5, 1e-5), (torch.float64, 1e-10, 1e-6)],
    ids=["fp32", "fp64"],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_every_title_alone(name, dtype, tolerance, grad_tolerance, packed):
    model = tiny_model(name, dtype)
    prompts, titles = ragged_batch()
    truth = plain_logps(model, prompts, titles)
    truth_grads = gradients(model, truth)
    for row_tokens in (None, 20, 60, 1000):
        scores = CandidateScorer(model, packed=packed)(pack(prompts, titles, pad_id=0, row_tokens=row_tokens))
        torch.testing.assert_close(scores, truth, rtol=tolerance, atol=tolerance)
        grads = gradients(model, scores)
        assert grads.keys() == truth_grads.keys()
        for key, grad in grads.items():
            scale = truth_grads[key].abs().max().clamp_min(1)
            worst = ((grad - truth_grads[key]).abs().max() / scale).item()
            assert worst <= grad_tolerance, f"{key}: {worst}"


def padded_logps(model, prompts, titles, side):
    """All titles in one padded batch through the model's own forward, the padding on the left or the right."""
    pairs = [(prompt, title) for prompt, group in zip(prompts, titles, strict=True) for title in group]
    width = max(len(prompt) + len(title) for prompt, title in pairs)
    ids, mask = torch.zeros(2, len(pairs), width, dtype=torch.long)
    starts = [width - len(prompt) - len(title) if side == "left" else 0 for prompt, title in pairs]
    for row, (start, (prompt, title)) in enumerate(zip(starts, pairs, strict=True)):
        ids[row, start : start + len(prompt + title)] = torch.tensor(prompt + title)
        mask[row, start : start + len(prompt + title)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    out = []
    for row, (start, (prompt, title)) in enumerate(zip(starts, pairs, strict=True)):
        first = start + len(prompt) - 1
        out.append(logps[row, first : first + len(title)].gather(1, torch.tensor(title)[:, None]).sum())
    return torch.stack(out)


@pytest.mark.usefixtures("true_softmax")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_batches_padded_on_either_side(name, side):
    model = tiny_model(name, torch.float64)
    prompts, titles = ragged_batch()
    padded = padded_logps(model, prompts, titles, side)
    expected = gradients(model, padded)
    scores = CandidateScorer(model)(pack(prompts, titles, pad_id=0))
    torch.testing.assert_close(scores, padded, rtol=1e-10, atol=1e-10)
    for key, grad in gradients(model, scores).items():
        scale = expected[key].abs().max().clamp_min(1)
        assert (grad - expected[key]).abs().max() <= 1e-6 * scale, key
