"""Preference rows, checked and turned into token ids before training starts.

A row is ``{"prompt", "chosen", "rejected": [...]}``, each a text or token ids; a single rejected text needs no list.
In a text the names of special tokens are these tokens, as chat templates write them, and an answer gets an end token
unless it brings one. Token ids stay as they are. Optional are:

- ``user_id``: rows of one user never borrow from one another;
- ``user_state``: floats, as many in every row; users with similar states share negatives;
- ``rejected_scores``: a recommender's score of every rejected item, for the dynamic margin;
- ``chosen_id``, ``rejected_ids``, ``history_ids``: item ids, by which false negatives are found. Integers of any size
  or strings; in all rows of a data set or in none.

Messages instead of text, and rows without a prompt of its own: ``napo.trainer.conversations``. A data set is a list of
rows, a ``datasets.Dataset`` in any format, a stream of rows, a table (pandas, Polars, pyarrow) or a dict of columns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from napo.data.prompts import close_answer, encode_answer, encode_continuations, encode_prompt, end_token
from napo.trainer.conversations import as_texts
from napo.trainer.problems import MEND, BadRow, plain, show, value_of
from napo.trainer.sources import as_rows

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

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest answer."""
        return len(self.prompt) + max(map(len, self.answers))


Tokens = tuple[list[int], list[int], list[list[int]]] | BadRow
"""Prompt, chosen and rejected answers of a row, the answers with their end tokens; or why there are none."""


