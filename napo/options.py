"""Options in dataclasses: made from what was given by name, checked, and described for the command line.

A field's type, default, range and the docstring below it describe an option completely; flags, ``--set``,
``run.yaml`` and ``napo options`` are made from them.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
WORDS: dict[str, Any] = {"True": True, "False": False, "None": None}
NUMBER = re.compile(r"[+-]?(\d+\.?|\d*\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


class UsageError(ValueError):
    """Wrong usage: an option that does not exist, or a value that it cannot have."""


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have: ``Annotated[int, Range(1)]``."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
        )

    def __str__(self) -> str:
        low = f"more than {self.above:g}" if self.above is not None else ""
        low = low or (f"at least {self.least:g}" if self.least is not None else "")
        if self.least is not None and self.most is not None:
            return f"between {self.least:g} and {self.most:g}"
        high = f"at most {self.most:g}" if self.most is not None else ""
        return " and ".join(filter(None, (low, high)))


@dataclass(frozen=True)
class Option:
    """A field of a dataclass of options. ``kinds``: its plain types, or empty where it is none of them."""

    name: str
    kinds: tuple[type, ...]
    choices: tuple[str, ...]
    range: Range | None
    default: Any
    sentence: str

    @property
    def is_flag(self) -> bool:
        return bool in self.kinds

    @property
    def expected(self) -> str:
        """Its possible values, in words."""
        if self.choices:
            return " or ".join([", ".join(self.choices), *(["null"] if type(None) in self.kinds else [])])
        words = [PLAIN[kind] for kind in self.kinds]
        if self.range is not None:
            words[0] += f" of {self.range}" if str(self.range).startswith("at") else f" {self.range}"
        return " or ".join(words) or "JSON"

    def check(self, value: Any) -> Any:
        """``value`` in the option's type; UsageError if it has another one."""
        if not self.kinds and not self.choices:
            return value
        if type(value) is int and float in self.kinds and int not in self.kinds:
            with contextlib.suppress(OverflowError):
                value = float(value)
        if value is None and type(None) in self.kinds:
            return None
        if self.choices:
            if value not in self.choices:
                raise UsageError(f"{self.name}: expected {self.expected}, got {value!r}")
            return value
        if type(value) not in self.kinds:
            words = " or ".join(PLAIN[kind] for kind in self.kinds)
            raise UsageError(f"{self.name}: expected {words}, got {value!r}")
        if self.range is not None and value not in self.range:
            raise UsageError(f"{self.name}: expected {self.range}, got {value:g}")
        if type(value) is float and not math.isfinite(value):  # no comparison with a NaN holds, so no limit would
            raise UsageError(f"{self.name}: expected a finite number, got {value}")
        return value


def made(kind: type[T], given: Mapping[str, Any]) -> T:
    """The dataclass of options ``kind`` with the fields that were given; UsageError where they cannot be.

    Options within an option are given as a mapping, or one by one under dotted names: ``lora.r``.
    """
    types = get_type_hints(kind)
    known = {option.name: option for option in options_of(kind)}
    values = {}
    for name, value in nested(given).items():
        if name not in known:
            raise UsageError(f"{name}: no such option; expected one of {', '.join(known)}")
        inner_kind: Any = types[name]
        if is_dataclass(inner_kind):
            if isinstance(value, Mapping):
                try:
                    value = made(inner_kind, value)  # type: ignore[arg-type]
                except UsageError as error:
                    raise UsageError(f"{name}.{error}") from None
            elif not isinstance(value, inner_kind):  # type: ignore[arg-type]
                raise UsageError(f"{name}: expected options by name, as in {name}.r=8, got {value!r}")
        values[name] = known[name].check(value)
    try:
        return kind(**values)
    except UsageError:
        raise
    except ValueError as error:  # of options that exclude one another
        raise UsageError(str(error)) from None


def nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as mappings: {"lora.r": 8} -> {"lora": {"r": 8}}."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        outer, dot, inner = name.partition(".")
        if not dot:
            found[name] = value
            continue
        part = found.setdefault(outer, {})
        if not isinstance(part, Mapping):
            raise UsageError(f"{name}: {outer} was given as {part!r}; give one of the two")
        found[outer] = {**part, inner: value}
    return found


def check(options: Any) -> None:
    """For ``__post_init__``: every field of the dataclass has a value that it may have."""
    for option in options_of(type(options)):
        option.check(getattr(options, option.name))


def options_of(kind: type) -> tuple[Option, ...]:
    """The options of a dataclass, in their order."""
    types = get_type_hints(kind, include_extras=True)
    sentences = _sentences(kind)
    found = []
    for field in fields(kind):
        default = field.default
        if default is MISSING:
            default = field.default_factory() if field.default_factory is not MISSING else None
        hint, limits = types[field.name], None
        if get_origin(hint) is Annotated:
            hint, limits = get_args(hint)[0], next((m for m in get_args(hint)[1:] if isinstance(m, Range)), None)
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        choices = tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
        kinds = tuple(str if get_origin(part) is Literal else part for part in parts)
        plain = all(part in PLAIN for part in kinds)
        found.append(
            Option(field.name, kinds if plain else (), choices if plain else (), limits, default, sentences[field.name])
        )
    return tuple(found)


def parsed(text: str, option: Option | None = None) -> Any:
    """A value as people type it: a number, true, false, null (or True, False, None), JSON, or else text."""
    if option is not None and text in option.choices:
        return text
    # For text 1252 and "05" are no numbers; quotes around it are those of JSON, as for all others.
    if option is not None and str in option.kinds and set(option.kinds) <= {str, type(None)}:
        if len(text) > 1 and text[0] == text[-1] == '"':
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(text)
        return None if text in ("null", "None") else text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        if NUMBER.fullmatch(text):  # .5 and 1. are not JSON
            return float(text)
        return WORDS.get(text, text)


def settings(texts: Iterable[str], of: str, described: Mapping[str, Option] | None = None) -> dict[str, Any]:
    """``NAME=VALUE`` as people type it, for the flag ``of``; a name given twice has its last value."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.replace(".", "_").isidentifier():
            raise UsageError(f"{of}: expected NAME=VALUE; got {text!r}")
        found[name] = parsed(value, (described or {}).get(name))
    return found


def plain(value: Any) -> Any:
    """The value of an enumeration's member; anything else as it is."""
    return value.value if isinstance(value, Enum) else value


def _sentences(kind: type) -> dict[str, str]:
    """{field: the docstring below it}, which Python does not keep: it is read from the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {field.name: "" for field in fields(kind)}
    for statement, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found[statement.target.id] = " ".join(below.value.value.split())
    return found
