"""Times of real files: their order is that of the exact times.

Each input is the smallest that once gave a wrong result without a word.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_folder import LENGTH, LOG, RIGHT, USERS, Folder, kept, sequence, table, titles, titles_of_arrow, users

from napo.data import lines, parts
from napo.data.prepare import summary
from napo.data.times import LIMB, TimeReader, Times, Units, stamps

NEWEST_FIRST = [(user, item, item) for user, item, _ in reversed(LOG)][::-1][::-1]
TEXTS: dict[str, Callable[[int], str]] = {
    "fractions": lambda k: f"{1_600_000_000 + k / 100:.2f}",
    "0 to 1": lambda k: repr(k / 997),
    "0 to 1e-9": lambda k: repr(k * 1e-12),
    "nanoseconds": lambda k: str(1_600_000_000_000_000_000 + k),
    "sixteen decimals": lambda k: f"1600000000.{k:016d}",
    "forty decimals": lambda k: f"0.{k:040d}",
    "exponents": lambda k: f"1.6{k:012d}e9",
    "below zero": lambda k: f"-{10 - k / 100:.2f}",
    "ISO with milliseconds": lambda k: f"2020-09-13T12:26:40.{k:03d}",
    "ISO with nanoseconds": lambda k: f"2020-09-13 12:26:40.{k:09d}Z",
    "ISO with a comma": lambda k: f'"2020-09-13T12:26:40,{k:03d}+02:00"',
    "ISO across zones": lambda k: f"2020-09-13T{12 + k % 2}:26:40.{k:03d}+0{k % 2}:00",
    "ISO without seconds": lambda k: f"2020-09-13T12:{k:02d}",
    "days": lambda k: f"2020-09-{k + 1:02d}",
}


def newest_first(when: Callable[[int], Any]) -> list[tuple[int, int, Any]]:
    return [(user, item, when(item)) for user, item, _ in reversed(LOG)]


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("split", ["user", "time"])
def test_the_order_is_that_of_the_exact_times(kind: str, split: str, folder: Folder) -> None:
    data = folder.csv(newest_first(TEXTS[kind])).prepare(split=split)
    for user in range(USERS):
        first = int(users(data)[user])
        assert sequence(data, user) == [f"Title {item}" for item in range(first, first + LENGTH)]
    assert data.interactions["timestamp"].dtype == np.int64
    assert data.meta["ties"] == {"neighbours": USERS * (LENGTH - 1), "equal_times": 0}
    if split == "time":
        when = dict(zip(data.items["title"], range(data.num_items), strict=True))
        assert max(when[data.titles[item]] for item in data.train["next"]) < min(
            when[data.titles[item]] for item in data.test["next"]
        )


def moments(unit: str, step: int) -> pa.Array:
    return pa.array([1_600_000_000 * step + k for *_, k in newest_first(lambda k: k)], pa.timestamp(unit))


ARROW: dict[str, Callable[[list[int]], pa.Array]] = {
    "datetime64[us]": lambda ks: pa.array([1_600_000_000_000_000 + k for k in ks], pa.timestamp("us")),
    "datetime64[ns]": lambda ks: pa.array([1_600_000_000_000_000_000 + k for k in ks], pa.timestamp("ns")),
    "datetime64[ms, Tokyo]": lambda ks: pa.array([1_600_000_000_000 + k for k in ks], pa.timestamp("ms", "Asia/Tokyo")),
    "before 1970": lambda ks: pa.array([k - 1000 for k in ks], pa.timestamp("us")),
    "date32": lambda ks: pa.array([18_000 + k for k in ks], pa.date32()),
    "float64": lambda ks: pa.array([1_600_000_000 + k / 100 for k in ks]),
    "float32": lambda ks: pa.array([k / 100 for k in ks], pa.float32()),
    "decimal": lambda ks: pa.array([Decimal(k).scaleb(-20) for k in ks], pa.decimal128(30, 20)),
    "int8": lambda ks: pa.array(ks, pa.int8()),
    "uint64": lambda ks: pa.array([2**62 + k for k in ks], pa.uint64()),
    "text": lambda ks: pa.array([f"1600000000.{k:03d}" for k in ks]),
    "binary": lambda ks: pa.array([f"1600000000.{k:03d}".encode() for k in ks], pa.binary()),
}


@pytest.mark.parametrize("kind", ARROW)
def test_typed_times_are_exact(kind: str, folder: Folder) -> None:
    user, item, step = zip(*newest_first(lambda k: k), strict=True)
    folder.parquet({"user_id": user, "item_id": item, "timestamp": ARROW[kind](list(step))}, titles_of_arrow())
    data = folder.prepare("parquet")
    assert sequence(data, users(data).index("0")) == RIGHT and not data.meta["ties"]["equal_times"]


def test_json_numbers_keep_all_their_digits(folder: Folder) -> None:
    rows = [f'{{"user_id": {u}, "item_id": {i}, "timestamp": 1600000000.{k:012d}}}\n' for u, i, k in newest_first(int)]
    folder.jsonl([], [{"item_id": item, "title": title} for item, title in titles()])
    folder.write("interactions.jsonl", "".join(rows))
    assert sequence(folder.prepare("jsonl"), USERS - 1) == RIGHT


def test_recbole_times_between_0_and_1(folder: Folder) -> None:
    data = folder.recbole(newest_first(lambda k: k / 100)).prepare("recbole", split="time")
    assert sequence(data, USERS - 1) == RIGHT and data.meta["timestamps"].startswith("in units of 1e-2")
    assert "timestamps: in units of 1e-2 of the source's times, which have decimals" in summary(data.meta)


def test_how_many_ties_decide_nothing_is_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    data = folder.csv([(user, item, item // 3) for user, item, _ in LOG]).prepare()
    pairs = [item // 3 == (item + 1) // 3 for user in range(USERS) for item in range(user, user + LENGTH - 1)]
    assert data.meta["ties"] == {"neighbours": USERS * (LENGTH - 1), "equal_times": sum(pairs)}
    assert any(f"equal times: {sum(pairs)} of {len(pairs)} neighbours" in line for line in summary(data.meta))
    assert not caplog.text
    folder.csv([(user, item, 7) for user, item, _ in LOG]).prepare()
    assert "all times of every user are equal" in caplog.text


def test_numbers_and_dates_in_one_column_are_refused(folder: Folder) -> None:
    folder.csv([(u, i, k if u else f"2020-01-{k + 1:02d}") for u, i, k in LOG])
    with pytest.raises(ValueError, match=r"interactions\.csv: the column timestamp has 84 numbers and 12 dates"):
        folder.prepare()


# --- units ---

SECOND = 1_600_000_000
MIXED: dict[str, tuple[Callable[[int], Any], Callable[[int], Any], str]] = {
    "seconds, milliseconds": (lambda k: SECOND + k, lambda k: (SECOND + k) * 10**3, "seconds, milliseconds"),
    "seconds, microseconds": (lambda k: SECOND + k, lambda k: (SECOND + k) * 10**6, "seconds, microseconds"),
    "seconds, nanoseconds": (lambda k: SECOND + k, lambda k: (SECOND + k) * 10**9, "seconds, nanoseconds"),
    "milliseconds, microseconds": (
        lambda k: (SECOND + k) * 10**3, lambda k: (SECOND + k) * 10**6, "milliseconds, microseconds"
    ),
    "microseconds, nanoseconds": (
        lambda k: (SECOND + k) * 10**6, lambda k: (SECOND + k) * 10**9, "microseconds, nanoseconds"
    ),
    "decimals": (lambda k: f"{SECOND + k}.25", lambda k: (SECOND + k) * 10**3, "seconds, milliseconds"),
    "decimals of both": (
        lambda k: f"{SECOND + k}.25", lambda k: f"{(SECOND + k) * 10**3}.5", "seconds, milliseconds"
    ),
    "before 1970": (lambda k: k - SECOND, lambda k: (k - SECOND) * 1000, "seconds, milliseconds"),
    "dates, seconds": (lambda k: 20200901 + k, lambda k: SECOND + k, "dates like 20200131, seconds"),
    "dates, milliseconds": (lambda k: 20200901 + k, lambda k: SECOND * 1000 + k, "dates like 20200131, milliseconds"),
    "dates with minutes, milliseconds": (
        lambda k: 202009011200 + k, lambda k: SECOND * 1000 + k, "dates like 202001312359, milliseconds"
    ),
    "dates with seconds, milliseconds": (
        lambda k: 20200901120000 + k, lambda k: SECOND * 1000 + k, "milliseconds, dates like 20200131235959"
    ),
    "dates, dates with seconds": (
        lambda k: 20200901 + k, lambda k: 20200901120000 + k, "dates like 20200131, dates like 20200131235959"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("split", ["user", "time"])
def test_times_of_several_units_are_said(
    kind: str, split: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    """Each user has one unit, so that no user's own order is wrong."""
    few, many, names = MIXED[kind]
    data = folder.csv([(u, i, many(k) if u else few(k)) for u, i, k in LOG]).prepare(split=split)
    found = data.meta["mixed_times"]
    assert set(found) == set(names.split(", ")) and sorted(found.values()) == [12, 84]
    assert ", ".join(f"{found[name]} look like {name}" for name in found) in caplog.text


