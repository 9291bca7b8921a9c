"""Rows encoded by several processes, and rows that were encoded before: the same as encoded here and now."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainer_cases import config, make_rows, tiny_model, tiny_tokenizer, trainer
from transformers import PreTrainedTokenizerFast

from napo.trainer import NAPOTrainer, encoded
from napo.trainer.rows import Encoder, Examples


def same(a: Examples, b: Examples) -> bool:
    for one, other in zip(a, b, strict=True):
        for field in dataclasses.fields(one):
            np.testing.assert_equal(getattr(one, field.name), getattr(other, field.name), field.name)
    return a.skipped == b.skipped and a.fingerprint() == b.fingerprint()


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("encoded_rows-*.npz"))


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows that were turned into tokens in this process."""
    seen: list[Any] = []
    tokens = Encoder.tokens
    monkeypatch.setattr(Encoder, "tokens", lambda self, row: [seen.append(row), tokens(self, row)][1])
    return seen


def faulty_rows() -> list[dict[str, Any]]:
    rows = make_rows(40)
    rows[7] = {**rows[7], "prompt": ""}
    rows[23] = {**rows[23], "rejected_scores": [1.0]}
    del rows[11]["user_id"]
    return rows


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "CHUNK", 6)


@pytest.mark.usefixtures("small_chunks")
def test_several_processes_encode_the_same(
    tmp_path: Path, encodings: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"on_bad_row": "skip", "cache_rows": False}
    alone = trainer(tmp_path, faulty_rows(), **options).train_dataset
    assert len(encodings) == 40
    said = caplog.messages.copy()
    together = trainer(tmp_path, faulty_rows(), dataset_num_proc=3, **options).train_dataset
    assert len(encodings) == 40  # all of the second time in the other processes
    assert same(together, alone) and caplog.messages == [*said, *said] and len(said) == 1
    assert kept(tmp_path) == []


@pytest.mark.usefixtures("small_chunks")
def test_a_bad_row_is_named_by_several_processes_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^train_dataset\[7\]\.prompt: expected a non-empty string"):
        trainer(tmp_path, faulty_rows(), dataset_num_proc=2)


def test_rows_are_encoded_once(tmp_path: Path, encodings: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"on_bad_row": "skip", "cache_rows": True}
    first = trainer(tmp_path, faulty_rows(), **options).train_dataset
    (path,) = kept(tmp_path)
    count, said = len(encodings), caplog.messages.copy()
    again = trainer(tmp_path, faulty_rows(), **options).train_dataset
    assert len(encodings) == count and same(again, first)
    assert caplog.messages[len(said) :] == [
        f"train_dataset: 38 encoded rows read from {path}, made before from the same rows, tokenizer and options",
        *said,
    ]
    trainer(tmp_path, faulty_rows(), beta=3.0, learning_rate=1.0, **options)  # they decide nothing about tokens
    assert len(encodings) == count and kept(tmp_path) == [path]


OTHERS: dict[str, dict[str, Any]] = {
    "option": {"answer_end": "newline"},
    "length": {"max_length": 60},
    "objective's needs": {"objective": "softmax"},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS.keys())
def test_other_options_are_encoded_anew(options: dict[str, Any], tmp_path: Path, encodings: list[Any]) -> None:
    rows = make_rows(6)
    trainer(tmp_path, rows, cache_rows=True)
    trainer(tmp_path, rows, cache_rows=True, **options)
    assert len(encodings) == 12 and len(kept(tmp_path)) == 2


def test_other_rows_and_other_tokenizers_are_encoded_anew(tmp_path: Path, encodings: list[Any]) -> None:
    rows = make_rows(6)
    trainer(tmp_path, rows, cache_rows=True)
    rows[3]["rejected_scores"][0] += 1e-9  # not even float32 sees it; whoever changes a row gets it
    trainer(tmp_path, rows, cache_rows=True)
    words = tiny_tokenizer()
    words.add_tokens(["watched"])
    trainer(tmp_path, rows, cache_rows=True, processing_class=words)
    rows.append(rows[0])
    found = trainer(tmp_path, rows, cache_rows=True, processing_class=words).train_dataset
    assert len(encodings) == 6 + 6 + 6 + 7 and len(kept(tmp_path)) == 4 and len(found) == 7


class Own(PreTrainedTokenizerFast):
    """Whose methods could be anything."""


def dated() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def own() -> PreTrainedTokenizerFast:
    return Own(tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("tokenizer", [dated, own])
def test_what_cannot_be_told_apart_is_not_kept(tokenizer: Any, tmp_path: Path, encodings: list[Any]) -> None:
    for _ in range(2):
        trainer(tmp_path, make_rows(6), cache_rows=True, processing_class=tokenizer())
    assert len(encodings) == 12 and kept(tmp_path) == []


def test_rows_that_json_cannot_write_are_not_kept(tmp_path: Path, encodings: list[Any]) -> None:
    rows = [{**row, "image": object()} for row in make_rows(6)]
    for _ in range(2):
        trainer(tmp_path, rows, cache_rows=True)
    assert len(encodings) == 12 and kept(tmp_path) == []


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"x" * 99])
def test_a_damaged_file_is_made_again(
    damage: Any, tmp_path: Path, encodings: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    first = trainer(tmp_path, make_rows(6), cache_rows=True).train_dataset
    (path,) = kept(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    again = trainer(tmp_path, make_rows(6), cache_rows=True).train_dataset
    assert len(encodings) == 12 and same(again, first) and f"{path}: cannot be read" in caplog.text
    trainer(tmp_path, make_rows(6), cache_rows=True)
    assert len(encodings) == 12


def test_by_default_many_rows_of_text_are_kept(
    tmp_path: Path, encodings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path, make_rows(6))
    assert kept(tmp_path) == []
    monkeypatch.setattr(encoded, "KEPT_FROM", 6)
    for _ in range(2):
        trainer(tmp_path, make_rows(6))
    assert len(encodings) == 12 and len(kept(tmp_path)) == 1
    ids = [
        {**row, "prompt": [5, 6], "chosen": [7, 2], "rejected": [[8 + i, 2] for i in range(len(row["rejected"]))]}
        for row in make_rows(6)
    ]
    trainer(tmp_path, ids)  # there is nothing to encode
    assert len(kept(tmp_path)) == 1


def test_evaluation_rows_are_kept_too(tmp_path: Path, encodings: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        NAPOTrainer(
            tiny_model(),
            config(tmp_path, cache_rows=True),
            train_dataset=make_rows(6),
            eval_dataset={"a": make_rows(4, seed=1)},
            processing_class=tiny_tokenizer(),
        )
    assert len(encodings) == 10 and len(kept(tmp_path)) == 2
    assert "eval_dataset['a']: 4 encoded rows read from" in caplog.text


def test_processes_are_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^dataset_num_proc: expected at least 1, or None, got 0"):
        config(tmp_path, dataset_num_proc=0)


def test_nothing_is_said_of_rows_that_are_encoded_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="napo"):
        trainer(tmp_path, make_rows(6), cache_rows=True)
    assert "encoded rows" not in caplog.text
