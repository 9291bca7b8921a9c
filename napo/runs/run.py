"""The run folder: stages that are finished or absent, never half there, and skipped when asked for again.

A stage works in a folder aside, ``RUN/.working/NAME``, and what it made takes its place when it is whole: whatever
happens meanwhile, the model before it stays. Its stamp, ``RUN/stages/NAME.json``, says with which options and on which
content it was made. A run that was killed redoes the stage it was in, from its last checkpoint, and no other. Work that
was done is not done again: where the process was killed while outputs were put in place, the next one does the rest.

Whoever reads a file of a run asks first whether it is what the run made: the stamp holds the sha256 of each file of its
stage, ``config.json`` of those that no stage made, and each of the two its own. So a change by hand is seen.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from napo import machine, ranks
from napo.data.prepared import PreparedData
from napo.data.texts import shown
from napo.files import (
    clear_leftovers,
    content_hash,
    file_hashes,
    hash_of_files,
    plain,
    put_in_place,
    read_json,
    remove,
    remove_at_once,
    replacing,
    text_hash,
    write_json,
)
from napo.identity import adapter_hash
from napo.runs.hashes import SEAL, check_seal, content_or_words, say_not_noted, sealed
from napo.runs.lock import locked
from napo.runs.names import ADAPTER, KEPT_FILES, NAME, POPULARITY
from napo.runs.origin import Origin

logger = logging.getLogger(__name__)

STAMPED = (
    "data",
    "sasrec",
    "models/[!.]*",
    *(f"{of}/[!.]*.json" for of in ("combinations", "predictions", "catalogue")),
)
"""What stages make in a run."""
_SHA256 = re.compile("[0-9a-f]{64}")
FORMAT = 2
"""Of the run folder; 1 had no number and kept model and prompt style for all models together."""
PATIENCE = 10.0
"""Seconds that a short note in ``config.json`` waits for another process to finish its own."""


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """A short hash of options; a Path among them counts by the content of its file or folder."""
    return text_hash(json.dumps(dict(inputs), sort_keys=True, default=_hashable))[:16]


class Run:
    """A run folder and its stages. The folder is made with the first thing written into it."""

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run: {self.path} is a file; expected a folder")
        if os.path.lexists(self.path / "config.json"):
            self._check_format()
        elif not create:
            raise ValueError(f"run: {self.path} has no config.json; expected the folder of a run (napo demo, napo sft)")
        elif self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise ValueError(f"run: {self.path} is no run and not empty; give a folder that is empty or not there yet")

    @property
    def config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        config = read_json(path) if os.path.lexists(path) else {}
        _check_config(path, config)
        return {key: value for key, value in config.items() if key != SEAL}

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

    def check_data(self, data: Path) -> str:
        """The hash of prepared data that this run was made with, or will be: one run, one data set."""
        if data.resolve() == self.path.resolve():
            raise ValueError(f"run: {self.path} is the folder of the prepared data; give a folder of its own")
        sha256 = content_hash(data)
        known = self.config.get("data_sha256", sha256)
        if known != sha256:
            raise ValueError(
                f"data: {self.path} was made with {self.config.get('data')} as it was then (sha256 {known[:12]}); "
                f"{data} is other data ({sha256[:12]}); begin another run folder for it"
            )
        return sha256

    def adopt(self, data: Path, sha256: str) -> None:
        """Note the prepared data and keep what recommending needs of it, so that the run can recommend when the data is
        gone: titles, whose history is which, and how often each item was met in training. What was changed since is
        kept anew."""
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
            counts = PreparedData.load(data).training_counts()
            with replacing(self.path / POPULARITY) as aside:
                pd.DataFrame({"item_id": np.arange(len(counts)), "interactions": counts}).to_parquet(aside)
            self.configure(data=os.path.relpath(data, self.path), data_sha256=sha256)
            self.note(*(name for name in (*KEPT_FILES, POPULARITY) if (self.path / name).is_file()))

    def _keeps_its_data(self) -> bool:
        noted = self.config.get("kept_sha256", {})
        names = [name for name in (*KEPT_FILES, POPULARITY) if name in noted]
        return POPULARITY in names and all(content_or_words(self.path / name) == noted[name] for name in names)

    def note(self, *names: str) -> None:
        """Note what is in files of the run that no stage made; ``kept`` asks for it."""
        if ranks.rank() > 0:
            return
        with self.writing(wait=PATIENCE):
            noted = {name: content_hash(self.path / name) for name in names}
            self.configure(kept_sha256={**self.config.get("kept_sha256", {}), **noted})

    def catalogue(self) -> PreparedData:
        """The titles and the log that the run keeps, which must be those that its models were trained with: other ones
        would be taken in their place without a word."""
        for name in KEPT_FILES:
            self.kept(name)
        return PreparedData.load(self.path)

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
                "the command again that trained its last model (napo demo, sasrec, sft or train), which keeps it anew"
            )
            if name not in (*KEPT_FILES, POPULARITY):
                again = "napo evaluate again, which writes it anew"
            raise ValueError(
                f"run: {path} is not what the run was made with (expected sha256 {known[:12]}, got {got[:12]}); run "
                f"{again}"
            )
        return path

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

    def check_unchanged(self, stage: str, *names: str) -> None:
        """ValueError where a file, or a folder with all its files, is not what the ``stage`` made. Where the run does
        not know what that was, it says so, once. What is not there passes."""
        stamp = self.stamp(stage)
        noted = {} if stamp is None else {**stamp["outputs"], **stamp.get("files", {})}
        for name in names:
            if not os.path.lexists(self.path / name):
                continue
            if name not in noted:  # by an older napo, which noted a folder as a whole
                name = next((output for output in noted if name.startswith(f"{output}/")), name)
            if name not in noted:
                say_not_noted(self.path, name)
            elif (got := content_or_words(self.path / name)) != noted[name]:
                raise ValueError(
                    f"{self.path / name}: was changed after it was finished, or is of another run (expected sha256 "
                    f"{noted[name][:12]} as stages/{stage}.json says, got {got[:12]}); {_make_again(stage, stamp)}"
                )

    def gone(self, folder: str) -> dict[str, str]:
        """What finished stages made, in the ``folder`` or under its name, and is not there any more: {output: stage}"""
        return {
            output: stage
            for output, stage in self._made().items()
            if f"{output}/".startswith(f"{folder}/") and not os.path.lexists(self.path / output)
        }

    def _made(self) -> dict[str, str]:
        """{output: the stage that made it}"""
        found: dict[str, str] = {}
        for path in sorted((self.path / "stages").glob("[!.]*.json")):
            with contextlib.suppress(ValueError):  # a changed stamp, which is said where it is asked for
                found |= dict.fromkeys((self.stamp(path.stem) or {"outputs": {}})["outputs"], path.stem)
        return found

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

    def say_left_out(self, folder: str) -> None:
        """A warning for each file in the ``folder`` that a stage made and that is gone."""
        for output, stage in self.gone(folder).items():
            logger.warning(
                "run: %s is gone and left out; put it back or make it again, or delete %s too",
                shown(self.path / output),
                shown(self.path / "stages" / f"{stage}.json"),
            )

    @property
    def data(self) -> Path:
        """The prepared data that this run was made with, where the pair of folders was moved together."""
        candidate = self.path / str(self.config.get("data", ""))
        if candidate != self.path and (candidate / "dataset.json").is_file():
            return candidate
        raise ValueError(f"run: {self.path} does not say where its prepared data is; pass --data")

    def stamp(self, stage: str) -> dict[str, Any] | None:
        """What is known of a finished stage, or None."""
        stamp = self._stamp(stage)
        return None if stamp is None or "replacing" in stamp else stamp

    @property
    def first_origin(self) -> Origin | None:
        """How the run's first model was made, for headings."""
        names = self.model_names()
        return self.origin(names[0]) if names else None

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
        folder = self._folder(name)
        self.check_unchanged(name, *(f"models/{name}/{file}" for file in ADAPTER))
        return folder

    def adapter_sha256(self, name: str) -> str:
        """The ``adapter_hash`` of the run's model ``name``."""
        return adapter_hash(self.adapter(name))

    def _folder(self, name: str) -> Path:
        if name not in self.model_names():
            have = ", ".join(self.model_names()) or "none yet"
            raise ValueError(f"init-from: {self.path} has no model {name!r}; it has {have}; run `napo sft` first")
        return self.path / "models" / name

    def stale(self, name: str) -> str | None:
        """Why a model is not what its name says: a model that it was trained from is another one now, or gone."""
        seen: list[str] = []
        while name not in seen:
            seen.append(name)
            try:
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

    def stage(
        self,
        name: str,
        work: Callable[[Path], None],
        *,
        options: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any],
        outputs: list[str],
        overwrite: bool = False,
        ask: bool = True,
        say: Callable[[str], None] = print,
    ) -> str:
        """Do ``work`` unless it was done with the same options and inputs and its outputs are still there.

        ``work`` is given a folder and writes ``outputs``, paths relative to the run, into it; only when it returns do
        they take the place of older ones. What else it leaves there when it is interrupted, its checkpoints, is there
        again when it is called with the same options and inputs.

        ``options`` are what somebody chose: a result of other options is replaced under ``overwrite`` alone, where
        ``ask`` is set. ``inputs`` are the contents that it was made from: where these changed, it is made again.

        Returns the fingerprint.
        """
        wanted = fingerprint({"options": options or {}, "inputs": inputs})
        with self.writing():
            aside = ranks.told(lambda: self._begin(name, wanted, options or {}, outputs, overwrite, ask, say))
            if aside is None:
                return wanted
            began = time.monotonic()
            try:
                work(aside)
            except Exception:
                if ranks.rank() == 0:
                    _prune(aside, outputs)
                raise
            ranks.wait()
            if ranks.rank() == 0:
                seconds = time.monotonic() - began
                self._keep(name, aside, outputs, {"fingerprint": wanted, "seconds": seconds}, options or {}, inputs)
                say(f"{name}: {seconds:.0f} s")
            ranks.wait()
        return wanted

    def _begin(
        self,
        name: str,
        wanted: str,
        options: Mapping[str, Any],
        outputs: list[str],
        overwrite: bool,
        ask: bool,
        say: Callable[[str], None],
    ) -> Path | None:
        """The folder to work in, or None where the work was done before."""
        self._settle(name, outputs)
        stamp = self._stamp(name)
        present = [output for output in outputs if (self.path / output).exists()]
        if stamp is not None and stamp["fingerprint"] == wanted and present == outputs:
            changed = [o for o in outputs if content_hash(self.path / o) != stamp["outputs"].get(o)]
            if not changed:
                self._clear_aside(name, wanted)  # where the process was killed before it did
                say(f"{name}: finished before in {stamp['seconds']:.0f} s, skipped")
                return None
            if ask and not overwrite and "replacing" not in stamp:
                raise ValueError(
                    f"{name}: {self.path / changed[0]} was changed after it was finished; pass --overwrite to "
                    "make it again"
                )
        elif present and ask and not overwrite:
            self._refuse_other_options(name, stamp, options, present)
        return self._aside(name, wanted, outputs)

    def _keep(
        self,
        name: str,
        aside: Path,
        outputs: list[str],
        stamp: dict[str, Any],
        options: Mapping[str, Any],
        inputs: Mapping[str, Any],
    ) -> None:
        """What was made takes the place of what was there."""
        missing = [output for output in outputs if not (aside / output).exists()]
        if missing:
            raise RuntimeError(f"stage {name} ended without writing {', '.join(missing)}")
        folders = {output: file_hashes(aside / output) for output in outputs if (aside / output).is_dir()}
        stamp |= {
            "options": dict(options),
            "inputs": dict(inputs),
            "machine": machine.facts(),
            "outputs": {o: hash_of_files(folders[o]) if o in folders else content_hash(aside / o) for o in outputs},
            "files": {f"{output}/{file}": sha for output, files in folders.items() for file, sha in files.items()},
        }
        # Killed from here on, the outputs are partly the old ones and partly the new ones, until _settle ends this.
        write_json(self.path / "stages" / f"{name}.json", sealed(stamp | {"replacing": True}))
        self._settle(name, outputs)
        self._clear_aside(name, stamp["fingerprint"])

    def _settle(self, name: str, outputs: list[str]) -> None:
        """Put in place what the finished stage ``name`` made and its stamp names: each output is there, or still in the
        folder aside. Where one is neither, as somebody changed it, the stamp stays and the stage is done again."""
        stamp = self._stamp(name)
        if stamp is None or "replacing" not in stamp:
            return
        for output in outputs:
            target, made = self.path / output, self.path / ".working" / name / output
            clear_leftovers(target)
            if target.exists() and content_hash(target) == stamp["outputs"].get(output):
                continue
            if not made.exists() or content_hash(made) != stamp["outputs"].get(output):
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            put_in_place(made, target)
        del stamp["replacing"]
        write_json(self.path / "stages" / f"{name}.json", sealed(stamp))

    def _clear_aside(self, name: str, wanted: str) -> None:
        """Remove the folder that a stage worked in, unless it is of a call with another fingerprint."""
        aside = self.path / ".working" / name
        clear_leftovers(aside)
        if _is_of(aside, wanted):
            remove_at_once(aside)
        with contextlib.suppress(OSError):  # not there, or others are there that were interrupted
            aside.parent.rmdir()

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

    def _refuse_other_options(
        self, name: str, stamp: Mapping[str, Any] | None, options: Mapping[str, Any], present: list[str]
    ) -> None:
        if stamp is None:
            raise ValueError(
                f"{name}: {self.path / present[0]} is there, and no stage of this run made it; move it away, or pass "
                "--overwrite to replace it"
            )
        if "replacing" in stamp:
            return
        before, now = _flat(stamp["options"]), _flat(json.loads(json.dumps(dict(options), default=plain)))
        changed = [
            f"{key.removeprefix('options.')} {_shown(before.get(key))} -> {_shown(now.get(key))}"
            for key in dict.fromkeys([*before, *now])
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"{name}: {self.path / present[0]} was made with other options ({'; '.join(changed)}); pass "
                "--overwrite to replace it, or give another --name or --run"
            )

    def _aside(self, name: str, wanted: str, outputs: list[str]) -> Path:
        """The folder a stage works in: with what an interrupted call of the same fingerprint left, or empty."""
        aside = self.path / ".working" / name
        clear_leftovers(aside)
        if not _is_of(aside, wanted):
            remove_at_once(aside)
            aside.mkdir(parents=True)
            (aside / ".fingerprint").write_text(wanted)
        for output in outputs:
            remove(aside / output)
        return aside

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
                    f"run: {self.path / 'config.json'}: {name}: expected {expected}, got {_shown(text)}; the file "
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
            f"run: {self.path} is no run, or one of an older napo (its config.json says format {_shown(found)}; "
            f"expected {FORMAT}); begin another run folder, or read this one with the napo that wrote it"
        )


