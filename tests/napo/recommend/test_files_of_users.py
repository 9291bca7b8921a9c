"""Recommendations for the users and histories of a file, and the file that they are written to."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from napo.recommend import Asked, Catalogue, Recommendations, Recommender, recommend_file
from napo.runs import Run


@pytest.fixture(scope="module")
def recommender(demo_run: Run) -> Recommender:
    return Recommender.from_run(demo_run.path, model="napo+sasrec", retrieve=20)


@pytest.mark.parametrize("source, out", [("csv", "jsonl"), ("parquet", "csv"), ("jsonl", "parquet")])
def test_files_of_users_and_histories(recommender: Recommender, tmp_path: Path, source: str, out: str) -> None:
    titles = recommender.catalogue.titles
    users = pd.DataFrame({"user": ["1", "2", "nobody"]})
    histories = pd.DataFrame({"history": [titles[:3], [titles[7]], []]})
    for frame in (users, histories):
        given, written = tmp_path / f"in.{source}", tmp_path / f"out.{out}"
        if source == "csv":
            as_text = frame.map(lambda value: "::".join(value) if isinstance(value, list) else value)
            as_text.to_csv(given, index=False)
        elif source == "parquet":
            frame.to_parquet(given)
        else:
            frame.to_json(given, orient="records", lines=True)
        report = recommend_file(recommender, given, written, k=4)
        assert (report.rows, report.popular, report.notes) == (3, 1, [])
        if out == "jsonl":
            rows = [json.loads(line) for line in written.read_text().splitlines()]
            best = [row["items"][0]["title"] for row in rows]
        else:
            table = pd.read_csv(written) if out == "csv" else pd.read_parquet(written)
            assert table["row"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and ("user" in table) == (frame is users)
            best = table.query("place == 1")["title"].tolist()
        name = frame.columns[0]
        expected = [recommender.recommend(**{name: value}, k=4) for value in frame[name].tolist()]
        assert best == [answer.items[0].title for answer in expected]


def test_all_rows_that_cannot_be_answered_are_named_at_once(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles, given, out = recommender.catalogue.titles, tmp_path / "in.csv", tmp_path / "o.csv"
    rows = [titles[0], f"{titles[1]}::Alien", *titles[2:5], "Alien"]
    given.write_text("\n".join(["history", *rows]) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(recommender, "answer", None)  # nothing is computed
        with pytest.raises(
            ValueError,
            match=r"in\.csv: 2 of 6 rows cannot be answered \(--unknown skip .*\): row 1.*'Alien'.*; row 5.*'Alien'",
        ):
            recommend_file(recommender, given, out)
        given.write_text("history\n" + "Alien\n" * 30)
        with pytest.raises(ValueError, match=r"30 of 30 rows cannot be answered.*; the first 10: ") as caught:
            recommend_file(recommender, given, out)
        assert str(caught.value).count("row ") == 10 and not out.exists()
        given.write_text(f"history\n{titles[0]}\nAlien\n")
        with pytest.raises(
            ValueError, match=r"in\.csv row 1.*: history: expected a title or an id .*'Alien'.*; --unknown skip leaves"
        ):
            recommend_file(recommender, given, out)
    recommend_file(recommender, given, out, k=2, unknown="skip")
    assert pd.read_csv(out)["notes"].fillna("").tolist() == ["", "", *2 * ["1 item not known: 'Alien'"]]


def test_files_that_cannot_be(recommender: Recommender, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("customer\n1\n")
    (tmp_path / "b.jsonl").write_text('{"history": "Blue Red"}\n')
    with pytest.raises(ValueError, match=r"a\.csv: expected a column user or history; got customer"):
        recommend_file(recommender, tmp_path / "a.csv", tmp_path / "o.csv")
    with pytest.raises(ValueError, match=r"b\.jsonl row 0 \(line 1\): history: expected a list of titles .*'Blue Red'"):
        recommend_file(recommender, tmp_path / "b.jsonl", tmp_path / "o.csv")
    with pytest.raises(ValueError, match=r"out: expected a name that ends in \.parquet, \.csv, \.jsonl"):
        recommend_file(recommender, tmp_path / "a.csv", tmp_path / "o.xlsx")
    assert not (tmp_path / "o.csv").exists()


def answers_to(recommender: Recommender, folder: Path, text: str | bytes, name: str = "in.csv") -> list[dict]:
    """A file's answers, line by line."""
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    recommend_file(recommender, folder / name, folder / "out.jsonl", k=2)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_the_input_and_links_stay(recommender: Recommender, tmp_path: Path) -> None:
    given, link, target = tmp_path / "self.csv", tmp_path / "link.csv", tmp_path / "far" / "target.csv"
    given.write_text("user\n1\n")
    other = tmp_path / "other.csv"
    other.symlink_to(given)
    for out in (given, other):
        with pytest.raises(ValueError, match=r"^out: .* is the input, which would be lost; give another name"):
            recommend_file(recommender, given, out)
    assert given.read_text() == "user\n1\n"
    target.parent.mkdir()
    link.symlink_to(target)
    for _ in range(2):  # to a file that is not there yet, and to one that is
        recommend_file(recommender, given, link, k=1)
        assert link.is_symlink() and target.read_text().startswith("row,user,place")
    with pytest.raises(ValueError, match="out: expected the name of a file"):
        (tmp_path / "folder.csv").mkdir()
        recommend_file(recommender, given, tmp_path / "folder.csv")


