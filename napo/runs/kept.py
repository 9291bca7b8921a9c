"""Files of a run that no stage made: what recommending needs of the prepared data, and what evaluation sums up.

``config.json`` holds the sha256 of each.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from napo import ranks
from napo.data.prepared import PreparedData
from napo.data.texts import shown
from napo.files import content_hash, remove, replacing
from napo.runs.folder import PATIENCE, Folder
from napo.runs.hashes import content_or_words, say_not_noted
from napo.runs.names import COUNTED_FILES, KEPT_FILES, POPULARITY, SEQUENCES


class Keeping(Folder):
    """A run that keeps what it needs of its data."""

    def check_data(self, data: Path, *, called: str | None = None) -> str:
        """The hash of prepared data that this run was made with, or will be: one run, one data set. ``called``: what
        messages call it, where that is not its folder."""
        if data.resolve() == self.path.resolve():
            raise ValueError(f"run: {self.path} is the folder of the prepared data; give a folder of its own")
        sha256 = content_hash(data)
        known = self.config.get("data_sha256", sha256)
        if known != sha256:
            # Noted from the run folder, which is not where somebody reads this.
            theirs = os.path.normpath(self.path / self.config["data"]) if "data" in self.config else "other data"
            raise ValueError(
                f"data: {self.path} was made with {shown(theirs)} as it was then (sha256 {known[:12]}); "
                f"{called or data} is other data ({sha256[:12]}); begin another run folder for it"
            )
        return sha256

    def adopt(self, data: Path, sha256: str) -> None:
        """Note the prepared data and keep what recommending needs of it, so that the run can recommend when the data is
        gone: titles, whose history is which, and the training sequences with how often each item is in them. What was
        changed since is kept anew."""
        if ranks.rank() > 0:
            return
        if self.config.get("data_sha256") == sha256 and self._keeps_its_data():
            self.configure(data=os.path.relpath(data, self.path))
            return
        with self.writing(wait=PATIENCE):
            for name in KEPT_FILES:
                if (data / name).is_file():
                    with replacing(self.path / name) as aside:
                        shutil.copyfile(data / name, aside)
                else:
                    remove(self.path / name)
            prepared = PreparedData.load(data)
            items, whose = prepared.training_items()
            counts = np.bincount(items, minlength=prepared.num_items)
            for name, table in (
                (POPULARITY, {"item_id": np.arange(len(counts)), "interactions": counts}),
                (SEQUENCES, {"sequence": whose, "item_id": items}),
            ):
                with replacing(self.path / name) as aside:
                    pd.DataFrame(table).to_parquet(aside)
            self.configure(data=os.path.relpath(data, self.path), data_sha256=sha256)
            self.note(*(name for name in (*KEPT_FILES, *COUNTED_FILES) if (self.path / name).is_file()))

    @property
    def data(self) -> Path:
        """The prepared data that this run was made with, where the pair of folders was moved together."""
        candidate = self.path / str(self.config.get("data", ""))
        if candidate != self.path and (candidate / "dataset.json").is_file():
            return candidate
        raise ValueError(f"run: {self.path} does not say where its prepared data is; pass --data")

    def note(self, *names: str) -> None:
        """Note what is in files of the run that no stage made; ``kept`` asks for it."""
        if ranks.rank() > 0:
            return
        with self.writing(wait=PATIENCE):
            noted = {name: content_hash(self.path / name) for name in names}
            self.configure(kept_sha256={**self.config.get("kept_sha256", {}), **noted})

    def kept(self, name: str) -> Path:
        """A file of the run that no stage made. ValueError where it is not what the run noted of it."""
        path = self.path / name
        known = self.config.get("kept_sha256", {}).get(name)
        if known is None:
            if os.path.lexists(path):
                say_not_noted(self.path, name)
            return path
        if (got := content_or_words(path)) != known:
            again = (
                "the command again that trained its last model (napo demo, run, sasrec, sft or train), which keeps it "
                "anew"
            )
            if name not in (*KEPT_FILES, *COUNTED_FILES):
                again = "napo evaluate again, which writes it anew"
            raise ValueError(
                f"run: {path} is not what the run was made with (expected sha256 {known[:12]} as config.json says, got "
                f"{got[:12]}); run {again}"
            )
        return path

    def catalogue(self) -> PreparedData:
        """The titles and the log that the run keeps, which must be those that its models were trained with: other ones
        would be taken in their place without a word."""
        for name in KEPT_FILES:
            self.kept(name)
        return PreparedData.load(self.path)

    def _keeps_its_data(self) -> bool:
        noted = self.config.get("kept_sha256", {})
        names = [name for name in (*KEPT_FILES, *COUNTED_FILES) if name in noted]
        return {*COUNTED_FILES} <= {*names} and all(content_or_words(self.path / name) == noted[name] for name in names)
