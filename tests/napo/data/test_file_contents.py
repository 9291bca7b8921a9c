"""Contents of real files: text that is text, one spelling of an id, titles that attack a terminal.

Each input is the smallest that once gave a wrong result without a word.
"""

from __future__ import annotations

import datetime
import gzip
import subprocess
import sys
import time
import unicodedata
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from command_calls import Call
from table_folder import ALL, ITEMS, LOG, USERS, Folder, kept, sequence, table, titles, titles_of_arrow, users

from napo.data import lines
from napo.data.interactions import Log, key, title_of
from napo.data.missing import is_missing
from napo.data.prepare import summary
from napo.data.texts import clean_title, shown
from napo.data.titles import disambiguate
from napo.recommend.rows import Row, user_of
from napo.trainer.problems import value_of

# --- text that is not text ---


def test_binary_columns_are_decoded(folder: Folder) -> None:
    user, item, when = zip(*LOG, strict=True)
    log = {
        "user_id": pa.array([f"u{one}".encode() for one in user], pa.binary()),
        "item_id": pa.array([f"{one:03d}".encode() for one in item], pa.binary(3)),
        "timestamp": when,
    }
    names = {
        "item_id": [f"{item:03d}" for item in range(ITEMS)],
        "title": pa.array([f"Café {item}".encode() for item in range(ITEMS)], pa.large_binary()),
    }
    data = folder.parquet(log, names).prepare("parquet")
    assert data.titles[:2] == ["Café 0", "Café 1"] and users(data)[:2] == ["u0", "u1"] and kept(data) == len(LOG)


def test_bytes_that_are_no_text_name_column_and_row(folder: Folder) -> None:
    _, item, when = zip(*LOG, strict=True)
    folder.parquet({"user_id": [b"\xff\xfe"] * len(LOG), "item_id": item, "timestamp": when}, titles_of_arrow())
    with pytest.raises(
        ValueError, match=r"interactions\.parquet: 96 of 96 rows are bad.*row 1: user_id: bytes that are"
    ):
        folder.prepare("parquet")


def test_nan_is_no_user_and_no_title(folder: Folder) -> None:
    nan = float("nan")
    log = [{"user_id": u, "item_id": i, "timestamp": k} for u, i, k in LOG]
    names = [{"item_id": item, "title": nan if item == 3 else None if item == 4 else title} for item, title in titles()]
    names[5].pop("title")
    folder.jsonl([*log, {"user_id": nan, "item_id": 1, "timestamp": 1}], names)
    with pytest.raises(
        ValueError, match=r"interactions\.jsonl: 1 of 97 lines are bad.*line 97: user_id: expected an id"
    ):
        folder.prepare("jsonl")
    data = folder.prepare("jsonl", max_bad=0.02)
    assert not {"nan", "None", "Title 3", "Title 4", "Title 5"} & set(data.titles) and "nan" not in users(data)
    assert data.meta["without_title"] == 3 and data.meta["files"][1]["bad_lines"] == 0
    lost = sum(item in (3, 4, 5) for _, item, _ in LOG)
    assert f"items without a title: {lost} of 96 interactions dropped (15.6%), 81 left" in summary(data.meta)[0]


