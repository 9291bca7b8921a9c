"""What stands in tables and files for a value that is not there."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np

MISSING = frozenset(
    {"nan", "NaN", "NAN", "None", "none", "NONE", "null", "Null", "NULL", "undefined"}
    | {"NA", "<NA>", "N/A", "n/a", "#N/A", "NaT", r"\N"}
)
"""Words that programs write for it."""


def is_missing(value: Any) -> bool:
    """Whether a typed value stands for none: None, a NaN of any type of number, NaT, or pandas' NA. Text is none of
    these, nor is an array."""
    if value is None:
        return True
    if isinstance(value, (float, np.floating)):
        return math.isnan(value)
    if isinstance(value, Decimal):
        return value.is_nan()
    if isinstance(value, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(value))
    # By name, as pandas takes half a second to import, and where it was not imported there is none of these.
    return type(value).__module__.startswith("pandas.") and type(value).__name__ in ("NAType", "NaTType")