def _is_of(aside: Path, wanted: str) -> bool:
    """Whether a call with the fingerprint ``wanted`` worked in the folder."""
    mark = aside / ".fingerprint"
    return mark.is_file() and mark.read_bytes() == wanted.encode()


def _prune(aside: Path, outputs: list[str]) -> None:
    """After a failure: no half outputs, no empty folders; checkpoints stay."""
    for output in outputs:
        remove(aside / output)
    for folder, _, _ in os.walk(aside, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)
    if os.listdir(aside) == [".fingerprint"]:
        remove(aside)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if SEAL in config:
        check_seal(path, config, "undo the change, or begin another run folder")


def _make_again(stage: str, stamp: Mapping[str, Any] | None) -> str:
    """What makes the outputs of a stage anew."""
    by = None if stamp is None else stamp["options"].get("by")
    kind, _, of = stage.partition("-")
    if by in ("sft", "train"):
        return f"put it back, or run napo {by} --name {stage} with --overwrite"
    commands = {
        "sasrec": "sasrec with --overwrite",
        "combine": f"combine --model {of}",
        "evaluate": f"evaluate --models {of}",
        "catalogue": f"evaluate --catalogue --models {of}",
    }
    if kind not in commands or "@" in stage:
        return f"delete it and make it again (stage {stage})"
    return f"put it back, or run napo {commands[kind]}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)[:80]


def _hashable(value: Any) -> Any:
    return content_hash(value) if isinstance(value, Path) else plain(value)
