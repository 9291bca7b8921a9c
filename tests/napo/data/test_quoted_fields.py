"""Quoted fields that go on over lines, and quotes that are letters.

Each input is the smallest that once gave a wrong result without a word.
"""

from __future__ import annotations

import csv
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_folder import ITEMS, LOG, Folder, sequence, table, titles

from napo.data import fields
from napo.data.fields import Fields
from napo.data.lines import Lines


def items_text(replaced: dict[int, str]) -> str:
    return "item_id,title\n" + "".join(replaced.get(item, f"{item},{title}") + "\n" for item, title in titles())


JOINED = {
    "a comma in the second line": ('3,"Dune\nPart Two, the film"', "Dune Part Two, the film", True),
    "as many commas in the first": ('3,"Dune, first\nPart Two, the film"', "Dune, first Part Two, the film", False),
    "a doubled quote and a comma": ('3,"Dune\n""Part"", two"', 'Dune "Part", two', True),
    "the last line ends with a doubled quote": ('3,"Dune\nPart, ""Two"""', 'Dune Part, "Two"', True),
    "three lines": ('3,"Dune\nPart, two\nof it, at last"', "Dune Part, two of it, at last", True),
    "no comma": ('3,"Dune\nPart Two"', "Dune Part Two", False),
    "a quote behind a backslash": ('3,"A \\"Burb\\" and\nthe \\"city\\", too"', 'A "Burb" and the "city", too', True),
}  # fmt: skip


