"""Text of files, which may hold anything, made fit for a terminal, a prompt and a comparison."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

# What terminals obey: CSI and OSC sequences as a whole, then whatever of them is left.
_CSI = r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
_OSC = r"(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
_ESCAPES = re.compile(rf"{_CSI}|{_OSC}|\x1b[ -/]*[0-~]?")
# Control characters other than white space, those that turn the direction of what follows, those of no width.
_CONTROLS = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)
# What nobody sees in an id: marks of byte order and of direction, blanks and joiners of no width.
_UNSEEN = re.compile("[\xad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
_JOINERS = re.compile("[\u200c\u200d]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#[0-9]{1,6}|#x[0-9a-fA-F]{1,6});")


def shown(text: object, limit: int = 200) -> str:
    """For messages: one line, cut at ``limit``, with nothing in it that a terminal would obey."""
    cut = str(text)[: limit + 1]
    safe = "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in cut[:limit])
    return safe + "..." if len(cut) > limit else safe


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """For messages: ``name old -> new`` for each name whose value is another one, with none for a missing one."""

    def told(value: Any) -> str:
        return "none" if value is None else shown(value, 80)

    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} {told(before.get(name))} -> {told(now.get(name))}" for name in names]


def one_line(title: str) -> str:
    """A title is one line of a prompt, so its white space becomes single blanks; terminal escapes and control
    characters go, and so do lone surrogates, which no file of UTF-8 can hold. Letters are composed (NFC): two
    spellings that look alike are one title."""
    if not title.isascii():
        title = unicodedata.normalize("NFC", _SURROGATES.sub("\ufffd", title))
    if not title.isprintable():
        title = _CONTROLS.sub("", _ESCAPES.sub("", title))
    return " ".join(title.split())


def without_entities(title: str) -> str:
    """HTML entities, which crawlers leave in titles, as what they stand for."""
    return _ENTITY.sub(lambda match: html.unescape(match[0]), title) if "&" in title else title


def clean_title(title: str) -> str:
    """What an item is called; "" where nothing is left."""
    return one_line(without_entities(title))


def without_unseen(text: str) -> str:
    """An id without what has no width. Joiners tell letters of some scripts and emojis apart, but nothing in ASCII."""
    text = _UNSEEN.sub("", text)
    joined = _JOINERS.sub("", text)
    return joined if joined.isascii() else text


def text_of(value: bytes) -> str:
    """Text that a column of bytes holds."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("bytes that are no UTF-8 text; cast the column to text") from None
