"""LLaRA's pickles are read without unpickling: whatever a file holds, the answer is rows or a ValueError, in bounds."""

from __future__ import annotations

import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from data_files import prepare

from napo.data.pickles import MOST_ENTRIES
from napo.data.sources.llara import read_rows

NAMES = {item: item for item in range(60)}
PLAIN = [([1, 2, 60], 2, 3), ([4, 5, 6], 3, 7)]
READ = [([1, 2], 3), ([4, 5, 6], 7)]


def frame(rows: list, columns: tuple[str, ...] = ("seq", "len_seq", "next")) -> pd.DataFrame:
    """Written as by the pandas of the field's files: names of columns are plain objects."""
    return pd.DataFrame(rows, columns=pd.Index(columns, dtype=object))


def plain_names(made: pd.DataFrame) -> pd.DataFrame:
    return made.set_axis(pd.Index([*made], dtype=object), axis=1)


def read(folder: Path, content: bytes) -> list:
    file = folder / "train_data.df"
    file.write_bytes(content)
    return read_rows(file, NAMES)[0]


# --- what real files hold ---


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "change",
    [
        lambda f: f,
        lambda f: f[["next", "len_seq", "seq"]],
        lambda f: f.assign(user=[7, 8], name=pd.Series(["a", "b"], dtype=object)),
        lambda f: f.astype({"len_seq": np.int32, "next": np.int16}),
        lambda f: f.astype({"next": float}),
        lambda f: f.astype(object),
        lambda f: f.iloc[::-1].iloc[::-1].copy(),
        lambda f: f.set_index(pd.Index(["x", "y"], dtype=object)),
        lambda f: f.assign(seq=[tuple(seq) for seq in f["seq"]]),
        lambda f: f.assign(seq=[np.array(seq) for seq in f["seq"]]),
        lambda f: f.assign(seq=[[np.int64(item) for item in seq] for seq in f["seq"]]),
        lambda f: f.assign(seq=[[(item, 4.5) for item in seq] for seq in f["seq"]], next=[(3, 1), (7, 2)]),
        lambda f: f.assign(seq=[[[item, 4] for item in seq] for seq in f["seq"]], next=[[3, 1], [7, 2]]),
    ],
)
def test_frames_of_pandas_are_read(protocol: int, change: Callable, tmp_path: Path) -> None:
    assert read(tmp_path, pickle.dumps(plain_names(change(frame(PLAIN))), protocol=protocol)) == READ


def test_a_frame_as_pandas_wrote_it_before_1_3(tmp_path: Path) -> None:
    """LastFM's files are such: the manager's state is a tuple, its blocks are dicts."""
    names = array(["seq", "len_seq", "next"], (3,), "O8")
    index = Call("pandas.core.indexes.base._new_Index", (Name("pandas.core.indexes.base.Index"), {"data": names}))
    blocks = [
        {"values": array([[1, 2, 60], [4, 5, 6]], (1, 2), "O8"), "mgr_locs": Call("builtins.slice", (0, 1, 1))},
        {"values": array([2, 3, 3, 7], (2, 2), "i8"), "mgr_locs": Call("builtins.slice", (1, 3, 1))},
    ]
    state = ([], [], [], {"0.14.1": {"axes": [index, None], "blocks": blocks}})
    manager = Call("pandas.core.internals.managers.BlockManager", (), state)
    assert read(tmp_path, dump(Call("pandas.core.frame.DataFrame", (), {"_mgr": manager}))) == READ


def test_padding_ends_a_history_and_nothing_else_does(tmp_path: Path) -> None:
    rows = [([60] * 4, 1, 3), ([1, 60, 60, 60], 1, 3), ([1, 2, 60, 60], 3, 3)]
    assert read(tmp_path, pickle.dumps(frame(rows))) == [([], 3), ([1], 3), ([1, 2], 3)]
    for row, item in (([1, 2, 99], 3), 99), (([1, 99, 60], 2), 99), (([99, 1, 60], 2), 99):
        with pytest.raises(ValueError, match=rf"row 0: item {item} is not in the file of names"):
            read(tmp_path, pickle.dumps(frame([(*row, 3)])))


