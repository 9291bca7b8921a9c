"""Changes of a run's files as the tests make them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from command_calls import Call

from napo.files import read_json, write_json
from napo.runs import Run


def changed_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = read_json(path)
    write_json(path, change(value) or value)


def changed_table(path: Path, change: Callable[[pd.DataFrame], Any]) -> None:
    frame = pd.read_parquet(path)
    found = change(frame)
    (frame if found is None else found).to_parquet(path)


def refused(napo: Call, run: Run, pattern: str, *command: object) -> None:
    code, _, err = napo(*(command or ("recommend", "--run", run.path, "--user", "3")))
    lines = [
        line for line in err.splitlines() if not re.search("^run: .* has no hash of .*, as a run of an older", line)
    ]
    assert code == 1 and len(lines) == 1 and "--debug" not in lines[0], err
    assert re.search(pattern, lines[0]), err
