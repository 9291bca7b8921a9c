"""Recommendations for a file of users or histories, into a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from napo.files import replacing
from napo.progress import progress
from napo.recommend.places import check_files, check_place, folders_of
from napo.recommend.reading import FileReport, read
from napo.recommend.recommender import Query, Recommender, Unknown
from napo.recommend.writing import writing

__all__ = ["FileReport", "check_files", "recommend_file"]

TOGETHER = 256
"""Rows that are ranked in one call."""


def recommend_file(
    recommender: Recommender,
    source: str | Path,
    out: str | Path,
    *,
    k: int = 10,
    exclude: tuple[str, ...] = (),
    exact: bool = False,
    unknown: Unknown = "error",
) -> FileReport:
    """Write the best ``k`` items for each row of ``source`` to ``out``. ValueError names all rows that cannot be
    answered, before anything is computed.

    ``source`` has a column ``user`` (ids as the data's source has them) or ``history`` (a list of titles or ids, oldest
    first; in CSV a JSON list, or titles with ``::`` between them). With both, the user counts where the history is
    empty, or, under ``unknown="skip"``, where nothing of it is known. It may have ``exclude``, a list too, and ``k``.
    Formats: .csv, .tsv, .jsonl, each also with .gz, and .parquet. ``out`` (.parquet, .csv, .jsonl) has a row for each
    recommendation: row (of ``source``, from 0), user, place (from 1), item, title, score, model and notes; in .jsonl a
    line for each row of ``source``.
    """
    source, out = Path(source), Path(out)
    suffix = check_files(source, out)
    place = Path(os.path.realpath(out))  # a link stays one
    with _said_of_out(out):
        check_place(place)
    rows, report = read(recommender, source, Query(k=k, exclude=exclude, exact=exact, unknown=unknown))
    users = [one.user for one in rows]
    with ExitStack() as opened:
        with _said_of_out(out):
            opened.enter_context(folders_of(place))
            aside = opened.enter_context(replacing(place))
            write = opened.enter_context(writing(aside, suffix, users))
        bar = opened.enter_context(progress("recommend", report.rows, unit="rows"))
        for begin in range(0, len(rows), TOGETHER):
            part = slice(begin, begin + TOGETHER)
            answers = recommender.answer([one.asked() for one in rows[part]])
            with _said_of_out(out):
                write(users[part], answers)
            bar.advance(len(answers))
        with _said_of_out(out):
            opened.close()
    return report


@contextmanager
def _said_of_out(out: Path) -> Iterator[None]:
    """The file beside it that is written first is nothing that a user knows of. Around writing alone: a model that
    cannot be read is another matter."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"out: cannot write {out} ({error.strerror or error}); give another place") from None