def test_empty_lines_are_rows(recommender: Recommender, tmp_path: Path) -> None:
    titles = recommender.catalogue.titles
    found = answers_to(recommender, tmp_path, f"history\n{titles[0]}\n\n{titles[1]}\n")
    assert [one["model"] for one in found] == ["napo+sasrec", "popularity", "napo+sasrec"]
    with pytest.raises(ValueError, match=r"in\.csv row 1 \(line 3\): user: expected the id of a user; got none"):
        answers_to(recommender, tmp_path, "user\n1\n\n2\n")


def test_histories_as_text(tmp_path: Path, demo_run: Run) -> None:
    recommender = Recommender.from_run(demo_run.path, model="sasrec")
    titles = [
        ":wumpscut:",
        "[REC]",
        "Depths of Fear :: Knossos",
        "2nd::part",
        '["x"]',
        *recommender.catalogue.titles[5:],
    ]
    recommender.catalogue = Catalogue(titles, recommender.catalogue.source_ids)
    last, number = titles[-1], recommender.catalogue.source_ids[8]
    cells = {
        f"[REC]::{last}": [1, 59],
        f"{last}:::wumpscut:": [59, 0],
        f":wumpscut:::{last}::::[rec]": [0, 59, 1],
        ":wumpscut:": [0],
        "depths of fear :: knossos": [2],
        f"{last}::2nd::part::{titles[7]}e": [59, 3, 7],
        '["x"]': [4],
        f'["{last}", {number}, {{"title": "[REC]"}}]': [59, 8, 1],
        f"{number}::{last}": [8, 59],
        "": [],
    }
    lines = "".join('"' + cell.replace('"', '""') + '"\n' for cell in cells)
    asked = []
    recommender.answer = lambda some: asked.extend(some) or Recommender.answer(recommender, some)  # type: ignore
    answers_to(recommender, tmp_path, "history\n" + lines)
    assert [one.history for one in asked] == list(cells.values())
    many = "::".join([*["2nd::part", last] * 500, "none of them", ":wumpscut:"])
    with pytest.raises(ValueError, match="got 'none of them'; see") as caught:
        answers_to(recommender, tmp_path, f"history\n{many}\n")
    assert "nor are" not in str(caught.value)


