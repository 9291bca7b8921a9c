"""One file for each format. Each has ``Options`` and ``read(path, options, *, max_bad)``.

``read`` returns a Log, or a Preset where the source brings its split.
"""

from __future__ import annotations

import importlib
from types import ModuleType

SOURCES = {
    "lastfm": "lastfm",
    "goodreads": "goodreads",
    "steam": "steam",
    "movielens": "movielens",
    "recbole": "recbole",
    "llara": "llara",
    "sdpo-json": "sdpo_json",
    "csv": "tables",
    "parquet": "tables",
    "jsonl": "tables",
}
"""The name of a source in ``napo prepare``, and the module here that reads it."""


def reader_of(source: str) -> ModuleType:
    """The module of a source, imported when it is asked for."""
    return importlib.import_module(f".{SOURCES[source]}", __name__)
