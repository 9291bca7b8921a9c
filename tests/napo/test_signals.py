"""kill -9, Ctrl-C and SIGTERM at random moments of ``napo sft`` and ``napo train``: the same command goes on, and ends
in the weights of a run that nobody interrupted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from napo.runs import Run


@pytest.fixture(scope="module", params=[3, pytest.param(20, marks=pytest.mark.slow)], ids="{} moments".format)
def report(
    request: pytest.FixtureRequest, demo_run: Run, small_world: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict:
    folder = tmp_path_factory.mktemp("kills")
    base = folder / "base"
    shutil.copytree(demo_run.path, base, ignore=shutil.ignore_patterns("models", "predictions"))
    for stage in ("sft", "napo"):
        (base / "stages" / f"{stage}.json").unlink()
    # SFT begins from nothing; NAPO from the demo's SFT, which lies there under another name.
    shutil.copytree(demo_run.path / "models" / "sft", base / "models" / "start")
    here = Path(__file__).parent
    script = [sys.executable, str(here / "run_kills.py"), str(base), str(base / "data"), str(small_world / "model")]
    paths = os.pathsep.join([str(here), *sys.path])
    subprocess.run([*script, str(folder), str(request.param)], check=True, env={**os.environ, "PYTHONPATH": paths})
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("stage", ["sft", "train"])
def test_the_same_command_goes_on_and_ends_in_the_same_weights(report: dict, stage: str) -> None:
    found = report[stage]
    assert found["whole"] == 0
    codes = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
    for end in found["ends"]:
        assert end["first"] in (codes[end["signal"]], 0), end  # 0: it had ended before the signal
        if end["first"] > 0:
            assert re.search(rf"to continue: \S*(napo| -m napo) {stage} --data", end["said"])
            assert "Traceback" not in end["said"]
            assert end["told"] == (end["saved"] > 0), end
        assert end["again"] == 0 and end["weights"] == found["weights"], end
        assert end["left"] == []
