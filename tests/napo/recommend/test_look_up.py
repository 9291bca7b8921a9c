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


TITLES = ["Toy Story", "Toy Soldiers", "Heat", "heat"]


def test_titles_as_people_type_them() -> None:
    catalogue, notes = Catalogue(TITLES, ["7", "8", "9", "10"]), []
    found = [catalogue.find(text, notes) for text in ("toy story", " Heat ", "Toy So", "Toy Storry", 10, "8")]
    assert found == [0, 2, 1, 0, 3, 1]
    assert notes == ["'Toy So' was taken for 'Toy Soldiers'", "'Toy Storry' was taken for 'Toy Story'"]
    with pytest.raises(UnknownItem, match="did you mean 'Toy Story' or 'Toy Soldiers'"):
        catalogue.find("toy", notes)
    with pytest.raises(UnknownItem, match=r"got 'Alien'; see items\.parquet"):
        catalogue.find("Alien", notes)
    with pytest.raises(UnknownItem, match="expected the id of an item"):
        catalogue.find({"id": "Heat"}, notes)
    assert len(notes) == 2


def test_a_title_of_several_items_is_the_first_one_with_a_note() -> None:
    catalogue, notes = Catalogue(["Thing", "Heat", "Thing (2)"], ["7", "8", "9"]), []
    assert catalogue.find("thing", notes) == 0 and catalogue.find("Thing (2)", notes) == 2
    assert notes == ["'thing' was taken for the item with id '7'; '9' is 'Thing (2)'"]
    assert catalogue.find("Thing", notes) == 0 and notes[1:] == [notes[0].replace("thing", "Thing")]


def test_titles_that_differ_in_case_alone() -> None:
    """Steam has FORTIFY and Fortify."""
    catalogue, notes = Catalogue(["Thing", "Thing (2)", "thing", "FORTIFY", "Fortify"], [1, 2, 3, 4, 5]), []
    assert [catalogue.find(title, notes) for title in ("thing", "FORTIFY", "Fortify")] == [2, 3, 4]
    assert notes == []
    assert catalogue.find("THING", notes) == 0 and catalogue.find("fortify", notes) == 3
    assert notes == [
        "'THING' was taken for the item with id '1'; '3' is 'thing', '2' is 'Thing (2)'",
        "'fortify' was taken for the item with id '4'; '5' is 'Fortify'",
    ]
    with pytest.raises(UnknownItem, match="did you mean 'FORTIFY' or 'Fortify'"):
        catalogue.find("Fortifyy", notes)


def test_numbers_are_ids_and_are_not_guessed() -> None:
    catalogue, notes = Catalogue(["50 Cent", "311", "Rocky 3", "Heat"], [1, 2, 3, 4]), []
    assert catalogue.find(2, notes) == catalogue.find("311", notes) == catalogue.find(" 2.0 ", notes) == 1
    for number in (5, "5", "50", "1311", "3110", "3 11"):
        with pytest.raises(UnknownItem, match=rf"got '{number}'; see items|expected the id of an item.*'{number}'$"):
            catalogue.find(number, notes)
        assert catalogue.knows(number)
    with pytest.raises(UnknownItem, match=r"got '311'; it is a title: write it as text, in quotes"):
        catalogue.find(311, notes)
    with pytest.raises(UnknownItem, match="did you mean 'Rocky 3'"):
        catalogue.find("Rocky 4", notes)
    with pytest.raises(UnknownItem, match="did you mean 'Heat'"):
        catalogue.find("Hea", notes)  # too short a start
    assert notes == []


def test_what_is_searched_for() -> None:
    catalogue = Catalogue(["50 Cent", "Heat"], ["sku-1", "sku-2"])
    known = ("heat", "sku-1", "no. 5" * 100, 7, {"id": "sku-3"}, {"title": "50 CENT"})
    assert [catalogue.knows(item) for item in known] == [True] * 6
    assert not any(catalogue.knows(item) for item in ("Heats", "sku-3", {"title": "sku-1"}))


def test_letters_may_be_composed_or_not() -> None:
    catalogue, notes = Catalogue(["Sigur R\u00f3s", "M\u00fcnchen double space"], [1, 2]), []
    assert catalogue.find("Sigur Ro\u0301s", notes) == 0 and catalogue.find("sigur ro\u0301s", notes) == 0
    assert catalogue.find("Mu\u0308nchen  double\tspace", notes) == 1 and notes == []
    assert Catalogue(["Sigur Ro\u0301s"], [1]).find("SIGUR R\u00d3S", notes) == 0


def test_exact_titles_alone() -> None:
    catalogue, notes = Catalogue(TITLES, ["7", "8", "9", "10"]), []
    assert [catalogue.find(text, notes, exact=True) for text in ("Toy Story", " heat ", 8)] == [0, 3, 1]
    for wrong in ("toy story", "Toy So", "Toy Storry"):
        with pytest.raises(UnknownItem, match=f"expected a title or an id of the catalogue; got '{wrong}'"):
            catalogue.find(wrong, notes, exact=True)
    assert notes == []


def test_ids_that_are_titles_too() -> None:
    catalogue, notes = Catalogue(["10", "Heat"], ["1", "10"]), []
    assert catalogue.find("10", notes) == 1 and "an id and a title" in notes[0]
    assert catalogue.find({"title": "10"}, notes) == 0 and catalogue.find({"id": 10}, notes) == 1
    for wrong in (True, 1.5, None, {"name": "Heat"}, {}):
        with pytest.raises(ValueError, match="history: expected"):
            catalogue.find(wrong, notes)  # type: ignore[arg-type]
