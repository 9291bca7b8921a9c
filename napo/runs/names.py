"""What things in a run folder are called."""

from __future__ import annotations

import re

from napo.identity import SETTINGS, WEIGHTS

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
LONGEST_NAME = 100
STAGES = ("demo", "prepare", "sasrec", "sft", "train", "evaluate", "popularity", "itemknn", "rules", "base")
"""What stages and built-in recommenders are called; of them a model may have ``sft``, which is the name of its own."""
KEPT_FILES = ("items.parquet", "dataset.json", "interactions.parquet", "users.parquet")
"""Of the prepared data, copied into the run; ``users.parquet`` is missing where the source tells no users."""
ADAPTER = (SETTINGS, WEIGHTS)
"""Of a model: what scoring with it reads, beside how it was made."""
POPULARITY = "popularity.parquet"
"""Of the run: how often each item was met in training."""
SEQUENCES = "sequences.parquet"
"""Of the run: the items of each training sequence in their order."""
COUNTED_FILES = (POPULARITY, SEQUENCES)
"""What the run writes of the prepared data, for the recommenders that count and do not learn."""


def checked_model_name(name: str, *, own: str | None = None) -> str:
    """``name``, which may become a folder of ``RUN/models``. ``own``: the one stage whose name it may have."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise ValueError(
            f"name: expected up to {LONGEST_NAME} letters, digits, '.', '_' and '-', the first one no dot; got {name!r}"
        )
    if (name in STAGES and name != own) or name.startswith(("evaluate-", "combine-", "catalogue-")):
        raise ValueError(f"name: {name!r} is what another stage is called; give another --name")
    return name
