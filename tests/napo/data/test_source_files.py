"""Whether `napo run` sees that the files of a data set are not those any more that it was prepared from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from command_calls import Call

from napo.data.prepare import PrepareOptions, prepare
from napo.data.source_files import compare


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, napo: Call) -> Callable[..., tuple[int, str, str]]:
    """A shop's files that `napo run` has prepared; a call runs it again with this in its prepare section."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = [f"u{user},i{(user + step) % 12},{step}" for user in range(20) for step in range(6)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows, ""]))
    items = [f"i{item},Title {item}" for item in range(12)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *items, ""]))

    def run(**prepare: Any) -> tuple[int, str, str]:
        section = {"source": "csv", "path": "shop", "min_user": 2, "candidates": 3, **prepare}
        (tmp_path / "m.yaml").write_text(yaml.safe_dump({"data": "data", "prepare": section}))
        return napo("run", "--config", "m.yaml")

    code, _, err = run()
    assert code == 0 and Path("data/dataset.json").is_file(), err
    return run


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("u1,i5,99\n")


def test_the_files_of_a_prepared_data_set_are_compared(shop: Callable[..., tuple[int, str, str]]) -> None:
    as_it_was = "prepare: data is there, skipped\n"
    assert shop()[:2] == (0, as_it_was)
    shutil.copytree("shop", "copy")
    assert shop(path="copy")[:2] == (0, as_it_was)  # the same files elsewhere
    assert shop(path="copy/interactions.csv")[:2] == (0, as_it_was)
    Path("copy/interactions.csv").rename("copy/bought.csv")
    assert shop(path="copy/bought.csv")[:2] == (0, as_it_was)
    assert shop(path="copy/bought.csv", items="items.csv")[0] == 1  # another option


def test_a_default_of_the_reader_is_the_same_given_or_not(shop: Callable[..., tuple[int, str, str]]) -> None:
    given = {"title_column": "title", "noun": "Items", "delimiter": None, "rows_per_user": 1, "min_item": None}
    assert shop(**given)[:2] == (0, "prepare: data is there, skipped\n")
    code, _, err = shop(min_user=None)  # prepared with 2
    assert code == 1 and "data was prepared with min_user 2, and m.yaml says 5" in err
    code, _, err = shop(title_column="name")
    assert code == 1 and "data was prepared with title_column title, and m.yaml says name" in err


def test_changed_files_of_a_prepared_data_set_are_refused(shop: Callable[..., tuple[int, str, str]]) -> None:
    remedy = r"; give another folder, or move that one away\n$"
    shutil.copytree("shop", "more")
    append(Path("more/interactions.csv"))
    shutil.copytree("more", "named")
    Path("named/interactions.csv").rename("named/bought.csv")
    Path("named/items.csv").rename("named/things.csv")
    was = r"^napo: data: data was prepared from interactions.csv"
    both = rf"{was}, items.csv, and m.yaml says path "
    now = r" of sha256 \w{12}, and m.yaml says path %s, where it has sha256 \w{12}"
    for path, pattern in (
        ("more", was + now % "more"),
        ("more/interactions.csv", was + now % "more/interactions.csv"),
        ("named", rf"{both}named, where none of these is, but bought.csv, things.csv"),
        ("named/bought.csv", rf"{both}named/bought.csv, where bought.csv \(sha256 \w{{12}}\) is none of these"),
    ):
        code, out, err = shop(path=path)
        assert (code, out) == (1, "") and re.search(pattern + remedy, err), err
    append(Path("shop/interactions.csv"))
    code, _, err = shop()
    assert code == 1 and re.search(was + now % "shop" + remedy, err), err


def test_files_that_are_gone_could_not_be_compared(shop: Callable[..., tuple[int, str, str]]) -> None:
    said = "prepare: data is there, skipped; it could not be compared with %s, which %s does not have\n"
    Path("shop/items.csv").unlink()
    assert shop()[:2] == (0, said % ("items.csv", "shop"))
    shutil.rmtree("shop")
    assert shop()[:2] == (0, said % ("interactions.csv, items.csv", "shop"))


def test_a_part_more_is_another_table(tmp_path: Path) -> None:
    users, steps = np.divmod(np.arange(120), 6)
    log = pd.DataFrame({"user_id": users, "item_id": (users + steps) % 12, "timestamp": steps})
    for number in range(2):
        part = tmp_path / "shop" / "interactions.parquet" / f"part-{number}.parquet"
        part.parent.mkdir(parents=True, exist_ok=True)
        log[number * 60 : (number + 1) * 60].to_parquet(part)
    titles = pd.DataFrame({"item_id": range(12), "title": [f"Title {n}" for n in range(12)]})
    titles.to_parquet(tmp_path / "shop" / "items.parquet")
    options = PrepareOptions(min_user=1, min_item=1, candidates=3)
    meta = prepare("csv", tmp_path / "shop", tmp_path / "data", options).meta
    assert compare(meta, tmp_path / "shop") == (None, [])
    log.to_parquet(part.with_name("part-2.parquet"))
    other, _ = compare(meta, tmp_path / "shop")
    assert other is not None and re.fullmatch(r"where part-2.parquet \(sha256 \w+\) is none of these", other[1])
    part.with_name("part-2.parquet").unlink()
    part.unlink()
    assert compare(meta, tmp_path / "shop") == (None, ["part-1.parquet"])


@pytest.mark.parametrize("source", ["movielens", "recbole"])
def test_files_of_a_source_are_those_that_were_read(small_world: Path, tmp_path: Path, source: str) -> None:
    files = small_world / "files"
    if source == "movielens":
        files = tmp_path / "ml"
        files.mkdir()
        rows = (line.split("\t") for line in (small_world / "files" / "tiny.inter").read_text().splitlines()[1:])
        (files / "u.data").write_text("".join("\t".join(row) + "\n" for row in rows))
        (files / "u.item").write_text("".join(f"{item}|Title {item} (1990)|\n" for item in range(1, 61)))
        (files / "README").write_text("Nothing.\n")
    meta = prepare(source, files, tmp_path / "data", PrepareOptions(min_user=2, min_item=1)).meta
    assert compare(meta, files) == (None, [])
