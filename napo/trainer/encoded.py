"""Encoded rows of a large data set: made by several processes, and kept on disk by what they were made from.

What is kept is found again by the content of the rows, the tokenizer and the encoder's options. Rows of few tokens, or
of token ids, are encoded sooner than they are read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from napo.files import replacing, text_hash
from napo.trainer.problems import plain
from napo.trainer.rows import Encoder, Example, Examples, Tokens
from napo.trainer.sources import as_rows

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the files, and of how rows become tokens: raise it where either changes."""
KEPT_FROM = 2_000
"""Rows of text from which on they are kept, where nobody says."""
SHARED_FROM = 20_000
"""Rows of text from which on several processes encode them, where nobody says: to start these takes a second."""
MOST_PROCESSES = 8
"""Where nobody says."""
CHUNK = 500
"""Rows that a process takes at a time."""


def encode(
    encoder: Encoder,
    name: str,
    data: Any,
    *,
    folder: Path,
    keep: bool | None = None,
    processes: int | None = None,
    most: int | None = None,
) -> Examples:
    """What ``encoder.encode`` gives, from the file in ``folder`` that an earlier call left for the same rows.

    ``keep``: whether to leave one and to look for one; None: where there are many rows of text. ``processes``: that
    encode together; None: as many as there are cores, where there are very many rows of text.
    """
    rows = as_rows(name, data, most=most)
    of_text = len(rows) > 0 and _has_text(rows[0])
    if keep is None:
        keep = of_text and len(rows) >= KEPT_FROM
    key = _key(encoder, rows) if keep else None
    path = folder / f"encoded_rows-{key}.npz"
    if key is not None:
        found = _read(path)
        if found is not None:
            logger.warning(
                "%s: %d encoded rows read from %s, made before from the same rows, tokenizer and options",
                name,
                len(found),
                path,
            )
            found.report_skipped(name)
            return found
    if processes is None:
        processes = _cores() if of_text and len(rows) >= SHARED_FROM else 1
    with _encoded_together(encoder, rows, processes) as tokens:
        examples = encoder.encode(name, rows, tokens=tokens)
    if key is not None:
        _write(path, examples)
    return examples


def _has_text(row: Any) -> bool:
    """Whether the answer is a text or messages, and not token ids."""
    chosen = plain(row.get("chosen")) if isinstance(row, dict) else None
    return isinstance(chosen, str) or (isinstance(chosen, (list, tuple)) and any(isinstance(o, dict) for o in chosen))


