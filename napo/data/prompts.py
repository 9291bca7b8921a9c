"""From titles to prompts and token ids.

Three styles. "history": the titles watched, one per line, and the answer is the next line, so a title ends with the
newline that also separates the titles of the prompt, and the prompt itself is training text. "candidates": behind the
history the list to choose from; the answer ends with the tokenizer's end-of-sequence token. "candidates-first": the
list before the history, so that again the answer is the next line, and one list serves several titles of a history.

Byte-pair merges depend on the characters around them. So that a title has the same tokens in a prompt, as an answer
and in a trie of the catalogue, titles are tokenised alone and prompts are put together from ids, not from text.
A title is text, whatever stands in it: "</s>" in a title is four characters, not the end token. Prompts and answers
that come as text (rows of preferences) may have been rendered by a chat template, so there "</s>" is the end token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from .interactions import NOUNS
from .styles import STYLES, PromptStyle, continues, shows_candidates

Normalise = Literal["vocabulary", "catalogue"]


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How a model's prompts are written and its titles scored. They stand in its ``origin.json``, from where training,
    evaluation and recommendation read them."""

    style: PromptStyle = "history"
    history: int = 10
    """A prompt shows the last so many items of a history."""
    normalise: Normalise = "vocabulary"
    """The set over which the probabilities of a title's next token sum to 1: all tokens, or those that go on with a
    title of the catalogue (docs/design.md 4.6)."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PromptSettings:
        """Those among other settings."""
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def shown(self, history: Sequence[int] | np.ndarray) -> list[int]:
        return [int(item) for item in history[-self.history :]]


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
    """Prompt text -> ids. In front the token that the model expects first, unless the text brings it itself; no end
    token but the text's own."""
    plain = _plain(tokenizer, text)
    return [*_opening(tokenizer, text, plain), *plain]


def encode_continuations(tokenizer: Any, prompt: str, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """A prompt and its answers as text -> their ids, without end tokens: what stands behind the prompt in the tokens of
    prompt + answer.

    An answer tokenised by itself would get SentencePiece's leading blank a second time, and would miss merges over the
    border. Where an answer changes the prompt's last tokens ("Answer: " + "Paris"), the prompt ends before these and
    every answer begins with them.
    """
    plain = _plain(tokenizer, prompt)
    joint = tokenizer([prompt + answer for answer in answers], add_special_tokens=False)["input_ids"]
    opening = _opening(tokenizer, prompt, plain)
    border = min(_common(plain, ids) for ids in joint)
    if not opening and border == 0:  # all merged into the answers; the model needs a token to begin from
        return plain, [encode_answer(tokenizer, answer) for answer in answers]
    return [*opening, *plain[:border]], [list(ids[border:]) for ids in joint]


def encode_answer(tokenizer: Any, text: str) -> list[int]:
    """An answer behind a prompt that comes as ids, without an end token. Taken behind a newline, since SentencePiece
    puts a blank before text that begins a string."""
    line, ids = _plain(tokenizer, "\n"), _plain(tokenizer, f"\n{text}")
    return ids[len(line) :] if line and ids[: len(line)] == line else _plain(tokenizer, text)


def close_answer(tokenizer: Any, ids: Sequence[int], end: int) -> list[int]:
    """The answer with its end token. One that a chat template has rendered brings it, and perhaps blanks behind it that
    nobody has to predict."""
    eos = tokenizer.eos_token_id
    if ids and ids[-1] in (end, eos):
        return list(ids)
    if eos in ids:
        behind = len(ids) - list(reversed(ids)).index(eos)
        if not tokenizer.decode(list(ids[behind:])).strip():
            return list(ids[:behind])
    return [*ids, end]


def _opening(tokenizer: Any, text: str, plain: list[int]) -> list[int]:
    """The ids that the tokenizer puts before a text of tokens ``plain``, unless the text begins with them."""
    full = list(tokenizer(text)["input_ids"])
    starts = range(len(full) - len(plain) + 1)
    place = next((start for start in starts if full[start : start + len(plain)] == plain), None)
    if place is None:
        raise ValueError(
            f"tokenizer: expected {type(tokenizer).__name__} to give a text the same tokens with and without "
            f"add_special_tokens, got {full[:8]} and {plain[:8]}; give token ids instead of text"
        )
    return [] if full[:place] == plain[:place] else full[:place]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two lists have in common at their front."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def encode_title(tokenizer: Any, title: str, style: PromptStyle = "history") -> list[int]:
    """Ids of an answer, end token included. ``title`` is one line."""
    if "\n" in title or not title:
        raise ValueError(f"title: expected one line of text, got {title!r}")
    return [*_literal(tokenizer, [title])[0], end_token(tokenizer, style)]


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
    """Header and titles, each tokenised by itself. PromptEncoder does the same for many rows of one catalogue."""
    ids = encode_prompt(tokenizer, header_text(noun))
    for title in history_titles:
        ids += encode_title(tokenizer, title, "history")
    return ids


class PromptEncoder:
    """Prompts and answers of one catalogue as ids, from item ids; each title is tokenised once, at the start.

    ``prefix_length``: the tokens at the front of every prompt that a truncation must keep. A truncation drops the
    oldest titles, or, in the style candidates-first, the first of the list.
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
        bare = _literal(tokenizer, titles)
        _check_distinct(tokenizer, titles, bare)
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


def _literal(tokenizer: Any, titles: Sequence[str]) -> list[list[int]]:
    """Titles -> ids; the text of a special token is text."""
    if not len(titles):
        return []
    return list(tokenizer(list(titles), add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _check_distinct(tokenizer: Any, titles: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
    """Refuse a tokenizer that cannot write the titles, before anything is trained with it."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for title, ids in zip(titles, tokens, strict=True):
        groups.setdefault(tuple(ids), []).append(title)
    alike = [group for ids, group in groups.items() if len(group) > 1 or not ids]
    if alike:
        count = sum(map(len, alike))
        shown = "; ".join(" = ".join(repr(title) for title in group[:3]) for group in alike[:3])
        raise ValueError(
            f"tokenizer: expected tokens of its own for each of {len(titles)} titles, got {count} titles that "
            f"{type(tokenizer).__name__} cannot tell apart or write ({shown}); use a model whose tokenizer knows their "
            "script (byte fallback), or change the titles"
        )


def _check(style: str, candidates: Sequence[Any] | None) -> None:
    if style not in STYLES:
        raise ValueError(f"style: expected one of {', '.join(STYLES)}, got {style!r}")
    if shows_candidates(style) and candidates is None:
        raise ValueError(f"candidates: the prompt style {style} needs the titles to choose from, got None")
