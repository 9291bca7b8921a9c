"""The examples run as they stand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def plain_loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_loop", EXAMPLES / "plain_loop.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_ways_of_the_plain_loop_learn_and_give_the_same_losses(
    plain_loop: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, hidden = (plain_loop.main(["--way", way, "--steps", "8"]) for way in ("logits", "hidden"))
    assert logits[-1] < logits[0] - 0.1
    assert hidden == pytest.approx(logits, rel=1e-3)
    assert "hidden: loss" in capsys.readouterr().out


def test_the_plain_loop_takes_a_saved_model(
    plain_loop: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenize, _ = plain_loop.tiny()
    model.save_pretrained(tmp_path)

    class Words:
        eos_token_id = 1

        @classmethod
        def from_pretrained(cls, folder: str) -> Words:
            assert folder == str(tmp_path)
            return cls()

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": tokenize(text)}

    monkeypatch.setattr(plain_loop, "AutoTokenizer", Words)
    losses = plain_loop.main(["--model", str(tmp_path), "--steps", "2"])
    assert losses[0] == pytest.approx(plain_loop.main(["--steps", "2"])[0], rel=1e-5)
