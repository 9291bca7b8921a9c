"""Files read by the block give what reading line by line gives, whatever stands in them."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napo.data import blocks, lines
from napo.data.interactions import Log
from napo.data.sources import goodreads
from napo.data.sources import tables as own_tables

GOOD = {
    "user_id": "u",
    "book_id": "1",
    "is_read": True,
    "rating": 3,
    "date_added": "Tue Aug 15 13:23:18 -0700 2017",
    "more": {"a": [1, None]},
}
ODD = [
    json.dumps(GOOD | {"date_added": ""}),
    json.dumps(GOOD | {"date_added": "Tue Aug 5 1:23:18 -0700 2017"}),
    json.dumps(GOOD | {"date_added": "Tue Foo 15 13:23:18 -0700 2017"}),
    json.dumps(GOOD | {"date_added": "Tue Aug 15 13:23:18 *0700 2017"}),
    json.dumps(GOOD | {"date_added": "yesterday"}),
    json.dumps(GOOD | {"user_id": 7}),
    json.dumps(GOOD | {"user_id": 7.0}),
    json.dumps(GOOD | {"user_id": None}),
    json.dumps(GOOD | {"user_id": ""}),
    json.dumps(GOOD | {"user_id": "7.0", "book_id": " 1"}),
    json.dumps(GOOD | {"user_id": "\ud800"}),
    json.dumps(GOOD | {"user_id": "é"}, ensure_ascii=False),
    json.dumps(GOOD | {"rating": 0}),
    json.dumps(GOOD | {"is_read": False}),
    json.dumps({key: value for key, value in GOOD.items() if key != "rating"}),
    json.dumps(GOOD) + json.dumps(GOOD),
    json.dumps(GOOD)[:-1] + ', "book_id": "2"}',
    json.dumps(GOOD)[:-9],
    json.dumps(GOOD) + " x",
    json.dumps(GOOD) + "null",
    json.dumps(GOOD) + " null" + json.dumps(GOOD),
    '{"user_id":\n"u"}',
    "[]",
    "{}",
    "null",
    "NaN",
    "",
    "\0",
    "\udcff",
]


def read(folder: Path, **options: object) -> Log:
    return goodreads.read(folder, goodreads.Options(**options), max_bad=1.0)  # type: ignore[arg-type]


def told(log: Log) -> tuple:
    user, item, *limbs = log.parts().load(0)
    ids = (list(log.user_ids), list(log.item_ids))
    return user.tolist(), item.tolist(), [limb.tolist() for limb in limbs], ids, log.report


@pytest.mark.parametrize("options", [{}, {"min_rating": 2.0}, {"only_read": True, "min_rating": 1.0}])
@given(
    st.lists(st.one_of(st.integers(0, 60), st.sampled_from(ODD)), max_size=60),
    st.sampled_from([200, 1000, 1 << 20]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_blocks_tell_what_lines_tell(options: dict, entries: list, size: int, ended: bool) -> None:
    texts = [
        json.dumps(GOOD | {"user_id": f"u{n % 7}", "book_id": str(n), "rating": n % 6}) if isinstance(n, int) else n
        for n in entries
    ]
    content = ("\n".join(texts) + "\n" * ended).encode("utf-8", "surrogateescape")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_SIZE", size)
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            with gzip.open(folder / "goodreads_interactions_x.json.gz", "wb") as file:
                file.write(content)
            (folder / "goodreads_books_x.json").write_text(json.dumps({"book_id": "1", "title": "T"}) + "\n")
            fast = told(read(folder, **options))
            patch.setattr(blocks, "_json_table", lambda block, schema: None)
            assert fast == told(read(folder, **options))


def test_plain_blocks_are_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or all of the above would compare the slow way with itself."""
    rows = [GOOD | {"user_id": f"u{n}", "book_id": str(n % 9)} for n in range(500)]
    (tmp_path / "goodreads_interactions_x.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "goodreads_books_x.json").write_text("")
    monkeypatch.setattr(goodreads.Lines, "lines_of", lambda self, block: pytest.fail("read line by line"))
    assert read(tmp_path).parts().sizes == [500]


@given(st.lists(st.datetimes(pd.Timestamp(1905, 1, 1), pd.Timestamp(2100, 1, 1)), max_size=20), st.integers(-720, 720))
@settings(max_examples=50, deadline=None)
def test_dates_by_the_block(moments: list, zone: int) -> None:
    sign = "-" if zone < 0 else "+"
    texts = [f"{m:%a %b %d %H:%M:%S} {sign}{abs(zone) // 60:02d}{abs(zone) % 60:02d} {m.year}" for m in moments]
    # A slice, so that the offsets of the array do not begin with 0.
    found = goodreads.many_seconds(pa.array(["xyz", *texts, "x"]).slice(1, len(texts)))
    assert found is not None and found.tolist() == [goodreads.seconds(text) for text in texts]


ODD_CSV = [
    *("", "x,y", "u1,i1,5,6,7", "u 1,i1,7", "12.0,i3,8", "nan,i3,8", "u1,i1,1.5", "u1,i1,2020-01-01", "u1,i1,-5"),
    *('u1,"i,1",9', 'u1,"open,9', 'u2,i2,10"', "é,i1,4", "a\rb,i1,3", "u1,i1,", "u1,,5", "u1,i1,00012", " u1 ,i1,5"),
    *("u1,i1,99999999999999999999", "u1,i1,5\r"),
]
ODD_JSONL = [
    *("", "[]", "null", "{}", '{"user_id":"u1","item_id":"a","timestamp":1}{"a":1}', '{"item_id":"a","timestamp":1}'),
    *(
        f'{{"user_id":"u1","item_id":"a","timestamp":{time}}}'
        for time in ("1.5", '"1"', "true", "null", "99999999999999999999", "1e3", '1,"x":NaN')
    ),
    *(
        f'{{"user_id":{user},"item_id":"a","timestamp":1}}'
        for user in ("1", '"12.0"', "null", '"\\ud800"', '"nan"', '"u1","user_id":"u2"')
    ),
]


def own(folder: Path, kind: str, texts: list[str], ended: bool = True) -> None:
    """``texts`` as a file of interactions, and one title."""
    header = ["user_id,item_id,timestamp"] if kind == "csv" else []
    (folder / f"interactions.{kind}").write_text("\n".join([*header, *texts]) + "\n" * ended)
    (folder / "items.csv").write_text("item_id,title\ni1,A\n")


def plain(kind: str, number: int) -> str:
    fields = {"user_id": f"u{number % 5}", "item_id": f"i{number % 9}", "timestamp": number}
    return json.dumps(fields) if kind == "jsonl" else ",".join(map(str, fields.values()))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@given(st.data(), st.sampled_from([40, 200, 1 << 20]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_blocks_of_own_data_tell_what_lines_tell(kind: str, drawn: st.DataObject, size: int, ended: bool) -> None:
    entry = st.one_of(st.integers(0, 60), st.sampled_from(ODD_CSV if kind == "csv" else ODD_JSONL))
    entries = drawn.draw(st.lists(entry, max_size=40))
    texts = [plain(kind, entry) if isinstance(entry, int) else entry for entry in entries]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as work:
        own(Path(work), kind, texts, ended)
        patch.setattr(lines, "BLOCK_SIZE", size)
        found = []
        for _ in range(2):
            try:
                found.append(told(own_tables.read(Path(work), own_tables.Options(), max_bad=1.0)))
            except ValueError as error:  # a file without a good line, or with dates beside numbers
                found.append((str(error),))
            patch.setattr(own_tables, "_add_block", lambda log, time, table: False)
        assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_plain_blocks_of_own_data_are_taken_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path, kind, [plain(kind, number) for number in range(500)])
    taken = []
    monkeypatch.setattr(Log, "add", lambda self, user, item, time: taken.append(user))
    log = own_tables.read(tmp_path, own_tables.Options(), max_bad=0.0)
    # The first of the JSON lines is read by itself, to know the types.
    assert log.parts().sizes == [500 - len(taken)] and len(taken) == (kind == "jsonl")
