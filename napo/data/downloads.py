"""Data sets at public addresses: fetched, checked, unpacked, and never left half done."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from napo.progress import progress

from .archives import ARCHIVES, BY_HAND, Archive

BLOCK = 1 << 18
TIMEOUT_S = 30


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
