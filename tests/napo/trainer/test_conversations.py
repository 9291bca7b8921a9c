"""Rows as TRL's users have them: messages, prompts that stand in the answers, streams and dicts of data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from trainer_cases import make_rows, tiny_tokenizer, trainer

from napo.trainer.conversations import as_texts
from napo.trainer.problems import BadRow

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
THINKING = TEMPLATE.replace("{{ m.content }}", "{{ ('x' if m.role == 'assistant' and loop.last else '') + m.content }}")
USER = {"role": "user", "content": "hi"}
MORE = {"role": "user", "content": "more"}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def chat(template: str | None = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def example(tmp_path: Path, row: dict[str, Any], template: str = TEMPLATE) -> tuple[str, list[str]]:
    """Prompt and answers as the trainer encodes them, as text again."""
    tokenizer = chat(template)
    (one,) = trainer(tmp_path, [row], processing_class=tokenizer, objective="softmax").train_dataset
    prompt, *answers = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (one.prompt, *one.answers))
    return prompt, answers


ROWS: dict[str, dict[str, Any]] = {
    "explicit prompt": {"prompt": [USER], "chosen": said("good"), "rejected": [said("bad"), said("off")]},
    "implicit prompt": {"chosen": [USER, *said("good")], "rejected": [[USER, *said("bad")], [USER, *said("off")]]},
    "prompt as text too": {
        "prompt": "hi",
        "chosen": [USER, *said("good")],
        "rejected": [[USER, *said("bad")], [USER, *said("off")]],
    },
}


@pytest.mark.parametrize("kind", ROWS)
def test_messages_are_what_the_chat_template_makes_of_them(kind: str, tmp_path: Path) -> None:
    prompt, answers = example(tmp_path, ROWS[kind])
    assert prompt == "u hi</s>\na "
    assert answers == ["good</s>", "bad</s>", "off</s>"]


def test_messages_equal_the_text_rendered_by_hand(tmp_path: Path) -> None:
    row = ROWS["explicit prompt"]
    tokenizer = chat()
    opening = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    by_hand = {"prompt": opening, "chosen": "good</s>\n", "rejected": ["bad</s>\n", "off</s>\n"]}
    ours, theirs = (
        trainer(tmp_path, [one], processing_class=tokenizer, objective="softmax").train_dataset
        for one in (row, by_hand)
    )
    assert ours.fingerprint() == theirs.fingerprint()


def test_a_pair_needs_no_list_of_rejected(tmp_path: Path) -> None:
    assert example(tmp_path, {"prompt": [USER], "chosen": said("good"), "rejected": said("bad")})[1] == [
        "good</s>",
        "bad</s>",
    ]
    assert example(tmp_path, {"prompt": "hi ", "chosen": "good", "rejected": "bad"})[1] == ["good</s>", "bad</s>"]


def test_longer_conversations_keep_their_turns(tmp_path: Path) -> None:
    turns = [USER, *said("yes"), MORE]
    prompt, answers = example(tmp_path, {"chosen": [*turns, *said("a")], "rejected": [*turns, *said("b")]})
    assert prompt == "u hi</s>\na yes</s>\nu more</s>\na " and answers == ["a</s>", "b</s>"]


def test_a_prompt_that_ends_in_the_assistants_words_is_continued(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}{{ '' if loop.last else '0' }}{% endfor %}"
    row = {"prompt": [USER, *said("well")], "chosen": said("a"), "rejected": said("b")}
    prompt, answers = example(tmp_path, row, template)
    assert prompt == "u hi0a well" and answers == ["0a a</s>", "0a b</s>"]


def test_a_template_that_opens_answers_in_its_own_way(tmp_path: Path) -> None:
    prompt, answers = example(tmp_path, ROWS["explicit prompt"], THINKING)
    assert prompt == "u hi</s>\na " and answers == ["xgood</s>", "xbad</s>", "xoff</s>"]


@pytest.mark.parametrize("missing", [{}, {"prompt": None}, {"prompt": float("nan")}], ids=str)
def test_words_that_answers_have_in_common_are_their_prompt(missing: dict[str, Any], tmp_path: Path) -> None:
    """Tables have None or NaN in rows without a prompt where others have one."""
    row = {**missing, "chosen": "the sky is blue", "rejected": ["the sky is black", "the sky is red"]}
    prompt, answers = example(tmp_path, row)
    assert prompt == "the sky is" and answers == [" blue</s>", " black</s>", " red</s>"]


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "text beside messages": ({"prompt": [USER], "chosen": "a", "rejected": said("b")}, "chosen", "list of messages"),
    "a rejected text": (
        {"prompt": [USER], "chosen": said("a"), "rejected": [said("b"), "c"]},
        "rejected[1]",
        "list of",
    ),
    "nothing in common": ({"chosen": [USER, *said("a")], "rejected": [MORE, *said("b")]}, "prompt", "same messages"),
    "another prompt": ({"prompt": "x", "chosen": [USER, *said("a")], "rejected": [USER, *said("b")]}, "prompt", "'hi'"),
    "no common words": ({"chosen": "t1", "rejected": ["t2"]}, "prompt", "begin with the same words"),
    "one answer begins the other": ({"chosen": "a b", "rejected": ["a "]}, "prompt", "begin with the same words"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_rows_whose_prompt_is_not_known_are_refused(kind: str, tmp_path: Path) -> None:
    row, field, words = FAULTS[kind]
    with pytest.raises(ValueError, match="train_dataset") as error:
        example(tmp_path, row)
    assert str(error.value).startswith(f"train_dataset[0].{field}: ") and words in str(error.value)


def test_templates_that_are_missing_refuse_or_rewrite_are_named() -> None:
    row = ROWS["explicit prompt"]
    with pytest.raises(BadRow, match="without one") as error:
        as_texts(chat(None), row)
    assert error.value.remedy.startswith("set tokenizer.chat_template")
    with pytest.raises(BadRow, match=r"the chat template refuses .*roles must alternate"):
        as_texts(chat("{{ raise_exception('roles must alternate') }}"), row)
    with pytest.raises(BadRow, match="leaves the prompt as it is"):
        as_texts(chat("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"), row)


# Data sets.


class Stream:
    """``datasets.IterableDataset``: rows without a length, perhaps without an end."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.read = rows, 0

    def __iter__(self) -> Any:
        while True:
            for row in self.rows:
                self.read += 1
                yield row


