"""A model that our tests do not cover is compared with its own forward before its scores are believed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from napo.scoring.head import ALONE
from napo.scoring.packing import PackedBatch, pack

WINDOW = 4  # of the comparison, shorter than its prompts, so that a sliding window shows
CANNOT_RUN = (AttributeError, TypeError, KeyError, IndexError, NotImplementedError)


@torch.no_grad()
def compare_with_own_forward(
    model: nn.Module,
    causal_lm: PreTrainedModel,
    score: Callable[[PackedBatch], Tensor],
    *,
    packed: bool = True,
    foreign: str | None = None,
) -> None:
    """Raise ValueError unless `score` gives a few random titles the same log-probabilities as the logits of `model`, a
    title at a time. `model` is called from the outside, with all wrappers and hooks; `causal_lm` is the transformers
    model in it. `foreign` is why it is compared, for the message.

    Dropout is off. The causal LM itself and its head keep their mode, as code of somebody else may ask for it.
    """
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod  # type: ignore[assignment]  # compiling the whole forward for this takes minutes
    who = type(causal_lm).__name__ + (f" with {foreign}" if foreign is not None else "")
    way_out = f"set {ALONE}" if packed else "take it off, or put it below the model's own forward"
    vocabulary = causal_lm.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts, titles = (
        torch.randint(vocabulary, (2, *size), generator=generator).tolist() for size in [(WINDOW + 4,), (3, 5)]
    )
    batch = pack(prompts, titles, pad_id=0, row_tokens=100).to(causal_lm.device)
    pairs = [(prompt, title) for prompt, group in zip(prompts, titles, strict=True) for title in group]
    with _still(causal_lm):
        try:
            truth = torch.stack([_own(model, causal_lm, prompt, title) for prompt, title in pairs])
            got = score(batch).float()
        except CANNOT_RUN as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise ValueError(f"model: {who} cannot be compared with its own forward ({reason}); {way_out}") from error
    half = causal_lm.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(got.device.type)
    allowed = (3e-2 if half else 1e-3) * truth.abs().mean()
    if not ((got - truth).abs() <= allowed).all():
        raise ValueError(
            f"model: {who} scores random titles {got.tolist()} here and {truth.tolist()} by its own forward (allowed "
            f"difference {allowed.item():.1e}); {way_out}"
        )


def logits_of(output: Any) -> Tensor:  # (n, T, V)
    """Of a model's output, or of the tuple that `return_dict=False` makes of it."""
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


def _own(model: nn.Module, causal_lm: PreTrainedModel, prompt: Sequence[int], title: Sequence[int]) -> Tensor:  # ()
    ids = torch.tensor([[*prompt, *title]], device=causal_lm.device)
    logits = logits_of(model(input_ids=ids))[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()


@contextlib.contextmanager
def _still(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, and sliding windows (where the model has them) that the comparison's prompts overrun."""
    config = model.config.get_text_config()
    window, modes = getattr(config, "sliding_window", None), [(module, module.training) for module in model.modules()]
    top: list[Any] = [model, model.get_output_embeddings()]
    of_top = [module.training for module in top]
    model.eval()
    for module, training in zip(top, of_top, strict=True):
        module.training = training
    if window is not None:
        config.sliding_window = WINDOW
    try:
        yield
    finally:
        if window is not None:
            config.sliding_window = window
        for module, training in modes:
            module.training = training
