"""`napo prepare goodreads` on a generated file of millions of lines: time and memory of the whole command.

    python -m benchmarks run prepare                  # or first --folder DIR --generate, then --folder DIR

Users and books are drawn by Zipf's law over a catalogue like that of the real genre files; lines have their fields. The
floor is `gzip` decompression and `json.loads` of every line; no reader in Python is faster.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.options import parser_for
from benchmarks.report import Report

USERS, BOOKS = 300_000, 60_000
TITLE = "The Book of %d (The Long Series, #%d)"
SMOKE = (20_000, 300, 600)  # lines, users, books
FIRST_DAY = 1_167_609_600  # 2007-01-01
LINE = (
    '{"user_id": "%032x", "book_id": "%d", "review_id": "%032x", "is_read": true, "rating": %d, '
    '"review_text_incomplete": "", "date_added": "%s", "date_updated": "%s", "read_at": "", "started_at": ""}\n'
)


def generate(folder: Path, lines: int, users: int, books: int) -> None:
    generator = np.random.default_rng(0)
    user = np.sort((users * generator.random(lines) ** 2.5).astype(np.int64))
    book = (books * generator.random(lines) ** 2.5).astype(np.int64)
    seconds = FIRST_DAY + generator.integers(0, 10 * 365 * 86_400, lines)
    rating = generator.integers(0, 6, lines)
    with gzip.open(folder / "goodreads_interactions_made.json.gz", "wt", compresslevel=1) as file:
        for u, b, s, r in zip(user.tolist(), book.tolist(), seconds.tolist(), rating.tolist(), strict=True):
            date = time.strftime("%a %b %d %H:%M:%S -0800 %Y", time.gmtime(s))
            file.write(LINE % (u * 7919, b, s * 104_729 + u, r, date, date))
    with gzip.open(folder / "goodreads_books_made.json.gz", "wt", compresslevel=1) as file:
        for b in range(books):
            file.write(json.dumps({"book_id": str(b), "title": TITLE % (b, b % 9), "publication_year": "1999"}) + "\n")


def floor(folder: Path) -> float:
    began = time.perf_counter()
    with gzip.open(folder / "goodreads_interactions_made.json.gz", "rb") as file:
        for line in file:
            json.loads(line)
    return time.perf_counter() - began


def measure(folder: Path, options: argparse.Namespace) -> None:
    report, lines = Report("prepare", options), options.lines
    least = floor(folder)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        out = Path(work) / "out"
        command = [sys.executable, "-m", "napo.cli", "prepare", "goodreads", str(folder), "--out", str(out)]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        meta = json.loads((out / "dataset.json").read_text())
    if meta["files"][0]["lines"] != lines or meta["files"][0]["bad_lines"]:
        raise SystemExit(f"expected {lines} good lines, read {meta['files'][0]}")
    case = f"goodreads, {lines} lines"
    report.add(case, "gzip and json.loads of each line (floor)", seconds=round(least, 1))
    rows = sum(meta["counts"]["rows"].values())
    report.add(case, "napo prepare", seconds=round(seconds, 1), ratio=seconds / least, peak_mib=round(peak), rows=rows)
    report.finish()


def main(arguments: Sequence[str]) -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--lines", type=int, default=5_000_000)
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--books", type=int, default=BOOKS)
    parser.add_argument("--smoke", action="store_true", help="few lines: shows that it runs, measures nothing")
    parser.add_argument("--folder", type=Path, help="where the files are, or are to be; a temporary one if left out")
    parser.add_argument("--generate", action="store_true", help="make the files in --folder and measure nothing")
    chosen = parser.parse_args(arguments)
    if chosen.smoke:
        chosen.lines, chosen.users, chosen.books = SMOKE
    if chosen.folder is None:
        with tempfile.TemporaryDirectory() as work:
            generate(Path(work), chosen.lines, chosen.users, chosen.books)
            measure(Path(work), chosen)
    elif chosen.generate:
        chosen.folder.mkdir(parents=True, exist_ok=True)
        generate(chosen.folder, chosen.lines, chosen.users, chosen.books)
    else:
        measure(chosen.folder, chosen)
