"""A folder of two small files of interactions and items, and what napo prepare makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from data_files import prepare

from napo.data.prepared import PreparedData

ALL = {"min_user": 1, "min_item": 1, "candidates": 2, "min_history": 1}
USERS, LENGTH = 8, 12
ITEMS = USERS + LENGTH - 1
RIGHT = [f"Title {item}" for item in range(LENGTH)]
LOG = [(user, item, item) for user in range(USERS) for item in range(user, user + LENGTH)]


def titles(count: int = ITEMS) -> list[tuple[int, str]]:
    return [(item, f"Title {item}") for item in range(count)]


def table(head: str, rows: Any, between: str = ",") -> str:
    return "\n".join([head, *(between.join(map(str, row)) for row in rows)]) + "\n"


class Folder:
    """A folder of two files, and what becomes of it."""

    def __init__(self, path: Path) -> None:
        self.path = path / "in"
        self.out = path / "out"
        self.path.mkdir()

    def csv(self, log: Any = LOG, items: Any = None, *, suffix: str = "csv", between: str = ",") -> Folder:
        head = between.join(("user_id", "item_id", "timestamp"))
        self.write(f"interactions.{suffix}", table(head, log, between))
        self.write(f"items.{suffix}", table(f"item_id{between}title", titles() if items is None else items, between))
        return self

    def jsonl(self, log: Any, items: Any) -> Folder:
        for name, rows in (("interactions", log), ("items", items)):
            self.write(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return self

    def parquet(self, log: dict, items: dict) -> Folder:
        for name, columns in (("interactions", log), ("items", items)):
            pq.write_table(pa.table(columns), self.path / f"{name}.parquet")
        return self

    def recbole(self, log: Any = LOG, items: Any = None, head: str = "item_id:token\ttitle:token_seq") -> Folder:
        self.write("x.inter", table("user_id:token\titem_id:token\ttimestamp:float", log, "\t"))
        self.write("x.item", table(head, titles() if items is None else items, "\t"))
        return self

    def write(self, name: str, text: str | bytes) -> None:
        (self.path / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    def prepare(self, source: str = "csv", **options: Any) -> PreparedData:
        return prepare(source, self.path, self.out, **{**ALL, **options})


def kept(data: PreparedData) -> int:
    return len(data.interactions)


def sequence(data: PreparedData, user: int = 0) -> list[str]:
    log = data.interactions
    return [data.titles[item] for item in log["item_id"][log["user_id"] == user]]


def users(data: PreparedData) -> list[str]:
    return pd.read_parquet(data.path / "users.parquet")["source_id"].tolist()


def titles_of_arrow() -> dict:
    item, title = zip(*titles(), strict=True)
    return {"item_id": item, "title": title}
