"""What is known of finished stages: ``RUN/stages/NAME.json``.

A stamp says with which options and on which content a stage was made, and holds the sha256 of each file that it made.
Whoever reads such a file asks first whether it is what the stage made.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from typing import Any

from napo.data.texts import shown
from napo.files import read_json, write_json
from napo.runs.folder import Folder
from napo.runs.hashes import SEAL, check_seal, content_or_words, say_not_noted, sealed

logger = logging.getLogger(__name__)

STAMPED = (
    "data",
    "sasrec",
    "models/[!.]*",
    *(f"{of}/[!.]*.json" for of in ("combinations", "predictions", "catalogue")),
)
"""What stages make in a run."""


class Stamped(Folder):
    """A run that knows what its stages made."""

    def stamp(self, stage: str) -> dict[str, Any] | None:
        """What is known of a finished stage, or None."""
        stamp = self._stamp(stage)
        return None if stamp is None or "replacing" in stamp else stamp

    def check_unchanged(self, stage: str, *names: str) -> dict[str, str]:
        """ValueError where a file, or a folder with all its files, is not what the ``stage`` made. Where the run does
        not know what that was, it says so, once. What is not there passes. Returns the sha256 of each that it knows."""
        stamp = self.stamp(stage)
        noted = {} if stamp is None else {**stamp["outputs"], **stamp.get("files", {})}
        known: dict[str, str] = {}
        for name in names:
            if not os.path.lexists(self.path / name):
                continue
            if name not in noted:  # by an older napo, which noted a folder as a whole
                name = next((output for output in noted if name.startswith(f"{output}/")), name)
            if name not in noted:
                say_not_noted(self.path, name)
            elif name not in known:
                known[name] = content_or_words(self.path / name)
                if known[name] != noted[name]:
                    raise ValueError(
                        f"{self.path / name}: was changed after it was finished, or is of another run (expected sha256 "
                        f"{noted[name][:12]} as stages/{stage}.json says, got {known[name][:12]}); "
                        f"{self._make_again(stage, stamp)}"
                    )
        return known

    def gone(self, folder: str) -> dict[str, str]:
        """What finished stages made, in the ``folder`` or under its name, and is not there any more: {output: stage}"""
        return {
            output: stage
            for output, stage in self._made().items()
            if f"{output}/".startswith(f"{folder}/") and not os.path.lexists(self.path / output)
        }

    def say_left_out(self, folder: str) -> None:
        """A warning for each file in the ``folder`` that a stage made and that is gone."""
        for output, stage in self.gone(folder).items():
            logger.warning(
                "run: %s is gone and left out; put it back or make it again, or delete %s too",
                shown(self.path / output),
                shown(self.path / "stages" / f"{stage}.json"),
            )

    def check_stamps(self) -> None:
        """ValueError where a stamp was changed, or is not of what is there and has no other reader; said once where
        something is there that no stamp knows."""
        for path in sorted((self.path / "stages").glob("[!.]*.json")):
            self.stamp(path.stem)
        made = self._made()
        for output, stage in made.items():
            if output.split("/")[0] in ("data", "catalogue"):
                self.check_unchanged(stage, output)
        for pattern in STAMPED:
            for path in sorted(self.path.glob(pattern)):
                if (name := str(path.relative_to(self.path))) not in made:
                    say_not_noted(self.path, name)

    def _made(self) -> dict[str, str]:
        """{output: the stage that made it}"""
        found: dict[str, str] = {}
        for path in sorted((self.path / "stages").glob("[!.]*.json")):
            with contextlib.suppress(ValueError):  # a changed stamp, which is said where it is asked for
                found |= dict.fromkeys((self.stamp(path.stem) or {"outputs": {}})["outputs"], path.stem)
        return found

    def _stamp(self, stage: str) -> dict[str, Any] | None:
        """The stamp as it is, also that of a stage whose outputs were being replaced when the process ended."""
        path = self.path / "stages" / f"{stage}.json"
        if not os.path.lexists(path):
            return None
        stamp = read_json(path)
        kinds: dict[str, Any] = {"fingerprint": str, "seconds": (int, float), "options": dict, "outputs": dict}
        whole = isinstance(stamp, dict) and all(isinstance(stamp.get(key), kind) for key, kind in kinds.items())
        hashes = [stamp["outputs"], stamp.get("files", {})] if whole else []
        whole = whole and all(isinstance(of, dict) and all(map(_is_text, of.values())) for of in hashes)
        if not whole or not 0 <= stamp["seconds"] < 1e12:
            raise ValueError(f"{path}: not the stamp of a stage; delete it and run again")
        if SEAL in stamp:
            check_seal(path, stamp, "delete it and run again")
        else:
            say_not_noted(self.path, f"stages/{path.name}")
        return dict(stamp)

    def _write_stamp(self, stage: str, stamp: Mapping[str, Any]) -> None:
        write_json(self.path / "stages" / f"{stage}.json", sealed(stamp))

    def _make_again(self, stage: str, stamp: Mapping[str, Any] | None) -> str:
        """What makes the outputs of a stage anew."""
        by = None if stamp is None else stamp["options"].get("by")
        kind, _, of = stage.partition("-")
        if by in ("sft", "train"):
            return f"put it back, or run what made it (napo {by} --name {stage}) again with --overwrite"
        commands = {
            "sasrec": "what made it (napo sasrec) again with --overwrite",
            "combine": self.command("combine", "--model", of),
            "evaluate": self.command("evaluate", "--models", of),
            "catalogue": self.command("evaluate", "--catalogue", "--models", of),
        }
        if kind not in commands or "@" in stage:
            return f"delete it and make it again (stage {stage})"
        return f"put it back, or run {commands[kind]}"


def seconds_of(stamp: Mapping[str, Any]) -> str:
    """What a stage took, in words: those of a process that was killed are not known."""
    return f"{'more than ' if stamp.get('killed') else ''}{stamp['seconds']:.0f}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
