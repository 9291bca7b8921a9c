"""The examples run, with a tiny model and little data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "napo"))


def test_train_preferences(tmp_path: Path) -> None:
    from trainer_cases import make_rows, tiny_model, tiny_tokenizer

    model, out = tmp_path / "model", tmp_path / "out"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in make_rows(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", model, "--rows", tmp_path / "rows.jsonl", "--output_dir", out, "--objective", "sdpo"]
    words += ["--max_steps", 2, "--per_device_train_batch_size", 3, "--held_out", 0.3, "--report_to", "none"]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "train_preferences.py", *map(str, words), "--use_cpu", "true"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "held out: loss" in done.stdout
    assert (out / "adapter_model.safetensors").is_file()


def test_notebook_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells, one after another, with the cell of parameters replaced."""
    import small_world

    monkeypatch.setenv("NAPO_DTYPE", "fp32")
    small_world.recbole_files(tmp_path / "files")
    small_world.model(tmp_path / "model")
    names: dict[str, object] = {}
    cells = json.loads((ROOT / "examples" / "demo.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code[0]["metadata"]["tags"] == ["parameters"]
    assert not any(cell["outputs"] for cell in code), "the notebook is kept without outputs"
    for cell in code:
        exec(compile("".join(cell["source"]), "demo.ipynb", "exec"), names)
        if cell is code[0]:
            names |= {"RUN": tmp_path / "run", "MODEL": str(tmp_path / "model"), "SOURCE": tmp_path / "files"}
            names["BUDGET"] = small_world.budget()
    assert "watched:" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").is_file()
