"""A base model that is loaded once: the adapters that were trained on it take turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from napo.assets import resolve_model
from napo.language_models.loading import load_model, put_on


class Turn(NamedTuple):
    """A model while it has the base."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    check: Callable[[], None]
    """RuntimeError once another one has the base: ``model`` would answer with that one's adapter."""


class Bases:
    """Keeps the base that was asked for last, in memory and on its device."""

    def __init__(self) -> None:
        self._name = ""
        self._base: Any = None
        self._tokenizer: Any = None
        self._model: Any = None  # the base, or the base with an adapter on it
        self._turn = 0

    def load(self, name: str | Path, adapter: Path | None) -> Turn:
        """The model that ``load_model`` gives for ``name`` and ``adapter``, to the last bit of what it computes. The
        one that had the base before must not be asked any more."""
        self._turn += 1
        if isinstance(self._model, PeftModel):
            self._base = self._model.unload()  # type: ignore[operator]
        if str(resolve_model(name)) != self._name:
            self._base = self._model = None  # there is room for one
            self._base, self._tokenizer = load_model(name)
            self._name = str(resolve_model(name))
        self._model = self._base if adapter is None else put_on(self._base, adapter)
        mine = self._turn

        def check() -> None:
            if self._turn != mine:
                raise RuntimeError(f"model: {adapter or name} was asked after another model had taken its base")

        return Turn(self._model, self._tokenizer, check)
