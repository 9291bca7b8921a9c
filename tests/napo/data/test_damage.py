"""Damaged and hostile files: a clear error or a counted skip, and never half a prepared data set."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import data_files
import numpy as np
import pandas as pd
import pytest
from data_files import prepare
from hypothesis import given, settings
from hypothesis import strategies as st

from napo.data.interactions import Log
from napo.data.split_kinds import SPLIT_KINDS

PRESETS = ("llara", "sdpo-json")
SPAM = (b"\0", b"\n", b"\t", b'"', b"{", b"[" * 3000, b"9" * 30, b"-1e999", b"\xff\xfe", b"null", b"::", b"")


def llara(folder: Path) -> None:
    names = "".join(f"{item}::Title {item}\n" for item in range(60))
    (folder / "id2name.txt").write_text(names)
    for name in ("train_data.df", "Val_data.df", "Test_data.df"):
        rows = [([*range(at, at + 5), 60, 60], 5, at + 5) for at in range(20)]
        frame = pd.DataFrame(rows, columns=pd.Index(["seq", "len_seq", "next"], dtype=object))
        (folder / name).write_bytes(pickle.dumps(frame, protocol=4))


def sdpo_json(folder: Path) -> None:
    for split in ("train", "val", "test"):
        titles = [f"Title {item}" for item in range(60)]
        records = [
            {"historyList": titles[at : at + 4], "itemList": titles[at + 4 : at + 9], "trueSelection": titles[at + 6]}
            for at in range(20)
        ]
        (folder / f"x-{split}.json").write_text(json.dumps(records))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of whole files, by layout."""
    folders = {}
    for layout in (*data_files.WRITERS, *PRESETS):
        folders[layout] = tmp_path_factory.mktemp(layout)
        if layout in PRESETS:
            (llara if layout == "llara" else sdpo_json)(folders[layout])
        else:
            data_files.WRITERS[layout](folders[layout], data_files.log(users=8, length=8))
    return folders


@pytest.mark.parametrize("layout", [*data_files.WRITERS, *PRESETS])
@given(drawn=st.data())
@settings(max_examples=10, deadline=None)
def test_damage_is_an_error_or_a_skip(layout: str, originals: dict[str, Path], drawn: st.DataObject) -> None:
    """Whatever happens to a file, a reader raises nothing but ValueError, and what it lets through is consistent."""
    with tempfile.TemporaryDirectory() as work:
        folder, out = Path(work) / "in", Path(work) / "out"
        shutil.copytree(originals[layout], folder)
        files = sorted(folder.iterdir())
        file = files[drawn.draw(st.integers(0, len(files) - 1), "file")]
        content = file.read_bytes()
        if drawn.draw(st.booleans(), "cut"):
            content = content[: drawn.draw(st.integers(0, len(content) - 1), "at")]
        for _ in range(drawn.draw(st.integers(1, 3), "wounds")):
            at = drawn.draw(st.integers(0, len(content)), "at")
            width = drawn.draw(st.integers(0, 4), "over")
            content = content[:at] + drawn.draw(st.sampled_from(SPAM), "spam") + content[at + width :]
        file.write_bytes(content)
        options = {"min_user": 1, "min_item": 1, "candidates": 5, "max_bad": 0.1}
        try:
            data = prepare(layout if layout in PRESETS else layout.partition("-")[0], folder, out, **options)
        except ValueError:
            assert [path.name for path in Path(work).iterdir()] == ["in"]
            return
        assert sorted(path.name for path in Path(work).iterdir()) == ["in", "out"]
        consistent(data)


def consistent(data: object) -> None:
    """Ids in range, and one target a list."""
    for rows in (data.train, data.val, data.test):  # type: ignore[attr-defined]
        for row in rows.itertuples():
            ids = np.concatenate([row.full_history, row.candidates, [row.next]])
            assert ids.min() >= 0 and ids.max() < data.num_items  # type: ignore[attr-defined]
            assert list(row.candidates).count(row.next) == 1


