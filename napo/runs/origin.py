"""How a model of a run was made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from napo.assets import cache_dir, resolve_model
from napo.data.prompts import Normalise, PromptSettings, PromptStyle
from napo.files import read_json
from napo.identity import model_identity


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How an adapter was made: ``origin.json`` beside it. It is all that scoring with the adapter needs to know."""

    by: str  # the stage: sft or train
    model: str  # as from_pretrained takes it: a folder or a name on the hub
    model_identity: str  # of the base that it is an adapter of
    style: str
    history: int
    normalise: str
    data_sha256: str
    parent: str | None  # the model of the run that it was trained from
    parent_sha256: str | None
    seed: int
    options: dict[str, Any]

    @classmethod
    def read(cls, adapter: Path) -> Origin:
        path = adapter / "origin.json"
        if not path.is_file():
            raise ValueError(f"model: {path} is missing, so its prompts are not known; train {adapter.name} again")
        found = read_json(path)
        kinds = {"by": str, "model": str, "model_identity": str, "style": str, "history": int, "data_sha256": str}
        kinds |= {"normalise": str, "seed": int, "options": dict}
        names = {field.name for field in fields(cls)}
        whole = isinstance(found, dict) and names <= found.keys()
        whole = whole and all(type(found[name]) is kind for name, kind in kinds.items())
        whole = whole and all(isinstance(found[name], (str, type(None))) for name in ("parent", "parent_sha256"))
        whole = whole and found["style"] in get_args(PromptStyle) and found["normalise"] in get_args(Normalise)
        whole = whole and found["history"] > 0
        if not whole:
            raise ValueError(f"model: {path} does not say how {adapter.name} was made; train it again")
        return cls(**{name: found[name] for name in names})

    @property
    def prompt(self) -> PromptSettings:
        return PromptSettings.of(asdict(self))

    @property
    def base(self) -> str:
        """Where the base model is: where it was, or, on another machine, the folder of its name in the cache. Whether
        it is the same model ``check_base`` says."""
        if not Path(self.model).is_absolute() or Path(self.model).exists():
            return self.model
        here = cache_dir() / Path(self.model).name
        if not here.is_dir():
            raise ValueError(
                f"model: no such folder: {self.model}, the base model of the run; put it back there, or make "
                f"{here} a copy of it or a link to it"
            )
        return str(here)

    def check_base(self, name: str) -> None:
        """An adapter says nothing on weights that it was not trained on: ``name``'s base must be what it was."""
        if model_identity(resolve_model(self.base)) != self.model_identity:
            raise ValueError(
                f"model: {self.model} is not the model any more that {name} was trained on; train {name} again"
            )
