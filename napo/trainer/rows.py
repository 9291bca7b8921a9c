"""Preference rows, checked and turned into token ids before training starts.

A row is ``{"prompt", "chosen", "rejected": [...]}``, each a text or token ids, and optionally:

- ``user_id``: rows of one user never borrow from one another;
- ``user_state``: floats, as many in every row; users with similar states share negatives;
- ``rejected_scores``: a recommender's score of every rejected item, for the dynamic margin;
- ``chosen_id``, ``rejected_ids``, ``history_ids``: item ids, by which false negatives are found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from napo.data.prompts import encode_prompt, end_token

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One row: a prompt with its answers, the chosen one first."""

    row: int  # index in the data set
    prompt: list[int]
    answers: list[list[int]]  # 1 + n, end tokens included
    width: int  # most rejected answers of any row: what this row's are padded to, the same on all ranks
    group: int  # equal for rows of one user
    state: np.ndarray | None  # (D,) float32
    scores: np.ndarray | None  # (n,) float32
    chosen_id: int
    rejected_ids: np.ndarray  # (n,) int64
    history: np.ndarray  # int64
    ref_logps: np.ndarray | None = None  # (1 + n,) float32


class Examples(Dataset[Example]):
    """The usable rows of a data set; ``skipped`` counts the others by the field at fault."""

    def __init__(self, examples: list[Example], skipped: Counter[str]) -> None:
        self.examples, self.skipped = examples, skipped

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def ref_logps(self) -> list[np.ndarray] | None:
        """The reference's log-probabilities of every row's answers, where they have been computed."""
        logps = [example.ref_logps for example in self.examples]
        return None if any(one is None for one in logps) else logps  # type: ignore[return-value]

    def with_references(self, logps: Sequence[np.ndarray]) -> Examples:
        pairs = zip(self.examples, logps, strict=True)
        return Examples([dataclasses.replace(example, ref_logps=one) for example, one in pairs], self.skipped)

    def fingerprint(self) -> str:
        """Of the tokens, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            for ids in (example.prompt, *example.answers):
                digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
            digest.update(b"|")
        return digest.hexdigest()


class _BadRow(ValueError):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Checks rows and encodes them. Texts that recur (titles) are tokenised once."""

    tokenizer: Any
    answer_end: str
    max_length: int | None
    truncate_prompts: bool
    on_bad_row: str
    needs_states: bool
    needs_scores: bool
    needs_item_ids: bool
    _answers: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def encode(self, name: str, rows: Sequence[dict[str, Any]]) -> Examples:
        """``name`` is what errors call the data set."""
        if not hasattr(rows, "__len__"):
            raise ValueError(f"{name}: expected a data set with a length, got {type(rows).__name__}; make a list of it")
        examples: list[Example] = []
        skipped: Counter[str] = Counter()
        first_problem = ""
        index = _Index(has_ids=len(rows) > 0 and "rejected_ids" in rows[0])
        for number in range(len(rows)):
            try:
                examples.append(self._encode_row(number, rows[number], index))
            except _BadRow as error:
                message = f"{name}[{number}].{error.field}: {error}"
                if self.on_bad_row == "error":
                    raise ValueError(f"{message}; mend the row or set on_bad_row='skip'") from None
                first_problem = first_problem or message
                skipped[error.field] += 1
        if not examples:
            raise ValueError(
                f"{name}: expected at least one usable row of {len(rows)}; {first_problem or 'it is empty'}"
            )
        if skipped:
            counts = ", ".join(f"{count} for {field}" for field, count in skipped.most_common())
            logger.warning(
                "%s: skipped %d of %d rows (%s); %s", name, skipped.total(), len(rows), counts, first_problem
            )
        width = max(len(example.answers) for example in examples) - 1
        return Examples([dataclasses.replace(example, width=width) for example in examples], skipped)

    def _encode_row(self, number: int, row: Any, index: _Index) -> Example:
        if not isinstance(row, dict):
            raise _BadRow("row", f"expected a dict, got {type(row).__name__}")
        prompt = _tokens(row, "prompt", lambda text: encode_prompt(self.tokenizer, text))
        chosen = _tokens(row, "chosen", self._answer)
        rejected = row.get("rejected")
        if isinstance(rejected, np.ndarray):  # from Parquet
            rejected = rejected.tolist()
        if isinstance(rejected, str) or not isinstance(rejected, Sequence) or len(rejected) == 0:
            raise _BadRow("rejected", f"expected a non-empty list of answers, got {_show(rejected)}")
        negatives = [_tokens({f"rejected[{i}]": one}, f"rejected[{i}]", self._answer) for i, one in enumerate(rejected)]
        if chosen in negatives:
            raise _BadRow(
                "rejected", f"expected answers other than the chosen one, got it at {negatives.index(chosen)}"
            )
        if self.max_length is not None:
            longest = max(len(answer) for answer in (chosen, *negatives))
            spare = self.max_length - longest
            if spare < 1 or (len(prompt) > spare and not self.truncate_prompts):
                got = f"{len(prompt)} and {longest} for the longest answer"
                raise _BadRow(
                    "prompt", f"expected at most max_length {self.max_length} tokens with the answer, got {got}"
                )
        scores = _numbers(row, "rejected_scores", np.float32, len(negatives), needed=self.needs_scores)
        state = _numbers(row, "user_state", np.float32, index.state_size, needed=self.needs_states)
        if state is not None:
            index.state_size = len(state)
        chosen_id, rejected_ids = self._item_ids(row, chosen, negatives, index)
        history = _numbers(row, "history_ids", np.int64)
        return Example(
            row=number,
            prompt=prompt,
            answers=[chosen, *negatives],
            width=len(negatives),
            group=index.group(row.get("user_id"), number),
            state=state,
            scores=scores,
            chosen_id=chosen_id,
            rejected_ids=rejected_ids,
            history=np.zeros(0, dtype=np.int64) if history is None else history,
        )

    def _answer(self, text: str) -> list[int]:
        if text not in self._answers:
            end = end_token(self.tokenizer, "history" if self.answer_end == "newline" else "candidates")
            self._answers[text] = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], end]
        return self._answers[text]

    def _item_ids(
        self, row: dict[str, Any], chosen: list[int], negatives: list[list[int]], index: _Index
    ) -> tuple[int, np.ndarray]:
        """The row's item ids; where the data set has none, equal answers get equal ids."""
        if not index.has_ids and not self.needs_item_ids:
            ids = [index.answer(answer) for answer in (chosen, *negatives)]
            return ids[0], np.asarray(ids[1:], dtype=np.int64)
        rejected_ids = _numbers(row, "rejected_ids", np.int64, len(negatives), needed=True)
        chosen_id = row.get("chosen_id")
        if not isinstance(chosen_id, (int, np.integer)) or isinstance(chosen_id, bool):
            raise _BadRow("chosen_id", f"expected an item id beside rejected_ids, got {_show(chosen_id)}")
        assert rejected_ids is not None
        if chosen_id in rejected_ids:
            raise _BadRow("rejected_ids", f"expected items other than the chosen one, got {chosen_id}")
        return int(chosen_id), rejected_ids


