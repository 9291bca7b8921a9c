"""Rows of messages, and rows whose prompt stands in front of every answer, as prompt and answers in text.

As TRL has them: a field may be a list of messages ``{"role", "content"}``, which the tokenizer's chat template renders;
a row without ``prompt`` has it in the common beginning of its answers. ``rejected`` is one answer or a list of them.
``tools`` and ``chat_template_kwargs`` of a row go to the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from napo.trainer.problems import BadRow, plain, show, value_of

Messages = list[dict[str, Any]]


def as_texts(tokenizer: Any, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with its three fields as texts or token ids."""
    prompt, chosen, rejected = (value_of(row, field) for field in ("prompt", "chosen", "rejected"))
    if isinstance(rejected, str) or _is_conversation(rejected):
        rejected = [rejected]
    if not isinstance(rejected, (list, tuple)) or not rejected:
        return row  # refused further on, by the name of the field
    answers = [chosen, *map(plain, rejected)]
    if any(_is_conversation(one) for one in (prompt, *answers)):
        prompt, answers = _rendered(tokenizer, row, prompt, answers)
    elif prompt is None and all(isinstance(one, str) and one for one in answers):
        prompt, answers = _split_texts(answers)
    else:
        return row
    return {**row, "prompt": prompt, "chosen": answers[0], "rejected": answers[1:]}


def _is_conversation(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, Mapping) for one in value)


def _split_texts(answers: list[str]) -> tuple[str, list[str]]:
    """The words that all answers begin with, and what follows in each, with the blank before it."""
    common = answers[0][: _common(answers)]
    border = max(common.rfind(blank) for blank in " \n\t")
    if border < 1 or any(not answer[border:].strip() for answer in answers):
        raise BadRow(
            "prompt",
            f"expected it, or answers that begin with the same words, got answers that begin with {show(common)}",
            "give prompt in every row",
        )
    return answers[0][:border], [answer[border:] for answer in answers]


def _rendered(tokenizer: Any, row: Mapping[str, Any], prompt: Any, answers: list[Any]) -> tuple[str, list[str]]:
    for place, answer in enumerate(answers):
        if not _is_conversation(answer):
            raise BadRow(
                "chosen" if place == 0 else f"rejected[{place - 1}]",
                f"expected a list of messages, like the row's other fields, got {show(answer)}",
                "give all of a row as messages, or all as text",
            )
    conversations = [list(answer) for answer in answers]
    if not _is_conversation(prompt):
        prompt, conversations = _split_messages(prompt, conversations)
    if not getattr(tokenizer, "chat_template", None):
        raise BadRow(
            "prompt",
            f"expected a tokenizer with a chat template to write messages as text, got {type(tokenizer).__name__} "
            "without one",
            "set tokenizer.chat_template, or give text",
        )
    options: dict[str, Any] = {"tools": plain(row.get("tools")), **(row.get("chat_template_kwargs") or {})}
    continues = prompt[-1].get("role") == "assistant"
    asked = _written(tokenizer, prompt, options | {"continue_final_message": continues})
    opening = asked if continues else _written(tokenizer, prompt, options | {"add_generation_prompt": True})
    whole = [_written(tokenizer, [*prompt, *answer], options) for answer in conversations]
    # Some templates open an answer differently from how they ask for one (with an empty thought, say). The difference
    # belongs to the answers, as long as it comes after the last message of the prompt.
    border = _common([opening, *whole])
    if border < len(asked) or any(len(text) == border for text in whole):
        raise BadRow(
            "prompt",
            "expected a chat template that leaves the prompt as it is when an answer follows, got one that changes it "
            f"from character {border} on ({show(whole[0][border : border + 40])})",
            "write messages as text with tokenizer.apply_chat_template(messages, tokenize=False)",
        )
    return opening[:border], [text[border:] for text in whole]


def _split_messages(prompt: Any, conversations: list[Messages]) -> tuple[Messages, list[Messages]]:
    """The messages that all conversations begin with, and what follows in each. A prompt in text beside whole
    conversations, as some data sets have it, must be what the last of these messages says."""
    common = 0
    while all(len(one) > common + 1 and one[common] == conversations[0][common] for one in conversations):
        common += 1
    if common == 0:
        raise BadRow(
            "prompt",
            "expected messages, or answers that begin with the same messages, got "
            f"{show(prompt)} and answers that begin with {show(conversations[0][0])}",
            "give prompt as a list of messages",
        )
    shared = conversations[0][:common]
    if prompt is not None and prompt != shared[-1].get("content"):
        raise BadRow(
            "prompt",
            f"expected what the answers' common message says, {show(shared[-1].get('content'))}, got {show(prompt)}",
            "give prompt as a list of messages, or leave it out",
        )
    return shared, [one[common:] for one in conversations]


def _written(tokenizer: Any, messages: Messages, options: Mapping[str, Any]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # templates raise what they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadRow("prompt", f"the chat template refuses the messages {show(messages)}: {reason}") from None


def _common(texts: list[str]) -> int:
    """How many characters all begin with."""
    shortest, longest = min(texts), max(texts)  # in order of their characters: what these two share, all do
    places = (place for place, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b)
    return next(places, min(len(shortest), len(longest)))
