"""Times as files have them, kept exactly: what comes before what must not hang on a float or on whole seconds."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import math
import re
import sys
import time
from array import array
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from .texts import shown, text_of

logger = logging.getLogger(__name__)

LIMB = 18
"""Decimals of a time that one array of 64-bit integers holds."""
MOST_LIMBS = 4
_SCALE = 10**LIMB
_FULL = 8
"""Letters of a time that counts from an epoch, or of a date, at least."""
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


_EDGES = np.array(
    [
        *(19 * 10**6, 2101 * 10**4, 10**8, 10**10, 10**11, 19 * 10**10, 2101 * 10**8, 10**13),
        *(19 * 10**12, 2101 * 10**10, 10**14, 10**16, 10**17),
    ],
    np.uint64,
)
"""Where the size of a time becomes another cell; below the first of them is cell 0."""
_DATES = {1: ("dates like 20200131", 1), 6: ("dates like 202001312359", 10**4), 9: ("dates like 20200131235959", 10**6)}
"""By cell: the name, and how much a day counts."""
_UNITS = {3: "seconds", 5: "milliseconds", 6: "milliseconds", 7: "milliseconds", 11: "microseconds", 13: "nanoseconds"}
_FEW = 0.1
"""Up to this share of the smaller of two units is nothing between them."""


class Units:
    """In which units the times of a column seem to be, by their size, over all of them.

    A unit is told by the years from 1973 on, which lie a thousandfold apart. Between two units there is nothing where a
    column mixes them, and much where the numbers of one unit, or plain counts, go from small to large.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(len(_EDGES) + 1, np.int64)
        self.dates = dict.fromkeys(_DATES, 0)

    def add(self, times: np.ndarray) -> None:
        """The whole parts of some of the times."""
        if not len(times):
            return
        sizes = np.abs(times).view(np.uint64)  # also of -2**63, which has no absolute value in 63 bits
        least, most = np.searchsorted(_EDGES, [sizes.min(), sizes.max()], side="right")
        if least == most and least not in _DATES:
            self.counts[least] += len(sizes)
            return
        cells = np.searchsorted(_EDGES, sizes, side="right")
        self.counts += np.bincount(cells, minlength=len(self.counts))
        for cell, (_, day) in _DATES.items():
            self.dates[cell] += _count_dates(sizes[cells == cell].astype(np.int64), day)

    def mixed(self) -> dict[str, int]:
        """How many times have each unit; empty unless there are several."""
        names = dict(_UNITS)
        for cell, (name, _) in _DATES.items():
            if self.dates[cell] > (1 - _FEW) * self.counts[cell]:
                names[cell] = name
        found: list[tuple[str, int]] = []
        between = 0
        for cell, count in enumerate(self.counts.tolist()):
            if cell not in names or not count:
                between += count
                continue
            name = names[cell]
            last, known = found[-1] if found else (name, count)
            if found and (last == name or between > _FEW * min(known, count)):
                found[-1] = (name, known + count)
            else:
                found.append((name, count))
            between = 0
        by_name: dict[str, int] = {}
        for name, count in found:
            by_name[name] = by_name.get(name, 0) + count
        return by_name if len(by_name) > 1 else {}