class Examples(Dataset[Example]):
    """The usable rows of a data set; ``skipped`` counts the others by the field at fault, ``first_problem`` says what
    is wrong with the first of them."""

    def __init__(self, examples: list[Example], skipped: Counter[str], first_problem: str = "") -> None:
        self.examples, self.skipped, self.first_problem = examples, skipped, first_problem

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
        examples = [dataclasses.replace(example, ref_logps=one) for example, one in pairs]
        return Examples(examples, self.skipped, self.first_problem)

    def report_skipped(self, name: str) -> None:
        """``name`` is what errors call the data set."""
        if self.skipped:
            total = self.skipped.total()
            counts = ", ".join(f"{count} for {field}" for field, count in self.skipped.most_common())
            rows = total + len(self)
            logger.warning("%s: skipped %d of %d rows (%s); %s%s", name, total, rows, counts, name, self.first_problem)

    def fingerprint(self) -> str:
        """A hash of the tokens, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            for ids in (example.prompt, *example.answers):
                digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
            digest.update(b"|")
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Checks rows and encodes them. ``items``: how many items the recommender has whose vectors make the margin; item
    ids are then indices into them, and every row needs them."""

    tokenizer: Any
    vocabulary: int  # ids that the model has embeddings for
    positions: int | None  # that the model has, where it has a limit
    answer_end: str
    max_length: int | None
    truncate_prompts: bool
    keep_prefix: int
    on_bad_row: str
    needs_states: bool
    needs_scores: bool
    items: int | None = None

    @property
    def longest(self) -> int | None:
        """Most tokens of prompt and answer together."""
        limits = [limit for limit in (self.max_length, self.positions) if limit is not None]
        return min(limits, default=None)

    def encode(
        self, name: str, rows: Any, *, most: int | None = None, tokens: Iterable[Tokens] | None = None
    ) -> Examples:
        """``name`` is what errors call the data set. ``most``: so many rows are read of one without a length.
        ``tokens``: what ``tokens`` gives for each row, where that is known."""
        rows = as_rows(name, rows, most=most)
        known = map(self.tokens, (rows[number] for number in range(len(rows)))) if tokens is None else tokens
        examples: list[Example] = []
        skipped: Counter[str] = Counter()
        first_problem = remedy = ""
        index = _Index(has_ids=self.items is not None or _have_ids(rows), items=self.items)
        for number, of_row in enumerate(known):
            try:
                if isinstance(of_row, BadRow):
                    raise of_row
                examples.append(self._example(number, rows[number], of_row, index))
            except BadRow as error:
                problem = f"[{number}].{error.field}: {error}"
                if self.on_bad_row == "error":
                    raise ValueError(f"{name}{problem}; {error.remedy}") from None
                if not first_problem:
                    first_problem, remedy = problem, error.remedy.removeprefix(MEND).removeprefix(" or ")
                skipped[error.field] += 1
        if not examples:
            raise ValueError(
                f"{name}: expected at least one usable row of {len(rows)}; "
                f"{name + first_problem if first_problem else 'it is empty'}" + (f"; {remedy}" if remedy else "")
            )
        width = max(len(example.answers) for example in examples) - 1
        found = Examples([dataclasses.replace(example, width=width) for example in examples], skipped, first_problem)
        found.report_skipped(name)
        return found

    def report_shortened(self, name: str, examples: Examples) -> None:
        """``name`` is what errors call the data set."""
        if not self.truncate_prompts or self.longest is None:
            return
        room = self.longest
        long = sum(one.length > room for one in examples.examples)
        if long:
            logger.warning(
                "%s: %d of %d prompts lose tokens behind their first %d, since they have more than %d with their "
                "longest answer",
                name,
                long,
                len(examples),
                self.keep_prefix,
                room,
            )

    def tokens(self, row: Any) -> Tokens:
        """What does not depend on other rows, so that several processes can share it."""
        try:
            if not isinstance(row, dict):
                raise BadRow("row", f"expected a dict, got {type(row).__name__}")
            return self._encode_texts(row)
        except BadRow as error:
            return error

    def _example(
        self, number: int, row: dict[str, Any], tokens: tuple[list[int], list[int], list[list[int]]], index: _Index
    ) -> Example:
        prompt, chosen, negatives = tokens
        if chosen in negatives:
            raise BadRow("rejected", f"expected answers other than the chosen one, got it at {negatives.index(chosen)}")
        self._check_length(prompt, max(len(answer) for answer in (chosen, *negatives)))
        scores = _numbers(row, "rejected_scores", len(negatives), unless="alpha=0" if self.needs_scores else None)
        state = _numbers(row, "user_state", index.state_size, unless="rho=0" if self.needs_states else None)
        if state is not None:
            index.state_size = len(state)
        chosen_id, rejected_ids, history = _item_ids(row, chosen, negatives, index)
        return Example(
            row=number,
            prompt=prompt,
            answers=[chosen, *negatives],
            width=len(negatives),
            group=index.group(value_of(row, "user_id"), number),
            state=state,
            scores=scores,
            chosen_id=chosen_id,
            rejected_ids=rejected_ids,
            history=history,
        )

    def _encode_texts(self, row: dict[str, Any]) -> tuple[list[int], list[int], list[list[int]]]:
        """Prompt, chosen and rejected answers as ids, the answers with their end tokens."""
        row = dict(as_texts(self.tokenizer, row))
        prompt, chosen, rejected = (value_of(row, field) for field in ("prompt", "chosen", "rejected"))
        if isinstance(rejected, str) and rejected:  # a pair
            rejected = [rejected]
        if not isinstance(rejected, (list, tuple)) or len(rejected) == 0:
            raise BadRow("rejected", f"expected a non-empty list of answers, got {show(rejected)}")
        answers = {"chosen": chosen, **{f"rejected[{i}]": plain(one) for i, one in enumerate(rejected)}}
        for field, value in {"prompt": prompt, **answers}.items():
            self._check_text(field, value)
        if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers.values()):
            before, encoded = encode_continuations(self.tokenizer, prompt, list(answers.values()))
        else:
            before = encode_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
            encoded = [
                encode_answer(self.tokenizer, one) if isinstance(one, str) else [int(i) for i in one]
                for one in answers.values()
            ]
        for (field, value), ids in zip([("prompt", prompt), *answers.items()], [before, *encoded], strict=True):
            if not ids:
                raise BadRow(field, f"expected a text of at least one token, got {show(value)}")
        end = end_token(self.tokenizer, "history" if self.answer_end == "newline" else "candidates")
        closed = [
            close_answer(self.tokenizer, ids, end) if isinstance(value, str) else ids
            for value, ids in zip(answers.values(), encoded, strict=True)
        ]
        for field, ids in zip(("prompt", *answers), (before, *closed), strict=True):
            self._check_vocabulary(field, ids)
        return before, closed[0], closed[1:]

    @staticmethod
    def _check_text(field: str, value: Any) -> None:
        if isinstance(value, str) and value:
            return
        if (
            isinstance(value, (list, tuple))
            and value
            and all(type(i) is int or isinstance(i, np.integer) for i in value)
        ):
            return
        raise BadRow(field, f"expected a non-empty string, list of token ids or list of messages, got {show(value)}")

    def _check_vocabulary(self, field: str, ids: list[int]) -> None:
        wrong = next((i for i in ids if not 0 <= i < self.vocabulary), None)
        if wrong is not None:
            raise BadRow(
                field,
                f"expected token ids in [0, {self.vocabulary}), which the model has embeddings for, got {wrong}",
                MEND if wrong < 0 else f"{MEND}; for a tokenizer with new tokens call model.resize_token_embeddings",
            )

    def _check_length(self, prompt: list[int], answer: int) -> None:
        if fits(prompt, answer, self.longest, self.keep_prefix if self.truncate_prompts else None):
            return
        limit = f"max_length {self.longest} tokens with the answer"
        if self.longest != self.max_length:
            limit = f"{self.longest} tokens with the answer, as many as the model has positions"
        raise BadRow(
            "prompt",
            f"expected at most {limit}, got {len(prompt)} and {answer} for the longest answer",
            f"{MEND}, or lower keep_prefix={self.keep_prefix}"
            if self.truncate_prompts
            else f"{MEND} or truncate_prompts=True",
        )


def fits(prompt: Sequence[int], answer: int, longest: int | None, keep_prefix: int | None) -> bool:
    """Whether an answer of so many tokens goes behind a prompt within ``longest`` tokens. ``keep_prefix``: those that
    stay of a prompt that is shortened; None: no prompt is."""
    if longest is None:
        return True
    spare = longest - answer
    return 1 <= len(prompt) <= spare or (keep_prefix is not None and spare > keep_prefix)


