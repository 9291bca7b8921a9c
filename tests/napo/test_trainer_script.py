"""The script in the README, as somebody who knows TRL would run it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from peft import PeftModel
from trainer_cases import make_rows, tiny_model, tiny_tokenizer

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_script_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = [
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "NAPOTrainer(" in block
    ]
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("my-model")
    tiny_tokenizer().save_pretrained("my-model")
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in make_rows(10)]
    Path("preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict[str, object] = {}
    exec(compile(script, str(README), "exec"), names)
    history = names["trainer"].state.log_history  # type: ignore[attr-defined]
    assert history[-1]["step"] == 6  # 10 rows by 4, twice
    assert json.loads(Path("out/log_history.json").read_text()) == history
    adapter = PeftModel.from_pretrained(tiny_model(), "out/final")
    assert any(bool(value.any()) for name, value in adapter.named_parameters() if "lora_B" in name)
