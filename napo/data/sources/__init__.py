"""One file for each format. Each has ``Options`` and ``read(path, options, *, max_bad)``.

``read`` returns a Log, or a Preset where the source brings its split.
"""

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