@pytest.mark.parametrize(
    "row, said",
    [
        (([1, None], 1, 3), "expected a whole number, got None"),
        (([1, True], 1, 3), "expected a whole number, got True"),
        (([1, "2"], 1, 3), "expected a whole number, got '2'"),
        (([1, 2.5], 1, 3), r"expected a whole number, got 2\.5"),
        (([1, float("nan")], 1, 3), "expected a whole number, got nan"),
        (([1, []], 1, 3), "expected a whole number, got list"),
        (("12", 1, 3), "expected a list, got '12'"),
        (([1, 2], 3, 3), "expected a length from 0 to 2, got 3"),
        (([1, 2], -1, 3), "expected a length from 0 to 2, got -1"),
        (([1, 2], 2, 77), "item 77 is not in the file of names"),
    ],
)
def test_a_bad_row_is_named(row: tuple, said: str, tmp_path: Path) -> None:
    rows = frame([*PLAIN, PLAIN[0]]).astype(object)
    for name, value in zip(rows, row, strict=True):
        rows.at[1, name] = value
    with pytest.raises(ValueError, match=rf"train_data\.df: row 1: {said}"):
        read(tmp_path, pickle.dumps(rows))


# --- what made-up files hold ---


class Name:
    def __init__(self, dotted: str) -> None:
        self.module, _, self.name = dotted.rpartition(".")


class Call:
    """A call of a name, and the state set on what it returns."""

    def __init__(self, called: str, args: tuple, state: Any = None) -> None:
        self.called, self.args, self.state = Name(called), args, state