def test_units_that_differ_only_between_parts_are_said(
    folder: Folder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART", 24)
    monkeypatch.setattr(lines, "BLOCK_SIZE", 200)
    folder.csv([(u, i, (SECOND + k) * (1000 if u > 3 else 1)) for u, i, k in LOG]).prepare()
    assert "48 look like seconds, 48 look like milliseconds" in caplog.text


def log_times(kind: str) -> np.ndarray:
    """A hundred thousand times as logs have them."""
    rng, count, year = np.random.default_rng(0), 100_000, 31_556_952
    if kind == "plain counts":
        return rng.integers(0, 3 * 10**8, count)
    if kind == "milliseconds of a session":
        return (rng.exponential(1e10, count)).astype(np.int64)
    if kind == "places in a file":
        return np.arange(count)
    if kind == "logarithms":
        return (10 ** rng.uniform(0, 18, count)).astype(np.int64)
    if kind == "dates":
        return rng.integers(1950, 2025, count) * 10_000 + rng.integers(1, 13, count) * 100 + rng.integers(1, 29, count)
    if kind == "years":
        return rng.integers(1950, 2025, count)
    if kind == "days":
        return rng.integers(0, 20_000, count)
    if kind == "seconds with some zeros":
        return np.where(rng.random(count) < 0.01, 0, rng.integers(1.2e9, 1.7e9, count))
    scale = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
    unit, _, span = kind.partition(", ")
    first, last = {"1950 to 2024": (-20, 54), "1970 to 2024": (0, 54), "2000 to 2024": (30, 54)}[span]
    return rng.integers(first * year * scale[unit], last * year * scale[unit], count)


@pytest.mark.parametrize(
    "kind",
    [
        *("plain counts", "milliseconds of a session", "places in a file", "logarithms", "dates", "years", "days"),
        "seconds with some zeros",
        *(
            f"{unit}, {span}"
            for unit in ("seconds", "milliseconds", "microseconds", "nanoseconds")
            for span in ("1950 to 2024", "1970 to 2024", "2000 to 2024")
        ),
    ],
)
def test_times_of_one_unit_are_not_doubted(kind: str) -> None:
    units = Units()
    for part in np.array_split(log_times(kind), 7):
        units.add(part)
    assert units.mixed() == {}


def test_one_time_of_another_unit_is_found() -> None:
    units = Units()
    units.add(log_times("seconds, 1970 to 2024"))
    units.add(np.array([SECOND * 1000, -(2**63)]))
    assert units.mixed() == {"seconds": units.counts[3], "milliseconds": 1, "nanoseconds": 1}


def test_times_of_which_some_name_a_zone_are_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    for zone in ("", "Z", "+01:00"):
        folder.csv(newest_first(lambda k, zone=zone: f"2020-09-{k + 1:02d}T10:00{zone}"))
        folder.prepare()
        assert "time zone" not in caplog.text
    folder.csv(newest_first(lambda k: f"2020-09-{k + 1:02d}T10:00{'Z' if k % 2 else ''}"))
    folder.prepare()
    found = re.search(r"timestamp: (\d+) of (\d+) dates name a time zone; the others are taken as UTC", caplog.text)
    assert found is not None and 0 < int(found[1]) < int(found[2])


def test_a_date_format_is_an_option(folder: Folder) -> None:
    folder.csv(newest_first(lambda k: f"{k + 1:02d}/09/2020 10:00"))
    with pytest.raises(
        ValueError, match=r"timestamp: expected a number or an ISO date, got '19/09/2020 10:00'"
    ) as said:
        folder.prepare()
    assert str(said.value).count("--set date_format") == 1 and str(said.value).count("expected a number") == 5
    assert sequence(folder.prepare(date_format="%d/%m/%Y %H:%M"), USERS - 1) == RIGHT
    folder.csv(newest_first(lambda k: f"202009{k + 1:02d}"))
    data = folder.prepare(date_format="%Y%m%d")
    assert data.interactions["timestamp"].max() == 1_600_473_600  # 2020-09-19


def dates_as(kind: str, date_format: str, folder: Folder) -> None:
    """The dates of a month's end, which as plain numbers have another order."""
    rows = newest_first(lambda k: (datetime.date(2020, 1, 20) + datetime.timedelta(k)).strftime(date_format))
    typed = [{"user_id": u, "item_id": i, "timestamp": int(when)} for u, i, when in rows]
    if kind == "csv":
        folder.csv(rows)
    elif kind == "jsonl":
        folder.jsonl(typed, [{"item_id": item, "title": title} for item, title in titles()])
    else:
        folder.parquet({name: [row[name] for row in typed] for name in typed[0]}, titles_of_arrow())


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_date_format_is_for_numbers_too(kind: str, folder: Folder) -> None:
    dates_as(kind, "%Y%m%d", folder)
    data = folder.prepare(kind, date_format="%Y%m%d")
    assert sequence(data, USERS - 1) == RIGHT
    assert data.interactions["timestamp"].max() == 1_581_033_600  # 2020-02-07
    dates_as(kind, "%d%m%Y", folder)
    if kind == "csv":
        assert sequence(folder.prepare(kind, date_format="%d%m%Y"), USERS - 1) == RIGHT
    else:  # the first of February is the number 1022020, and so is the tenth where a month has one digit
        with pytest.raises(ValueError, match=r"expected text with a date like %d%m%Y, got the number 7022020"):
            folder.prepare(kind, date_format="%d%m%Y")


def test_a_date_of_digits_alone_has_all_of_them(folder: Folder) -> None:
    assert TimeReader("%Y%m%d%H%M%S%f")("20200901100000123") == Decimal("1598954400.123")
    with pytest.raises(ValueError, match="expected all digits of a date like %d%m%Y, got '1022020'"):
        TimeReader("%d%m%Y")("1022020")
    assert TimeReader("%d.%m.%Y")("1.2.2020") == TimeReader("%d%m%Y")("01022020")


@pytest.mark.parametrize("date_format", ["d.m.Y", "%d.%m.%d", "%d.%m.%Q", "%d.%m.%", "%G-%V"])
def test_a_date_format_that_reads_no_date_is_named(date_format: str, folder: Folder) -> None:
    with pytest.raises(ValueError, match=r"^date_format: expected codes of strptime, each once, as .*, got "):
        folder.csv().prepare(date_format=date_format)
    for right in ("%d.%m.%Y %H:%M", "%d/%b/%Y:%H:%M:%S %z", "%m/%d/%y %I:%M %p", "%Y-%m", "%G-%V-%u", "%a %d %B %Y %Z"):
        TimeReader(right)


@pytest.mark.parametrize(
    "date_format",
    [
        *("%d.%m.", "%d.%m. %H:%M", "%H:%M", "%j", "%Y %d", "%%", "%Z", "%A"),
        *("%Y-%m-%d %M", "%Y-%m-%d %H %S", "%Y-%m-%d %I:%M", "%Y %U", "%a %Y-%m"),
    ],
)
def test_a_date_format_that_lacks_a_part_is_refused(date_format: str, folder: Folder) -> None:
    """Without a year all dates were of 1900: after New Year's Eve came those before it."""
    with pytest.raises(ValueError, match=r"^date_format: expected codes for the year \(%Y\) and for .*, got '"):
        folder.csv().prepare(date_format=date_format)


def test_date_formats_that_have_all_parts_are_right() -> None:
    for date_format in ("%Y", "%m/%Y", "%y%m%d", "%Y %j", "%Y-%U-%w", "%Y-%W-%a", "%G-%V-%u", "%c", "%x", "%x %X"):
        TimeReader(date_format)
    for date_format in ("%d %b %y", "%B %d, %Y %I %p", "%Y-%m-%d %H:%M %p", "%A %d.%m.%Y %H:%M:%S.%f%z"):
        TimeReader(date_format)


def test_parts_of_dates_that_would_be_ignored_are_bad_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    of_24 = TimeReader("%Y-%m-%d %H:%M %p")
    assert of_24("2026-01-31 13:30 PM") == of_24("2026-01-31 13:30 pm") > of_24("2026-01-31 12:30 PM")
    for text in ("2026-01-31 01:30 PM", "2026-01-31 12:30 AM"):
        with pytest.raises(ValueError, match=rf"expected an hour of 24 \(%H\), got '{text}'; .* need %I"):
            of_24(text)
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        zoned = TimeReader("%Y-%m-%d %Z")
        assert zoned("2026-07-01 UTC") == zoned("2026-07-01 GMT")
        with pytest.raises(ValueError, match=r"expected a date in UTC, got '2026-07-01 CEST'; .*\(%z\)"):
            zoned("2026-07-01 CEST")
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "text",
    ["", "nan", "inf", "-inf", "1_000", "1,5", "yesterday", "2020-13-01", "2020-01-01T25:00", "0x10", "1e999", "٣"],
)
def test_what_is_no_time_is_a_bad_line(text: str, folder: Folder) -> None:
    folder.csv([*LOG, (0, 19, f'"{text}"')])
    data = folder.prepare(max_bad=0.02)
    assert kept(data) == len(LOG) and data.meta["files"][0]["bad_lines"] == 1