@pytest.mark.parametrize("kind", JOINED)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quoted_title_over_lines_is_whole(
    kind: str, end: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    record, title, doubtful = JOINED[kind]
    folder.csv().write("items.csv", items_text({3: record}).replace("\n", end))
    data = folder.prepare()
    assert data.titles == ["Title 0", "Title 1", "Title 2", title, *(f"Title {item}" for item in range(4, ITEMS))]
    assert data.meta["files"][1]["joined_lines"] == record.count("\n")
    # A line that could be a record is not joined without a word.
    assert ("1 quoted fields go on over lines that could be records of their own" in caplog.text) is doubtful
    assert ("line 5: '3," in caplog.text) is doubtful


@pytest.mark.parametrize("source, sep", [("csv", "\t"), ("recbole", "\t"), ("movielens", ",")])
def test_other_files_of_fields_join_lines_too(source: str, sep: str, folder: Folder) -> None:
    record = sep.join(("3", f'"Dune\nPart Two{sep} the film"'))
    rows = [sep.join(map(str, row)) for row in titles()]
    rows[3] = record
    if source == "recbole":
        folder.recbole().write("x.item", "item_id:token\ttitle:token_seq\n" + "\n".join(rows) + "\n")
    elif source == "csv":
        folder.csv(suffix="tsv", between=sep).write("items.tsv", "item_id\ttitle\n" + "\n".join(rows) + "\n")
    else:
        folder.write("ratings.csv", table("userId,movieId,rating,timestamp", [(u, i, 5, k) for u, i, k in LOG]))
        folder.write("movies.csv", "movieId,title,genres\n" + "".join(f"{row},Drama\n" for row in rows))
    data = folder.prepare(source)
    assert data.titles[3] == " ".join(f"Dune Part Two{sep} the film".split()) and data.num_items == ITEMS


def test_a_quoted_id_over_lines_in_interactions_is_whole(folder: Folder) -> None:
    """Where the file is read by the block up to the first quote."""
    folder.csv(items=[*titles(), ('"x\n3,4"', "Odd")]).write(
        "interactions.csv", table("user_id,item_id,timestamp", [*LOG, (0, '"x\n3,4"', 99)])
    )
    assert sequence(folder.prepare())[-1] == "Odd"


LONE = {
    "no end in the file": '3,"Title 3',
    "other text behind the next quote": '3,"Title 3\n4,12" Title 4',
    "another field behind it": '3,"Title 3\n4,Title 4\n"5",Title 5',
}


@pytest.mark.parametrize("kind", LONE)
def test_a_lone_quote_swallows_nothing_and_is_said(kind: str, folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    lines = LONE[kind]
    folder.csv().write("items.csv", items_text({3: lines, 4: "6,Title 6", 5: "7,Title 7"}))
    data = folder.prepare(max_untitled=0.5)
    assert data.titles[3] == '"Title 3' and "Title 6" in data.titles and data.num_items >= ITEMS - 2
    assert "items.csv: 1 fields begin with a quote" in caplog.text
    assert "line 5: '3,\"Title 3'" in caplog.text and data.meta["files"][1]["quotes_without_end"] == 1


def test_lines_that_a_lone_quote_may_have_swallowed_are_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    """One reading is RFC 4180's, the other that of a file without quoting: no rule can tell which is right."""
    folder.csv().write("items.csv", items_text({3: '3,"Title 3', 5: '5,a record of 12"'}))
    data = folder.prepare(max_untitled=0.5)
    assert data.titles[3] == "Title 3 4,Title 4 5,a record of 12" and data.num_items == ITEMS - 2
    assert "1 quoted fields go on over lines that could be records of their own" in caplog.text
    assert data.meta["files"][1]["doubtful_joins"] == 1
    assert "with --set items_quote=none all quotes are letters" in caplog.text
    bare = folder.prepare(items_quote="none")
    assert bare.titles[3:6] == ['"Title 3', "Title 4", 'a record of 12"']


def test_a_quoted_field_beyond_the_bound_is_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.csv().write("items.csv", items_text({3: '3,"long' + "\nmore" * 150 + '"'}))
    with pytest.raises(ValueError, match=r"items\.csv: 150 of 170 lines are bad, .*line 6: expected 2 fields, got 1"):
        folder.prepare()
    assert "1 fields begin with a quote, and none within 100 lines ends" in caplog.text


def test_some_quoted_fields_beyond_the_bound_do_not_end_those_within(
    folder: Folder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fields, "MOST_TRIED", 2)
    monkeypatch.setattr(fields, "MOST_JOINED", 3)
    changed = {place: f'{place},"Title\n{place}"' for place in range(ITEMS)}
    long = {place: f'{place},"long' + "\nmore" * 5 + '"' for place in (4, 7, 10)}
    folder.csv().write("items.csv", items_text(changed | long))
    data = folder.prepare(max_bad=0.5)
    assert data.titles[11] == "Title 11" and data.meta["files"][1]["quotes_without_end"] == len(long)
    assert f"{len(long)} fields begin with a quote" in caplog.text


def test_a_joined_record_of_too_many_fields_is_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.csv().write("items.csv", items_text({3: '3,"Title 3\nof two","more"'}))
    data = folder.prepare(max_bad=0.1)
    assert data.titles[3] == '"Title 3'
    assert "1 fields begin with a quote" in caplog.text


@pytest.mark.parametrize("written", ['3, "Heroes"', '3, "Dune\nPart Two, the film"'])
def test_blanks_before_quotes_are_said(written: str, folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.csv().write("items.csv", items_text({3: written, 4: '4,"not, so", here', 5: "5, Title 5"}))
    data = folder.prepare(max_bad=0.1, max_untitled=0.5)
    assert data.titles[3].startswith('"') and data.meta["files"][1]["blanks_before_quotes"] == 1
    assert "1 lines have a blank between the delimiter and a quote" in caplog.text and "line 5: '3," in caplog.text


@pytest.mark.parametrize("title", [' "Heroes"', ' "Heroes", live\nat home'])
def test_a_blank_within_quotes_is_not_doubted(title: str, folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    written = title.replace('"', '""')
    folder.csv().write("items.csv", items_text({3: f'3,"{written}"'}))
    data = folder.prepare()
    assert data.titles[3] == " ".join(title.split()) and not caplog.text
    assert "blanks_before_quotes" not in data.meta["files"][1]


def test_plain_quoting_is_not_doubted(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    """Descriptions over lines with commas, beside titles: no line could be a record with its quotes as letters."""
    text = "item_id,title,about\n" + "".join(
        f'{item},"{title}, a film","A line, of text.\n\nAnother, with ""quotes"",\nand a last, one, here."\n'
        for item, title in titles()
    )
    folder.csv().write("items.csv", text)
    data = folder.prepare()
    assert data.titles[3] == "Title 3, a film" and data.num_items == ITEMS and not caplog.text


@given(st.lists(st.tuples(*[st.text('ab ,"\n', max_size=8)] * 3), min_size=1, max_size=20))
@settings(max_examples=150, deadline=None)
def test_what_a_writer_of_csv_writes_is_read_again(rows: list[tuple[str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "x.csv"
        with path.open("w", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
        with Lines(path) as lines:
            found = [fields for _, fields in Fields(",").records(lines, iter(lines), 3)]
    # Empty lines are no lines to the reader, as titles are of one line.
    assert [[re.sub("\n+", "\n", field) for field in row] for row in rows] == found