def test_ids_of_users_in_any_spelling(recommender: Recommender, tmp_path: Path) -> None:
    known = [recommender.recommend(user=user, k=2).as_dict()["items"] for user in (4, 2)]
    for name, text in (
        ("a.csv", "user\n4.0\n 2\n"),
        ("b.tsv", "user\tx\n4 \t1\n2\t1\n"),
        ("c.jsonl", '\ufeff{"user": 4.0}\n\n{"user": "2 "}\n'),
        ("D.CSV", "name;user\na;4\nb;2\n".encode("utf-16")),
    ):
        found = answers_to(recommender, tmp_path, text, name)
        assert [one["items"] for one in found] == known, name
        assert [int(one["user"]) for one in found] == [4, 2]
    for kind in ("float64", "Int64", "string"):
        pd.DataFrame({"user": pd.array([4, 2], dtype=kind if kind != "string" else "Int64").astype(kind)}).to_parquet(
            tmp_path / "users.parquet"
        )
        recommend_file(recommender, tmp_path / "users.parquet", tmp_path / "o.csv", k=1)
        assert pd.read_csv(tmp_path / "o.csv", dtype=str)["user"].tolist() == ["4", "2"]
    pd.DataFrame({"user": pd.array([4, None], dtype="Int64")}).to_parquet(tmp_path / "users.parquet")
    with pytest.raises(ValueError, match=r"users\.parquet row 1: user: expected the id of a user; got none"):
        recommend_file(recommender, tmp_path / "users.parquet", tmp_path / "o.csv")
    with pytest.raises(ValueError, match=r"n\.jsonl row 0 \(line 1\): user: expected the id of a user; got none"):
        answers_to(recommender, tmp_path, '{"user": NaN}\n', "n.jsonl")
    with gzip.open(tmp_path / "u.csv.gz", "wt") as file:
        file.write("user\n4\n")
    assert recommend_file(recommender, tmp_path / "u.csv.gz", tmp_path / "o.csv").popular == 0


def test_rows_with_a_user_and_a_history(recommender: Recommender, tmp_path: Path) -> None:
    titles = recommender.catalogue.titles
    given, out = tmp_path / "in.csv", tmp_path / "o.jsonl"
    given.write_text(
        f"user,history,exclude,k,name\n1,{titles[0]},,3,x\n2,,{titles[9]}::{titles[8]},,y\n,,,,z\nbob,,,,\n"
    )
    report = recommend_file(recommender, given, out, k=2)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found[0]["items"] == recommender.recommend(titles[:1], k=3).as_dict()["items"]
    assert found[1]["items"] == recommender.recommend(user=2, k=2, exclude=titles[8:10]).as_dict()["items"]
    assert [one["model"] for one in found[2:]] == ["popularity"] * 2
    assert [one.get("user") for one in found] == ["1", "2", None, "bob"]
    assert report.notes == [
        f"{given}: has history and user; the history counts, and the user where it is empty",
        f"{given}: columns used: user, history, exclude, k; ignored: name",
    ]
    line = "4 rows: 2 by napo, 2 with popular items (1 unknown user, such as 'bob'; 1 without known items)"
    assert report.line("napo") == line
    given.write_text("user,k\nbob,\n1,0\n")
    with pytest.raises(ValueError, match=r"row 1 \(line 3\): k: expected a whole number of at least 1; got '0'"):
        recommend_file(recommender, given, out)
    given.write_text("user\nalice@x\nbob\n1\n")
    assert "most users are not known, such as 'alice@x'" in recommend_file(recommender, given, out).notes[0]


def test_json_lines_of_all_kinds(recommender: Recommender, tmp_path: Path) -> None:
    title = recommender.catalogue.titles[0]
    text = f'{{"history": ["{title}"], "user": 5}}\n\n{{"history": ["{title}"]}}\n{{"user": "a"}}\n'
    found = answers_to(recommender, tmp_path, text, "a.jsonl")
    assert [one.get("user", "none") for one in found] == [5, "none", "a"]
    bad = '{"user": 1}\n\n{"user": \n[1]\n{"name": 1}\n'
    reasons = r"row 1 \(line 3\): not JSON .*row 2 \(line 4\): expected an object .*got list.*row 3 .*got name"
    with pytest.raises(ValueError, match=reasons):
        answers_to(recommender, tmp_path, bad, "b.jsonl")
    for out in ("o.csv", "o.parquet"):
        recommend_file(recommender, tmp_path / "a.jsonl", tmp_path / out, k=1)
    assert (tmp_path / "o.csv").read_text().splitlines()[1].startswith("0,5,1,")
    assert pd.read_parquet(tmp_path / "o.parquet")["user"].fillna("").tolist() == ["5", "", "a"]


