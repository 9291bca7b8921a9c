"""A model is identified by its content, not by its name, size or time."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from napo.assets import cache_dir, cannot_load
from napo.files import content_hash, read_json, text_hash, write_json

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Of a PEFT adapter."""
READ_BY_TRANSFORMERS = (".json", ".safetensors", ".bin", ".model", ".txt", ".tiktoken", ".jinja", ".py")
SETTLED_SECONDS = 2.0
"""A file changed later than this before it was read may change again without a new time, as clocks of file systems
tick: its hash is not kept."""


def model_identity(model: str) -> str:
    """A hash of what ``from_pretrained`` reads of a local folder; for a name on the hub, the commit that is cached.

    ``model`` is what ``resolve_model`` gave. Weights of gigabytes are hashed once: see ``file_hash``.
    """
    folder = Path(model)
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.suffix in READ_BY_TRANSFORMERS and file.is_file())
        return text_hash(json.dumps([[file.name, file_hash(file)] for file in files]))
    from transformers.utils.hub import cached_file

    try:
        config = cached_file(model, "config.json")
    except OSError as error:
        raise cannot_load(model, error) from None
    return f"{model}@{Path(str(config)).parent.name}"


def adapter_hash(folder: Path, *, weights_sha256: str | None = None) -> str:
    """A hash of the tensors and settings of a PEFT adapter; its log and its origin do not count. ``weights_sha256``:
    of the file of tensors, where it was computed already."""
    settings = read_json(folder / SETTINGS)
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / SETTINGS}: expected an object; train the model again")
    # PEFT writes sets in any order and the path of the base model.
    kept = {name: _ordered(value) for name, value in settings.items() if name != "base_model_name_or_path"}
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{folder}: {WEIGHTS} is missing; train the model again")
    return text_hash(json.dumps([kept, weights_sha256 or content_hash(weights)], sort_keys=True))


def file_hash(path: Path) -> str:
    """sha256 of a file, kept in the cache by path, size and times."""
    path = path.resolve()
    found = path.stat()
    key = {"path": str(path), "size": found.st_size, "modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
    kept = cache_dir() / ".hashes" / f"{text_hash(str(path))}.json"
    try:
        record = read_json(kept)
        if isinstance(record, dict) and record.get("key") == key and isinstance(record.get("sha256"), str):
            return str(record["sha256"])
    except (OSError, ValueError):
        pass  # missing or damaged: it is only a cache
    digest = content_hash(path)
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED_SECONDS * 1e9:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            write_json(kept, {"key": key, "sha256": digest})
    return digest


def _ordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value
