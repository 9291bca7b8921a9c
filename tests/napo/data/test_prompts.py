"""Prompts: the same tokens for a title wherever it stands."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_world
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from napo.data.prompts import (
    PromptEncoder,
    build_prompt,
    encode_prompt,
    encode_title,
    history_prompt_ids,
    newline_token,
)

TITLES = ["Blue Moon", "Red River", "The Lost King", "Café 2046", "Storm"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_world.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_history_prompt_reads_as_its_text(tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer, TITLES, noun="Movies")
    ids = encoder.prompt([3, 0, 2])
    text = "Movies watched, in order:\nCafé 2046\nBlue Moon\nThe Lost King\n"
    assert tokenizer.decode(ids) == text == build_prompt("history", [TITLES[i] for i in (3, 0, 2)], noun="Movies")
    assert ids == history_prompt_ids(tokenizer, [TITLES[i] for i in (3, 0, 2)], noun="Movies")
    assert ids[: encoder.prefix_length] == encode_prompt(tokenizer, "Movies watched, in order:\n")


def test_an_answer_is_the_next_line_of_the_prompt(tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer, TITLES, noun="Movies")
    for item, title in enumerate(TITLES):
        assert encoder.title(item) == encode_title(tokenizer, title)
        assert encoder.prompt([1, item]) == encoder.prompt([1]) + encoder.title(item)
        assert encoder.title(item)[-1] == newline_token(tokenizer)


def test_candidates_prompt_lists_them_and_ends_with_eos(tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer, TITLES, noun="Books", style="candidates")
    text = tokenizer.decode(encoder.prompt([0], [4, 1]))
    assert text == build_prompt("candidates", ["Blue Moon"], ["Storm", "Red River"], noun="Books")
    assert text.startswith("Books read, in order:\nBlue Moon\n") and "\nStorm\nRed River\n" in text
    assert encoder.title(1) == [*encode_title(tokenizer, "Red River")[:-1], tokenizer.eos_token_id]


def test_candidates_first_are_followed_by_a_history_that_grows(tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer, TITLES, noun="Books", style="candidates-first")
    prompt = encoder.prompt([0], [4, 1])
    text = tokenizer.decode(prompt)
    assert text == "Choose from:\nStorm\nRed River\nBooks read, in order:\nBlue Moon\n"
    assert text == build_prompt("candidates-first", ["Blue Moon"], ["Storm", "Red River"], noun="Books")
    assert encoder.prompt([0, 4], [4, 1]) == prompt + encoder.title(4)


def test_first_token_of_the_model_is_kept_and_an_end_token_is_not() -> None:
    class Sentencepiece:
        """Puts a token before and one behind, as T5's and Llama's tokenizers may."""

        eos_token_id = 2

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = [100 + ord(letter) for letter in text]
            return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    assert encode_prompt(Sentencepiece(), "ab") == [1, 197, 198]


def test_errors(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="style: expected one of history, candidates, candidates-first, got 'list'"):
        build_prompt("list", ["A"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the titles to choose from"):
        PromptEncoder(tokenizer, TITLES, style="candidates").prompt([1])
    with pytest.raises(ValueError, match="noun: expected one of Movies"):
        build_prompt("history", ["A"], noun="Films")
    with pytest.raises(ValueError, match="expected one line"):
        encode_title(tokenizer, "two\nlines")
    blind = lambda text, add_special_tokens=True: {"input_ids": [ord(c) for c in text.strip()]}  # noqa: E731
    with pytest.raises(ValueError, match="no token for a newline"):
        newline_token(type("Blind", (), {"__call__": staticmethod(blind), "decode": staticmethod(str)})())
    with pytest.raises(ValueError, match="has no eos token"):
        encode_title(_without_eos(tokenizer), "Storm", "candidates")


def _without_eos(tokenizer: Any) -> Any:
    class NoEnd(SimpleNamespace):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return tokenizer(*args, **options)

    return NoEnd(eos_token_id=None)


def test_the_text_of_a_special_token_in_a_title_is_text(tokenizer: Any) -> None:
    names = tokenizer.all_special_tokens
    titles = [*TITLES, *(text for name in names for text in (name, f"Storm{name}", f"{name}Old{name} New"))]
    special = set(tokenizer.all_special_ids)
    assert special & set(tokenizer(f"Storm{names[0]}")["input_ids"])  # it would be the token
    for style in ("history", "candidates", "candidates-first"):
        encoder = PromptEncoder(tokenizer, titles, noun="Movies", style=style)  # type: ignore[arg-type]
        for item, title in enumerate(titles):
            assert not special & set(encoder.title(item)[:-1])
            assert tokenizer.decode(encoder.title(item)[:-1]) == title
            assert encoder.title(item) == encode_title(tokenizer, title, style)  # type: ignore[arg-type]


def lossy(kind: str) -> Any:
    words = ["<unk>", "<s>", "</s>", "\n", " ", *"abcdefghijklmnopqrstuvwxyz", *("IV" if kind == "nfkc" else "")]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if kind != "unknown":
        tokenizer.normalizer = {"case": normalizers.Lowercase(), "nfkc": normalizers.NFKC()}[kind]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("kind", "alike"),
    [
        ("unknown", ["Кино", "Ария"]),
        ("case", ["blue moon", "Blue Moon"]),
        ("nfkc", ["Ⅳ", "IV"]),
    ],
)
def test_a_tokenizer_that_cannot_tell_titles_apart_is_refused(kind: str, alike: list[str]) -> None:
    tokenizer = lossy(kind)
    PromptEncoder(tokenizer, ["storm", alike[0]])
    with pytest.raises(ValueError, match=r"^tokenizer: .* each of 3 titles, got 2 titles that") as error:
        PromptEncoder(tokenizer, ["storm", *alike])
    assert " = ".join(map(repr, alike)) in str(error.value)
    assert "\n" not in str(error.value)
