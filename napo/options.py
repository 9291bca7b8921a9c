"""Options that come by name, as from ``--set``, in their dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def made(kind: type[T], given: Mapping[str, Any]) -> T:
    """The dataclass of options ``kind`` with the fields that were given."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in names:
            raise ValueError(f"{name}: no such option; expected one of {', '.join(names)}")
    types = get_type_hints(kind)
    return kind(**{name: _of_type(name, value, types[name]) for name, value in given.items()})


def _of_type(name: str, value: Any, expected: Any) -> Any:
    """``value`` where it is of the option's type. Types that are not plain are looked at by the dataclass itself."""
    kinds = get_args(expected) if get_origin(expected) in (Union, UnionType) else (expected,)
    if any(kind not in PLAIN for kind in kinds) or type(value) in kinds:
        return value
    if type(value) is int and float in kinds:
        return float(value)
    raise ValueError(f"{name}: expected {' or '.join(PLAIN[kind] for kind in kinds)}, got {value!r}")