def _cores() -> int:
    """Those of this process; ranks on one machine share them."""
    ranks_here = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return min(max(len(os.sched_getaffinity(0)) // ranks_here, 1), MOST_PROCESSES)


# Processes

_shared: tuple[Encoder, Any] | None = None
"""What a forked process finds: rows need not be sent to it."""


@contextmanager
def _encoded_together(encoder: Encoder, rows: Any, processes: int) -> Iterator[Iterator[Tokens] | None]:
    """The tokens of all rows, in order; None for one process, where the encoder takes row by row."""
    global _shared
    if processes == 1 or len(rows) <= CHUNK:
        yield None
        return
    starts = range(0, len(rows), CHUNK)
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    # A fork of a tokenizer that has used threads says so on stderr, unless it is told to use none.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _shared = encoder, rows
    pool = ProcessPoolExecutor(min(processes, len(starts)), mp_context=get_context("fork"))
    try:
        with warnings.catch_warnings():  # of forks beside threads; the forks encode text, which needs none of theirs
            warnings.simplefilter("ignore", DeprecationWarning)
            chunks = pool.map(_encode_chunk, starts)
        yield (one for chunk in chunks for one in chunk)
    finally:
        pool.shutdown(cancel_futures=True)
        _shared = None
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _encode_chunk(start: int) -> list[Tokens]:
    assert _shared is not None
    encoder, rows = _shared
    return [encoder.tokens(rows[number]) for number in range(start, min(start + CHUNK, len(rows)))]


# What is kept


def _key(encoder: Encoder, rows: Any) -> str | None:
    """Of all that decides what the rows are encoded to; None where that cannot be told."""
    tokenizer = _tokenizer_hash(encoder.tokenizer)
    content = None if tokenizer is None else _rows_hash(rows)
    if content is None:
        return None
    options = {
        field.name: getattr(encoder, field.name) for field in dataclasses.fields(encoder) if field.name != "tokenizer"
    }
    return text_hash(json.dumps([FORMAT, tokenizer, content, options], sort_keys=True))[:16]


def _tokenizer_hash(tokenizer: Any) -> str | None:
    """None for a tokenizer whose text could become other tokens without being another one to see: of a class of
    one's own, in Python, or with a chat template that writes the date."""
    inner, template = getattr(tokenizer, "backend_tokenizer", None), getattr(tokenizer, "chat_template", None)
    if inner is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    if "strftime_now" in json.dumps(template, default=str):
        return None
    facts = {
        "class": type(tokenizer).__qualname__,
        "tokenizer": inner.to_str(),
        "template": template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "options": {name: repr(value) for name, value in tokenizer.init_kwargs.items() if name != "tokenizer_object"},
        "versions": [version("tokenizers"), version("transformers")],
    }
    return text_hash(json.dumps(facts, sort_keys=True, default=str))


def _rows_hash(rows: Any) -> str | None:
    """None where a row holds what JSON has no way to write."""
    digest = sha256(f"{len(rows)}".encode())
    try:
        for number in range(len(rows)):
            digest.update(json.dumps(rows[number], sort_keys=True, default=_written, ensure_ascii=True).encode())
            digest.update(b"\n")
    except (TypeError, ValueError, RecursionError):
        return None
    return digest.hexdigest()


def _written(value: Any) -> Any:
    if hasattr(value, "tolist"):  # arrays and tensors count with their values, as the encoder reads them
        return value.tolist()
    raise TypeError(type(value).__name__)


def _write(path: Path, examples: Examples) -> None:
    every = examples.examples
    arrays: dict[str, Any] = {
        "row": _column(one.row for one in every),
        "group": _column(one.group for one in every),
        "chosen_id": _column(one.chosen_id for one in every),
        **_ragged("prompt", [one.prompt for one in every]),
        **_ragged("answers", [answer for one in every for answer in one.answers]),
        **_ragged("rejected_ids", [one.rejected_ids for one in every]),
        **_ragged("history", [one.history for one in every]),
        **_optional("state", [one.state for one in every]),
        **_optional("scores", [one.scores for one in every]),
        "skipped": np.array(json.dumps([dict(examples.skipped), examples.first_problem])),
    }
    with replacing(path) as aside, aside.open("wb") as file:
        np.savez(file, **arrays)


def _read(path: Path) -> Examples | None:
    """None where there is no such file, or where it is damaged, which is said."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        skipped, first_problem = json.loads(str(arrays["skipped"]))
        count = len(arrays["row"])
        prompts, answers = (_cut(arrays, name) for name in ("prompt", "answers"))
        rejected_ids, histories = (_cut(arrays, name) for name in ("rejected_ids", "history"))
        states, scores = (_cut_optional(arrays, name) for name in ("state", "scores"))
        width = max(len(ids) for ids in rejected_ids)
        ends = np.cumsum([1 + len(ids) for ids in rejected_ids]).tolist()
        if ends[-1] != len(answers) or any(len(column) != count for column in (prompts, histories, states, scores)):
            raise ValueError("columns of different lengths")
        examples = [
            Example(
                row=int(arrays["row"][at]),
                prompt=prompts[at].tolist(),
                answers=[one.tolist() for one in answers[ends[at] - 1 - len(rejected_ids[at]) : ends[at]]],
                width=width,
                group=int(arrays["group"][at]),
                state=states[at],
                scores=scores[at],
                chosen_id=int(arrays["chosen_id"][at]),
                rejected_ids=rejected_ids[at],
                history=histories[at],
            )
            for at in range(count)
        ]
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, zipfile.BadZipFile) as error:
        logger.warning("%s: cannot be read (%s); its rows are encoded again", path, error)
        return None
    return Examples(examples, Counter(skipped), first_problem)


def _column(values: Iterator[int]) -> np.ndarray:
    return np.fromiter(values, np.int64)


def _ragged(name: str, rows: Sequence[Any], dtype: Any = np.int64) -> dict[str, np.ndarray]:
    lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    flat = np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.empty(0, dtype)
    return {name: flat, f"{name}_lengths": lengths}


def _optional(name: str, rows: Sequence[np.ndarray | None]) -> dict[str, np.ndarray]:
    given = np.fromiter((row is not None for row in rows), bool, len(rows))
    return {f"{name}_given": given, **_ragged(name, [() if row is None else row for row in rows], np.float32)}


def _cut(arrays: dict[str, np.ndarray], name: str) -> list[np.ndarray]:
    lengths = arrays[f"{name}_lengths"]
    if int(lengths.sum()) != len(arrays[name]):
        raise ValueError(f"{name}: expected {int(lengths.sum())} values, got {len(arrays[name])}")
    return np.split(arrays[name], np.cumsum(lengths)[:-1]) if len(lengths) else []


def _cut_optional(arrays: dict[str, np.ndarray], name: str) -> list[np.ndarray | None]:
    rows = _cut(arrays, name)
    return [row if given else None for row, given in zip(rows, arrays[f"{name}_given"].tolist(), strict=True)]
