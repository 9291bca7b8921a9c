"""docs/own_data.md from nothing to a service: its very commands, on a CSV of 500 users and with a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("fastapi")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own_data.md"
SMALLER = {
    "--model smollm2-135m": "--model model",
    "--set tokens=300000": "--set tokens=6000 --set val_examples=8",
    "--port 8000": "--port 0",
    "napo sasrec ": "napo sasrec --set max_epochs=2 ",
}
"""The test uses a model of two layers, little training, and a free port."""


def commands(language: str = "bash") -> list[str]:
    """The lines of the page's blocks of commands, or its blocks of another language whole."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    blocks = [text for name, text in fenced if name == language]
    return blocks if language != "bash" else [line for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, small_world: Path) -> Path:
    import small_world as world

    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(small_world / "model", folder / "model")
    (folder / "shop").mkdir()
    random = np.random.default_rng(0)
    rows = []
    for user in range(500):
        place = int(random.integers(60))
        for step in range(int(random.integers(5, 9))):
            rows.append((user, f"sku-{place}", 1_700_000_000 + 3600 * step))
            place = (place + int(random.integers(1, 4))) % 60
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).to_csv(
        folder / "shop" / "interactions.csv", index=False
    )
    items = pd.DataFrame({"item_id": [f"sku-{i}" for i in range(60)], "title": world.ITEMS})
    items.to_csv(folder / "shop" / "items.csv", index=False)
    pd.DataFrame({"user": [17, 18, "new"]}).to_csv(folder / "users.csv", index=False)
    # The commands as they stand on the page: `napo` is this checkout's.
    (folder / "bin").mkdir()
    script = folder / "bin" / "napo"
    root = PAGE.parents[1]
    script.write_text(
        f"#!{sys.executable}\nimport sys; sys.path.insert(0, {str(root)!r})\nfrom napo.cli import main\nmain()\n"
    )
    script.chmod(0o755)
    return folder


def call(folder: Path, line: str) -> str:
    for ours, smaller in SMALLER.items():
        line = line.replace(ours, smaller)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_page_from_nothing_to_a_service(shop: Path) -> None:
    said: dict[str, str] = {}
    lines = commands()
    serving = next(line for line in lines if line.startswith("napo serve"))
    curls = [line for line in lines if line.startswith("curl")]
    assert [line.split()[1] for line in lines if line.startswith("napo")] == [
        *("prepare", "sasrec", "sft", "combine", "evaluate", "recommend", "recommend", "recommend", "serve", "export")
    ]
    for line in lines:
        if line != serving and line not in curls and not line.startswith("pip "):
            said[line] = call(shop, line)
    assert "500 users" in next(out for line, out in said.items() if "prepare" in line)
    judged = next(out for line, out in said.items() if "evaluate" in line)
    assert "sft of catalogue" in judged or "the whole catalogue, met items excluded" in judged
    for_user = next(out for line, out in said.items() if "--user 17" in line).splitlines()
    assert len(for_user) == 5 and for_user[0].strip().startswith("1. ")
    assert len(json.loads(next(out for line, out in said.items() if "--json" in line))["items"]) == 5
    table = pd.read_parquet(shop / "recommendations.parquet")
    assert table.groupby("row").size().tolist() == [10, 10, 10]
    assert table.query("row == 2")["model"].unique().tolist() == ["popularity"]
    titles = [line.split(". ", 1)[1].rsplit("  (", 1)[0] for line in for_user]
    assert table.query("row == 0")["title"].tolist()[:5] == titles
    assert (shop / "exported" / "sft" / "model.safetensors").is_file()

    service = subprocess.Popen(
        [str(shop / "bin" / "napo"), *serving.replace("--port 8000", "--port 0").split()[1:]],
        cwd=shop,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert service.stdout is not None
        port = re.search(r"http://127\.0\.0\.1:(\d+)", service.stdout.readline())
        assert port is not None
        answers = [json.loads(call(shop, line.replace(":8000/", f":{port[1]}/"))) for line in curls]
    finally:
        service.terminate()
    assert [item["title"] for item in answers[0]["items"]] == titles and answers[1]["status"] == "ok"
    began = time.monotonic()
    assert service.wait(timeout=60) == 143 and time.monotonic() - began < 60

    (program,) = commands("python")
    code = f"import sys; sys.path.insert(0, {str(PAGE.parents[1])!r})\n{program}"
    done = subprocess.run([sys.executable, "-c", code], cwd=shop, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = json.dumps(titles[0])[1:-1]
    assert first in done.stdout.splitlines()[0]