@pytest.mark.parametrize("value", [True, None, float("nan"), [1], {"$date": 1}])
def test_typed_values_that_are_no_time(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        TimeReader()(value)


@given(
    st.lists(
        st.decimals(-(10**18), 10**18, allow_nan=False, places=None).filter(lambda d: d.as_tuple().exponent >= -54)
    )
)
def test_times_sort_as_the_numbers_do(values: list[Decimal]) -> None:
    times = Times()
    for value in values:
        times.append(value if value != int(value) else int(value))
    limbs = times.columns()
    made, _ = stamps(limbs)
    assert [values[n] for n in np.argsort(made, kind="stable")] == sorted(values)
    for number, value in enumerate(values):
        again = sum(Decimal(int(limb[number])) * Decimal(10) ** (-LIMB * place) for place, limb in enumerate(limbs[:2]))
        assert len(limbs) > 2 or again == value or abs(value) > 10**9


# --- rounded times ---


@pytest.mark.parametrize(
    "kind, start, step", [(pa.float32(), SECOND, 128), (pa.float16(), 30_000, 16), (pa.float64(), SECOND * 10**9, 256)]
)
def test_floats_that_are_rounded_are_said(
    kind: pa.DataType, start: int, step: int, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    user, item, when = zip(*LOG, strict=True)
    times = pa.array([float(start + k) for k in when]).cast(kind, safe=False)
    folder.parquet({"user_id": user, "item_id": item, "timestamp": times}, titles_of_arrow())
    assert folder.prepare("parquet").meta["ties"]["equal_times"] > 0
    said = f"timestamp: 96 of 96 times are {np.dtype(kind.to_pandas_dtype()).name} that stand for several whole numbers"
    assert said in caplog.text and f"up to {step}: they are rounded" in caplog.text


def test_floats_that_are_whole_numbers_are_not_asked_about(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    user, item, when = zip(*LOG, strict=True)
    for times in (pa.array([float(k) for k in when], pa.float32()), pa.array([float(SECOND + k) for k in when])):
        folder.parquet({"user_id": user, "item_id": item, "timestamp": times}, titles_of_arrow())
        assert sequence(folder.prepare("parquet")) == RIGHT and not caplog.text


@pytest.mark.parametrize("form", ["{:.2E}", "{:g}"])
@pytest.mark.parametrize("source", ["csv", "recbole"])
def test_times_without_their_last_digits_are_said(
    form: str, source: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    """As spreadsheets write milliseconds, and C++ all that is large."""
    rows = [(u, i, form.format((SECOND + k) * 1000)) for u, i, k in LOG]
    (folder.csv if source == "csv" else folder.recbole)(rows)
    folder.prepare(source)
    assert "timestamp: 96 of 96 times are written without their last digits, the first is 1.6" in caplog.text


@pytest.mark.parametrize("form", ["R", "Java", "numpy"])
def test_times_with_an_exponent_and_all_digits_are_not_doubted(
    form: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    def written(k: int) -> str:
        if form == "R":
            return "1.6e+09" if k == 0 else str(SECOND + k)
        return f"1.6{k:07d}".rstrip("0") + "E9" if form == "Java" else f"{SECOND + k:.18e}"

    assert sequence(folder.csv(newest_first(written)).prepare(), USERS - 1) == RIGHT and not caplog.text


# --- files that were cut ---


@pytest.mark.parametrize("when", ["{}", "{}.125", "{}000"])
@pytest.mark.parametrize("source", ["csv", "recbole", "movielens", "slow"])
def test_a_file_that_is_cut_within_its_last_time_is_said(
    when: str, source: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [(u, i, when.format(SECOND + k)) for u, i, k in LOG]
    folder.csv(rows)
    name = "interactions.csv"
    if source == "recbole":
        folder.recbole(rows)
        name = "x.inter"
    elif source == "movielens":
        name = "ratings.csv"
        folder.write(name, table("userId,movieId,rating,timestamp", [(u, i, 5, k) for u, i, k in rows]))
        folder.write("movies.csv", table("movieId,title,genres", [(*row, "Drama") for row in titles()]))
    elif source == "slow":
        folder.csv([(f'"{u}"', i, k) for u, i, k in rows])
    whole = (folder.path / name).read_text()
    source = "csv" if source == "slow" else source
    folder.write(name, whole[:-1])
    data = folder.prepare(source)
    assert not caplog.text and kept(data) == len(LOG)
    assert any(f"{name}: the last line, " in line and "has no line end" in line for line in summary(data.meta))
    for cut in (2, 4):
        folder.write(name, whole[:-cut])
        data = folder.prepare(source)
        full = len(when.format(SECOND))
        assert f"ends with a time of {full + 1 - cut} letters where all others have {full} or more" in caplog.text
        assert f"{name}: line 97, the last one, has no line end" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("day", ["2020-09-13", "2020-09-13T12:26"])
def test_a_file_that_is_cut_within_its_last_date_is_said(
    day: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [(u, i, f"2020-09-13T12:26:{k:02d}") for u, i, k in LOG]
    folder.csv(rows).write("interactions.csv", table("user_id,item_id,timestamp", rows)[:-1][: len(day) - 19])
    folder.prepare()
    assert f"ends with a time of {len(day)} letters where all others have 19 or more" in caplog.text


@pytest.mark.parametrize("last", ["7,18,x", "7,18", '7,18,"1600'])
def test_a_last_line_that_is_bad_is_no_second_doubt(
    last: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.csv().write("interactions.csv", table("user_id,item_id,timestamp", [*LOG, (0, 18, 9)])[:-1] + "\n" + last)
    folder.prepare(max_bad=0.05)
    assert "of 99 lines skipped" in caplog.text and "seems to be cut" not in caplog.text


def test_small_numbers_are_no_doubt(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*((u, i, k + 100) for u, i, k in LOG), (0, 18, 99)]
    folder.csv(rows).write("interactions.csv", table("user_id,item_id,timestamp", rows)[:-1])
    folder.prepare()
    assert not caplog.text


def test_a_shorter_last_time_with_a_line_end_is_no_doubt(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.csv([*((u, i, k + 100) for u, i, k in LOG), (0, 18, 9)]).prepare()
    assert not caplog.text


def test_json_lines_and_titles_without_a_line_end_are_noted(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    log = [{"user_id": u, "item_id": i, "timestamp": k + 100} for u, i, k in LOG]
    folder.jsonl(log, [{"item_id": item, "title": title} for item, title in titles()])
    for name in ("interactions.jsonl", "items.jsonl"):
        folder.write(name, (folder.path / name).read_text()[:-1])
    lines = [line for line in summary(folder.prepare("jsonl").meta) if "has no line end" in line]
    assert len(lines) == 2 and lines[1].startswith('items.jsonl: the last line, {"item_id": 18') and not caplog.text