@dataclasses.dataclass
class _Index:
    """What rows of one data set have to agree on."""

    has_ids: bool
    state_size: int | None = None
    groups: dict[Any, int] = dataclasses.field(default_factory=dict)
    answers: dict[tuple[int, ...], int] = dataclasses.field(default_factory=dict)

    def group(self, user_id: Any, number: int) -> int:
        """A number a user; rows without ``user_id`` are users of their own."""
        if user_id is None:
            return -1 - number
        if isinstance(user_id, bool) or not isinstance(user_id, (str, int, np.integer)):
            raise _BadRow("user_id", f"expected a string or an integer, got {_show(user_id)}")
        return self.groups.setdefault(user_id, len(self.groups))

    def answer(self, tokens: list[int]) -> int:
        return self.answers.setdefault(tuple(tokens), len(self.answers))


def _tokens(row: dict[str, Any], field: str, encode: Callable[[str], list[int]]) -> list[int]:
    """The ids of a text, or the ids that stand in its place."""
    value = row.get(field)
    if isinstance(value, str) and value:
        return encode(value)
    if not isinstance(value, str) and value is not None:
        ids = np.asarray(value)
        if ids.ndim == 1 and len(ids) and ids.dtype.kind in "iu":
            return [int(i) for i in ids]
    raise _BadRow(field, f"expected a non-empty string or list of token ids, got {_show(value)}")


def _numbers(
    row: dict[str, Any], field: str, dtype: type, length: int | None = None, *, needed: bool = False
) -> np.ndarray | None:
    value = row.get(field)
    if value is None:
        if needed:
            raise _BadRow(field, "expected it, since this objective uses it, got none")
        return None
    try:
        array = np.asarray(value)
        numbers: np.ndarray = array.astype(dtype)
    except (TypeError, ValueError):
        raise _BadRow(field, f"expected numbers, got {_show(value)}") from None
    if array.ndim != 1 or (dtype is np.int64 and array.size and array.dtype.kind not in "iu"):
        kind = "integers" if dtype is np.int64 else "numbers"
        raise _BadRow(field, f"expected a list of {kind}, got {_show(value)}")
    if length is not None and len(numbers) != length:
        raise _BadRow(field, f"expected {length} numbers, got {len(numbers)}")
    if not np.isfinite(numbers).all():
        raise _BadRow(field, f"expected finite numbers, got {_show(value)}")
    return numbers


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
