"""Fuzzing of a run folder, which may come from anybody: files of a small finished run are changed in many ways.

    python tests/fuzz/fuzz_runs.py --seconds 60 --seed 0

A change is a byte, a number, a row, a tensor; a file that is cut, gone, of another run, or replaced by a folder, a pipe
or a link. After each the run recommends, ranks the catalogue and is reported, whatever reads the file. What comes must
be what came before (the change does not matter), something else with a word (a line on stderr, a mark in the table), or
one line that names the file. All else is printed and counts as found: another result without a word, a failure that
does not say which file it is, a traceback, more than ``SLOWEST`` seconds of a command or more than ``MEMORY``.

It makes two runs itself, in half a minute; --runs FOLDER keeps them there for the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1] / "napo"))

SLOWEST = 60  # seconds of one command
MEMORY = 12 << 30
LEAST = 10  # changes, however busy the machine is
READ = (".json", ".parquet", ".safetensors")
VALUES = (None, True, -1, 0, 7, 1.5, 10**30, 1e308, float("nan"), "", "x", "\x1b]0;owned\x07", "../../x", [], [1], {})
NUMBER = re.compile(rb"(?<![\w.\"])-?\d+(?:\.\d+)?(?![\w.\"])")
OF_EVALUATION = ("predictions", "catalogue", "metrics", "comparisons", "stages/evaluate", "stages/cat", "data/")
NOT_OF_REPORTS = ("catalogue", "sasrec", "interactions", "users", "data/")
MARKS = ("†", "Not compared, because their predictions are not in the run")
"""Of a report."""
Change = tuple[str, Callable[[Path], Any]]


class Said(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


class Slow(BaseException):
    pass


# ---- changes --------------------------------------------------------------------------------------------------------


def json_changes(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(name, the whole value with one place changed), down to three levels."""
    for other in VALUES:
        yield f"{'.'.join(map(str, place)) or 'all'} = {other!r:.30}", other
    if len(place) < 3 and isinstance(value, dict):
        for key in value:
            yield f"{'.'.join(map(str, (*place, key)))} gone", {k: v for k, v in value.items() if k != key}
            for name, inner in json_changes(value[key], (*place, key)):
                yield name, {**value, key: inner}
    elif len(place) < 3 and isinstance(value, list) and value:
        yield f"{'.'.join(map(str, place))} shorter", value[1:]
        yield f"{'.'.join(map(str, place))} twice", [value[0], *value]
        for name, inner in json_changes(value[0], (*place, 0)):
            yield name, [inner, *value[1:]]