def _count_dates(numbers: np.ndarray, day: int) -> int:
    """How many of the numbers read as a date and a time of day; ``day``: how much a day counts."""
    date, clock = np.divmod(numbers, day)
    month, of_month = date // 100 % 100, date % 100
    hour, rest = clock * 100 // day, clock % max(day // 100, 1)
    right = (month >= 1) & (month <= 12) & (of_month >= 1) & (of_month <= 31)
    return int(np.count_nonzero(right & (hour < 24) & (rest // 100 < 60) & (rest % 100 < 60)))


class Moment(NamedTuple):
    """A typed time: so many times 10^-decimals seconds since 1970."""

    value: int
    decimals: int


DATE_FORMAT = 'as "%d.%m.%Y" for 31.12.2026'
_ADJACENT = re.compile("(?:%[A-Za-z]){2,}")
_ORDERED = [
    datetime.datetime(*parts, tzinfo=datetime.timezone.utc)  # type: ignore[misc, arg-type]
    for parts in (
        *((2025, 12, 31, 23, 59), (2026, 1, 2), (2026, 1, 13)),
        *((2026, 1, 31, 11, 58, 58, 900_000), (2026, 1, 31, 11, 58, 59, 100_000)),
        *((2026, 1, 31, 11, 59), (2026, 1, 31, 12), (2026, 1, 31, 23, 59, 59), (2026, 2, 1), (2027, 1, 1)),
    )
]
"""Moments with a turn of each part of a date between them, ascending."""


def _check_format(date_format: str) -> None:
    """ValueError for a format that reads no date at all, not even one that was written with it, and for one that reads
    dates in another order: it lacks a part, such as the year, and has a smaller one."""
    try:
        if "%" not in date_format:
            raise ValueError("it has none")
        texts = [moment.strftime(date_format) for moment in _ORDERED]
        found = [_seconds(datetime.datetime.strptime(text, date_format)) for text in texts]
    except (ValueError, re.error) as error:
        raise ValueError(
            f"date_format: expected codes of strptime, each once, {DATE_FORMAT}, got {shown(date_format, 40)!r} "
            f"({shown(error)})"
        ) from None
    read = zip(_ORDERED, texts, found, strict=True)
    for (one, first, earlier), (two, second, later) in itertools.combinations(read, 2):
        if first != second and earlier >= later:
            raise ValueError(
                f"date_format: expected codes for the year (%Y) and for all parts down to the smallest, "
                f"{DATE_FORMAT}, got {shown(date_format, 40)!r}, which reads {shown(second, 40)!r} of {two:%F %T} as "
                f"no later than {shown(first, 40)!r} of {one:%F %T}"
            )
    if found[0] == found[-1]:
        raise ValueError(
            f"date_format: expected codes for the year (%Y) and for what follows it, {DATE_FORMAT}, got "
            f"{shown(date_format, 40)!r}, which has no year"
        )


class TimeReader:
    """Numbers stay what they are (their unit is the source's affair); dates become seconds since 1970, in UTC where
    they name no zone. A column of both has no order, so ``settle`` refuses it.

    ``date_format``: how dates are written, as for strptime, where they are not ISO dates. ValueError for one without
    its codes.
    """

    def __init__(self, date_format: str | None = None) -> None:
        if date_format is not None:
            _check_format(date_format)
        self.date_format = date_format
        self.num_numbers = 0
        self.num_dates = 0
        self.num_zoned = 0
        """Dates, written as text, that name their zone."""
        self.num_others = 0
        """Texts that are neither numbers nor ISO dates."""
        self.num_short = 0
        """Numbers written without their last digits, as 1.6E+09."""
        self.first_short = ""
        self.num_rounded = 0
        """Floats that stand for several whole numbers."""
        self.rounded = ("", 0.0)
        """Their type, and the widest step from one to the next."""
        self._shortest = self._last = sys.maxsize
        """Letters of a time as text: the fewest of all but the last, and of the last."""

    def __call__(self, value: Any) -> Exact:
        if type(value) is bytes:
            value = text_of(value)
        if type(value) is str:
            text = value.strip()
            if self._last < self._shortest:
                self._shortest = self._last
            self._last = len(text)
            if self.date_format is None and text.isdecimal() and text.isascii():
                self.num_numbers += 1
                return int(text)
            if self.date_format is None and _NUMBER.fullmatch(text):
                self.num_numbers += 1
                return self._number(text)
            moment = self._formatted(text) if self.date_format else self._moment(text)
            self.num_dates += 1
            return moment
        if type(value) is Moment:
            self.num_dates += 1
            return since_epoch(*value)
        if isinstance(value, datetime.date):
            self.num_dates += 1
            return _seconds(value)
        number = exact(value)
        if self.date_format is not None:  # the number 20260131 is a date too
            moment = self._of_number(number)
            self.num_dates += 1
            return moment
        self.num_numbers += 1
        return number

    def note_texts(self, sizes: np.ndarray) -> None:
        """Whole numbers, of so many letters each, that were read elsewhere."""
        self.num_numbers += len(sizes)
        if len(sizes):
            others = int(sizes[:-1].min()) if len(sizes) > 1 else sys.maxsize
            self._shortest, self._last = min(self._shortest, self._last, others), int(sizes[-1])

    def note_floats(self, times: np.ndarray) -> None:
        """Times of a column of floats, which are read one by one too."""
        sizes = np.abs(times[np.isfinite(times)])
        rounded = sizes[sizes >= 2.0 ** (np.finfo(sizes.dtype).nmant + 1)]
        if len(rounded):
            self.num_rounded += len(rounded)
            self.rounded = (sizes.dtype.name, max(self.rounded[1], float(np.spacing(rounded.max()))))

    def shorter_last(self) -> tuple[int, int] | None:
        """The letters of the last time and the fewest of all others, if it has fewer. Small numbers, such as days, have
        one letter more or less by themselves: they say nothing."""
        told = _FULL <= self._shortest < sys.maxsize
        return (self._last, self._shortest) if told and self._last < self._shortest else None

    def _number(self, text: str) -> Decimal:
        number = Decimal(text)
        if "+" in text[1:] and number and number.as_tuple().exponent > 0:  # type: ignore[operator]
            self.num_short += 1
            self.first_short = self.first_short or text
        return number

    def _formatted(self, text: str) -> Exact:
        assert self.date_format is not None
        try:
            moment = datetime.datetime.strptime(text, self.date_format)
        except ValueError:
            raise ValueError(f"expected a date like {self.date_format}, got {shown(text, 40)!r}") from None
        self._check_ignored(text, moment)
        # Where nothing stands between the codes 1022026 would be the 10th as well as the 1st of February.
        if _ADJACENT.fullmatch(self.date_format) and not text.startswith(
            moment.strftime(self.date_format.removesuffix("%f"))
        ):
            raise ValueError(f"expected all digits of a date like {self.date_format}, got {shown(text, 40)!r}")
        return _seconds(moment)

    def _check_ignored(self, text: str, moment: datetime.datetime) -> None:
        """ValueError where strptime reads a part of a date and makes nothing of it."""
        assert self.date_format is not None
        if "%p" in self.date_format and "%H" in self.date_format:
            of_12 = None
            with contextlib.suppress(ValueError):  # 13:30 PM is an hour of 24
                of_12 = datetime.datetime.strptime(text, self.date_format.replace("%H", "%I"))
            if of_12 not in (None, moment):
                raise ValueError(f"expected an hour of 24 (%H), got {shown(text, 40)!r}; hours of 12 with %p need %I")
        if "%Z" in self.date_format and moment.tzinfo is None:
            zone = time.strptime(text, self.date_format).tm_zone
            if zone.upper() not in ("UTC", "GMT"):
                raise ValueError(
                    f"expected a date in UTC, got {shown(text, 40)!r}; other zones are written as +01:00 (%z)"
                )

    def _of_number(self, number: Exact) -> Exact:
        """A number keeps no zeros in front, so only one that begins with the year is certain to have all digits."""
        assert self.date_format is not None
        if number != int(number) or not self.date_format.startswith("%Y"):
            raise ValueError(
                f"expected text with a date like {self.date_format}, got the number {number}; write dates as text"
            )
        return self._formatted(str(int(number)))

    def _moment(self, text: str) -> Exact:
        """An ISO date or datetime; datetime.fromisoformat would cut its decimals to six."""
        match = _MOMENT.fullmatch(text)
        if match is None:
            self.num_others += 1
            raise ValueError(f"expected a number or an ISO date, got {shown(text, 40)!r}")
        day, clock, zone = match["day"], match["clock"], match["zone"] or "+00:00"
        if zone in ("Z", "UTC"):
            zone = "+00:00"
        elif ":" not in zone:
            zone = f"{zone[:3]}:{zone[3:] or '00'}"
        seconds = _seconds(datetime.datetime.fromisoformat(f"{day}T{clock or '00:00'}{zone}"))
        self.num_zoned += match["zone"] is not None
        decimals = match["decimals"] or "0"
        return since_epoch(int(seconds) * 10 ** len(decimals) + int(decimals), len(decimals))

    def remedy(self) -> str:
        """For a source that has the option ``date_format``."""
        return f"dates that are not ISO dates need --set date_format, {DATE_FORMAT}" if self.num_others else ""

    def settle(self, path: object, column: str) -> None:
        if self.num_numbers and self.num_dates:
            raise ValueError(
                f"{path}: the column {column} has {self.num_numbers} numbers and {self.num_dates} dates, which have no "
                "common order; write all of one kind"
            )
        if 0 < self.num_zoned < self.num_dates:
            logger.warning(
                "%s: %s: %d of %d dates name a time zone; the others are taken as UTC",
                path,
                column,
                self.num_zoned,
                self.num_dates,
            )
        count = self.num_numbers + self.num_dates
        # Of some programs these are numbers that end with zeros, which are few.
        if self.num_short > count / 2:
            logger.warning(
                "%s: %s: %d of %d times are written without their last digits, the first is %s: several times may be "
                "one; write all digits",
                path,
                column,
                self.num_short,
                count,
                self.first_short,
            )
        if self.num_rounded:
            kind, step = self.rounded
            logger.warning(
                "%s: %s: %d of %d times are %s that stand for several whole numbers, up to %.0f: they are rounded; "
                "write integers or timestamps",
                path,
                column,
                self.num_rounded,
                count,
                kind,
                step,
            )


def exact(value: Any) -> Exact:
    """A number of a typed format. A float is the shortest decimal that gives it back."""
    if isinstance(value, np.floating):  # float16, as an older pyarrow gives it
        value = float(value)
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
