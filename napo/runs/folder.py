"""The folder of a run and its ``config.json``: what it is, and who may write into it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from napo import ranks
from napo.files import read_json, write_json
from napo.runs.hashes import SEAL, check_seal, say_not_noted, sealed
from napo.runs.lock import locked

_SHA256 = re.compile("[0-9a-f]{64}")
FORMAT = 2
"""Of the run folder; 1 had no number and kept model and prompt style for all models together."""
MAKERS = "demo, run, sasrec or sft"
"""The commands that begin a run folder, in words."""
PATIENCE = 10.0
"""Seconds that a short note in ``config.json`` waits for another process to finish its own."""


class Folder:
    """A run folder. It is made with the first thing written into it."""

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run: {self.path} is a file; expected a folder")
        if os.path.lexists(self.path / "config.json"):
            self._check_format()
        elif not create:
            raise ValueError(
                f"run: {self.path} has no config.json; expected the folder of a run, which napo {MAKERS} makes"
            )
        elif self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise ValueError(f"run: {self.path} is no run and not empty; give a folder that is empty or not there yet")

    @property
    def config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        config = read_json(path) if os.path.lexists(path) else {}
        _check_config(path, config)
        return {key: value for key, value in config.items() if key != SEAL}

    def command(self, name: str, *options: str, data: Path | None = None) -> str:
        """``napo NAME`` for this run as somebody types it, for messages that say what to do. ``data``: the prepared
        data set, where the run has not noted its own yet; DATA stands for one that is not where it was."""
        known = data or self.path / self.config.get("data", "")
        of = shlex.quote(os.path.normpath(known)) if (known / "dataset.json").is_file() else "DATA"
        return " ".join(["napo", name, "--data", of, "--run", shlex.quote(str(self.path)), *options])

    def configure(self, **values: Any) -> None:
        """Add to ``config.json`` what later stages and readers need."""
        if ranks.rank() > 0:
            return
        with self.writing(wait=PATIENCE):
            write_json(self.path / "config.json", sealed({**self.config, **values}))

    @contextmanager
    def writing(self, *, wait: float = 0.0) -> Iterator[None]:
        """One process at a time writes into a run. Others are told which one it is, after ``wait`` seconds. Of ranks
        that train together the first one has the lock."""
        if ranks.rank() > 0:  # the first rank writes, under its lock
            yield
            return
        with locked(self.path, wait):
            if not (self.path / "config.json").is_file():
                write_json(self.path / "config.json", sealed({"format": FORMAT}))
            yield

    def _check_format(self) -> None:
        config = read_json(self.path / "config.json")
        found = config.get("format") if isinstance(config, dict) else None
        if found == FORMAT:
            texts = {name: config.get(name, "") for name in ("data", "data_sha256", "dataset")}
            kept = config.get("kept_sha256", {})
            hashes = kept if isinstance(kept, dict) else {"": kept}
            wrong = [(name, "text", text) for name, text in texts.items() if not isinstance(text, str)]
            for name, text in hashes.items():
                # Of a text that is no hash the file would be called another one than the run's.
                if not isinstance(text, str) or not _SHA256.fullmatch(text):
                    wrong.append((f"kept_sha256 {name}".strip(), "a sha256", text))
            for name, expected, text in wrong[:1]:
                raise ValueError(
                    f"run: {self.path / 'config.json'}: {name}: expected {expected}, got {shown_value(text)}; the file "
                    "was changed; begin another run folder"
                )
            _check_config(self.path / "config.json", config)
            if SEAL not in config:
                say_not_noted(self.path, "config.json")
            return
        if isinstance(found, int) and found > FORMAT:
            raise ValueError(
                f"run: {self.path} has format {found}, of a newer napo; this one reads {FORMAT}; update napo"
            )
        raise ValueError(
            f"run: {self.path} is no run, or one of an older napo (its config.json says format {shown_value(found)}; "
            f"expected {FORMAT}); begin another run folder, or read this one with the napo that wrote it"
        )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if SEAL in config:
        check_seal(path, config, "undo the change, or begin another run folder")


def shown_value(value: Any) -> str:
    """As messages quote what a file says."""
    return "none" if value is None else str(value)[:80]