LOGS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 29), st.integers(0, 40)),
    min_size=30,
    max_size=120,
    unique_by=lambda r: r[:2],
)


@given(LOGS, st.sampled_from(SPLIT_KINDS), st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_no_log_and_split_leaks_a_target(rows: list, split: str, seed: int, history: int) -> None:
    rows = [(user, item, data_files.START + time) for user, item, time in rows]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "in"
        folder.mkdir()
        data_files.csv(folder, rows)
        options = {"min_user": 1, "min_item": 1, "min_history": 1, "candidates": 2, "rows_per_user": 0}
        try:
            data = prepare("csv", folder, Path(work) / "out", split=split, seed=seed, history=history, **options)
        except ValueError as error:
            assert "leave none to train on" in str(error) or "ask for fewer candidates" in str(error)
            return
        consistent(data)
        when = {(u, i): t for u, i, t in data.interactions.itertuples(index=False)}
        trained = {(row.user_id, item) for row in data.train.itertuples() for item in (*row.full_history, row.next)}
        for rows_of in (data.train, data.val, data.test):
            for row in rows_of.itertuples():
                assert list(row.history) == list(row.full_history[-history:])
                assert row.next not in row.full_history
                assert not set(row.candidates) - {row.next} & set(row.full_history)
                past = [when[row.user_id, item] for item in row.full_history]
                assert past == sorted(past) and past[-1] <= when[row.user_id, row.next]
        for held_out in (data.val, data.test):
            for row in held_out.itertuples():
                assert (row.user_id, row.next) not in trained
                if split == "user":
                    assert not {user for user, _ in trained} & {row.user_id}
        validated = {(row.user_id, item) for row in data.val.itertuples() for item in (*row.full_history, row.next)}
        assert not validated & {(row.user_id, row.next) for row in data.test.itertuples()}


def test_hostile_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    lines = [
        {"user_id": None, "item_id": 1, "timestamp": 1},
        {"user_id": "", "item_id": 1, "timestamp": 1},
        {"user_id": 1, "item_id": [1], "timestamp": 1},
        {"user_id": 1, "item_id": 1, "timestamp": 10**30},
        {"user_id": 1, "item_id": 1, "timestamp": "yesterday"},
        ["user_id"],
    ]
    data_files.jsonl(tmp_path, data_files.log())
    with open(tmp_path / "interactions.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.write("[" * 100_000 + "\n")
    data = prepare("jsonl", tmp_path, tmp_path / "out", min_user=1, min_item=1, max_bad=0.1)
    report = data.meta["files"][0]
    assert report["bad_lines"] == 7 and len(report["bad_examples"]) == 5
    assert data.meta["counts"]["interactions"] == 450 and data.meta["counts"]["users"] == 30


def test_a_time_out_of_range_leaves_the_columns_of_one_length() -> None:
    log = Log()
    with pytest.raises(OverflowError):
        log.add("a", "b", 2**63)
    assert [len(column) for column in log.parts().load(0)] == [0, 0, 0] and not log.user_ids


@pytest.mark.parametrize("bad, fails", [(3, False), (150, True)])
def test_bad_rows_of_parquet_are_counted_too(bad: int, fails: bool, tmp_path: Path) -> None:
    data_files.parquet(tmp_path, data_files.log())
    frame = pd.read_parquet(tmp_path / "interactions.parquet")
    frame.loc[: bad - 1, "user_id"] = None  # makes floats of the ids, and they stay the same ids
    frame.to_parquet(tmp_path / "interactions.parquet")
    if fails:
        with pytest.raises(
            ValueError, match=r"interactions\.parquet: 150 of 450 rows are bad, more than max_bad 1%.*row 1:"
        ):
            prepare("parquet", tmp_path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    data = prepare("parquet", tmp_path, tmp_path / "out", min_user=1, min_item=1)
    assert data.meta["files"][0]["bad_rows"] == 3 and len(data.meta["files"][0]["sha256"]) == 64
    assert "29" in set(pd.read_parquet(tmp_path / "out/users.parquet")["source_id"])


KILLED = """
import os, signal, sys
from napo.data import parts, prepare, writing

whole = writing.Sequences.write_rows

def killed(self, path, *rest, **options):
    if path.name == "test.parquet":
        os.kill(os.getpid(), signal.SIGKILL)
    whole(self, path, *rest, **options)

if sys.argv[3] == "killed":
    writing.Sequences.write_rows = killed
if sys.argv[3] == "killed in parts":
    parts.PART = 23
    prepare.write_tables = lambda path, tables: os.kill(os.getpid(), signal.SIGKILL)
prepare.prepare("csv", sys.argv[1], sys.argv[2], prepare.PrepareOptions(min_item=int(sys.argv[4])))
"""


def run(folder: Path, out: Path, kind: str, min_item: int, hash_seed: str = "0") -> int:
    command = [sys.executable, "-c", KILLED, str(folder), str(out), kind, str(min_item)]
    return subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": hash_seed}).returncode


def test_killed_or_not_and_whatever_the_hash_seed_the_folder_is_whole(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    data_files.csv(folder, data_files.log())
    assert run(folder, out, "whole", 5, hash_seed="1") == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert run(folder, out, "killed", 8) == -signal.SIGKILL
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 3, "the killed process leaves its work aside"
    # The same again, over what was there, in a process that hashes otherwise.
    assert run(folder, out, "whole", 5, hash_seed="2") == 0
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_parts_of_a_killed_process_go_with_the_next_call(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    data_files.csv(folder, data_files.log())
    assert run(folder, out, "killed in parts", 5) == -signal.SIGKILL
    assert list(tmp_path.rglob("*.npy")), "a log in parts lies in files"
    assert run(folder, out, "whole", 5) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_file_in_the_place_of_the_folder_is_said_before_reading(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    (tmp_path / "interactions.csv").write_text("nothing that could be read")
    with pytest.raises(ValueError, match="out: is a file, so it is no prepared data set"):
        prepare("csv", tmp_path, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    data_files.csv(tmp_path / "in", data_files.log())
    link, far = tmp_path / "link", tmp_path / "far" / "shop"
    link.symlink_to(far)
    for seed in range(2):  # to a folder that is not there yet, and to one that is
        assert prepare("csv", tmp_path / "in", link, seed=seed).path == link
        assert link.is_symlink() and json.loads((far / "dataset.json").read_text())["options"]["seed"] == seed
    assert sorted(path.name for path in far.parent.iterdir()) == ["shop"]


def test_the_folder_where_one_stands_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_files.csv(tmp_path, data_files.log())
    below = tmp_path / "out" / "below"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    with pytest.raises(ValueError, match="below: is where you stand, and would be replaced; give another --out"):
        prepare("csv", tmp_path, Path("."))
    assert prepare("csv", tmp_path, Path("there")).num_items


def test_a_dataset_json_that_others_made_is_not_replaced(tmp_path: Path) -> None:
    data_files.csv(tmp_path, data_files.log())
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.parquet").write_text("mine")
    for text in ('{"name": "mine"}', "no JSON"):
        (out / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match=r"out: holds a dataset\.json of another kind, so it is no prepared"):
            prepare("csv", tmp_path, out)
    assert (out / "train.parquet").read_text() == "mine"
    prepare("csv", tmp_path, tmp_path / "own")
    (tmp_path / "own" / "dataset.json").write_text("damaged")
    prepare("csv", tmp_path, tmp_path / "own")
    (tmp_path / "own" / "test.parquet").unlink()
    assert len(prepare("csv", tmp_path, tmp_path / "own").test)


def test_an_option_of_the_wrong_type_names_itself(tmp_path: Path) -> None:
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\n")
    with pytest.raises(ValueError, match="test_users: expected a number, got 'many'"):
        prepare("csv", tmp_path, tmp_path / "out", test_users="many")
