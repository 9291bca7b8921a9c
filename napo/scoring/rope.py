"""Rotations that change for a whole batch once its longest sequence passes a length."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedModel

from napo.scoring.head import ALONE


class Border(NamedTuple):
    """Up to `length` input tokens a sequence is turned as it would be alone, whatever is beside it."""

    kind: str
    length: int

    @property
    def alone(self) -> bool:
        """Whether a longer sequence has scores that depend on nothing else if it is by itself. With "dynamic" they
        depend on the longest sequence that the model has met before."""
        return self.kind == "longrope"


def border_of(model: PreTrainedModel) -> Border | None:
    """The lowest border of the model's layers; None where rotations do not depend on lengths."""
    config: Any = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    # One dict, or one for each kind of layer.
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    found = []
    for one in each:
        kind = str(one.get("rope_type"))
        if kind == "longrope":
            length = one.get("original_max_position_embeddings") or config.max_position_embeddings
            found.append(Border(kind, int(length)))
        elif "dynamic" in kind:
            found.append(Border(kind, int(config.max_position_embeddings)))
    return min(found, key=lambda border: border.length, default=None)


def most_tokens(border: Border | None, *, packed: bool) -> int | None:
    """Most tokens of prompt and title together that no neighbour turns; None where any number will do. The last token
    is a target and no input."""
    return None if border is None or (border.alone and not packed) else border.length + 1


def check_length(border: Border, longest: int, *, packed: bool) -> None:
    """Refuse a batch with sequences of up to `longest` input tokens that would be turned by their neighbours."""
    most = most_tokens(border, packed=packed)
    if most is None or longest < most:
        return
    way_out = f"set max_length={border.length}" + (f", or {ALONE}" if border.alone else "")
    why = (
        "which turns all of a batch as its longest sequence"
        if border.alone
        else "which turns sequences as the longest one that it has met"
    )
    raise ValueError(
        f"model: expected at most {border.length} tokens, prompt and title, with rope type {border.kind!r}, {why} "
        f"beyond that, got {longest}; {way_out}"
    )
