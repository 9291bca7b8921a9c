"""Fuzzing of the readers of data sets, whose files anybody may have made.

    python tests/fuzz/fuzz_readers.py --seconds 60 --seed 0

Half of the time goes to damaged files of every layout, half to the pickle reader: guided by coverage where atheris is
installed (the extra `fuzz`), else by damage as well. A reader gives a result or a ValueError; anything else, more
than ``SLOWEST`` seconds for one file or more than ``MEMORY`` is found, and the file is kept in build/fuzz.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

SLOWEST = 10  # seconds
MEMORY = 4 << 30
SAID = ("FOUND", "read", "refused", "Done", "ERROR")  # in a worker's lines that are shown
LEAST = 30  # files, however busy the machine is
NAMES = ("seq", "len_seq", "next")
FOUND = Path("build/fuzz")
SPAM = (
    b"\0",
    b"\n",
    b"\t",
    b'"',
    b"{",
    b"[" * 3000,
    b"9" * 30,
    b"-1e999",
    b"\xff\xfe",
    b"null",
    b"::",
    b"",
    b"\x80\x04",
)
OPCODES = bytes(ord(op) for op in "(.012FGHIJKLMNPQRSTUVXabcdeghijlopqrstu}])") + bytes(range(0x80, 0x99))


def damaged(content: bytes, rng: random.Random, *, of_pickle: bool = False) -> bytes:
    """Cut, and wounded up to four times; a pickle by its own opcodes as well."""
    if rng.random() < 0.3:
        content = content[: rng.randrange(len(content) + 1)]
    for _ in range(rng.randint(1, 4)):
        at, over = rng.randrange(len(content) + 1), rng.randint(0, 4)
        new = rng.choice(SPAM)
        if of_pickle and rng.random() < 0.7:
            new = bytes(rng.choice(OPCODES) for _ in range(rng.randint(1, 3)))
        elif rng.random() < 0.3:  # a piece of the file in another place, often many times
            start = rng.randrange(len(content) + 1)
            new = content[start : start + rng.randint(1, 200)] * rng.choice((1, 1, 50))
        content = content[:at] + new + content[at + over :]
    return content


def frame() -> bytes:
    import pandas as pd

    rows = [([*range(at, at + 5), 60, 60], 5, at + 5) for at in range(20)]
    return pickle.dumps(pd.DataFrame(rows, columns=pd.Index(NAMES, dtype=object)), protocol=4)


def layouts() -> dict[str, Any]:
    """The functions that write the files of a layout; a layout is named after its source."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "napo"))
    import data_files

    return dict(data_files.WRITERS)


class Slow(BaseException):
    pass


def limited(seconds: int) -> None:
    """At most `MEMORY`, and `Slow` after so many seconds of one file."""

    def stop(*_: Any) -> None:
        raise Slow(f"more than {seconds} s")

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, stop)


def work(seconds: float, seed: int, only_pickles: bool) -> int:
    """Damaged files until the time is over; what is tried lies in `FOUND` while it is, so that a crash leaves it."""
    from napo.data import pickles
    from napo.data.sources import SOURCES

    rng, counts = random.Random(seed), Counter[str]()
    whole, all_layouts = frame(), {} if only_pickles else layouts()
    rows = [(user, item, 1_000_000_000 + 60 * item) for user in range(30) for item in range(user % 7, user % 7 + 15)]
    limited(SLOWEST)
    until = time.monotonic() + seconds
    while time.monotonic() < until or counts.total() < LEAST:
        name = rng.choice(list(all_layouts)) if all_layouts else "pickle"
        folder = FOUND / f"{name}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            if all_layouts:
                all_layouts[name](folder, rows)
                file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
                file.write_bytes(damaged(file.read_bytes(), rng))
                signal.alarm(SLOWEST)
                source = importlib.import_module(f"napo.data.sources.{SOURCES[name.partition('-')[0]]}")
                source.read(folder, source.Options(), max_bad=0.1)
            else:
                content = damaged(whole, rng, of_pickle=True)
                (folder / "made.df").write_bytes(content)
                signal.alarm(SLOWEST)
                pickles.read_frame(folder / "made.df", content, NAMES)
            counts[f"{name} read"] += 1
        except ValueError:
            counts[f"{name} refused"] += 1
        except BaseException as error:
            print(f"FOUND {type(error).__name__}: {str(error)[:200]}; the files are in {folder}", flush=True)
            return 1
        finally:
            signal.alarm(0)
        shutil.rmtree(folder)
    print(", ".join(f"{n} {what}" for what, n in sorted(counts.items())), flush=True)
    return 0


def work_with_atheris(seconds: float, seed: int) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    whole = frame()  # before anything is instrumented
    with atheris.instrument_imports(include=["napo.data.pickles"]):
        from napo.data import pickles
    corpus = FOUND / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "frame").write_bytes(whole)

    def one(content: bytes) -> None:
        with contextlib.suppress(ValueError):
            pickles.read_frame(Path("made.df"), content, NAMES)

    options = [
        f"-max_total_time={int(seconds)}",
        f"-timeout={SLOWEST}",
        f"-rss_limit_mb={MEMORY >> 20}",
        f"-seed={seed + 1}",
    ]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=["files", "pickles", "atheris"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "atheris":
        work_with_atheris(options.seconds, options.seed)
    if options.worker:
        return work(options.seconds, options.seed, options.worker == "pickles")
    FOUND.mkdir(parents=True, exist_ok=True)
    found = 0
    for worker in ("files", "atheris" if importlib.util.find_spec("atheris") else "pickles"):
        command = [sys.executable, __file__, "--worker", worker, "--seconds", str(options.seconds / 2)]
        done = subprocess.run([*command, "--seed", str(options.seed)], capture_output=True, text=True)
        lines = (done.stdout + done.stderr).splitlines()
        wanted = [line for line in lines if any(word in line for word in SAID)]
        print(
            f"{worker}: exit {done.returncode}",
            *wanted[-4:],
            *([] if done.returncode == 0 else lines[-8:]),
            sep="\n    ",
        )
        found |= done.returncode
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
