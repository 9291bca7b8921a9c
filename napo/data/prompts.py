"""From titles to prompts and token ids.

Three styles. "history": the titles watched, one a line, and the answer is the next line, so a title ends with the
newline that also separates the titles of the prompt, and the prompt itself is training text. "candidates": behind the
history the list to choose from; the answer ends with the tokenizer's end-of-sequence token. "candidates-first": the
list before the history, so that again the answer is the next line, and one list serves several titles of a history.

Byte-pair merges depend on the characters around them. So that a title has the same tokens in a prompt, as an answer
and in a trie of the catalogue, titles are tokenised alone and prompts are put together from ids, not from text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from .log import NOUNS

PromptStyle = Literal["history", "candidates", "candidates-first"]


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How a run's prompts are written. They stand in its ``config.json``, from where training, evaluation and
    recommendation read them."""

    style: PromptStyle = "history"
    history: int = 10
    """A prompt shows the last so many items of a history."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PromptSettings:
        """Those of a run's config. A run that was made before ``history`` stood there shows 10 items."""
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def shown(self, history: Sequence[int] | np.ndarray) -> list[int]:
        return [int(item) for item in history[-self.history :]]


def shows_candidates(style: str) -> bool:
    return style != "history"


def continues(style: str) -> bool:
    """Whether an answer is the next line of the prompt, so that a prompt with its answer begins the next prompt."""
    return style != "candidates"


def header_text(noun: str) -> str:
    """The first line of a prompt, for the noun in dataset.json."""
    if noun not in NOUNS:
        raise ValueError(f"noun: expected one of {', '.join(NOUNS)}, got {noun!r}")
    return f"{noun} {NOUNS[noun]}, in order:\n"


CHOICE_TEXT = "Choose from:\n"  # begins the style candidates-first
CANDIDATES_TEXT = "One of these comes next:\n"
ANSWER_TEXT = "Next:\n"


def build_prompt(
    style: PromptStyle,
    history_titles: Sequence[str],
    candidate_titles: Sequence[str] | None = None,
    *,
    noun: str = "Items",
) -> str:
    """A prompt as text, the same lines that PromptEncoder makes as ids."""
    _check(style, candidate_titles)
    text = header_text(noun) + "".join(f"{title}\n" for title in history_titles)
    listed = "".join(f"{title}\n" for title in candidate_titles or ())
    if style == "candidates":
        return text + CANDIDATES_TEXT + listed + ANSWER_TEXT
    return text if style == "history" else CHOICE_TEXT + listed + text


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Prompt text -> ids, with the token that the model expects first, and no end token."""
    ids = list(tokenizer(text)["input_ids"])
    if ids and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def encode_title(tokenizer: Any, title: str, style: PromptStyle = "history") -> list[int]:
    """Ids of an answer, end token included. ``title`` is one line."""
    if "\n" in title or not title:
        raise ValueError(f"title: expected one line of text, got {title!r}")
    return [*tokenizer(title, add_special_tokens=False)["input_ids"], end_token(tokenizer, style)]


def end_token(tokenizer: Any, style: PromptStyle) -> int:
    if continues(style):
        return newline_token(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} has no eos token, which ends a title in "
            "the style candidates; use the style history"
        )
    return int(tokenizer.eos_token_id)


def newline_token(tokenizer: Any) -> int:
    """The id of a newline. Taken behind a letter, since sentencepiece puts a blank before text that begins a string."""
    alone, ended = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a\n"))
    if len(ended) != len(alone) + 1 or tokenizer.decode(ended[-1:]) != "\n":
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} has no token for a newline, which ends a title in the style "
            "history; use the style candidates"
        )
    return int(ended[-1])


def history_prompt_ids(tokenizer: Any, history_titles: Sequence[str], *, noun: str = "Items") -> list[int]:
    """Header and titles, each tokenised alone. PromptEncoder does the same for many rows of one catalogue."""
    ids = encode_prompt(tokenizer, header_text(noun))
    for title in history_titles:
        ids += encode_title(tokenizer, title, "history")
    return ids


class PromptEncoder:
    """Prompts and answers of one catalogue as ids, from item ids; each title is tokenised once, at the start.

    ``prefix_length``: the tokens at the front of every prompt that a truncation must keep. What it takes is the oldest
    titles, or, in the style candidates-first, the first of the list.
    """

    def __init__(
        self, tokenizer: Any, titles: Sequence[str], *, noun: str = "Items", style: PromptStyle = "history"
    ) -> None:
        _check(style, titles)
        self.style = style
        first = CHOICE_TEXT if style == "candidates-first" else header_text(noun)
        self.header = encode_prompt(tokenizer, first)
        self.prefix_length = len(self.header)
        newline, end = newline_token(tokenizer), end_token(tokenizer, style)
        bare = tokenizer(list(titles), add_special_tokens=False)["input_ids"] if len(titles) else []
        self.lines = [[*ids, newline] for ids in bare]
        self.answers = [[*ids, end] for ids in bare]
        if style == "candidates":
            self.before_candidates = _plain(tokenizer, CANDIDATES_TEXT)
            self.behind_candidates = _plain(tokenizer, ANSWER_TEXT)
        elif style == "candidates-first":
            self.behind_candidates = _plain(tokenizer, header_text(noun))

    def prompt(self, history: Sequence[int], candidates: Sequence[int] | None = None) -> list[int]:
        """Item ids -> prompt ids; the style history makes no use of ``candidates``."""
        _check(self.style, candidates)
        watched = [token for item in history for token in self.lines[item]]
        if candidates is None or self.style == "history":
            return [*self.header, *watched]
        listed = [token for item in candidates for token in self.lines[item]]
        if self.style == "candidates-first":
            return [*self.header, *listed, *self.behind_candidates, *watched]
        return [*self.header, *watched, *self.before_candidates, *listed, *self.behind_candidates]

    def title(self, item: int) -> list[int]:
        """The answer's ids, end token included."""
        return self.answers[item]


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check(style: str, candidates: Sequence[Any] | None) -> None:
    if style not in get_args(PromptStyle):
        raise ValueError(f"style: expected one of {', '.join(get_args(PromptStyle))}, got {style!r}")
    if shows_candidates(style) and candidates is None:
        raise ValueError(f"candidates: the prompt style {style} needs the titles to choose from, got None")
