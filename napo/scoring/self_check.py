"""An architecture that our tests do not cover is compared with its own forward before its scores are believed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from napo.scoring.packing import PackedBatch, pack

WINDOW = 4  # of the comparison, shorter than its prompts, so that a sliding window shows


@torch.no_grad()
def compare_with_own_forward(model: PreTrainedModel, score: Callable[[PackedBatch], Tensor]) -> None:
    """Raise ValueError unless `score` gives a few random titles the same log-probabilities as the model's logits, one
    title at a time."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts, titles = (
        torch.randint(vocabulary, (2, *size), generator=generator).tolist() for size in [(WINDOW + 4,), (3, 5)]
    )
    with _still(model):
        got = score(pack(prompts, titles, pad_id=0, row_tokens=100).to(model.device)).float()
        expected = []
        for prompt, group in zip(prompts, titles, strict=True):
            for title in group:
                ids = torch.tensor([prompt + title], device=model.device)
                logits = type(model).forward(model, input_ids=ids).logits[0, len(prompt) - 1 : -1]
                expected.append(logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum())
        truth = torch.stack(expected)
    half = model.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(got.device.type)
    allowed = (3e-2 if half else 1e-3) * truth.abs().mean()
    if not ((got - truth).abs() <= allowed).all():
        raise ValueError(
            f"model: {type(model).__name__} scores random titles {got.tolist()} here and {truth.tolist()} by its own "
            f"forward (allowed difference {allowed.item():.1e}); set packed=False (of CandidateScorer or NAPOConfig)"
        )


@contextlib.contextmanager
def _still(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, and sliding windows (where the model has them) that the comparison's prompts overrun."""
    config = model.config.get_text_config()
    window, modes = getattr(config, "sliding_window", None), [(module, module.training) for module in model.modules()]
    model.eval()
    if window is not None:
        config.sliding_window = WINDOW
    try:
        yield
    finally:
        if window is not None:
            config.sliding_window = window
        for module, training in modes:
            module.training = training
