"""Titles as a language model should see them: "The Matrix", not "Matrix, The (1999)", and no two items alike."""

from __future__ import annotations

import re
from collections.abc import Sequence

ARTICLES = "The|A|An|La|Le|Les|L'|El|Il|Lo|Los|Las|Un|Una|Une|Das|Der|Die|Den|Det|De|Gli|O|Os"
_ARTICLE_BEHIND = re.compile(rf"^(?P<rest>[^()]+), (?P<article>{ARTICLES})$", re.IGNORECASE)
_PARTS = re.compile(r"\(([^()]*)\)")
_YEAR = re.compile(r"^(?P<title>.*\S)\s*\((?P<year>[12]\d{3})\)\s*$")


def split_year(title: str) -> tuple[str, str]:
    """ "Heat (1995)" -> ("Heat", "1995"); the year is "" where there is none."""
    match = _YEAR.match(title)
    return (match["title"], match["year"]) if match else (title, "")


def article_first(title: str) -> str:
    """ "Seventh Seal, The (Sjunde inseglet, Det)" -> "The Seventh Seal (Det Sjunde inseglet)"."""

    def turn(part: str) -> str:
        match = _ARTICLE_BEHIND.match(part.strip())
        if not match:
            return part
        article = match["article"]
        return f"{article}{'' if article.endswith(chr(39)) else ' '}{match['rest']}"

    head, bracket, tail = title.partition(" (")
    return turn(head) + _PARTS.sub(lambda m: f"({turn(m[1])})", bracket + tail)


def disambiguate(titles: Sequence[str], years: Sequence[str]) -> tuple[list[str], list[str]]:
    """Make titles distinct: equal ones get their year, and what is still equal gets " (2)", " (3)", in order.

    Returns the new titles and the list of titles that occurred more than once.
    """
    counts: dict[str, int] = {}
    for title in titles:
        counts[title] = counts.get(title, 0) + 1
    repeated = sorted(title for title, count in counts.items() if count > 1)
    taken = {title for title, count in counts.items() if count == 1}
    numbers: dict[str, int] = {}  # of each base the last number given, below which none is free
    result = []
    for title, year in zip(titles, years, strict=True):
        if counts[title] > 1:
            title = base = f"{title} ({year})" if year else title
            while title in taken:
                numbers[base] = numbers.get(base, 1) + 1
                title = f"{base} ({numbers[base]})"
            taken.add(title)
        result.append(title)
    return result, repeated
