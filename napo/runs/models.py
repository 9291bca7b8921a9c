"""The models of a run: the adapters in ``RUN/models``."""

from __future__ import annotations

import os
from pathlib import Path

from napo.identity import WEIGHTS, adapter_hash
from napo.runs.hashes import content_or_words
from napo.runs.names import ADAPTER, NAME
from napo.runs.origin import Origin
from napo.runs.stamps import Stamped


class WithModels(Stamped):
    """A run that has models."""

    def model_names(self) -> list[str]:
        """The adapters in ``models/``: SFT's first, others by age, and ``napo`` last, to be compared with them all. One
        that lost a file, or whose file is a link to nowhere, is among them: whoever asks for it is told."""
        folders = [
            folder
            for folder in (self.path / "models").glob("[!.]*")
            if folder.is_dir() and any(os.path.lexists(folder / name) for name in ADAPTER)
        ]

        def place(folder: Path) -> tuple[bool, bool, float, str]:
            return not folder.name.startswith("sft"), folder.name == "napo", folder.stat().st_mtime, folder.name

        return [folder.name for folder in sorted(folders, key=place) if NAME.fullmatch(folder.name)]

    def adapter(self, name: str) -> Path:
        """The folder of the run's model ``name``, whose tensors and settings are those that were trained."""
        self._check_adapter(name)
        return self._folder(name)

    def adapter_sha256(self, name: str) -> str:
        """The ``adapter_hash`` of the run's model ``name``."""
        weights = self._check_adapter(name).get(f"models/{name}/{WEIGHTS}")
        return adapter_hash(self._folder(name), weights_sha256=weights)

    def origin(self, name: str) -> Origin:
        """How the model ``name`` was made. ValueError where it is a model of other data, as one that was copied here:
        it would name the titles of this run by the numbers of others."""
        folder = self._folder(name)
        self.check_unchanged(name, f"models/{name}/origin.json")
        origin = Origin.read(folder)
        known = self.config.get("data_sha256", origin.data_sha256)
        if origin.data_sha256 != known:
            raise ValueError(
                f"model: {folder} was trained on other data (sha256 {origin.data_sha256[:12]}) than the run's "
                f"({known[:12]}); move it away"
            )
        return origin

    @property
    def first_origin(self) -> Origin | None:
        """How the run's first model was made, for headings."""
        names = self.model_names()
        return self.origin(names[0]) if names else None

    def stale(self, name: str) -> str | None:
        """Why a model is not what its name says: a model that it was trained from, or the SASRec that it learned from,
        is another one now, or gone."""
        seen: list[str] = []
        while name not in seen:
            seen.append(name)
            try:
                teacher = (self.stamp(name) or {}).get("inputs", {}).get("sasrec")
                if teacher is not None and teacher != content_or_words(self.path / "sasrec"):
                    return f"{seen[0]}: SASRec was trained again, or removed, after {name} was trained with it"
                origin = self.origin(name)
                if origin.parent is None:
                    return None
                if origin.parent not in self.model_names():
                    return f"{seen[0]}: {origin.parent}, which {name} was trained from, is gone"
                if self.adapter_sha256(origin.parent) != origin.parent_sha256:
                    return f"{seen[0]}: {origin.parent} was trained again after {name} was trained from it"
            except ValueError as error:
                return f"{seen[0]}: {error}"
            name = origin.parent
        return f"{seen[0]}: origin.json says that {name} was trained from itself"

    def _check_adapter(self, name: str) -> dict[str, str]:
        self._folder(name)
        return self.check_unchanged(name, *(f"models/{name}/{file}" for file in ADAPTER))

    def _folder(self, name: str) -> Path:
        if name not in self.model_names():
            have = ", ".join(self.model_names()) or f"none yet; run `{self.command('sft')}` first"
            raise ValueError(f"init-from: {self.path} has no model {name!r}; it has {have}")
        return self.path / "models" / name
