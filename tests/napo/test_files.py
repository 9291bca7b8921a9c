from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from napo.files import content_hash, read_json, remove_at_once, replacing, write_json


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'there'}'"),
        replacing(tmp_path / "there"),
        Path("/dev/full").open("w") as handle,
    ):
        handle.write("much")
        handle.flush()


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (OSError("3 requested and 1 written"), OSError(errno.EIO, "Input/output error")):
        said = str(error)
        with pytest.raises(OSError, match=f"^{re.escape(said)}$"), replacing(tmp_path / "there"):
            raise error


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_stays_until_the_new_is_whole(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "there"

    def write(path: Path, text: str) -> None:
        if kind == "folder":
            path.mkdir(exist_ok=True)
        (path / "part" if kind == "folder" else path).write_text(text)

    write(target, "old")
    before = content_hash(target)
    with pytest.raises(RuntimeError, match="no space"), replacing(target) as aside:
        write(aside, "half")
        raise RuntimeError("no space")
    assert content_hash(target) == before and [path.name for path in tmp_path.iterdir()] == ["there"]
    with replacing(target) as aside:
        write(aside, "new")
        assert content_hash(target) == before
    assert (target / "part" if kind == "folder" else target).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_leftovers_of_a_killed_process_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    code = (
        "import sys, time; from napo.files import replacing\n"
        f"with replacing({str(tmp_path / 'out')!r}) as aside:\n"
        "    aside.mkdir(); (aside / 'half').write_text('half'); print('written', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    write_json(tmp_path / "out", {"a": 1})
    assert len(list(tmp_path.iterdir())) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    write_json(tmp_path / "out", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and read_json(tmp_path / "out") == {"a": 2}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_is_replaced_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Killed between any two renames, the old folder or the new one is found by the next call, and whole."""
    from napo import files

    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = tmp_path / "there"
    for death in ("before", "between", "after"):
        files.remove(target)
        target.mkdir()
        (target / "part").write_text("old")
        child = os.fork()
        if child == 0:
            rename, seen = Path.rename, []

            def dying(self: Path, to: Path, rename=rename, seen=seen, death=death) -> Path:
                if death == "before" or (death == "between" and seen):
                    os._exit(0)
                seen.append(rename(self, to))
                return seen[-1]

            Path.rename = dying  # type: ignore[method-assign, assignment]
            if death == "after":
                files.remove = lambda path: os._exit(0) if (target / "part").read_text() == "new" else None
            with replacing(target) as aside:
                aside.mkdir()
                (aside / "part").write_text("new")
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(RuntimeError, match="not now"), replacing(target):
            raise RuntimeError("not now")
        assert (target / "part").read_text() in ("old", "new"), death
        assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"report\.html: is a folder; expected the name of a file"):
        write_json(tmp_path / "report.html", {})
    assert (tmp_path / "report.html" / "mine").read_text() == "mine"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path: Path, mask: int) -> None:
    import torch
    from safetensors.torch import save_file

    before = os.umask(mask)
    try:
        with replacing(tmp_path / "model") as aside:
            aside.mkdir()
            save_file({"a": torch.zeros(2)}, aside / "a.safetensors")
            (aside / "b.json").write_text("{}")
        write_json(tmp_path / "c.json", {})
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}


def test_a_folder_that_is_removed_is_never_there_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "checkpoint-1" / "weights").write_text("x")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_at_once(folder)
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 1
    remove_at_once(folder)  # nothing there


def test_a_folder_that_another_process_puts_there_meanwhile_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, put = tmp_path / "out", Path.replace

    def late(self: Path, target: Path) -> Path:
        out.mkdir()
        (out / "theirs").touch()
        return put(self, target)

    monkeypatch.setattr(Path, "replace", late)
    with replacing(out) as aside:
        aside.mkdir()
        (aside / "ours").touch()
    assert [path.name for path in out.iterdir()] == ["ours"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_said_where_torch_or_safetensors_write(tmp_path: Path) -> None:
    """Their errors name no file, and torch's no reason. A limit on the size of files stands for the disk."""
    import torch
    from safetensors.torch import save_file

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {"weights": torch.zeros(100_000)}
    for write, reason in ((torch.save, "torch could not write it whole"), (save_file, "File too large")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        try:
            with (
                pytest.raises(OSError, match=rf"{reason}.*: '{tmp_path / 'file'}'"),
                replacing(tmp_path / "file") as aside,
            ):
                write(tensors, aside)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
