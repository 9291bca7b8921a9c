"""Public addresses of data sets. The command line reads their names, so nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """A zip file, its SHA-256, and the folder inside that holds the files ("" for the top)."""

    source: str
    address: str
    sha256: str
    inside: str


_GROUPLENS = "https://files.grouplens.org/datasets"
ARCHIVES = {
    "ml-100k": Archive(
        "movielens",
        f"{_GROUPLENS}/movielens/ml-100k.zip",
        "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        "ml-100k",
    ),
    "ml-1m": Archive(
        "movielens",
        f"{_GROUPLENS}/movielens/ml-1m.zip",
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        "ml-1m",
    ),
    "ml-20m": Archive(
        "movielens",
        f"{_GROUPLENS}/movielens/ml-20m.zip",
        "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
        "ml-20m",
    ),
    "ml-25m": Archive(
        "movielens",
        f"{_GROUPLENS}/movielens/ml-25m.zip",
        "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
        "ml-25m",
    ),
    "ml-latest-small": Archive(
        "movielens",
        f"{_GROUPLENS}/movielens/ml-latest-small.zip",
        "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
        "ml-latest-small",
    ),
    "lastfm-2k": Archive(
        "lastfm",
        f"{_GROUPLENS}/hetrec2011/hetrec2011-lastfm-2k.zip",
        "6738f48195667ff03caaab4d32ca9a3133d8cc026b7c3cdaf6ce1010e913c59c",
        "",
    ),
}
BY_HAND = {
    "goodreads": "https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html",
    "steam": "https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data",
}
"""Files that are published without a checksum: nothing could tell a good download from a bad one."""
