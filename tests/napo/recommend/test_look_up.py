"""Titles and ids that are looked up, and which of them are searched for."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napo.recommend import Catalogue, UnknownItem

LETTERS_BY_FOLDING = [
    one for one in map(chr, range(sys.maxunicode + 1)) if one.isalpha() != any(map(str.isalpha, one.casefold()))
]
"""Signs that are no letters until case is folded, such as the iota below Greek letters."""
GROWING = [one for one in map(chr, range(sys.maxunicode + 1)) if len(one.casefold()) > 1]
SIGNS = [*LETTERS_BY_FOLDING, *GROWING, *"aZ1 \u0301\u200b\u212b"]


def searches_for(catalogue: Catalogue, wanted: Any) -> int:
    searched: list[str] = []

    def search(folded: str) -> tuple[None, list[str]]:
        searched.append(folded)
        return None, []

    catalogue._search = search  # type: ignore[method-assign]
    catalogue._near.clear()
    with suppress(ValueError):
        catalogue.find(wanted, [])
    return len(searched)


@pytest.mark.parametrize("sign", LETTERS_BY_FOLDING)
def test_signs_that_become_letters_are_searched_for(sign: str) -> None:
    catalogue = Catalogue(["50 Cent", "Heat"], ["1", "2"])
    for text in (sign, f"5 {sign}", sign * 300):
        assert searches_for(catalogue, text) == (not catalogue.knows(text))


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from(SIGNS) | st.characters(), max_size=8),
    times=st.sampled_from([1, 40, 299, 301]),
    kind=st.sampled_from([None, "id", "title", "name"]),
)
def test_what_is_known_is_not_searched_for(text: str, times: int, kind: str | None) -> None:
    catalogue = Catalogue(["50 Cent", "Heat", "Stra\u00dfe"], ["sku-1", "2", "3"])
    wanted: Any = text * times if kind is None else {kind: text * times}
    if catalogue.knows(wanted):
        assert searches_for(catalogue, wanted) == 0


def test_a_search_is_remembered() -> None:
    catalogue = Catalogue(["Heat", "Alien"], ["1", "2"])
    with pytest.raises(UnknownItem):
        catalogue.find("Predator", [])
    catalogue._search = None  # type: ignore[method-assign, assignment]
    with pytest.raises(UnknownItem):
        catalogue.find("PREDATOR", [])
