"""Results of a benchmark: rows that are printed as a table and written as JSON, its budget, and its failures."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import device
from benchmarks.machine import RESULTS, facts_of_gpu, facts_of_machine, slug

OUT_OF_MEMORY = "out of memory"  # no error of a benchmark


def reason_of(failure: Exception) -> str:
    """One line."""
    if isinstance(failure, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    first = (str(failure).strip() or type(failure).__name__).splitlines()[0]
    return f"failed: {type(failure).__name__}: {first[:200]}"


@dataclass
class Report:
    """Rows of a benchmark: printed as a table, written as JSON with hardware and versions."""

    name: str
    options: argparse.Namespace | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # what of ours or of the baseline failed or was wrong
    began: float = field(default_factory=time.perf_counter)
    day: str = ""  # in the name of the JSON file: several benchmarks write into one, also past midnight

    def __post_init__(self) -> None:
        self.day = getattr(self.options, "day", None) or f"{datetime.now(timezone.utc):%Y-%m-%d}"
        if device.on_gpu():
            facts_of_gpu()  # asked for now, because a device in an error state does not answer

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.began

    def time_left(self) -> float:
        """Seconds of the budget."""
        budget = getattr(self.options, "budget", None)
        return float("inf") if budget is None else budget - self.spent

    def has_time(self, case: str, needs: float = 0.0) -> bool:
        """Whether the budget allows another case of `needs` seconds; a case that it does not allow is named."""
        if self.time_left() > needs:
            self.say(case)
            return True
        self.left_out.append(case)
        why = f"{self.time_left():.0f} s are left, it takes {needs:.0f}" if needs else "the time is over"
        print(f"{self.name}, {case}: left out, {why}", file=sys.stderr)
        return False

    def say(self, what: str) -> None:
        print(f"[{self.spent:5.0f} s] {self.name}: {what}", file=sys.stderr, flush=True)

    def add(self, case: str, variant: str, **facts: Any) -> None:
        self.rows.append({"case": case, "variant": variant, **facts})

    def put(self, case: str, rows: list[dict[str, Any]]) -> None:
        """Sets the rows of a case, in place of earlier ones."""
        had = [at for at, row in enumerate(self.rows) if row["case"] == case]
        others = [row for row in self.rows if row["case"] != case]
        at = had[0] if had else len(others)
        self.rows = [*others[:at], *({"case": case, **row} for row in rows), *others[at:]]

    @contextmanager
    def guarded(self, case: str, variant: str) -> Iterator[None]:
        """A failure inside becomes a row that names it, and the rest goes on."""
        try:
            yield
            return
        except Exception as failure:
            note = reason_of(failure)
        self.add(case, variant, note=note)
        self.say(f"{case}, {variant}: {note}")
        if note != OUT_OF_MEMORY:
            self.failed.append(f"{case}, {variant}: {note}")
        if not device.answers():
            self.end(f"{case}, {variant}: {note}")

    def end(self, what: str) -> None:
        """Writes the results so far and ends the program."""
        self.write()
        raise SystemExit(f"{self.name}, {what}; the device is in an error state: this program ends here")

    def print(self) -> None:
        """One table for all cases that have the same columns."""
        cases: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            cases.setdefault(row["case"], []).append(row)
        tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for rows in cases.values():
            columns = tuple(dict.fromkeys(key for row in rows for key in row))
            tables.setdefault(columns, []).extend(rows)
        for columns, rows in tables.items():
            _print_table(columns, rows)

    def write(self) -> Path:
        """Puts the rows into results/DATE-HARDWARE.json, beside what other benchmarks left there. Called after every
        case, so that a run that is cut short leaves what it has."""
        facts = facts_of_machine(device.current)
        folder = getattr(self.options, "results", RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.day}-{slug(facts)}.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        record[self.name] = {
            "machine": facts,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(self.spent, 1),
            "left_out": self.left_out,
            "failed": self.failed,
            "rows": self.rows,
        }
        aside = path.with_suffix(".json.tmp")
        aside.write_text(json.dumps(record, indent=1) + "\n")
        aside.replace(path)
        return path

    def finish(self) -> None:
        """The last write, with the table. Ends the program with status 1 where something of ours failed."""
        if self.rows:
            self.print()
        print(f"{self.write()}: {self.name}")
        if self.failed:
            raise SystemExit("\n".join(f"{self.name}, {what}" for what in self.failed))


def _print_table(columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    for line in [columns, ["-" * width for width in widths], *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else str(value)
