"""Rows that cannot be used, and how errors show their contents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from napo.data.missing import is_missing

MEND = "mend the row or set on_bad_row='skip'"


class BadRow(ValueError):
    """Says what is wrong with which field, and what helps."""

    def __init__(self, field: str, message: str, remedy: str = MEND) -> None:
        super().__init__(message)
        self.field, self.remedy = field, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return BadRow, (self.field, str(self), self.remedy)


def show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(value: Any) -> Any:
    """Arrays, tensors and their scalars in Python's own types."""
    return value.tolist() if hasattr(value, "tolist") else value


def value_of(row: Mapping[str, Any], field: str) -> Any:
    """The field in Python's own types; None where it is missing, whatever tables write for it."""
    value = plain(row.get(field))
    return None if is_missing(value) else value
