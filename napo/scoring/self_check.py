"""Scores are compared with the model's own forward before they are believed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from napo.scoring.foreign import foreign_part
from napo.scoring.packing import PackedBatch, pack

WINDOW = 4  # of the comparison, shorter than its prompts, so that a sliding window shows
FULL = (torch.float32, torch.float64)
CANNOT_RUN = (AttributeError, TypeError, KeyError, IndexError, NotImplementedError)


class OwnForward:
    """The log-probabilities of a few random titles by a model's own forward, a title at a time.

    The model is called from the outside, with all wrappers and hooks. Dropout is off. The causal LM itself and its head
    keep their mode, as code of somebody else may ask for it."""

    def __init__(self, model: nn.Module, causal_lm: PreTrainedModel) -> None:
        """`causal_lm` is the transformers model in `model`."""
        self.causal_lm, self.foreign = causal_lm, foreign_part(model)
        vocabulary = causal_lm.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        prompts, titles = (
            torch.randint(vocabulary, (2, *size), generator=generator).tolist() for size in [(WINDOW + 4,), (3, 5)]
        )
        self.batch = pack(prompts, titles, pad_id=0, row_tokens=100).to(causal_lm.device)
        pairs = [(prompt, title) for prompt, group in zip(prompts, titles, strict=True) for title in group]
        self._compiled = any(_is_compiled(module) for module in model.modules())
        self._rough = _is_rough(causal_lm)
        self.truth: Tensor | None = None
        self._failure: str | None = None
        with self._still():
            try:
                self.truth = torch.stack([self._own(model, prompt, title) for prompt, title in pairs])
            except CANNOT_RUN as error:
                self._failure = self._cannot(error)

    def refuses(self, score: Callable[[PackedBatch], Tensor]) -> str | None:
        """What is wrong with `score`, which gives the sum of each title; None where it agrees."""
        if self.truth is None:
            return self._failure
        try:
            with self._still():
                got = score(self.batch).float()
        except CANNOT_RUN as error:
            return self._cannot(error)
        truth = self.truth
        allowed = (3e-2 if self._rough else 1e-3) * truth[truth.isfinite()].abs().sum() / max(len(truth), 1)
        # Weights that are no numbers give none either way, which is found elsewhere.
        same = ((got - truth).abs() <= allowed) | (got == truth) | (got.isnan() & truth.isnan())
        if same.all():
            return None
        return (
            f"{self._who} scores random titles {got.tolist()} here and {truth.tolist()} by its own forward (allowed "
            f"difference {allowed.item():.1e})"
        )

    def _own(self, model: nn.Module, prompt: Sequence[int], title: Sequence[int]) -> Tensor:  # ()
        ids = torch.tensor([[*prompt, *title]], device=self.batch.input_ids.device)
        logits = logits_of(model(input_ids=ids))[0, len(prompt) - 1 : -1]
        self._rough |= logits.dtype not in FULL  # FSDP casts weights, too, for as long as they are used
        return logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()

    @property
    def _who(self) -> str:
        return type(self.causal_lm).__name__ + (f" with {self.foreign}" if self.foreign is not None else "")

    def _cannot(self, error: Exception) -> str:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return f"{self._who} cannot be compared with its own forward ({reason})"

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        """No gradient, no dropout, nothing compiled, which would take minutes, and sliding windows (where the model has
        them) that the comparison's prompts overrun."""
        config = self.causal_lm.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        modes = [(module, module.training) for module in self.causal_lm.modules()]
        top: list[Any] = [self.causal_lm, self.causal_lm.get_output_embeddings()]
        of_top = [module.training for module in top]
        self.causal_lm.eval()
        for module, training in zip(top, of_top, strict=True):
            module.training = training
        if window is not None:
            config.sliding_window = WINDOW
        eager = torch.compiler.set_stance("force_eager") if self._compiled else contextlib.nullcontext()
        try:
            with torch.no_grad(), eager:
                yield
        finally:
            if window is not None:
                config.sliding_window = window
            for module, training in modes:
                module.training = training


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def logits_of(output: Any) -> Tensor:  # (n, T, V)
    """Of a model's output, or of the tuple that `return_dict=False` makes of it."""
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


def _is_rough(model: PreTrainedModel) -> bool:
    """Whether matmuls round to less than fp32, so that other shapes give other digits."""
    try:
        tensor_cores = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by another of torch's ways
        tensor_cores = True
    return (
        tensor_cores
        or torch.is_autocast_enabled(model.device.type)
        or hasattr(model, "_original_forward")  # below accelerate's autocast
        or bool(getattr(model, "is_quantized", False))
        or any(parameter.dtype not in FULL for parameter in model.parameters())
    )
