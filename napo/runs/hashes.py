"""Whether a file of a run is what the run made, by the sha256 that was noted of it then.

A record, a stamp or ``config.json``, holds the hash of what it says itself: its seal. Files of an older napo have none;
they are taken, and that is said, once for each run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from napo import ranks
from napo.data.texts import shown
from napo.files import content_hash, plain, text_hash

logger = logging.getLogger(__name__)

SEAL = "sha256"
"""Of a stamp and of ``config.json``: the hash of what else it says."""
_SAID: set[Path] = set()
"""The runs of which this process said that they do not know what one of their files was."""


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the hash of what it says."""
    said = json.loads(json.dumps({key: value for key, value in record.items() if key != SEAL}, default=plain))
    return {**said, SEAL: text_hash(json.dumps(said, sort_keys=True))}


def check_seal(path: Path, record: Mapping[str, Any], remedy: str) -> None:
    """ValueError where a ``sealed`` record, read from ``path``, says something else than it did."""
    if (got := sealed(record)[SEAL]) != record[SEAL]:
        raise ValueError(
            f"{path}: was changed after it was written (expected sha256 {shown(record[SEAL])[:12]}, got {got[:12]}); "
            f"{remedy}"
        )


def content_or_words(path: Path) -> str:
    """The ``content_hash``, or in words what is there in place of a file."""
    return content_hash(path) if path.is_file() or path.is_dir() else "none" if not os.path.lexists(path) else "no file"


def say_not_noted(run: Path, name: str) -> None:
    """Once a process for each run."""
    if ranks.rank() == 0 and (key := run.resolve()) not in _SAID:
        _SAID.add(key)
        logger.warning(
            "run: %s has no hash of %s, as a run of an older napo: changes of it by hand would not be seen",
            shown(run),
            shown(name),
        )
