"""Whether the files that a data set was prepared from are still what they were. ``dataset.json`` has their names and
sha256, and not where they lay: the same files elsewhere are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from napo.files import content_hash

from .texts import shown


def compare(meta: Mapping[str, Any], path: Path, items: str | None = None) -> tuple[tuple[str, str] | None, list[str]]:
    """The first difference between the files at ``path`` and those that ``dataset.json`` names, in words: what was
    read, and what is there. And the names of the files that are not there to be compared. ``items``: the option of that
    name of the source."""
    files = [file for file in meta.get("files", []) if isinstance(file, Mapping)]
    recorded = [(str(file.get("name")), str(file.get("sha256"))) for file in files]
    if not recorded:
        return None, [path.name]
    names = shown(", ".join(name for name, _ in recorded), 200)
    left, others = list(recorded), []
    for file, is_read in _files(path, items):
        name = shown(file.name)
        before = next((sha256 for other, sha256 in left if other == name), None)
        if before is None and not is_read:
            others.append(name)
            continue
        sha256 = content_hash(file)
        same = next((one for one in left if one[1] == sha256 and (one[0] == name or file == path)), None)
        if same is not None:
            left.remove(same)
        elif before is not None:
            return (f"{name} of sha256 {before[:12]}", f"where it has sha256 {sha256[:12]}"), []
        else:
            return (names, f"where {name} (sha256 {sha256[:12]}) is none of these"), []
    if left == recorded and others:
        return (names, f"where none of these is, but {shown(', '.join(others), 200)}"), []
    return None, [name for name, _ in left]


def _files(path: Path, items: str | None) -> Iterator[tuple[Path, bool]]:
    """The files that may be those of the source, and whether they are certainly read: a file that PATH or ``items``
    names, and all parts of a folder of Parquet."""
    folder = path if path.is_dir() and path.suffix != ".parquet" else path.parent
    named = [path] if path.exists() and folder != path else []
    if items is not None:
        named += [place for place in (folder / items, Path(items)) if place.exists()][:1]
    # Of a file that is gone, or whose items are named, others in its folder say nothing.
    is_asked = folder == path or (bool(named) and items is None)
    beside = sorted(folder.iterdir()) if is_asked and folder.is_dir() else []
    for place in dict.fromkeys((*named, *beside)):
        if place.is_file() and not place.name.startswith("."):
            yield place, place in named
        elif place in named or place.name in ("interactions.parquet", "items.parquet"):
            parts = (p for p in sorted(place.rglob("*.parquet")) if p.is_file())
            yield from (
                (part, True) for part in parts if not any(name[0] in "._" for name in part.relative_to(place).parts)
            )