def _have_ids(rows: Any) -> bool:
    """Whether any row has item ids: then all need them."""
    fields = ("chosen_id", "rejected_ids")
    columns = getattr(rows, "column_names", fields)
    if not set(fields) & set(columns):
        return False
    each = (rows[number] for number in range(len(rows)))
    return any(isinstance(row, dict) and any(value_of(row, field) is not None for field in fields) for row in each)


@dataclasses.dataclass
class _Index:
    """The properties that all rows of a data set must share."""

    has_ids: bool
    items: int | None = None
    state_size: int | None = None
    kind: str | None = None  # of the item ids: integers or strings
    groups: dict[Any, int] = dataclasses.field(default_factory=dict)
    numbers: dict[Any, int] = dataclasses.field(default_factory=dict)

    def group(self, user_id: Any, number: int) -> int:
        """One number per user; rows without ``user_id`` are users of their own."""
        if user_id is None:
            return -1 - number
        if isinstance(user_id, bool) or not isinstance(user_id, (str, int)):
            raise BadRow("user_id", f"expected a string or an integer, got {show(user_id)}")
        return self.groups.setdefault(user_id, len(self.groups))

    def item(self, field: str, value: Any) -> int:
        """Numbers the items from 0, whatever their ids are; ids that index ``items`` are their own numbers."""
        value = plain(value)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise BadRow(field, f"expected item ids as integers or strings, got {show(value)}")
        kind = "strings" if isinstance(value, str) else "integers"
        self.kind = self.kind or kind
        if kind != self.kind:
            raise BadRow(field, f"expected item ids as {self.kind}, like those before it, got {show(value)}")
        if self.items is None:
            return self.numbers.setdefault(value, len(self.numbers))
        if isinstance(value, str) or not 0 <= value < self.items:
            raise BadRow(
                field, f"expected item ids in [0, {self.items}), those of item_vectors or the trie, got {show(value)}"
            )
        return value

    def answer(self, tokens: list[int]) -> int:
        """Where the data set has no item ids: equal numbers for equal answers."""
        return self.numbers.setdefault(tuple(tokens), len(self.numbers))


def _item_ids(
    row: dict[str, Any], chosen: list[int], negatives: list[list[int]], index: _Index
) -> tuple[int, np.ndarray, np.ndarray]:
    """Numbers of the chosen, the rejected and the history's items, equal for equal items."""
    history = _list(row, "history_ids")
    if not index.has_ids:
        if history:
            raise BadRow(
                "history_ids",
                "expected chosen_id and rejected_ids with it, which it is compared with, got it alone",
                "give item ids in every row, or leave history_ids out",
            )
        ids = [index.answer(answer) for answer in (chosen, *negatives)]
        return ids[0], np.asarray(ids[1:], dtype=np.int64), np.zeros(0, dtype=np.int64)
    chosen_id, rejected_ids = value_of(row, "chosen_id"), _list(row, "rejected_ids")
    if chosen_id is None or rejected_ids is None:
        field, why = (
            ("chosen_id" if chosen_id is None else "rejected_ids"),
            "other rows have item ids" if index.items is None else "the margin is computed from item_vectors",
        )
        raise BadRow(field, f"expected it, since {why}, got none")
    if len(rejected_ids) != len(negatives):
        raise BadRow("rejected_ids", f"expected {len(negatives)} item ids, got {len(rejected_ids)}")
    number = index.item("chosen_id", chosen_id)
    rejected = np.asarray([index.item("rejected_ids", one) for one in rejected_ids], dtype=np.int64)
    if number in rejected:
        raise BadRow("rejected_ids", f"expected items other than the chosen one, got {show(chosen_id)}")
    return number, rejected, np.asarray([index.item("history_ids", one) for one in history or ()], dtype=np.int64)


def _list(row: dict[str, Any], field: str) -> list[Any] | None:
    value = value_of(row, field)
    if value is not None and not isinstance(value, (list, tuple)):
        raise BadRow(field, f"expected a list of item ids, got {show(value)}")
    return value if value is None else list(value)


def _numbers(
    row: dict[str, Any], field: str, length: int | None = None, *, unless: str | None = None
) -> np.ndarray | None:
    """A list of floats. ``unless``: needed, except with this option."""
    value = value_of(row, field)
    if value is None:
        if unless is not None:
            raise BadRow(
                field,
                "expected it, since this objective uses it, got none",
                f"give it in every row, or set {unless} or objective='softmax', which needs no such field",
            )
        return None
    try:
        numbers = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        raise BadRow(field, f"expected numbers, got {show(value)}") from None
    if numbers.ndim != 1:
        raise BadRow(field, f"expected a list of numbers, got {show(value)}")
    if length is not None and len(numbers) != length:
        raise BadRow(field, f"expected {length} numbers, got {len(numbers)}")
    if not np.isfinite(numbers).all():
        raise BadRow(field, f"expected finite numbers, got {show(value)}")
    return numbers