PLAIN = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in make_rows(6)]


def test_an_endless_stream_is_read_as_far_as_the_run_goes(tmp_path: Path) -> None:
    stream = Stream(PLAIN)
    run = trainer(tmp_path, stream, objective="softmax", max_steps=4, per_device_train_batch_size=2)
    assert len(run.train_dataset) == stream.read == 8
    run.train()


def test_a_stream_with_an_end_is_read_to_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, iter(PLAIN), objective="softmax", max_steps=-1, num_train_epochs=1)
    assert len(run.train_dataset) == 6


def test_a_dict_of_data_sets_trains_on_its_train(tmp_path: Path) -> None:
    splits = {"train": PLAIN, "test": PLAIN[:2]}
    run = trainer(tmp_path, splits, objective="softmax", eval_dataset=splits)
    assert len(run.train_dataset) == 6 and {name: len(part) for name, part in run.eval_dataset.items()} == {
        "train": 6,
        "test": 2,
    }


def test_columns_are_one_data_set_also_to_evaluate_on(tmp_path: Path) -> None:
    columns = {name: [row[name] for row in PLAIN] for name in PLAIN[0]}
    run = trainer(tmp_path, pd.DataFrame(PLAIN), objective="softmax", eval_dataset=columns)
    assert run.train_dataset.fingerprint() == run.eval_dataset.fingerprint()


def test_the_real_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    chats = [ROWS["explicit prompt"], {**ROWS["explicit prompt"], "rejected": [said("bad")]}]
    for rows in (PLAIN, chats):
        table = datasets.Dataset.from_list(rows)
        splits = datasets.DatasetDict({"train": table, "test": table})
        stream = table.to_iterable_dataset()
        prints = {
            trainer(
                tmp_path, data, processing_class=chat(), objective="softmax", max_steps=2
            ).train_dataset.fingerprint()
            for data in (rows, table, splits, stream)
        }
        assert len(prints) == 1
