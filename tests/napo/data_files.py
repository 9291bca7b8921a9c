"""Small files in the formats of the sources, all of one and the same log."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pandas as pd

import napo.data.prepare
from napo.data.prepared import PreparedData

Log = list[tuple[int, int, int]]  # user, item, seconds
ITEMS = 40
START = 1_300_000_000


def prepare(source: str, path: Path, out: Path, **options: Any) -> PreparedData:
    """Options by name, as the command line takes them."""
    return napo.data.prepare.prepare(source, path, out, *napo.data.prepare.split_options(options))


def log(users: int = 30, length: int = 15, seed: int = 0) -> Log:
    rng = random.Random(seed)
    return [
        (user, item, START + 60 * step)
        for user in range(users)
        for step, item in enumerate(rng.sample(range(ITEMS), length))
    ]


def movielens_100k(folder: Path, rows: Log) -> None:
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t3\t{t}\n" for u, i, t in rows))
    (folder / "u.item").write_text("".join(f"{i}|Title {i} (1990)|x\n" for i in range(ITEMS)), encoding="latin-1")


def movielens_1m(folder: Path, rows: Log) -> None:
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::3::{t}\n" for u, i, t in rows))
    (folder / "movies.dat").write_text("".join(f"{i}::Title {i} (1990)::x\n" for i in range(ITEMS)))


def movielens_csv(folder: Path, rows: Log) -> None:
    ratings = "".join(f"{u},{i},3.5,{t}\n" for u, i, t in rows)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + ratings)
    movies = "".join(f'{i},"Title {i} (1990)",x\n' for i in range(ITEMS))
    (folder / "movies.csv").write_text("movieId,title,genres\n" + movies)


def lastfm(folder: Path, rows: Log) -> None:
    tags = "".join(f"{u}\t{i}\t1\t{t * 1000}\n" for u, i, t in rows)
    (folder / "user_taggedartists-timestamps.dat").write_text("userID\tartistID\ttagID\ttimestamp\n" + tags)
    artists = "".join(f"{i}\tTitle {i}\tx\tx\n" for i in range(ITEMS))
    (folder / "artists.dat").write_text("id\tname\turl\tpictureURL\n" + artists)


def goodreads(folder: Path, rows: Log) -> None:
    def date(seconds: int) -> str:
        return pd.Timestamp(seconds, unit="s").strftime("%a %b %d %H:%M:%S +0000 %Y")

    with gzip.open(folder / "goodreads_interactions_x.json.gz", "wt") as file:
        for u, i, t in rows:
            line = {"user_id": f"{u}", "book_id": f"{i}", "is_read": True, "rating": 3, "date_added": date(t)}
            file.write(json.dumps(line) + "\n")
    with gzip.open(folder / "goodreads_books_x.json.gz", "wt") as file:
        file.writelines(json.dumps({"book_id": f"{i}", "title": f"Title {i}"}) + "\n" for i in range(ITEMS))


def steam(folder: Path, rows: Log) -> None:
    """Python literals; the public file has only days."""
    with gzip.open(folder / "steam_reviews.json.gz", "wt") as file:
        for u, i, t in rows:
            day = pd.Timestamp(t, unit="s").strftime("%Y-%m-%d")
            file.write(f"{{u'username': u'{u}', u'hours': 1.5, u'product_id': u'{i}', u'date': u'{day}'}}\n")
    with gzip.open(folder / "steam_games.json.gz", "wt") as file:
        file.writelines(f"{{u'id': u'{i}', u'app_name': u'Title {i}', u'price': 9.99}}\n" for i in range(ITEMS))


def recbole(folder: Path, rows: Log) -> None:
    inter = "".join(f"{u}\t{i}\t{t}.0\n" for u, i, t in rows)
    (folder / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + inter)
    item = "".join(f"{i}\tTitle {i}\n" for i in range(ITEMS))
    (folder / "x.item").write_text("item_id:token\ttitle:token_seq\n" + item)


def _frames(rows: Log) -> tuple[pd.DataFrame, pd.DataFrame]:
    items = pd.DataFrame({"item_id": range(ITEMS), "title": [f"Title {i}" for i in range(ITEMS)]})
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]), items


def csv(folder: Path, rows: Log) -> None:
    for frame, name in zip(_frames(rows), ("interactions", "items"), strict=True):
        frame.to_csv(folder / f"{name}.csv", index=False)


def tsv(folder: Path, rows: Log) -> None:
    for frame, name in zip(_frames(rows), ("interactions.tsv", "items.tsv.gz"), strict=True):
        frame.to_csv(folder / name, sep="\t", index=False)


def parquet(folder: Path, rows: Log) -> None:
    for frame, name in zip(_frames(rows), ("interactions", "items"), strict=True):
        frame.to_parquet(folder / f"{name}.parquet")


def jsonl(folder: Path, rows: Log) -> None:
    for frame, name in zip(_frames(rows), ("interactions", "items"), strict=True):
        frame.to_json(folder / f"{name}.jsonl", orient="records", lines=True)


WRITERS = {
    "movielens-100k": movielens_100k,
    "movielens-1m": movielens_1m,
    "movielens-csv": movielens_csv,
    "lastfm": lastfm,
    "goodreads": goodreads,
    "steam": steam,
    "recbole": recbole,
    "csv": csv,
    "csv-tsv": tsv,
    "parquet": parquet,
    "jsonl": jsonl,
}
