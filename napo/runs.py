"""The run folder: stages that are finished or absent, never half there, and skipped when asked for again.

A stage's inputs are fingerprinted (options, data, and the fingerprints of the stages it builds on). Its stamp,
``RUN/stages/NAME.json``, is written last, by renaming: a run that was killed redoes the stage it was in and no other.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from napo.files import content_hash, plain, read_json, remove, replacing, text_hash, write_json


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """A short hash of options; a Path among them counts by the content of its file or folder."""
    text = json.dumps(dict(inputs), sort_keys=True, default=_hashable)
    return text_hash(text)[:16]


def model_identity(model: str) -> str:
    """What a model's fingerprint is made of: a hub name as it is; a local folder by its config and the sizes of its
    weights, since hashing gigabytes at every start would cost more than it protects."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    sizes = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
    return f"{content_hash(folder / 'config.json')} {json.dumps(sizes)}"


class Run:
    """A run folder and its stages."""

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run: {self.path} is a file; expected a folder")
        if not create and not (self.path / "config.json").is_file():
            raise ValueError(f"run: {self.path} has no config.json; expected the folder of a run (napo demo, napo sft)")
        if create:
            self.path.mkdir(parents=True, exist_ok=True)

    @property
    def config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        return read_json(path) if path.is_file() else {}

    def configure(self, **values: Any) -> None:
        """Add to ``config.json`` what later stages and readers need."""
        write_json(self.path / "config.json", {**self.config, **values})

    def adopt(self, data: Path) -> None:
        """Note the prepared data and copy its titles, so that the run can recommend when the data is gone."""
        for name in ("items.parquet", "dataset.json"):
            with replacing(self.path / name) as aside:
                shutil.copyfile(data / name, aside)
        self.configure(data=os.path.relpath(data, self.path), data_absolute=str(data.resolve()))

    @property
    def data(self) -> Path:
        """The prepared data that this run was made with, wherever the pair of folders was moved to."""
        config = self.config
        for candidate in (self.path / config.get("data", ""), Path(config.get("data_absolute", ""))):
            if (candidate / "dataset.json").is_file() and (candidate / "items.parquet").is_file():
                return candidate
        raise ValueError(f"run: {self.path} does not say where its prepared data is; pass --data")

    def stamp(self, stage: str) -> dict[str, Any] | None:
        """What is known of a finished stage, or None."""
        path = self.path / "stages" / f"{stage}.json"
        return read_json(path) if path.is_file() else None

    def model_names(self) -> list[str]:
        """The adapters in ``models/``: SFT's first, others by age, and ``napo`` last, to be compared with them all."""
        folders = [path.parent for path in (self.path / "models").glob("[!.]*/adapter_config.json")]

        def place(folder: Path) -> tuple[bool, bool, float]:
            return not folder.name.startswith("sft"), folder.name == "napo", folder.stat().st_mtime

        return [folder.name for folder in sorted(folders, key=place)]

    def stage(
        self,
        name: str,
        work: Callable[[], None],
        *,
        inputs: Mapping[str, Any],
        outputs: list[str],
        say: Callable[[str], None] = print,
    ) -> str:
        """Do ``work`` unless it was done with the same inputs and its outputs are still there.

        Returns the fingerprint, which is an input of the stages that build on this one.
        """
        wanted = fingerprint(inputs)
        stamp = self.stamp(name)
        if stamp is not None and stamp["fingerprint"] == wanted and all((self.path / o).exists() for o in outputs):
            say(f"{name}: finished before in {stamp['seconds']:.0f} s, skipped")
            return wanted
        (self.path / "stages" / f"{name}.json").unlink(missing_ok=True)
        for output in outputs:
            remove(self.path / output)
        began = time.monotonic()
        work()
        missing = [output for output in outputs if not (self.path / output).exists()]
        if missing:
            raise RuntimeError(f"stage {name} ended without writing {', '.join(missing)}")
        seconds = time.monotonic() - began
        stamp = {"fingerprint": wanted, "seconds": seconds, "inputs": dict(inputs), "outputs": outputs}
        write_json(self.path / "stages" / f"{name}.json", stamp)
        say(f"{name}: {seconds:.0f} s")
        return wanted


def _hashable(value: Any) -> Any:
    return content_hash(value) if isinstance(value, Path) else plain(value)
