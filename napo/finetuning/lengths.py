"""Where examples of supervised fine-tuning are longer than the model or the options allow: what is cut off, counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from napo.data.prompts import PromptEncoder
from napo.data.windows import Tiling, Window


def cut_answer(prompt: Sequence[int], answer: list[int], most: int, keep_prefix: int) -> list[int]:
    """As much of the answer as stands behind the front of its prompt, which a truncation keeps, and one token more."""
    return answer[: most - min(len(prompt), keep_prefix + 1)]


def check_tokens(encoder: PromptEncoder, size: int) -> None:
    """ValueError where a prompt has tokens that a model with ``size`` embeddings does not know."""
    worst = max(map(max, (encoder.header, *encoder.lines, *encoder.answers)))
    if worst >= size:
        raise ValueError(
            f"model: expected embeddings for all tokens of its tokenizer, got {size}, and token {worst} in titles or "
            "prompts; save the model after model.resize_token_embeddings(len(tokenizer)), or take its own tokenizer"
        )


def checked_length(max_length: int, positions: int | None, front: int) -> int:
    """The tokens that an example has at most. ``front``: of every prompt. ValueError where no answer finds room."""
    most = max_length if positions is None else min(max_length, positions)
    if most <= front + 1:
        limit = f"got {max_length}" if most == max_length else f"got a model of {positions} positions"
        remedy = "raise it" if most == max_length else "choose a model of more"
        raise ValueError(
            f"max_length: expected more than {front + 1} tokens, for the first {front} of a prompt, one behind them "
            f"and an answer; {limit}; {remedy}"
        )
    return most


def of_examples(examples: Sequence[tuple[list[int], list[int]]], most: int, keep_prefix: int, kind: str) -> str | None:
    """What to say of prompts and answers that are cut to ``most`` tokens. ``kind``: of examples."""
    short = shorter = 0
    for prompt, answer in examples:
        kept = cut_answer(prompt, answer, most, keep_prefix)
        short += len(prompt) + len(kept) > most
        shorter += len(kept) < len(answer)
    if not short and not shorter:
        return None
    return (
        f"max_length: of {len(examples)} {kind} {short} lose the oldest tokens of their prompts and {shorter} the end "
        f"of their answers, since they have more than {most} tokens"
    )


def of_windows(
    windows: Sequence[Window], sequences: Sequence[np.ndarray], tiling: Tiling, inputs: np.ndarray, positions: int
) -> str | None:
    """What to say of windows that ``max_length`` ends. ``inputs`` (items,): tokens of a title that are computed where
    it is the last of a window. ValueError where the model has too few positions: two titles are not cut any further."""
    full = longer = 0
    for window in windows:
        sequence = sequences[window.sequence]
        before = tiling.header + int(tiling.lengths[sequence[window.begin : window.end - 1]].sum())
        last = sequence[window.end - 1]
        if before + inputs[last] > positions:
            raise ValueError(
                f"data: expected titles of which two fit into the {positions} positions of the model behind a header "
                f"of {tiling.header} tokens, got two of {before + tiling.lengths[last] - tiling.header}; shorten the "
                "titles, or choose a model of more positions"
            )
        tokens = before + int(tiling.lengths[last])
        longer += tokens > tiling.max_length
        if window.end < len(sequence) and window.end - window.begin < tiling.titles:
            full += tokens + int(tiling.lengths[sequence[window.end]]) > tiling.max_length
    if not full and not longer:
        return None
    return (
        f"max_length: of {len(windows)} windows {full} are full with {tiling.max_length} tokens before they have "
        f"{tiling.titles} titles, and {longer} are of two titles that have more"
    )