def emit(value: Any) -> bytes:
    """Opcodes that make ``value``: what pickle.dumps would not write."""
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        state = emit(value.state) + b"b" if value.state is not None else b""
        return emit(value.called) + emit(value.args) + b"R" + state
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(emit, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(emit, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(emit(key) + emit(entry) for key, entry in value.items()) + b"u"
    return value.content  # opcodes as they are


class Raw:
    def __init__(self, content: bytes) -> None:
        self.content = content


def dump(value: Any) -> bytes:
    return b"\x80\x04" + emit(value) + b"."


def dtype(code: str, *state: Any) -> Call:
    return Call("numpy.dtype", (code, False, True), state or (3, "<", None, None, None, -1, -1, 0))


def array(data: Any, shape: tuple, kind: Any) -> Call:
    kind = dtype(kind) if isinstance(kind, str) else kind
    if isinstance(data, list) and kind.args[0] == "i8":
        data = struct.pack(f"<{len(data)}q", *data)
    call = ("numpy._core.multiarray._reconstruct", (Name("numpy.ndarray"), (0,), b"b"))
    return Call(*call, (1, shape, kind, False, data))


def made(seq: Any, numbers: Any = None, *, places: tuple = ((0, 1, 1), (1, 3, 1)), labels: Any = None) -> bytes:
    """A frame of one row whose block of sequences is ``seq``."""
    names = array(["seq", "len_seq", "next"], (3,), "O8") if labels is None else labels
    index = Call("pandas.core.indexes.base._new_Index", (Name("pandas.core.indexes.base.Index"), {"data": names}))
    numbers = array([1, 3], (2, 1), "i8") if numbers is None else numbers
    blocks = tuple(
        Call("pandas._libs.internals._unpickle_block", (values, Call("builtins.slice", place), 2))
        for values, place in zip((seq, numbers), places, strict=True)
    )
    manager = Call("pandas.core.internals.managers.BlockManager", (blocks, [index, None]))
    return dump(Call("pandas.core.frame.DataFrame", (), {"_mgr": manager}))


POINTER = struct.pack("<Q", 0x4141414141414141)
SUBARRAY = dtype("V8", 3, "|", (dtype("O8"), (1,)), None, None, 8, 1, 0)
FIELDS = dtype("V8", 3, "|", None, ("a",), {"a": (dtype("i8"), 1 << 30)}, 8, 1, 16)
ONE = array([[1]], (1, 1), "O8")
DOUBLED = b"](NNe" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(60))  # a list of itself, 2**60 leaves
HOLDS_ITSELF = b"]q\x00h\x00a"
DEEP_LIST = b"]" * 2_000_000 + b"a" * 1_999_999
ATTACKS = {
    "a call": made(Call("os.system", ("touch here",))),
    "a call in a row": made(array([[Call("os.system", ("touch here",))]], (1, 1), "O8")),
    "a call of builtins": dump(Call("builtins.eval", ("1",))),
    "a call of numpy": dump(Call("numpy.load", ("x",))),
    "a call of pandas": dump(Call("pandas.read_pickle", ("x",))),
    "a name that is none": dump(Name("os\x1b[2J.system")),
    "object pointers": made(array(POINTER, (1, 1), dtype("O8", 3, "|", None, None, None, -1, -1, 0))),
    "object pointers from a buffer": made(
        Call("numpy._core.numeric._frombuffer", (POINTER, dtype("O8"), (1, 1), "C")),
    ),
    "object pointers in a scalar": made(
        array([[Call("numpy._core.multiarray.scalar", (dtype("O8"), POINTER))]], (1, 1), "O8")
    ),
    "a subarray of objects": made(array(POINTER, (1, 1), SUBARRAY)),
    "a field beyond the item": made(array(POINTER, (1, 1), FIELDS)),
    "too few bytes": made(ONE, array(b"12345678", (2, 1), "i8")),
    "too many bytes": made(ONE, array(b"12345678" * 3, (2, 1), "i8")),
    "a shape below zero": made(ONE, array(b"", (-2, -1), "i8")),
    "a shape without end": made(array([1], (1, 2**62), "i8")),
    "a shape of three": made(array([1], (1, 1, 1), "i8")),
    "an item size of the file's": made(array(b"A" * 8, (1, 1), dtype("V1", 3, "|", None, None, None, 1 << 20, 1, 0))),
    "a text dtype": made(array(b"A" * 8, (1, 1), "S8")),
    "a dtype of no text": made(array(b"A" * 8, (1, 1), Call("numpy.dtype", (7,)))),
    "a byte order": made(array([1], (1, 1), dtype("i8", 3, "?"))),
    "places beyond the columns": made(ONE, places=((1000, 1003, 1), (1, 3, 1))),
    "places below zero": made(ONE, places=((-3, -2, 1), (1, 3, 1))),
    "places without end": made(ONE, places=((0, 2**63, 1), (1, 3, 1))),
    "places without a step": made(ONE, places=((0, 1, 0), (1, 3, 1))),
    "a block twice": made(ONE, places=((1, 2, 1), (1, 3, 1))),
    "labels that are numbers": made(ONE, labels=array([1, 2, 3], (3,), "i8")),
    "a column twice": made(ONE, labels=array(["seq", "seq", "next"], (3,), "O8")),
    "no block": made(None),
    "a list for a block": made([1]),
    "a frame of a dict": dump(Call("pandas.DataFrame", ({"seq": [[1]], "len_seq": [1], "next": [3]},))),
    "a state that is no dict": dump(Call("pandas.DataFrame", (), 3)),
    "a state twice": b"\x80\x04" + emit(Call("pandas.DataFrame", (), {})) + b"}b.",
    "no frame": dump([1]),
    "nothing": b"",
    "a stop at once": b".",
    "marks alone": b"(" * 1000 + b".",
    "a mark that is not there": b"]t.",
    "an unknown memo": b"h\x07.",
    "an unknown opcode": b"\x80\x04\x82\x01.",
    "a persistent id": b"Px\n.",
    "a long of a thousand bytes": b"\x8b" + struct.pack("<I", 1000) + b"1" * 1000 + b".",
    "a frame size of 2**62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "bytes of 2**40": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"N.",
    "a bytearray of 2**36": b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"N.",
    "a memo at 2**31": b"\x80\x04Nr" + struct.pack("<I", 2**31 - 1) + b".",
    "a list of itself": made(array([[Raw(HOLDS_ITSELF)]], (1, 1), "O8")),
    "a doubled list": made(array([Raw(DOUBLED)], (1, 1), "O8")),
    "a doubled item": made(array([[Raw(DOUBLED)]], (1, 1), "O8")),
    "a doubled label": made(ONE, labels=array([Raw(DOUBLED)] * 3, (3,), "O8")),
    "deep tuples": b"\x80\x04N" + b"\x85" * 1_000_000 + b".",
    "deep tuples in a row": made(array([[Raw(b"N" + b"\x85" * 1_000_000)]], (1, 1), "O8")),
    "deep tuples as a key": b"\x80\x04}N" + b"\x85" * 300_000 + b"Ns.",
    "deep lists": b"\x80\x04" + DEEP_LIST + b".",
    "deep calls": b"\x80\x04" + emit(Name("pandas.DataFrame")) + b"q\x00" + b"h\x00N" + b"\x85R\x85" * 9 + b".",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_one_clear_error(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"train_data\.df: ") as caught:
        read(tmp_path, ATTACKS[attack])
    assert time.monotonic() - began < 20 and len(str(caught.value)) < 500 + len(str(tmp_path))
    assert str(caught.value).isprintable()
    assert [file.name for file in tmp_path.iterdir()] == ["train_data.df"]


def test_one_list_in_many_rows_does_not_run_for_minutes(tmp_path: Path) -> None:
    """A list of a hundred thousand, three bytes for each row that holds it again."""
    rows = 5000
    shared = b"](" + b"K\x01" * 100_000 + b"eq\x63"
    seq = array([Raw(shared), *[Raw(b"h\x63")] * (rows - 1)], (1, rows), "O8")
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"row 100: more than {MOST_ENTRIES} items"):
        read(tmp_path, made(seq, array([1] * rows + [3] * rows, (2, rows), "i8")))
    assert time.monotonic() - began < 60


BOMBS = {
    "dicts": b"\x80\x04](" + b"}" * 21_000_000,
    "memo": b"\x80\x04N" + b"\x94" * 21_000_000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_stays_in_bounds(bomb: str, tmp_path: Path) -> None:
    """Opcodes of one byte, each of which takes 60 to 100 bytes of memory, in 4 GiB of address space."""
    file = tmp_path / "train_data.df"
    file.write_bytes(BOMBS[bomb])
    code = "import sys, pathlib; from napo.data.sources import llara; llara.read_rows(pathlib.Path(sys.argv[1]), {})"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )
    assert done.returncode == 1 and "more than 20000000 lists and tuples" in done.stderr.splitlines()[-1], done.stderr


def test_a_file_of_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "train_data.df"
    with file.open("wb") as out:
        out.truncate(1 << 33)
    with pytest.raises(ValueError, match=r"8589934592 bytes, expected at most"):
        read_rows(file, NAMES)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_no_damage_raises_anything_but_a_value_error(protocol: int, tmp_path: Path) -> None:
    """Every byte of a small file, changed in turn; then cuts and noise."""
    whole = pickle.dumps(frame(PLAIN), protocol=protocol)
    rng = random.Random(protocol)
    contents = [whole[:at] for at in range(len(whole))]
    contents += [whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :] for at in range(len(whole))]
    contents += [
        whole[:at] + rng.randbytes(rng.randrange(9)) + whole[at + rng.randrange(9) :] for at in range(len(whole))
    ]
    refused = 0
    for content in contents:
        try:
            rows = read(tmp_path, content)
        except ValueError:
            refused += 1
        else:
            assert all(set(history) <= set(NAMES) and last in NAMES for history, last in rows)
    assert refused > len(whole)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/napo-was-here",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.system, .*may run code; refused"):
        read(tmp_path, pickle.dumps(frame([([1, 2], 2, 3), (Payload(), 1, 1)]), protocol=4))
    assert not Path("/tmp/napo-was-here").exists()