def table_changes(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    yield "no rows", table.slice(0, 0)
    yield "last row gone", table.slice(0, len(table) - 1)
    yield "first row twice", pa.concat_tables([table.slice(0, 1), table])
    yield "rows reversed", table.take(list(range(len(table)))[::-1])
    for place, name in enumerate(table.column_names):
        column = table.column(place)
        yield f"{name} gone", table.drop([name])
        yield f"{name} twice", table.append_column(name, column)
        values = column.to_pylist()
        firsts: list[Any] = [None]
        if pa.types.is_integer(column.type) and values[0] is not None:
            firsts += [-1, 2**40, values[0] + 1]
            yield f"{name} as floats", table.set_column(place, name, column.cast(pa.float64()))
            yield f"{name} as text", table.set_column(place, name, column.cast(pa.string()))
            yield f"{name} reversed", table.set_column(place, name, pa.array(values[::-1], column.type))
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            firsts += ["", "\x1b]0;owned\x07", values[-1]]
            yield f"{name} as numbers", table.set_column(place, name, pc.utf8_length(column))
        elif pa.types.is_list(column.type) and values[0]:
            firsts += [[], values[0][::-1], values[0][:-1], [*values[0], values[0][0]]]
            if pa.types.is_floating(column.type.value_type):
                firsts += [[float("nan"), *values[0][1:]], [1e308] * len(values[0]), [0.0] * len(values[0])]
            else:
                firsts += [[-1, *values[0][1:]], [2**40, *values[0][1:]], [None, *values[0][1:]]]
        for first in firsts:
            changed = pa.array([first, *values[1:]], column.type)
            yield f"{name}[0] = {first!r:.40}", table.set_column(place, name, changed)


def tensor_changes(path: Path) -> Iterator[tuple[str, Any]]:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path)
    yield "no tensors", {}
    for name in list(tensors)[:: max(1, len(tensors) // 6)]:
        one = tensors[name]
        others = {
            "NaN": one.clone().fill_(float("nan")),
            "infinite": one.clone().fill_(float("inf")),
            "1e37": one.clone().fill_(1e37),
            "doubled": one * 2,
            "whole numbers": one.to(torch.int64),
            "fp64": one.double(),
            "one longer": torch.cat([one.reshape(-1), one.reshape(-1)[:1]]),
        }
        yield f"{name} gone", {key: tensor for key, tensor in tensors.items() if key != name}
        for kind, other in others.items():
            yield f"{name} {kind}", {**tensors, name: other}
    yield "one more", {**tensors, "other\x1b[2J": torch.zeros(2)}


def writing(data: bytes) -> Callable[[Path], Any]:
    return lambda target: target.write_bytes(data)


def linking(to: str) -> Callable[[Path], Any]:
    return lambda target: (target.unlink(), target.symlink_to(to))


def kinds_of_files(path: Path, other: Path) -> list[Change]:
    """The file is not there, or is not a file, or is another one; ``other`` is that of another run."""
    found: list[Change] = [
        ("gone", Path.unlink),
        ("empty", writing(b"")),
        ("no text", writing(b"\xff\xfe\x00\x80" * 9)),
        ("folder", lambda target: (target.unlink(), target.mkdir())),
        ("pipe", lambda target: (target.unlink(), os.mkfifo(target))),
        ("link to itself", linking(path.name)),
        ("link to nothing", linking("nothing")),
        ("link to /dev/null", linking("/dev/null")),
        ("link to /dev/zero", linking("/dev/zero")),
    ]
    if path.parent.name != "run":
        found.append(("its folder is gone", lambda target: shutil.rmtree(target.parent)))
    beside = [file for file in sorted(path.parent.glob(f"*{path.suffix}")) if file != path]
    found += [(f"link to {file.name}", linking(file.name)) for file in beside[:3]]
    if other.is_file() and other.read_bytes() != path.read_bytes():
        found += [("of another run", writing(other.read_bytes())), ("link to another run's", linking(str(other)))]
    return found


def damage(content: bytes, rng: random.Random) -> Change:
    """A byte or a number changed, or the file cut."""
    kind = rng.choice(("byte", "number", "cut"))
    at = rng.randrange(len(content))
    numbers = list(NUMBER.finditer(content)) if kind == "number" else []
    if numbers:
        one = rng.choice(numbers)
        new = rng.choice((b"0", b"-1", b"1e9", b"%d" % rng.randrange(1000), one[0] + b"1", one[0] + b"5e-1"))
        return f"{one[0]!r:.30} at {one.start()} = {new!r}", writing(
            content[: one.start()] + new + content[one.end() :]
        )
    if kind == "cut":
        return f"cut at {at} of {len(content)}", writing(content[:at])
    return f"byte {at} of {len(content)}", writing(
        content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    )


def changes_of_content(path: Path) -> list[Change]:
    """Changes that a reader of the format can follow."""
    if path.suffix == ".json":
        found = [
            (name, writing(json.dumps(value).encode())) for name, value in json_changes(json.loads(path.read_text()))
        ]
        return [*found, ("100,000 brackets", writing(b"[" * 100_000)), ("10,000 digits", writing(b"9" * 10_000))]
    if path.suffix == ".parquet":
        found = []
        for name, table in table_changes(pq.read_table(path)):
            sink = io.BytesIO()
            pq.write_table(table, sink)
            found.append((name, writing(sink.getvalue())))
        return found
    from safetensors.torch import save

    return [(name, writing(save(tensors, {"format": "pt"}))) for name, tensors in tensor_changes(path)]


# ---- what reads them ------------------------------------------------------------------------------------------------


def called(*arguments: object) -> Said:
    """``napo ARGUMENTS`` in this process."""
    from napo import cli

    sys.argv = ["napo", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    signal.alarm(SLOWEST)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code, err = 99, io.StringIO(f"{type(error).__name__} came through: {error}")
        finally:
            signal.alarm(0)
    return Said(int(code), out.getvalue(), err.getvalue())


def commands(file: str, user: str) -> list[tuple[str, ...]]:
    """What reads the file of a run, which they name RUN."""
    asked = ("recommend", "--run", "RUN", "--json", "--top", "5")
    chosen: list[tuple[str, ...]] = []
    if not file.startswith(OF_EVALUATION):
        model = Path(file).parts[1] if file.startswith("models") else "napo+sasrec"
        chosen += [(*asked, "--user", user, "--model", model), (*asked, "--history", "3", "--history", "5")]
    if file.startswith(("stages", "config", "catalogue", "data/", ".lock")):
        judged = ("evaluate", "--data", "RUN/data", "--run", "RUN", "--models", "popularity", "--catalogue")
        chosen.append(judged)
    if not file.startswith(NOT_OF_REPORTS):
        chosen.append(("report", "RUN", "--out", "RUN.md"))
    return chosen


def answer(run: Path, asked: tuple[str, ...]) -> Said:
    """What a command says, and what it wrote, with RUN for the folder."""
    said = called(*(argument.replace("RUN", str(run)) for argument in asked))
    out = said.out
    if asked[0] == "report" and said.code == 0:
        out += run.with_suffix(".md").read_text()
    if asked[0] == "evaluate" and said.code == 0:  # seconds differ from call to call
        out = "".join(line for line in out.splitlines(keepends=True) if not line.endswith((" s\n", "skipped\n")))
    return Said(said.code, out.replace(str(run), "RUN"), said.err.replace(str(run), "RUN"))


def judged(before: Said, after: Said, file: str) -> str:
    """In capitals what must not be."""
    code, out, err = after
    if {"\x1b", "\x07"} & set(out + err):
        return "ESCAPES"
    if code == 99:
        return "SLOW" if err.startswith("Slow") else "TRACEBACK"
    lines = err.strip().splitlines()
    if code == 0:
        if out == before.out:
            return "said" if err != before.err else "same"
        return "said" if lines and err != before.err else "marked" if any(mark in out for mark in MARKS) else "DIFFERS"
    errors = [line for line in lines if line.startswith("napo: ")]
    if code not in (1, 2) or len(errors) != 1 or "--debug" in err or "Traceback" in err:
        return "UNCLEAR"
    parts = Path(file)
    named = any(part in err for part in {parts.name, parts.stem.removesuffix(".json"), parts.parent.name} - {""})
    return "refused" if named else "UNNAMED"


# ---- runs -----------------------------------------------------------------------------------------------------------


def make_run(folder: Path, seed: int) -> None:
    """``folder/run``: a demo that ran to its end, with its catalogue ranked."""
    import small_world

    from napo.demo import demo

    shutil.rmtree(folder, ignore_errors=True)
    small_world.recbole_files(folder / "files", seed=seed)
    small_world.model(folder / "model")
    run = folder / "run"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        demo(run, model=str(folder / "model"), source=folder / "files", budget=small_world.budget(), seed=seed)
    names = ("--models", "popularity,sasrec,napo", "--catalogue")
    said = called("evaluate", "--data", run / "data", "--run", run, *names)
    assert said.code == 0, said
    for report in run.glob("report.*"):  # megabytes that are copied for every change
        report.unlink()
    (folder / "made").touch()


class Fuzzer:
    def __init__(self, base: Path, copies: Path, seed: int) -> None:
        self.run, self.other, self.copies = base / "0" / "run", base / "1" / "run", copies
        self.rng = random.Random(seed)
        self.user = str(pq.read_table(self.run / "users.parquet").column("source_id")[3])
        paths = [path for path in self.run.rglob("[!.]*") if path.suffix in READ]
        self.files = [".lock", *sorted(str(path.relative_to(self.run)) for path in paths)]
        self.before: dict[tuple[str, ...], Said] = {}
        self.contents: dict[str, list[Change]] = {}
        self.number = 0

    def drawn(self, file: str) -> Change:
        """One of three sorts of changes, so that the many places of a file's format do not crowd out the rest."""
        path = self.run / file
        sort = self.rng.randrange(3 if path.suffix in READ else 2)
        if sort == 0:
            return self.rng.choice(kinds_of_files(path, self.other / file))
        if sort == 1:
            return damage(path.read_bytes(), self.rng)
        if file not in self.contents:
            self.contents[file] = changes_of_content(path)
        return self.rng.choice(self.contents[file])

    def copied(self) -> Path:
        """A copy under a name of its own: what is said once for each run is said again."""
        for old in self.copies.iterdir():
            shutil.rmtree(old)
        self.number += 1
        return shutil.copytree(self.run, self.copies / f"{self.number}" / "run")

    def tried(self, file: str) -> Iterator[tuple[str, str]]:
        """Changes the file; of each command how it ended and, in words, what was done."""
        name, change = self.drawn(file)
        for asked in commands(file, self.user):
            if asked not in self.before:
                self.before[asked] = answer(self.copied(), asked)
                assert self.before[asked].code == 0, self.before[asked]
            run = self.copied()
            target = run / file
            times = {path: path.stat().st_mtime_ns for path in (target, target.parent)}  # by which reports sort
            change(target)
            for path, when in times.items():
                with contextlib.suppress(OSError):
                    os.utime(path, ns=(when, when), follow_symlinks=False)
            after = answer(run, asked)
            told = f"{file}: {name}: napo {' '.join(asked)}: {after.code} {after.err[-300:]!r}"
            yield judged(self.before[asked], after, file), told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose names begin so")
    parser.add_argument("--runs", type=Path, help="a folder in which the two runs are kept for the next call")
    options = parser.parse_args()
    os.environ.setdefault("NAPO_DTYPE", "fp32")

    def stop(*_: Any) -> None:
        raise Slow(f"more than {SLOWEST} s")

    signal.signal(signal.SIGALRM, stop)
    counts: Counter[str] = Counter()
    changes = 0
    with tempfile.TemporaryDirectory() as temporary:
        base, copies = options.runs or Path(temporary) / "runs", Path(temporary) / "copies"
        copies.mkdir()
        for number in range(2):
            if not (base / str(number) / "made").is_file():
                make_run(base / str(number), number)
        import napo.evaluation.report
        import napo.recommend  # noqa: F401  what a command imports takes none of its seconds

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        fuzzer = Fuzzer(base, copies, options.seed)
        files = [file for file in fuzzer.files if file.startswith(options.only)]
        until = time.monotonic() + options.seconds
        while time.monotonic() < until or changes < LEAST:
            changes += 1
            for kind, told in fuzzer.tried(fuzzer.rng.choice(files)):
                counts[kind] += 1
                if kind.isupper():
                    print(f"FOUND {kind}: {told}", flush=True)
    print(f"{changes} changes: {', '.join(f'{number} {kind}' for kind, number in sorted(counts.items()))}", flush=True)
    return 1 if any(kind.isupper() for kind in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
