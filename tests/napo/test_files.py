from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from napo.files import content_hash, read_json, replacing, write_json


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