def test_nan_of_parquet_is_no_user(folder: Folder) -> None:
    user, item, when = zip(*LOG, strict=True)
    ids = pa.array([float(one) for one in user[:-1]] + [float("nan")], pa.float64(), from_pandas=False)
    data = folder.parquet({"user_id": ids, "item_id": item, "timestamp": when}, titles_of_arrow())
    made = data.prepare("parquet", max_bad=0.02)
    assert users(made) == [str(one) for one in range(USERS)] and kept(made) == len(LOG) - 1


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "NULL", "<NA>", "NA", r"\N"])
def test_words_for_nothing_are_no_ids_and_titles_are_asked_about(
    word: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.csv([*LOG, (word, 3, 1)], [*titles(ITEMS - 1), (ITEMS - 1, word)])
    data = folder.prepare(max_bad=0.02)
    assert word not in users(data) and data.meta["files"][0]["bad_lines"] == 1
    assert word in data.titles and f"1 titles read like a value that is not there ({word})" in caplog.text


def test_a_word_for_nothing_may_have_blanks_around_it(folder: Folder) -> None:
    folder.csv([*LOG, (" NaN", 3, 1)], titles(ITEMS))
    assert folder.prepare(max_bad=0.02).meta["files"][0]["bad_lines"] == 1


KEYS = [
    ("12", "12"), (" 12\t", "12"), ("12.0", "12"), ("12.00", "12"), (12.0, "12"), (-0.0, "0"), (0.5, "0.5"),
    ("0012", "0012"),
    (np.float32(3), "3"), (np.float64(3.5), "3.5"), (Decimal("12.00"), "12"), (Decimal("12.50"), "12.5"), (b"x", "x"),
    (2**70, str(2**70)), (Decimal(2**70), str(2**70)), (2.0**53 - 1, str(2**53 - 1)), ("1.10", "1.10"),
    ("12e5", "12e5"), ("1e+05", "100000"), ("-2e+06", "-2000000"), ("1e5", "1e5"), ("1E5", "1E5"), ("1E+05", "100000"),
    ("1E+5", "100000"), ("1.0E7", "10000000"), ("1.2345678E7", "12345678"), ("-1.2345678E7", "-12345678"),
    ("1.234560e+05", "123456"), ("1.23E+02", "123"), ("1.500000000000000000e+05", "150000"), ("1.25E-5", "1.25E-5"),
    ("1.2345E+02", "1.2345E+02"), ("1.2345E2", "1.2345E2"), ("0e+00", "0"), ("5E+10", "50000000000"),
    ("a.0", "a.0"), (unicodedata.normalize("NFD", "é"), "é"),
]  # fmt: skip


@pytest.mark.parametrize("value, spelled", KEYS)
def test_one_id_has_one_spelling(value: object, spelled: str) -> None:
    assert key(value) == spelled and key(key(value)) == spelled


NO_KEYS = [
    None, True, float("nan"), float("inf"), np.float32("nan"), np.float32(2**24), Decimal("nan"), Decimal("inf"),
    ("a", "b"), ["a"], {1}, {}, bytearray(b"x"), datetime.date(2020, 1, 2), np.datetime64("2020-01-01"), b"\xff", "",
    "  ", "\ud800", 2.0**53, 1e22, Decimal("7.2e17"), Decimal("720575940631797001.0"), "720575940631797001.0",
    "7.20575940631797e+17", "7e+17", "1E+11", "1.23E+11", "1.23457E+12", "1.2e+06", "1.0E+05", "1.0E16", "1e+999",
]  # fmt: skip


@pytest.mark.parametrize("value", NO_KEYS)
def test_what_is_nobodys_id(value: object) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        key(value)
    assert str(caught.value).isprintable()


NOTHING = [
    None, float("nan"), np.float16("nan"), np.float32("nan"), np.float64("nan"), Decimal("nan"), Decimal("sNaN"), pd.NA,
    pd.NaT, np.datetime64("NaT"), np.timedelta64("NaT"),
]  # fmt: skip
SOMETHING = [0, 0.0, "", "nan", False, [], [None], np.array([np.nan]), np.float32(1), Decimal("inf"), float("inf"),
    np.datetime64("2020-01-01"), datetime.date(2020, 1, 1)]  # fmt: skip


def test_what_tables_write_for_nothing_is_missing_everywhere() -> None:
    assert all(map(is_missing, NOTHING)) and not any(map(is_missing, SOMETHING))
    assert [title_of(value) for value in NOTHING] == [""] * len(NOTHING)
    assert [value_of({"prompt": value}, "prompt") for value in NOTHING] == [None] * len(NOTHING)
    asked = [user_of(Row("row 0", {"user": value})) for value in NOTHING]
    assert asked == [None] * len(NOTHING)


# --- identity ---


def test_ids_that_read_12_0_in_part_of_the_rows(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    rows = [(f"{u}.0" if k % 4 == 0 else u, f"{i}.0" if k % 3 == 0 else i, k) for u, i, k in LOG]
    data = folder.csv(rows).prepare()
    assert kept(data) == len(LOG) and len(users(data)) == USERS and data.num_items == ITEMS
    assert data.meta["respelled_ids"] == sum((k % 4 == 0) + (k % 3 == 0) for *_, k in LOG)
    assert "ids are spelled anew, as '0.0', which is 0" in caplog.text


def test_leading_zeros_on_one_side_join(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    data = folder.csv(items=[(f"{item:04d}", title) for item, title in titles()]).prepare()
    assert kept(data) == len(LOG) and data.titles[3] == "Title 3" and data.items["source_id"][3] == "3"
    assert "19 items are joined to titles whose ids differ in leading zeros, as 0 and 0000" in caplog.text


def test_leading_zeros_that_tell_items_apart_stay(folder: Folder) -> None:
    names = [*titles(), ("012", "Other"), ("0012", "Third")]
    data = folder.csv([*LOG, (0, "012", 99), (0, "00012", 100)], names).prepare()
    assert sequence(data)[-1] == "Other" and kept(data) == len(LOG) + 1
    assert data.meta["steps"][1]["dropped"] == 1  # which of two 00012 is, nobody can know


def test_ids_that_differ_by_zeros_in_front_are_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    padded = folder.csv([(f"{user:03d}", item, when) for user, item, when in LOG]).prepare()
    assert users(padded)[:2] == ["000", "001"] and "zeros in front" not in caplog.text
    data = folder.csv([(f"{user:0{1 + when % 3}d}", item, when) for user, item, when in LOG]).prepare()
    assert "16 ids of users differ from others only by zeros in front, as 00 and 0, and stay apart" in caplog.text
    assert data.meta["users_with_leading_zeros"] == 16 and "ids of items differ" not in caplog.text


def test_ids_that_differ_in_case_are_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    lower = [(f"user-{user}", f"b{item}", when) for user, item, when in LOG]
    names = [(f"b{item}", title) for item, title in titles()]
    folder.csv(lower, names).prepare()
    assert "case of letters" not in caplog.text
    mixed = [(user.upper() if when % 3 else user, item, when) for user, item, when in lower]
    data = folder.csv([*mixed, ("user-0", "B3", 99)], names).prepare()
    several = len({user for user, *_ in mixed}) - USERS
    assert data.meta["users_of_other_case"] == several > 1 and data.meta["items_of_other_case"] == 1
    assert len(users(data)) == USERS + several  # they stay apart
    assert f"{several} ids of users differ from others only in the case of letters, as USER-0 and user-0, and" in (
        caplog.text
    )
    assert "1 ids of items differ from others only in the case of letters, as B3 and b3, and stay apart" in caplog.text
    assert data.meta["steps"][1]["dropped"] == 1  # B3 has no title


def test_case_of_the_titles_ids_is_said_too(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    log = [(user, f"b{item}", when) for user, item, when in LOG]
    folder.csv(log, [(f"{'B' if item == 0 else 'b'}{item}", title) for item, title in titles()]).prepare()
    assert "1 ids of items differ from others only in the case of letters, as B0 and b0" in caplog.text


def test_blanks_around_ids_are_taken_away_and_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    log = [
        (f"u{user} " if when % 3 else f"u{user}", f" b{item}" if when == 5 else f"b{item}", when)
        for user, item, when in LOG
    ]
    data = folder.csv(log, [(f"b{item}", title) for item, title in titles()]).prepare()
    count = sum((when % 3 > 0) + (when == 5) for *_, when in LOG)
    assert len(users(data)) == USERS and kept(data) == len(LOG) and data.meta["respelled_ids"] == count
    assert f"{count} ids are spelled anew, as 'u0 ', which is u0" in caplog.text


@pytest.mark.parametrize("kind, least", [(pa.float64(), 2**53), (pa.float32(), 2**24)])
def test_floats_that_stand_for_several_items_are_refused(kind: pa.DataType, least: int, folder: Folder) -> None:
    user, item, when = zip(*LOG, strict=True)
    ids = pa.array([float(least + one) for one in item]).cast(kind, safe=False)
    log = {"user_id": user, "item_id": ids, "timestamp": when}
    names = {"item_id": [least + item for item in range(ITEMS)], "title": [title for _, title in titles()]}
    folder.parquet(log, names)
    with pytest.raises(
        ValueError, match=r"row 1: item_id: \S+ is a float of 2\*\*\d\d or more, which stands for several"
    ):
        folder.prepare("parquet")
    folder.parquet(log | {"item_id": [least + one for one in item]}, names)
    assert kept(folder.prepare("parquet")) == len(LOG)


def test_interactions_without_a_title_are_an_error_above_a_limit(folder: Folder) -> None:
    folder.csv(items=[(item if item % 2 else f"x{item}", title) for item, title in titles()])
    said = (
        r"48 of 96 interactions \(50\.0%\), of 10 of 19 items, have no title, more than max_untitled 20% allows; "
        r"the first: 0, 2, 4; items with a title: x0, 1, x2"
    )
    with pytest.raises(ValueError, match=said):
        folder.prepare()
    assert kept(folder.prepare(max_untitled=0.6)) == 48


def test_titles_of_two_unicode_forms_are_told_apart(folder: Folder) -> None:
    names = titles()
    for item, form in ((3, "NFC"), (4, "NFD")):
        names[item] = (item, unicodedata.normalize(form, "Amélie"))
    data = folder.csv(items=names).prepare()
    assert data.titles[3:5] == ["Amélie", "Amélie (2)"] and data.meta["repeated_titles"]["count"] == 1
    assert "titles of several items: 1, the first is 'Amélie'; a year or (2)" in summary(data.meta)[0]


def test_ids_of_two_unicode_forms_join(folder: Folder) -> None:
    name = {"NFC": unicodedata.normalize("NFC", "é"), "NFD": unicodedata.normalize("NFD", "é")}
    data = folder.csv(
        [(u, f"{name['NFD']}{i}", k) for u, i, k in LOG], [(f"{name['NFC']}{i}", title) for i, title in titles()]
    ).prepare()
    assert kept(data) == len(LOG)


def test_a_second_title_of_an_item_is_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    data = folder.csv(items=[*titles(), (3, "Title 3 (cut)"), (4, "Title 4")]).prepare()
    assert data.titles[3] == "Title 3" and data.meta["retitled"]["count"] == 1
    assert "3: 'Title 3', then 'Title 3 (cut)'" in caplog.text


# --- hostile text ---

HOSTILE = {
    "\x1b[31mRed\x1b[0m": "Red",
    "\x1b]0;title\x07Bell": "Bell",
    "\x1b]8;;http://x\x1b\\Link\x1b]8;;\x1b\\": "Link",
    "\x9b2JClear": "Clear",
    "a\x08\x08b\x7f": "ab",
    "\u202egnp.exe": "gnp.exe",
    "zero\u200bwidth\ufeff": "zerowidth",
    "line\u2028end\x85x": "line end x",
    "lone \ud83d surrogate": "lone \ufffd surrogate",
    "family 👨\u200d👩": "family 👨\u200d👩",
}


@pytest.mark.parametrize("title", HOSTILE)
def test_titles_hold_nothing_that_a_terminal_obeys(title: str, folder: Folder) -> None:
    names = [{"item_id": item, "title": title if item == 3 else name} for item, name in titles()]
    data = folder.jsonl([{"user_id": u, "item_id": i, "timestamp": k} for u, i, k in LOG], names).prepare("jsonl")
    assert data.titles[3] == HOSTILE[title] == clean_title(HOSTILE[title])
    assert data.meta.get("mended_titles", 0) == (HOSTILE[title] != " ".join(title.split()))


def test_messages_and_the_report_hold_nothing_that_a_terminal_obeys(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    bad = "\x1b[2J\u202e\ud800"
    folder.jsonl([{"user_id": bad, "item_id": 1, "timestamp": bad}], [{"item_id": 1, "title": "x"}])
    with pytest.raises(ValueError) as caught:
        folder.prepare("jsonl")
    assert str(caught.value).isprintable()
    log = [{"user_id": u, "item_id": i, "timestamp": k} for u, i, k in LOG]
    folder.jsonl(
        [*log, {"user_id": 1, "item_id": 1, "timestamp": bad}], [{"item_id": i, "title": t} for i, t in titles()]
    )
    folder.prepare("jsonl", max_bad=0.05)
    assert caplog.text.strip().isprintable() and "\x1b" not in (folder.out / "dataset.json").read_text()
    assert shown("a" * 300, 10) == "aaaaaaaaaa..." and shown("\x1b[m\n\ud800") == "\\x1b[m\\n\\ud800"


def test_a_lone_surrogate_in_an_id_is_a_bad_line(folder: Folder) -> None:
    log = [{"user_id": u, "item_id": i, "timestamp": k} for u, i, k in LOG]
    folder.jsonl(
        [*log, {"user_id": "\ud800", "item_id": 1, "timestamp": 1}], [{"item_id": i, "title": t} for i, t in titles()]
    )
    data = folder.prepare("jsonl", max_bad=0.05)
    assert data.meta["files"][0]["bad_examples"] == ["line 97: an id with a lone surrogate, which is no character"]


def test_equal_titles_take_linear_time() -> None:
    began = time.monotonic()
    made, repeated = disambiguate(["Same"] * 200_000, [""] * 200_000)
    assert time.monotonic() - began < 10
    assert made[:2] == ["Same", "Same (2)"] and made[-1] == "Same (200000)" and repeated == ["Same"]
    made, _ = disambiguate(["A", "A", "A", "A (2)", "B", "B"], ["", "", "", "", "1990", "1991"])
    assert made == ["A", "A (3)", "A (4)", "A (2)", "B (1990)", "B (1991)"]


def test_a_file_of_bad_lines_is_refused_early(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "STOP_FROM", 1000)
    folder.csv()
    with gzip.open(folder.path / "interactions.csv.gz", "wb", 1) as file:
        file.write(b"user_id,item_id,timestamp\n")
        for at in range(40):
            file.write(b"".join(b"%d spam %d\n" % (at * k, k) for k in range(50_000)))
    (folder.path / "interactions.csv").unlink()
    with pytest.raises(ValueError, match=r"(\d+) of (\d+) lines read before stopping are bad") as caught:
        folder.prepare()
    assert int(str(caught.value).split(" of ")[1].split()[0]) < 1_000_000


def test_bad_lines_at_the_head_of_a_good_file_do_not_stop_it(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "STOP_FROM", 100)
    monkeypatch.setattr(lines, "READ_SIZE", 1 << 12)
    folder.csv([*[("spam",)] * 300, *LOG * 400])
    assert folder.prepare().meta["files"][0]["bad_lines"] == 300


def test_ids_of_a_log_stay_those_of_the_file() -> None:
    log = Log()
    for user in ("12", "12.0", " 12", "012"):
        log.add(user, "x", 1)
    assert log.user_ids == {"12": 0, "012": 1}


# --- the command line ---


def test_the_terminal_says_what_is_lost_and_obeys_no_file(folder: Folder, napo: Call) -> None:
    options = [word for name, value in ALL.items() for word in ("--set", f"{name}={value}")]
    folder.csv([(u, i, k // 2) for u, i, k in LOG], titles()[:-1])
    code, out, _ = napo("prepare", "csv", folder.path, "--out", folder.out, *options)
    assert code == 0 and "items without a title: 1 of 96 interactions dropped (1.0%), 95 left" in out
    assert "equal times: " in out
    hostile = folder.path / "\x1b[2J\u202e"
    code, _, err = napo("prepare", "csv", hostile, "--out", folder.out, *options)
    assert code == 1 and err.strip().isprintable() and "\\x1b[2J" in err


def test_a_delimiter_is_an_option_of_the_command(folder: Folder) -> None:
    folder.csv(between=";")
    command = [sys.executable, "-m", "napo.cli", "prepare", "csv", str(folder.path), "--out", str(folder.out)]
    for name, value in (ALL | {"delimiter": ";"}).items():
        command += ["--set", f"{name}={value}"]
    assert subprocess.run(command, capture_output=True).returncode == 0


# --- ids with an exponent ---


@pytest.mark.parametrize("spelling", ["1E+05", "1e+05", "1.0E5", "1.000000e+05"])
@pytest.mark.parametrize("source", ["csv", "recbole", "jsonl"])
def test_ids_with_an_exponent_are_integers_and_said(
    spelling: str, source: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [(u + 1, spelling if i == 5 and u % 2 else i + 99_995, k) for u, i, k in LOG]
    names = [(item + 99_995, title) for item, title in titles()]
    if source == "jsonl":
        log = [dict(zip(("user_id", "item_id", "timestamp"), row, strict=True)) for row in rows]
        folder.jsonl(log, [{"item_id": item, "title": title} for item, title in names])
    else:
        (folder.csv if source == "csv" else folder.recbole)(rows, names)
    data = folder.prepare(source)
    assert kept(data) == len(LOG) and data.num_items == ITEMS and data.meta["ids_with_exponent"] == 3
    assert f"3 ids are written with an exponent and read as integers, '{spelling}' as 100000" in caplog.text


def test_ids_without_their_last_digits_are_refused(folder: Folder) -> None:
    folder.csv(items=[(item if item else "1.23E+11", title) for item, title in titles()])
    with pytest.raises(ValueError, match=r"items\.csv: 1 of 20 lines .*line 2: 1\.23E\+11 is an id of 12 digits"):
        folder.prepare(max_bad=0)


def test_ids_like_powers_among_whole_numbers_are_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    names = [(item if item != 10 else "1e1", title) for item, title in titles()]
    data = folder.csv(items=names).prepare(max_untitled=0.2)
    assert data.meta["items_like_powers"] == 1 and "users_like_powers" not in data.meta
    assert "1 ids of items stay text though they read like numbers with an exponent" in caplog.text
    assert "the first is 1e1" in caplog.text


def test_ids_of_which_a_spreadsheet_kept_15_digits_are_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    start = 76_561_198_000_000_000
    exact = {item: start + 7 * item for item in range(ITEMS)}
    data = folder.csv([(u, exact[i], k) for u, i, k in LOG], [(exact[i], t) for i, t in titles()]).prepare()
    assert data.num_items == ITEMS and not caplog.text
    kept_digits = {item: start + 700 * item for item in range(ITEMS)}
    folder.csv([(u, kept_digits[i], k) for u, i, k in LOG], [(kept_digits[i], t) for i, t in titles()])
    assert folder.prepare().meta["items_without_last_digits"] == ITEMS
    assert f"all {ITEMS} ids of items with more than 15 digits have zeros behind those, as {start}" in caplog.text


def test_ids_of_hexadecimal_digits_are_not_asked_about(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    """1e5 and 100 are two of them."""
    spelled = {item: f"{item * 97 + 0x1E0:x}" for item in range(ITEMS)} | {3: "1e5", 4: "2E6"}
    data = folder.csv([(u, spelled[i], k) for u, i, k in LOG], [(spelled[i], t) for i, t in titles()]).prepare()
    assert kept(data) == len(LOG) and data.num_items == ITEMS and not caplog.text


# --- what nobody sees ---

UNSEEN = ["\ufeff", "\u200b", "\u2060", "\xad", "\u200e", "\u202c", "\u200d", "\u200c", "\u180e", "\u2063"]


@pytest.mark.parametrize(
    "source, letter",
    [*(("csv", letter) for letter in UNSEEN), *((source, "\u200b") for source in ("jsonl", "parquet", "recbole"))],
)
def test_what_nobody_sees_makes_no_other_id(
    source: str, letter: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [(f"u{u}", f"i{i}{letter}" if k % 3 == 0 else f"i{i}", k) for u, i, k in LOG]
    rows = [(f"{u}{letter}" if n % 5 == 4 else u, i, k) for n, (u, i, k) in enumerate(rows)]
    names = [(f"i{item}", title) for item, title in titles()]
    if source == "csv":
        folder.csv(rows, names)
    elif source == "recbole":
        folder.recbole(rows, names)
    elif source == "jsonl":
        folder.jsonl(
            [dict(zip(("user_id", "item_id", "timestamp"), row, strict=True)) for row in rows],
            [dict(zip(("item_id", "title"), row, strict=True)) for row in names],
        )
    else:
        user, item, when = zip(*rows, strict=True)
        ids, called = zip(*names, strict=True)
        folder.parquet({"user_id": user, "item_id": item, "timestamp": when}, {"item_id": ids, "title": called})
    data = folder.prepare(source)
    assert kept(data) == len(LOG) and len(users(data)) == USERS and data.num_items == ITEMS
    assert "ids are spelled anew" in caplog.text and data.meta["respelled_ids"] > 0


def test_joiners_tell_letters_of_scripts_apart() -> None:
    persian = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert key(persian) == persian != key(persian.replace("\u200c", "")) and key("👨\u200d👩") == "👨\u200d👩"
    for nothing in ("\ufeff", " \u200b ", "\u200d"):
        with pytest.raises(ValueError, match="an empty user or item"):
            key(nothing)


def test_a_word_for_nothing_behind_a_mark_is_no_id(folder: Folder) -> None:
    folder.csv([*LOG, ("\ufeffNaN", 3, 1), (0, "null\u200b", 1)])
    assert folder.prepare(max_bad=0.05).meta["files"][0]["bad_lines"] == 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("quoted", ["", '"'])
@pytest.mark.parametrize("size", [200, 1 << 20])
def test_files_that_were_put_together_with_their_marks(
    encoding: str,
    quoted: str,
    size: int,
    folder: Folder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lines, "BLOCK_SIZE", size)
    head = "user_id,item_id,timestamp\n"
    first, second = LOG[:50], [(f"{quoted}{u}{quoted}", i, k) for u, i, k in LOG[50:]]
    parts = [head + table("", first)[1:], table("", second)[1:]]
    folder.csv().write("interactions.csv", b"".join(part.encode(encoding) for part in parts))
    data = folder.prepare()
    assert kept(data) == len(LOG) and len(users(data)) == USERS and data.meta["files"][0]["bad_lines"] == 0
    assert data.meta["files"][0]["byte_order_marks"] == 1
    assert "interactions.csv: 1 lines begin with a byte order mark" in caplog.text and "line 52: " in caplog.text


def test_a_header_that_comes_again_is_no_item(folder: Folder) -> None:
    names = table("item_id,title", titles(10)) + "\ufeff" + table("item_id,title", titles()[10:])
    folder.csv().write("items.csv", names)
    data = folder.prepare(max_bad=0.06)
    assert data.num_items == ITEMS and data.meta["files"][1]["bad_examples"] == ["line 12: the header again"]


# --- carriage returns ---


@pytest.mark.parametrize("size", [40, 1 << 20])
def test_a_lone_carriage_return_ends_no_line(
    size: int, folder: Folder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow ends a line there, and leaves out an empty one, so that the number of lines came out right."""
    monkeypatch.setattr(lines, "BLOCK_SIZE", size)
    text = table("user_id,item_id,timestamp", [*LOG, *((u, i, k + 50) for u, i, k in LOG)])
    folder.csv().write("interactions.csv", text + "0,3,200\r1,4,200\n\n")
    data = folder.prepare(max_bad=0.01)
    assert data.meta["files"][0]["bad_examples"] == ["line 194: expected 3 fields, got 5"]
    assert data.meta["files"][0]["lone_carriage_returns"] == 1
    assert "interactions.csv: 1 lines hold a carriage return without a line feed" in caplog.text
    assert "line 194: '0,3,200\\\\r1,4,200'" in caplog.text


@pytest.mark.parametrize("end", ["\r\n", "\r\r\n"])
def test_line_ends_of_windows_are_no_lone_carriage_returns(
    end: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.csv().write("interactions.csv", table("user_id,item_id,timestamp", LOG).replace("\n", end))
    data = folder.prepare()
    assert kept(data) == len(LOG) and not caplog.text


def test_a_carriage_return_in_a_title_is_a_blank_and_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    data = folder.csv(items=[(i, '"Two\rparts"' if i == 3 else t) for i, t in titles()]).prepare()
    assert data.titles[3] == "Two parts" and data.num_items == ITEMS and "1 lines hold a carriage return" in caplog.text
