"""The prompt styles. The command line reads their names, so nothing heavy is imported here."""

from __future__ import annotations

from typing import Literal, get_args

PromptStyle = Literal["history", "candidates", "candidates-first"]
STYLES: tuple[PromptStyle, ...] = get_args(PromptStyle)


def shows_candidates(style: str) -> bool:
    return style != "history"


def continues(style: str) -> bool:
    """Whether an answer is the next line of the prompt, so that a prompt with its answer begins the next prompt."""
    return style != "candidates"
