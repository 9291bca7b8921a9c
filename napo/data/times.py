"""Times as files have them, kept exactly: what comes before what must not hang on a float or on whole seconds."""

from __future__ import annotations

import datetime
import math
import re
from array import array
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from .texts import shown, text_of

LIMB = 18
"""Decimals of a time that one array of 64-bit integers holds."""
MOST_LIMBS = 4
_SCALE = 10**LIMB
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?", re.ASCII)
_MOMENT = re.compile(
    r"(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ](?P<clock>[0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?:[.,](?P<decimals>[0-9]{1,18}))?"
    r" ?(?P<zone>Z|UTC|[+-][0-9]{2}(?::?[0-9]{2})?)?)?",
    re.ASCII,
)
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)

Exact = int | Decimal


class Times:
    """A column of exact numbers: whole parts, and as many arrays of 18 decimals each as any of them needs."""

    def __init__(self) -> None:
        self.limbs = [array("q")]

    def append(self, time: Exact) -> None:
        """Raises OverflowError, before anything is kept, for what 64 bits and 54 decimals do not hold."""
        whole, decimals = _split(time) if isinstance(time, Decimal) else (time, [])
        self.limbs[0].append(whole)
        while len(self.limbs) <= len(decimals):
            self.limbs.append(array("q", bytes(8 * (len(self.limbs[0]) - 1))))
        for place, limb in enumerate(self.limbs[1:]):
            limb.append(decimals[place] if place < len(decimals) else 0)

    def extend(self, times: np.ndarray) -> None:
        """Whole times."""
        self.limbs[0].frombytes(times.astype(np.int64).tobytes())
        for limb in self.limbs[1:]:
            limb.frombytes(bytes(8 * len(times)))

    def columns(self) -> list[np.ndarray]:
        return [np.frombuffer(limb, np.int64) if limb else np.empty(0, np.int64) for limb in self.limbs]


def _split(time: Decimal) -> tuple[int, list[int]]:
    sign, digits, exponent = time.as_tuple()
    if not isinstance(exponent, int):
        raise ValueError(f"expected a time, got {time}")
    if exponent > 20 or -exponent > LIMB * (MOST_LIMBS - 1):
        raise OverflowError(f"a time of 10^{exponent}")
    number = int("".join(map(str, digits)) or "0") * (-1 if sign else 1)
    if exponent >= 0:
        return number * 10**exponent, []
    whole, rest = divmod(number, 10**-exponent)
    decimals: list[int] = []
    rest *= 10 ** (exponent % LIMB)
    for _ in range(math.ceil(-exponent / LIMB)):
        rest, limb = divmod(rest, _SCALE)
        decimals.insert(0, limb)
    while decimals and not decimals[-1]:
        decimals.pop()
    return whole, decimals


def stamps(limbs: list[np.ndarray]) -> tuple[np.ndarray, str | None]:
    """One 64-bit integer for each time, in the same order as the times: the time itself, or it in the unit of its last
    decimal, or, where that does not fit, its rank. And what ``dataset.json`` says of it; None for the time itself."""
    whole = limbs[0]
    if not any(limb.any() for limb in limbs[1:]):
        return whole, None
    if len(limbs) == 2:
        decimals = LIMB
        divisor = int(np.gcd.reduce(limbs[1]))
        while decimals and divisor % 10 == 0:
            divisor, decimals = divisor // 10, decimals - 1
        if max(abs(int(whole.min())), abs(int(whole.max()))) + 1 < 2**63 // 10**decimals:
            return (
                whole * 10**decimals + limbs[1] // 10 ** (LIMB - decimals),
                f"in units of 1e-{decimals} of the source's times, which have decimals",
            )
    order = np.lexsort(limbs[::-1])
    later = np.zeros(len(whole), bool)
    for limb in limbs:
        ordered = limb[order]
        later[1:] |= ordered[1:] != ordered[:-1]
    ranks = np.empty(len(whole), np.int64)
    ranks[order] = np.cumsum(later)
    return ranks, "ranks of the source's times, which have more decimals than 64 bits hold"


class Moment(NamedTuple):
    """A typed time: so many times 10^-decimals seconds since 1970."""

    value: int
    decimals: int


class TimeReader:
    """Numbers stay what they are (their unit is the source's affair); dates become seconds since 1970, in UTC where
    they name no zone. A column of both has no order, so ``settle`` refuses it.

    ``date_format``: how dates are written, as for strptime, where they are not ISO dates.
    """

    def __init__(self, date_format: str | None = None) -> None:
        self.date_format = date_format
        self.num_numbers = 0
        self.num_dates = 0

    def __call__(self, value: Any) -> Exact:
        if type(value) is bytes:
            value = text_of(value)
        if type(value) is str:
            text = value.strip()
            if self.date_format is None and text.isdecimal() and text.isascii():
                self.num_numbers += 1
                return int(text)
            if self.date_format is None and _NUMBER.fullmatch(text):
                self.num_numbers += 1
                return Decimal(text)
            moment = self._formatted(text) if self.date_format else _moment(text)
            self.num_dates += 1
            return moment
        if type(value) is Moment:
            self.num_dates += 1
            return since_epoch(*value)
        if isinstance(value, datetime.date):
            self.num_dates += 1
            return _seconds(value)
        self.num_numbers += 1
        return exact(value)

    def _formatted(self, text: str) -> Exact:
        assert self.date_format is not None
        try:
            return _seconds(datetime.datetime.strptime(text, self.date_format))
        except ValueError:
            raise ValueError(f"expected a date like {self.date_format}, got {shown(text, 40)!r}") from None

    def settle(self, path: object, column: str) -> None:
        if self.num_numbers and self.num_dates:
            raise ValueError(
                f"{path}: the column {column} has {self.num_numbers} numbers and {self.num_dates} dates, which have no "
                "common order; write all of one kind"
            )


def exact(value: Any) -> Exact:
    """A number of a typed format. A float is the shortest decimal that gives it back."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise TypeError(f"expected a time, got {type(value).__name__}")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"expected a time, got {value}")
        return int(value) if value.is_integer() else Decimal(repr(float(value)))
    return value


def since_epoch(value: int, decimals: int) -> Exact:
    """A typed time of 10^-decimals seconds, as seconds."""
    whole, rest = divmod(value, 10**decimals)
    return Decimal(f"{value}E-{decimals}") if rest else whole  # arithmetic of decimals would round to 28 digits


def _seconds(moment: datetime.date) -> Exact:
    if not isinstance(moment, datetime.datetime):
        moment = datetime.datetime(moment.year, moment.month, moment.day)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.timezone.utc)
    passed = moment - _EPOCH
    seconds = passed.days * 86_400 + passed.seconds
    return since_epoch(seconds * 10**6 + passed.microseconds, 6)


def _moment(text: str) -> Exact:
    """An ISO date or datetime; datetime.fromisoformat would cut its decimals to six."""
    match = _MOMENT.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a number or an ISO date, got {shown(text, 40)!r}; date_format tells of other dates")
    day, clock, zone = match["day"], match["clock"], match["zone"] or "+00:00"
    if zone in ("Z", "UTC"):
        zone = "+00:00"
    elif ":" not in zone:
        zone = f"{zone[:3]}:{zone[3:] or '00'}"
    seconds = _seconds(datetime.datetime.fromisoformat(f"{day}T{clock or '00:00'}{zone}"))
    decimals = match["decimals"] or "0"
    return since_epoch(int(seconds) * 10 ** len(decimals) + int(decimals), len(decimals))