def test_a_cut_pickle_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cut short or damaged"):
        read(tmp_path, pickle.dumps(frame(PLAIN))[:-40])


def test_a_pickle_of_arrow_strings_says_how_to_save_it(tmp_path: Path) -> None:
    rows = frame(PLAIN)
    rows.columns = rows.columns.astype(pd.StringDtype("pyarrow"))  # what pandas 3 makes by itself
    with pytest.raises(ValueError, match=r"train_data\.df: the pickle asks for .*columns\.astype\(object\)"):
        read(tmp_path, pickle.dumps(rows))


# --- MovieLens as LLaRA has it ---


def movielens(folder: Path) -> None:
    folder.mkdir()
    rows = [([(at + k, 4) for k in range(4)] + [(1682, 0)] * 2, 4, (at + 4, 3)) for at in range(20)]
    for name in ("train_data.df", "Val_data.df", "Test_data.df"):
        (folder / name).write_bytes(pickle.dumps(frame(rows), protocol=4))


def test_titles_of_u_item_where_there_is_no_id2name(tmp_path: Path) -> None:
    movielens(tmp_path / "in")
    lines = [f"{at + 1}|Café {at}, The (1995)|01-Jan-1995||http://x|0|0\n" for at in range(59)]
    lines.append("60|Café 3, The (1996)|01-Jan-1996||http://x|0|0\n")
    (tmp_path / "in" / "u.item").write_bytes("".join(lines).encode("latin-1"))
    data = prepare("llara", tmp_path / "in", tmp_path / "out", candidates=5, noun="Movies")
    row = data.train.iloc[0]
    assert [data.titles[item] for item in row.history] == [
        "The Café 0",
        "The Café 1",
        "The Café 2",
        "The Café 3 (1995)",
    ]
    assert data.titles[row.next] == "The Café 4" and data.titles[59] == "The Café 3 (1996)"
    assert data.items["source_id"].tolist()[:2] == ["0", "1"]


def test_id2name_goes_before_u_item_and_one_of_them_is_needed(tmp_path: Path) -> None:
    movielens(tmp_path / "in")
    with pytest.raises(ValueError, match=r"no id2name\.txt there, nor MovieLens' u\.item"):
        prepare("llara", tmp_path / "in", tmp_path / "out", candidates=5)
    (tmp_path / "in" / "u.item").write_text("1|Other (1990)|x\n")
    (tmp_path / "in" / "id2name.txt").write_text("".join(f"{at}::Film {at}\n" for at in range(60)))
    data = prepare("llara", tmp_path / "in", tmp_path / "out", candidates=5)
    assert data.titles[:2] == ["Film 0", "Film 1"]
