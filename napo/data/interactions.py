"""A reader's result: a log of interactions with small integers for users and items, and the titles."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from . import parts
from .missing import MISSING, is_missing
from .parts import Parts
from .texts import clean_title, shown, text_of, without_unseen
from .times import Exact, Times

logger = logging.getLogger(__name__)

NOUNS = {
    "Movies": "watched",
    "Artists": "listened to",
    "Books": "read",
    "Games": "played",
    "Items": "chosen",
}


EXACT_FLOATS = 2**53
"""From here on a float stands for several integers."""

_FLOAT_ID = re.compile(r"(-?[0-9]+)\.0+", re.ASCII)
_POWER_ID = re.compile(r"(-?[0-9])(?:\.([0-9]+))?([eE]\+|E)([0-9]{1,3})", re.ASCII)
"""A number with an exponent, as programs write it."""
_LIKE_A_POWER = re.compile(r"[0-9]+[eE][0-9]{1,2}", re.ASCII)
"""A number with an exponent, or an id of hexadecimal digits."""
SPREADSHEET_POWER = 11
"""From 10 to this power on spreadsheets write integers with an exponent, and only their first digits."""
SPREADSHEET_DIGITS = 15
"""What spreadsheets keep of a number; they make zeros of the digits behind."""
FEWEST_ROUND = 5
"""Fewer ids end with zeros by accident."""


def key(value: Any, *, exact_below: int = EXACT_FLOATS) -> str:
    """A user or an item as text: the same for every spelling of one id, as 12, 12.0 and " 12". Raises for values that
    cannot be an id, such as null, and for floats that stand for several integers."""
    if isinstance(value, np.generic):
        if isinstance(value, np.floating):
            exact_below = min(exact_below, 2 ** (np.finfo(value).nmant + 1))
        value = value.item()
    if isinstance(value, bytes):
        value = text_of(value)
    if isinstance(value, str):
        return _text_key(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"expected an id, got {value}")
        if abs(value) >= exact_below:
            raise ValueError(_rounded(repr(value), exact_below))
        return str(int(value)) if value.is_integer() else repr(float(value))
    if isinstance(value, Decimal) and value.is_finite():
        # With a point or an exponent it was a float once; without, it is an integer of any size.
        if abs(value) >= exact_below and value.as_tuple().exponent != 0:
            raise ValueError(_rounded(str(value), exact_below))
        return str(int(value)) if value == int(value) else f"{value.normalize():f}"
    raise TypeError(f"expected an id, got {type(value).__name__ if value is not None else 'null'}")


def _text_key(value: str) -> str:
    if value.isalnum() and value.isascii():  # nearly all ids
        return value
    text = value.strip()
    if not text:
        raise ValueError("an empty user or item")
    if not text.isascii():
        if any("\ud800" <= one <= "\udfff" for one in text):
            raise ValueError("an id with a lone surrogate, which is no character")
        text = unicodedata.normalize("NFC", without_unseen(text).strip())
        if not text:
            raise ValueError("an empty user or item")
    if text[-1] == "0" and (match := _FLOAT_ID.fullmatch(text)):
        if len(match[1]) > 15 and abs(int(match[1])) >= EXACT_FLOATS:
            raise ValueError(_rounded(text, EXACT_FLOATS))
        return match[1]
    if match := _POWER_ID.fullmatch(text):
        return _of_power(text, *match.groups())
    return text


def _of_power(text: str, digit: str, decimals: str | None, sign: str, exponent: str) -> str:
    """The integer that ``text`` stands for. Raises where it may stand for several."""
    shown_digits, power = decimals or "", int(exponent)
    if shown_digits[power:].strip("0") or (sign == "E" and decimals is None):
        return text  # no integer; or 1E5, which may be an id of hexadecimal digits
    # Java leaves out no digit but zeros (1.2345678E7), and R writes 100000 as 1e+05.
    whole = sign == "E" or len(shown_digits) >= power
    if not whole and (shown_digits or (sign == "E+" and power >= SPREADSHEET_POWER)):
        raise ValueError(
            f"{shown(text, 30)} is an id of {power + 1} digits without its last ones, as spreadsheets write it; write "
            "ids as integers or text"
        )
    number = int(digit + shown_digits[:power].ljust(power, "0"))
    if abs(number) >= EXACT_FLOATS:
        raise ValueError(_rounded(text, EXACT_FLOATS))
    return str(number)


def _like_powers(names: Iterable[str]) -> list[str]:
    """Ids like 1e5, if all others are whole numbers; among ids of hexadecimal digits they are nothing special."""
    found, others = [], 0
    for name in names:
        if name.isdecimal():
            others += 1
        elif _LIKE_A_POWER.fullmatch(name):
            found.append(name)
        else:
            return []
    return found if others else []


def _padded(known: Mapping[str, int]) -> list[tuple[str, str]]:
    """Whole numbers with zeros in front, each with another id that has fewer or more of them."""
    others: dict[str, str] = {}
    found = []
    for name in known:
        if name[0] == "0" and len(name) > 1 and name.isdecimal():
            bare = name.lstrip("0") or "0"
            other = bare if bare in known else others.setdefault(bare, name)
            if other != name:
                found.append((name, other))
    return found


def _of_other_case(names: Callable[[], Iterable[str]]) -> list[tuple[str, str]]:
    """Ids that are another one's but for the case of letters, each with the first such. ``names``: the ids, each once;
    there may be so many that their hashes are all that fits beside them."""
    hashes = np.fromiter((hash(name.lower()) for name in names()), np.int64)
    hashes.sort()
    common = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not common:
        return []
    firsts: dict[str, str] = {}
    found = []
    for name in names():
        if hash(lower := name.lower()) in common and (first := firsts.setdefault(lower, name)) != name:
            found.append((name, first))
    return found


def _without_last_digits(names: Iterable[str]) -> set[str]:
    """The ids of more digits than spreadsheets keep, if all of them have zeros in the place of the others."""
    found = set()
    for name in names:
        if len(name) > SPREADSHEET_DIGITS and name.isdecimal():
            if name[SPREADSHEET_DIGITS:].strip("0"):
                return set()
            found.add(name)
    return found if len(found) >= FEWEST_ROUND else set()


def _rounded(text: str, limit: int) -> str:
    return (
        f"{shown(text, 30)} is a float of 2**{limit.bit_length() - 1} or more, which stands for several ids; "
        "write ids as integers or text"
    )


def title_of(value: Any) -> str:
    """A title of a typed format; "" where there is none."""
    if is_missing(value):
        return ""
    if isinstance(value, bytes):
        return text_of(value)
    if isinstance(value, (bool, list, dict, tuple)):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value if isinstance(value, str) else key(value)


@dataclass
class Log:
    """Interactions in file order, in parts of which only the last is in memory.

    ``add`` is called once per line; users and items are numbered as they come, which makes the numbers deterministic.
    """

    noun: str = "Items"
    user_ids: dict[str, int] = field(default_factory=dict)
    item_ids: dict[str, int] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    years: dict[str, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=lambda: {"files": []})

    def __post_init__(self) -> None:
        self._parts = Parts()
        self._user = array("i")
        self._item = array("i")
        self._time = Times()
        self._untitled = 0
        self._mended = 0
        self._respelled = 0
        self._first_respelled: tuple[str, str] | None = None
        self._powers = 0
        self._first_power: tuple[str, str] | None = None
        self._retitled: list[str] = []
        self._one_year: dict[str, str] = {}  # millions of books share a few hundred of them

    def add(self, user: str, item: str, time: Exact) -> None:
        """Ids may be of any spelling. Nearly all are known already, and known ones are spelled right."""
        if user not in self.user_ids:
            user = self._spelled(user)
        if item not in self.item_ids:
            item = self._spelled(item)
        # The time first: one out of range raises OverflowError, and the columns must stay of one length.
        self._time.append(time)
        self._user.append(self.user_ids.setdefault(user, len(self.user_ids)))
        self._item.append(self.item_ids.setdefault(item, len(self.item_ids)))
        if len(self._user) >= parts.PART:
            self._end_part()

    def extend(self, users: pa.DictionaryArray, items: pa.DictionaryArray, times: np.ndarray) -> None:
        """``add`` for many at once, in the same order, with whole times. Raises as ``key`` does, before anything is
        kept, if one of them is nobody's id."""
        found = []
        for known, column in ((self.user_ids, users), (self.item_ids, items)):
            names = column.dictionary.to_pylist()
            numbers = list(map(known.get, names))
            new = [(place, self._spelled(names[place])) for place, number in enumerate(numbers) if number is None]
            found.append((known, numbers, new, column.indices))
        for column, (known, numbers, new, indices) in zip((self._user, self._item), found, strict=True):
            for place, name in new:
                numbers[place] = known.setdefault(name, len(known))
            column.frombytes(np.array(numbers, np.int32)[indices.to_numpy()].tobytes())
        self._time.extend(times)
        if len(self._user) >= parts.PART:
            self._end_part()

    def _spelled(self, name: Any) -> str:
        spelled = key(name)
        if type(name) is str and name != spelled:
            self._respelled += 1
            self._first_respelled = self._first_respelled or (name, spelled)
            self._note_power(name, spelled)
        return spelled

    def _note_power(self, name: str, spelled: str) -> None:
        if name != spelled and "e" in name.lower() and spelled.lstrip("-").isdecimal():
            self._powers += 1
            self._first_power = self._first_power or (name, spelled)

    def title(self, item: str, title: str, year: str = "") -> None:
        """The title of an item. The first one counts, and the report tells of others that differ from it."""
        name, item = item, key(item)
        self._note_power(name, item)
        cleaned = clean_title(title)
        if not cleaned:
            self._untitled += 1
            return
        self._mended += cleaned != " ".join(title.split())
        known = self.titles.setdefault(item, cleaned)
        if known == cleaned:
            if year:
                self.years.setdefault(item, self._one_year.setdefault(year, year))
        else:
            self._retitled.append(f"{shown(item, 40)}: {shown(known, 60)!r}, then {shown(cleaned, 60)!r}")

    def settle_titles(self) -> None:
        """Remarks on the titles, once all are read."""
        suspicious = [item for item, title in self.titles.items() if title in MISSING]
        if self._first_respelled:
            name, spelled = self._first_respelled
            self.report["respelled_ids"] = self._respelled
            logger.warning(
                "%d ids are spelled anew, as %r, which is %s",
                self._respelled,
                shown(name, 40),
                shown(spelled, 40),
            )
        self._tell_powers()
        if self._untitled:
            self.report["without_title"] = self._untitled
        if self._mended:
            self.report["mended_titles"] = self._mended
            logger.warning(
                "%d titles are composed anew (NFC) or rid of HTML entities and control characters", self._mended
            )
        if self._retitled:
            self.report["retitled"] = {"count": len(self._retitled), "first": self._retitled[:10]}
            logger.warning(
                "%d lines give an item a second title, and the first one counts; the first: %s",
                len(self._retitled),
                "; ".join(self._retitled[:3]),
            )
        if suspicious:
            self.report["suspicious_titles"] = len(suspicious)
            logger.warning(
                "%d titles read like a value that is not there (%s), and stay; the first is item %s",
                len(suspicious),
                ", ".join(sorted({self.titles[item] for item in suspicious})),
                shown(suspicious[0], 40),
            )
        self._join_leading_zeros()

    def _tell_powers(self) -> None:
        if self._first_power:
            name, spelled = self._first_power
            self.report["ids_with_exponent"] = self._powers
            logger.warning(
                "%d ids are written with an exponent and read as integers, %r as %s; where their last digits were "
                "rounded off, several ids are one: write ids as integers",
                self._powers,
                shown(name, 40),
                spelled,
            )
        for noun, ids, known in (
            ("users", self.user_ids, [self.user_ids]),
            ("items", self.item_ids, [self.item_ids, self.titles]),
        ):
            powers = sorted(set(_like_powers(itertools.chain(*known))))
            if powers:
                self.report[f"{noun}_like_powers"] = len(powers)
                logger.warning(
                    "%d ids of %s stay text though they read like numbers with an exponent, and all others are whole "
                    "numbers; the first is %s; write ids as integers",
                    len(powers),
                    noun,
                    powers[0],
                )
            only_titled = [name for name in self.titles if name not in ids] if noun == "items" else []
            for pairs, what, how in (
                (_padded(ids), "with_leading_zeros", "by zeros in front"),
                (
                    _of_other_case(functools.partial(itertools.chain, ids, only_titled)),
                    "of_other_case",
                    "in the case of letters",
                ),
            ):
                if pairs:
                    self.report[f"{noun}_{what}"] = len(pairs)
                    logger.warning(
                        "%d ids of %s differ from others only %s, as %s and %s, and stay apart; where they are the "
                        "same, write them alike",
                        len(pairs),
                        noun,
                        how,
                        *(shown(name, 40) for name in pairs[0]),
                    )
            round_ids = _without_last_digits(itertools.chain(*known))
            if round_ids:
                self.report[f"{noun}_without_last_digits"] = len(round_ids)
                logger.warning(
                    "all %d ids of %s with more than %d digits have zeros behind those, as %s: spreadsheets keep no "
                    "more digits, so several ids may be one; write ids as text there",
                    len(round_ids),
                    noun,
                    SPREADSHEET_DIGITS,
                    min(round_ids),
                )

    def _join_leading_zeros(self) -> None:
        """Items whose ids differ from those of the titles only in leading zeros, where that is not ambiguous."""
        without = [item for item in self.item_ids if item not in self.titles and item.isdecimal()]
        if not without:
            return
        spellings: dict[str, str | None] = {}
        for item in self.titles:
            if item.isdecimal():
                short = item.lstrip("0")
                spellings[short] = None if short in spellings or item in self.item_ids else item
        wanted: dict[str, str | None] = {}
        for item in without:
            found = spellings.get(item.lstrip("0"))
            if found is not None:
                wanted[found] = None if found in wanted else item
        renamed = {found: item for found, item in wanted.items() if item is not None}
        if not renamed:
            return
        # The order of the titles stays: items are numbered by it.
        self.titles = {renamed.get(item, item): title for item, title in self.titles.items()}
        self.years = {renamed.get(item, item): year for item, year in self.years.items()}
        self.report["joined_without_leading_zeros"] = len(renamed)
        found, item = next(iter(renamed.items()))
        logger.warning(
            "%d items are joined to titles whose ids differ in leading zeros, as %s and %s", len(renamed), item, found
        )

    def drop(self, reason: str, count: int = 1) -> None:
        """Count good lines that the options leave out."""
        if count:
            dropped = self.report.setdefault("left_out", {})
            dropped[reason] = dropped.get(reason, 0) + count

    def parts(self) -> Parts:
        """user (int32), item (int32) and the limbs of time (int64) of each interaction, in file order. Call it once,
        when all were added."""
        self._end_part(last=True)
        return self._parts

    def _end_part(self, *, last: bool = False) -> None:
        columns = [np.array(self._user, np.int32), np.array(self._item, np.int32), *self._time.columns()]
        if len(self._user) or not len(self._parts):
            self._parts.append(columns, last=last)
        self._user, self._item, self._time = array("i"), array("i"), Times()


@dataclass
class Preset:
    """A reader's result for a source with a split of its own: rows (history, next), oldest first, items from 0."""

    noun: str = "Items"
    titles: list[str] = field(default_factory=list)
    source_ids: list[str] = field(default_factory=list)
    years: list[str] = field(default_factory=list)
    """Where the source has them, one for each title: they tell equal titles apart."""
    rows: dict[str, list[tuple[list[int], int]]] = field(default_factory=dict)
    lists: dict[str, list[list[int]]] = field(default_factory=dict)
    """Candidate lists, where the source brings them too."""
    report: dict[str, Any] = field(default_factory=lambda: {"files": []})

    def rebuilt_users(self) -> dict[str, list[list[int]]] | None:
        """By split, each user's whole sequence; None where the rows do not tell.

        They tell where each row is either the start of a user (empty history) or goes on with the row before.
        """
        users: dict[str, list[list[int]]] = {}
        for split, rows in self.rows.items():
            users[split] = []
            for history, target in rows:
                if not history:
                    users[split].append([target])
                elif users[split] and users[split][-1][-len(history) :] == history:
                    users[split][-1].append(target)
                else:
                    return None
        return users
