"""``run.yaml``: the options of all stages in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from napo.options import UsageError

SHARED = ("run", "data", "seed", "threads")
"""Keys beside the sections. They hold for every stage that has such an option."""
SECTIONS = ("prepare", "sasrec", "sft", "train", "combine", "evaluate", "report")
"""In the order in which ``napo run`` goes through them."""


def read_run_file(path: Path) -> dict[str, Any]:
    """The file's keys and sections; UsageError where it is none."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"config: {path}: {error.strerror}; `napo init` writes one") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "not text in UTF-8"
        raise UsageError(f"config: {path}{f':{mark.line + 1}' if mark else ''}: not YAML ({reason})") from None
    if not isinstance(found, Mapping):
        raise UsageError(f"config: {path}: expected keys and sections, got {type(found).__name__}; see `napo init`")
    file = {key: {} if key in SECTIONS and value is None else value for key, value in found.items()}
    for key, value in file.items():
        if key in SHARED:
            if isinstance(value, (Mapping, list)):
                raise UsageError(f"config: {path}: {key}: expected one value, got {value!r}")
        elif key not in SECTIONS:
            raise UsageError(f"config: {path}: {key}: expected one of {', '.join(SHARED + SECTIONS)}")
        elif not all(isinstance(entry, Mapping) for entry in _entries(value)):
            raise UsageError(f"config: {path}: {key}: expected options by name, or a list of such, got {value!r}")
    return file


def entries(path: Path) -> list[tuple[str, int, dict[str, Any]]]:
    """The work of ``napo run``: stage, number of the entry from 1, and its values."""
    file = read_run_file(path)
    return [
        (stage, number, dict(entry))
        for stage in SECTIONS
        if stage in file
        for number, entry in enumerate(_entries(file[stage]), 1)
    ]


def entry_of(path: Path, stage: str, number: int | None) -> dict[str, Any]:
    """The file's values for a command: the shared keys, overridden by the entry of its section."""
    file = read_run_file(path)
    found = _entries(file.get(stage))
    if number is None and len(found) > 1:
        raise UsageError(f"config: {path} has {len(found)} entries for {stage}; say which one: --entry 1")
    if number is not None and not 1 <= number <= len(found):
        raise UsageError(f"entry: {path} has {len(found)} for {stage}, got {number}")
    shared = {key: file[key] for key in SHARED if file.get(key) is not None}
    if stage == "prepare" and "data" in shared:
        shared["out"] = shared["data"]
    if "run" in shared:
        shared["runs" if stage == "report" else "run_dir"] = [shared["run"]] if stage == "report" else shared["run"]
    return {**shared, **found[(number or 1) - 1]} if found else shared


def _entries(section: Any) -> list[Any]:
    """A section has one entry or a list of them."""
    if isinstance(section, list):
        return section
    return [] if section is None else [section]
