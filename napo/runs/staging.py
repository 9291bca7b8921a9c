"""The work of a stage: finished or absent, never half there, and skipped when it is asked for again.

A stage works in a folder aside, ``RUN/.working/NAME``, and what it made takes its place when it is whole: whatever
happens meanwhile, what was there before it stays. A run that was killed redoes the stage it was in, from its last
checkpoint, and no other. Work that was done is not done again: where the process was killed while outputs were put in
place, the next one does the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from napo import machine, ranks
from napo.data.texts import changes
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
    text_hash,
    write_json,
)
from napo.runs.stamps import Stamped, seconds_of

MARK, MADE_FROM, SITTINGS = ".fingerprint", ".made_from.json", ".sittings.json"
"""Of the folder that a stage works in: whose it is, the options and contents of that call, and the seconds so far."""


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """A short hash of options; a Path among them counts by the content of its file or folder."""
    return text_hash(json.dumps(dict(inputs), sort_keys=True, default=_hashable))[:16]


class Sittings:
    """The seconds of a stage in all processes that worked for it. Those of one that was killed are not known."""

    def __init__(self, aside: Path) -> None:
        self.file = aside / SITTINGS
        before = read_json(self.file) if self.file.is_file() else {"seconds": 0.0, "killed": True, "open": False}
        self.seconds, self.killed = float(before["seconds"]), bool(before["killed"] or before["open"])
        self.began = time.monotonic()
        self._write(open=True)

    def end(self) -> None:
        self.seconds += time.monotonic() - self.began
        self._write(open=False)

    def _write(self, *, open: bool) -> None:
        write_json(self.file, {"seconds": self.seconds, "killed": self.killed, "open": open})

    def stamp(self) -> dict[str, Any]:
        return {"seconds": self.seconds} | ({"killed": True} if self.killed else {})


class Staged(Stamped):
    """A run that stages are worked for."""

    def stage(
        self,
        name: str,
        work: Callable[[Path], None],
        *,
        options: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
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
        ``ask`` is set. ``defaults`` are the values of those that are left out: to give one of these changes nothing.
        ``inputs`` are the contents that it was made from: where these changed, it is made again.

        Returns the fingerprint.
        """
        made_from, defaults = {"options": options or {}, "inputs": inputs}, defaults or {}
        wanted = _wanted(made_from, defaults)
        with self.writing():
            aside = ranks.told(lambda: self._begin(name, wanted, made_from, defaults, outputs, overwrite, ask, say))
            if aside is None:
                return wanted
            sittings = Sittings(aside) if ranks.rank() == 0 else None
            try:
                work(aside)
            except BaseException as error:
                if sittings is not None:
                    with contextlib.suppress(OSError):  # of a full disk, which error may tell
                        sittings.end()
                    if isinstance(error, Exception):
                        _prune(aside, outputs)
                raise
            ranks.wait()
            if sittings is not None:
                sittings.end()
                stamp = {"fingerprint": wanted, **sittings.stamp()}
                self._keep(name, aside, outputs, stamp, options or {}, inputs)
                killed = "; those until it was killed are not counted" if sittings.killed else ""
                say(f"{name}: {seconds_of(stamp)} s{killed}")
            ranks.wait()
        return wanted

    def _begin(
        self,
        name: str,
        wanted: str,
        made_from: Mapping[str, Mapping[str, Any]],
        defaults: Mapping[str, Any],
        outputs: list[str],
        overwrite: bool,
        ask: bool,
        say: Callable[[str], None],
    ) -> Path | None:
        """The folder to work in, or None where the work was done before. ``made_from``: options and inputs."""
        self._settle(name, outputs)
        _know_again(self.path / ".working" / name, wanted, defaults)
        stamp = self._stamp(name)
        present = [output for output in outputs if (self.path / output).exists()]
        same = stamp is not None and (
            stamp["fingerprint"] in (wanted, fingerprint(made_from)) or _wanted(stamp, defaults) == wanted
        )
        if stamp is not None and same and present == outputs:
            changed = [o for o in outputs if content_hash(self.path / o) != stamp["outputs"].get(o)]
            if not changed:
                self._clear_aside(name, wanted)  # where the process was killed before it did
                say(f"{name}: finished before in {seconds_of(stamp)} s, skipped")
                return None
            if ask and not overwrite and "replacing" not in stamp:
                raise ValueError(
                    f"{name}: {self.path / changed[0]} was changed after it was finished; pass --overwrite to "
                    "make it again"
                )
        elif present and ask and not overwrite:
            self._refuse_other_options(name, stamp, made_from["options"], defaults, present)
        if ask and not overwrite:
            self._keep_interrupted(name, wanted, made_from, defaults, say)
        return self._aside(name, wanted, made_from, outputs)

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
        self._write_stamp(name, stamp | {"replacing": True})
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
        self._write_stamp(name, stamp)

    def _clear_aside(self, name: str, wanted: str) -> None:
        """Remove the folder that a stage worked in, unless it is of a call with another fingerprint."""
        aside = self.path / ".working" / name
        clear_leftovers(aside)
        if _is_of(aside, wanted):
            remove_at_once(aside)
        with contextlib.suppress(OSError):  # not there, or others are there that were interrupted
            aside.parent.rmdir()

    def _refuse_other_options(
        self,
        name: str,
        stamp: Mapping[str, Any] | None,
        options: Mapping[str, Any],
        defaults: Mapping[str, Any],
        present: list[str],
    ) -> None:
        if stamp is None:
            raise ValueError(
                f"{name}: {self.path / present[0]} is there, and no stage of this run made it; move it away, or pass "
                "--overwrite to replace it"
            )
        if "replacing" in stamp:
            return
        changed = _changed(stamp["options"], options, defaults)
        if changed:
            raise ValueError(
                f"{name}: {self.path / present[0]} was made with other options ({changed}); pass --overwrite to "
                f"replace it, or give another {_other(options)}"
            )

    def _keep_interrupted(
        self,
        name: str,
        wanted: str,
        made_from: Mapping[str, Mapping[str, Any]],
        defaults: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """ValueError where checkpoints would go of a training with other options that was interrupted. Where what it
        was made from is no more what it was, nobody can go on with them, and that is said."""
        aside = self.path / ".working" / name
        if _is_of(aside, wanted) or not any(aside.rglob("checkpoint*")) or not (aside / MADE_FROM).is_file():
            return
        before = read_json(aside / MADE_FROM)
        if changed := _changed(before["options"], made_from["options"], defaults):
            raise ValueError(
                f"{name}: {aside} has checkpoints of a training with other options ({changed}), which was interrupted; "
                "give its options to go on with it, pass --overwrite to begin anew in its place, or give another "
                f"{_other(made_from['options'])}"
            )
        changed = _changed(before["inputs"], made_from["inputs"])
        say(f"{name}: begins anew, what it is made from has changed since it was interrupted ({changed})")

    def _aside(self, name: str, wanted: str, made_from: Mapping[str, Any], outputs: list[str]) -> Path:
        """The folder a stage works in: with what an interrupted call of the same fingerprint left, or empty."""
        aside = self.path / ".working" / name
        clear_leftovers(aside)
        if not _is_of(aside, wanted):
            remove_at_once(aside)
            aside.mkdir(parents=True)
            (aside / MADE_FROM).write_text(json.dumps(made_from, default=_hashable))
            write_json(aside / SITTINGS, {"seconds": 0.0, "killed": False, "open": False})
            (aside / MARK).write_text(wanted)
        for output in outputs:
            remove(aside / output)
        return aside


def _wanted(made_from: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The fingerprint of options and inputs as a call or a stamp has them. Options that are at today's default are left
    out on both sides, so that it is the same whether they were given or not.

    A stamp has the options that were given, and not the defaults of the others. Where a later napo has another default,
    what an older one made without that option counts as made with the new default, as it did before.
    """
    chosen = _chosen(_flat(_as_json(made_from["options"])), _flat(_as_json(defaults)))
    return fingerprint({"options": chosen, "inputs": made_from.get("inputs")})


def _chosen(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not at their default, and 1.0 as 1, which is the same number."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in options.items()
        if name not in defaults or value != defaults[name]
    }


def _know_again(aside: Path, wanted: str, defaults: Mapping[str, Any]) -> None:
    """What an interrupted call left is gone on with where it gave a default that this call leaves out, or the other way
    round, and where an older napo wrote its fingerprint, which counted them."""
    if not _is_of(aside, wanted) and (aside / MARK).is_file() and (aside / MADE_FROM).is_file():
        before = read_json(aside / MADE_FROM)
        if _wanted(before, defaults) == wanted:
            (aside / MARK).write_text(wanted)


def _is_of(aside: Path, wanted: str) -> bool:
    """Whether a call with the fingerprint ``wanted`` worked in the folder."""
    mark = aside / MARK
    return mark.is_file() and mark.read_bytes() == wanted.encode()


def _prune(aside: Path, outputs: list[str]) -> None:
    """After a failure: no half outputs, no empty folders; checkpoints stay."""
    for output in outputs:
        remove(aside / output)
    for folder, _, _ in os.walk(aside, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)
    if {*os.listdir(aside)} <= {MARK, MADE_FROM, SITTINGS}:
        remove(aside)
        with contextlib.suppress(OSError):  # others are there that were interrupted
            aside.parent.rmdir()


def _other(options: Mapping[str, Any]) -> str:
    """The flags that give the result of a stage another place."""
    return "--name or --run" if "by" in options else "--run"


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> str:
    """What is other than it was, as ``name before -> now``; what was not given has its default."""
    old, new = _flat(before), _flat(_as_json(now))
    left_out = _flat(_as_json(defaults or {}))
    found = changes(*({name: of.get(name, left_out.get(name)) for name in {**old, **new}} for of in (old, new)))
    return "; ".join(change.removeprefix("options.") for change in found)


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """As a stamp has them."""
    return dict(json.loads(json.dumps(dict(options), default=_hashable)))


def _hashable(value: Any) -> Any:
    return content_hash(value) if isinstance(value, Path) else plain(value)
