"""Data sets that lie at a public address: fetched, checked, unpacked; half of one is never left behind."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from napo.progress import progress

BLOCK = 1 << 18
TIMEOUT_S = 30


@dataclass(frozen=True)
class Archive:
    """A zip file, its SHA-256, and the folder inside that holds the files ("" for the top)."""

    source: str
    address: str
    sha256: str
    inside: str


_GROUPLENS = "https://files.grouplens.org/datasets"
ARCHIVES = {
    "ml-100k": Archive(
        "movielens",
        f"{_GROUPLENS}/movielens/ml-100k.zip",
        "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        "ml-100k",
    ),
    "ml-1m": Archive(
        "movielens",
        f"{_GROUPLENS}/movielens/ml-1m.zip",
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        "ml-1m",
    ),
    "ml-20m": Archive(
        "movielens",
        f"{_GROUPLENS}/movielens/ml-20m.zip",
        "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
        "ml-20m",
    ),
    "ml-25m": Archive(
        "movielens",
        f"{_GROUPLENS}/movielens/ml-25m.zip",
        "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
        "ml-25m",
    ),
    "ml-latest-small": Archive(
        "movielens",
        f"{_GROUPLENS}/movielens/ml-latest-small.zip",
        "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
        "ml-latest-small",
    ),
    "lastfm-2k": Archive(
        "lastfm",
        f"{_GROUPLENS}/hetrec2011/hetrec2011-lastfm-2k.zip",
        "6738f48195667ff03caaab4d32ca9a3133d8cc026b7c3cdaf6ce1010e913c59c",
        "",
    ),
}
BY_HAND = {
    "goodreads": "https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html",
    "steam": "https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data",
}
"""Where files are published without a checksum, so that nothing could tell a good download from a bad one."""


def download(name: str, folder: str | Path, *, source: str | None = None) -> Path:
    """Fetch the archive ``name`` and unpack it as ``folder``, where it is not there yet. Returns the folder.

    ``source``: the reader that the files are meant for. Raises ValueError for another one, a folder with other things
    in it, no network, or bytes that are not the published ones.
    """
    if source in BY_HAND:
        raise ValueError(
            f"download: {source} is published without a checksum; fetch its files from {BY_HAND[source]} and leave "
            "--download out"
        )
    fitting = [key for key, archive in ARCHIVES.items() if source in (None, archive.source)]
    if name not in fitting:
        there = f"expected one of {', '.join(fitting)}" if fitting else "this source has no public address"
        raise ValueError(f"download: {there}{f' for {source}' if source and fitting else ''}, got {name!r}")
    archive, folder = ARCHIVES[name], Path(folder)
    stamp = folder / ".sha256"
    if stamp.is_file() and stamp.read_text().strip() == archive.sha256:
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not {name}; leave --download out to read it, or give another PATH")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        packed = Path(work) / "packed.zip"
        _fetch(archive, packed)
        unpacked = Path(work) / "unpacked"
        with zipfile.ZipFile(packed) as file:
            file.extractall(unpacked)
        made = unpacked / archive.inside
        (made / ".sha256").write_text(archive.sha256 + "\n")
        if folder.is_dir():
            folder.rmdir()
        shutil.move(made, folder)
    return folder


def _fetch(archive: Archive, target: Path) -> None:
    """Streams the archive to ``target`` and compares its SHA-256."""
    digest, got, size = hashlib.sha256(), 0, None
    try:
        with urllib.request.urlopen(archive.address, timeout=TIMEOUT_S) as response, target.open("wb") as out:
            size = response.headers.get("Content-Length")
            with progress("download", int(size) / 1e6 if size else None, unit="MB") as bar:
                while block := response.read(BLOCK):
                    digest.update(block)
                    out.write(block)
                    got += len(block)
                    bar.advance(len(block) / 1e6)
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"download: cannot fetch {archive.address} ({reason}); check the network, or unpack it by hand and "
            "leave --download out"
        ) from None
    if size and got < int(size):
        raise ValueError(f"download: {archive.address} was cut off after {got} of {size} bytes; try again")
    if digest.hexdigest() != archive.sha256:
        raise ValueError(
            f"download: {archive.address} came with SHA-256 {digest.hexdigest()}, expected {archive.sha256}; try "
            "again, and if it stays so the file has changed and is not the one that figures here refer to"
        )