def test_tables_that_are_not_as_their_header_says(
    recommender: Recommender, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for text, reason in (
        (
            "user,name\n1,a\n2,b,c\n",
            r"row 1 \(line 3\): expected 2 cells; got 3; write a cell that holds ',' in quotes",
        ),
        ("user,user\n1,2\n", "expected one column user; got 2"),
        ("", "empty; expected a line with the names"),
        (b"user\n\x001\n", r"line 2: holds a NUL byte; is the file UTF-16, write it as UTF-8"),
    ):
        with pytest.raises(ValueError, match=reason):
            answers_to(recommender, tmp_path, text)
    (tmp_path / "latin.csv").write_bytes("history\nBlue R\u00e9d\n".encode("cp1252"))
    assert recommend_file(recommender, tmp_path / "latin.csv", tmp_path / "o.csv", k=1).popular == 0
    assert "read as cp1252" in caplog.text and "is it another encoding, write it as UTF-8" in caplog.text
    (tmp_path / "no.parquet").write_text("user")
    with pytest.raises(ValueError, match=r"no\.parquet: cut short or no Parquet file"):
        recommend_file(recommender, tmp_path / "no.parquet", tmp_path / "o.csv")


def test_a_place_that_cannot_be_written_is_said_first(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.csv").write_text("user\n1\n")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(recommender, "answer", None)
    for place in ("/proc/x.csv", tmp_path / "file" / "x.csv"):
        with pytest.raises(ValueError, match=rf"^out: cannot write {place} \([^/]*\); give another place$"):
            recommend_file(recommender, tmp_path / "in.csv", place)
    with pytest.raises(ValueError, match=r"^input: .*none\.csv: no such file"):
        recommend_file(recommender, tmp_path / "none.csv", tmp_path / "x.csv")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_answers_are_written_as_they_come(
    recommender: Recommender,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
) -> None:
    (tmp_path / "in.csv").write_text("user\n" + "".join(f"{user}\n" for user in range(1, 8)))
    whole, parts = tmp_path / f"whole.{suffix}", tmp_path / f"parts.{suffix}"
    recommend_file(recommender, tmp_path / "in.csv", whole, k=2)
    seen: list[tuple[int, int]] = []

    def answer(asked: list[Asked]) -> list[Recommendations]:
        (aside,) = (path for path in tmp_path.iterdir() if path.name.startswith(".parts"))
        seen.append((len(asked), aside.stat().st_size))
        return Recommender.answer(recommender, asked)

    monkeypatch.setattr(recommender, "answer", answer)
    monkeypatch.setattr("napo.recommend.files.TOGETHER", 3)
    monkeypatch.setattr("napo.recommend.writing.ROW_GROUP", 3)
    monkeypatch.setattr("napo.progress.LINE_SECONDS", 0.0)
    recommend_file(recommender, tmp_path / "in.csv", parts, k=2)
    assert [size for size, _ in seen] == [3, 3, 1]
    assert seen[0][1] < seen[1][1] < seen[2][1]
    assert "recommend: 6 of 7 rows" in capsys.readouterr().err
    if suffix == "parquet":
        pd.testing.assert_frame_equal(pd.read_parquet(parts), pd.read_parquet(whole))
    else:
        assert parts.read_text() == whole.read_text()


def test_stopped_is_stopped_and_nothing_is_kept(demo_run: Run, tmp_path: Path) -> None:
    slow = (
        "import time; from napo import cli; from napo.recommend import Recommender\n"
        "def slowly(self, asked):\n    print('begun', flush=True); time.sleep(60)\n"
        "Recommender.answer = slowly; cli.main()"
    )
    (tmp_path / "in.csv").write_text("user\n1\n")
    options = ["--run", demo_run.path, "--model", "sasrec", "--input", "in.csv", "--out", "out.csv"]
    command = [sys.executable, "-c", slow, "recommend", *map(str, options)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143
    assert err.startswith("napo: stopped; nothing is kept; to begin again: ") and "napo recommend --run" in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]
