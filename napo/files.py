"""Files and folders that are whole or not there, JSON, and hashes of what files hold."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

BLOCK = 1 << 20
OLD = ".old.tmp"
"""The end of the name of a folder that is moved away while another one takes its place."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux' renameat2


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives the name to write a file or a folder under. It becomes ``path`` if everything went well::

        with replacing("metrics.json") as aside:
            aside.write_text("[]")

    ``path`` is never half written, not even if the process is killed. The next call removes what a killed process left
    beside it."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    aside = path.with_name(f"{_aside_prefix(path)}{os.getpid()}.tmp")
    remove(aside)
    try:
        with named_errors(path):
            yield aside
            put_in_place(aside, path)
    finally:
        remove(aside)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Inside, ``path`` is written. On a full disk safetensors and torch raise errors of their own, which name no file,
    and torch's not even the reason: they become OSErrors of ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in NO_ROOM:  # of a handle, which does not say its name
            error.filename = str(path)
        raise
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        if "inline_container.cc" in str(error):
            raise OSError(errno.EIO, "torch could not write it whole, as on a full disk", str(path)) from error
        raise


def why_kept(out: Path, patterns: Collection[str], mark: str, *, line: str | None = None) -> str | None:
    """Why the folder ``out`` is not to be replaced by files that match ``patterns``; None where it is free or empty, or
    holds only such files. The one named ``mark``, with ``line`` near its beginning, must be among them."""
    if not out.exists():
        return None
    if not out.is_dir():
        return "is a file"
    found = sorted(out.iterdir())
    others = [path.name for path in found if path.is_dir() or not any(map(path.match, patterns))]
    if others:
        return f"holds {others[0]}"
    if found and not _has_line(out / mark, line):
        return f"has no {mark}" if line is None else f"has no {mark} with the line {line!r}"
    return None


def _has_line(path: Path, line: str | None) -> bool:
    if not path.is_file() or line is None:
        return path.is_file()
    with path.open(encoding="utf-8", errors="replace") as file:
        return line in file.read(4096).splitlines()


def put_in_place(new: Path, path: Path) -> None:
    """Rename the file or folder ``new`` to ``path`` in place of the file or folder that is there."""
    use_umask(new)
    if path.exists() and path.is_dir() != new.is_dir():
        kinds = ("a folder", "a file")
        there, wanted = kinds if path.is_dir() else kinds[::-1]
        raise ValueError(f"{path}: is {there}; expected the name of {wanted}; give another name or move it away")
    if not path.is_dir():
        try:
            new.replace(path)
            return
        except OSError as error:  # another process put its folder there just now
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not path.is_dir():
                raise
    # A folder can only be renamed to a name that is free.
    if _exchange(new, path):
        remove(new)
        return
    old = path.with_name(f"{_aside_prefix(path)}{os.getpid()}{OLD}")
    remove(old)
    path.rename(old)
    new.rename(path)
    remove(old)


def use_umask(path: Path) -> None:
    """Give the file, or the files of the folder, the mode that the user's umask asks for: safetensors writes files
    that nobody else can read."""
    mask = os.umask(0)
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def _aside_prefix(path: Path) -> str:
    return f".{path.name}.{socket.gethostname()}."


def clear_leftovers(path: Path) -> None:
    """Remove what processes that no longer run left beside ``path``; if one died between the two renames of
    ``put_in_place``, the folder that it had moved away is the only one and comes back."""
    prefix = _aside_prefix(path)
    for leftover in sorted(path.parent.glob(f"{glob.escape(prefix)}*.tmp")):
        if _is_running(leftover.name[len(prefix) :].split(".")[0]):
            continue
        if leftover.name.endswith(OLD) and not path.exists():
            leftover.rename(path)
        else:
            remove(leftover)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, so that there is no moment without either; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))


def remove(path: Path) -> None:
    """A file or a folder with all it holds; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_at_once(path: Path) -> None:
    """A folder is there with all it holds or is gone, whenever the process is killed: renamed first, then removed."""
    aside = path.with_name(f"{_aside_prefix(path)}{os.getpid()}.tmp")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    remove(aside)


def refuse_special(path: Path) -> None:
    """ValueError for a pipe, a socket or a device in the place of a file: it may never end, and gives its content but
    once."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: a pipe, socket or device; expected a file; write what comes from it to a file first")


def read_json(path: Path) -> Any:
    """The file's content; ValueError where it is missing or not JSON."""
    try:
        check_is_file(path)
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); delete it and run again") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}); delete it and run again") from None
    except (ValueError, RecursionError):  # not UTF-8, a number of thousands of digits, thousands of brackets
        raise ValueError(f"{path}: not JSON; delete it and run again") from None


def check_is_file(path: Path) -> None:
    """ValueError for what is in the place of a file: a pipe or a device, a folder, a link to nothing. A file that is
    not there passes, as reading it says so."""
    refuse_special(path)
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(f"{path}: expected a file; got a folder or a broken link; move it away")


def write_text(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Dataclasses, paths and NumPy arrays among the values are written by their contents."""
    write_text(path, json.dumps(value, indent=2, default=plain, ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """The ``default`` of ``json.dumps`` for dataclasses, paths and arrays."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def content_hash(path: Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files (hidden files are left out)."""
    return hash_of_files(file_hashes(path)) if path.is_dir() else _file_hash(path)


def file_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each of a folder's files by its name within the folder; hidden files are left out."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {str(file.relative_to(folder)): _file_hash(file) for file in files}


def hash_of_files(hashes: Mapping[str, str]) -> str:
    """The ``content_hash`` of a folder whose ``file_hashes`` these are."""
    return text_hash("".join(f"{name} {sha256}\n" for name, sha256 in hashes.items()))


def _file_hash(path: Path) -> str:
    check_is_file(path)
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def text_hash(text: str) -> str:
    """sha256 of the text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _is_running(process: str) -> bool:
    """Whether a process of this machine runs; True where that cannot be known."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        pass
    return True
