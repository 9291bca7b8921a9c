"""``napo prepare``: from files of some format to the folder of PreparedData. The same input and seed give the same
bytes."""

from __future__ import annotations

import difflib
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from napo.files import read_json, refuse_special
from napo.options import made

from .filters import Filters
from .interactions import NOUNS, Log, Preset
from .parts import scratch
from .prepared import SPLITS, PreparedData, written_aside
from .sources import SOURCES, reader_of
from .split_kinds import SPLIT_KINDS
from .splits import Rows, split_by_time, split_by_user, split_leave_last_out
from .texts import changes, clean_title, shown
from .times import Units, stamps
from .titles import article_first, disambiguate
from .writing import CandidateLists, Sequences, write_table, write_tables

logger = logging.getLogger(__name__)

HELD_OUT = ("test_users", "val_users", "rows_per_user")
OF_A_LOG = ("split", "min_user", "min_item", *HELD_OUT, "max_untitled")
"""Options that say nothing of rows which come already split."""
DEFAULTS: dict[str, dict[str, Any]] = {"steam": {"min_user": 20, "min_item": 20}}


@dataclass(kw_only=True)
class PrepareOptions:
    """How a log becomes rows. None means the source's own default."""

    split: str | None = None
    """"user" (users held out whole), "leave-last-out" or "time" (two moments cut the whole log); null: user."""
    seed: int = 0
    """Draws the held-out users and the candidates; seed 0 gives the field's candidate lists."""
    min_user: int | None = None
    """Users with fewer interactions are dropped; null: 5, for steam 20."""
    min_item: int | None = None
    """Items with fewer interactions are dropped; null: 5, for steam 20."""
    history: int = 10
    """Items shown to a model."""
    min_history: int = 3
    """Rows with a shorter history are left out."""
    test_users: float = 0.1
    """Share (below 1) or number of users held out for the test; of interactions for a split by time."""
    val_users: float = 0.1
    """The same for validation."""
    rows_per_user: int = 1
    """Validation and test rows of each held-out user: the last so many; 0 takes every one."""
    candidates: int = 20
    """Length of the candidate lists, target included."""
    max_bad: float = 0.01
    """Share of bad lines above which a file is refused."""
    max_untitled: float = 0.2
    """Share of interactions whose item has no title above which the data set is refused."""

    def __post_init__(self) -> None:
        at_least = {"min_user": 1, "min_item": 1, "history": 1, "min_history": 1, "rows_per_user": 0, "candidates": 2}
        at_least["seed"] = 0
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in ("max_bad", "max_untitled"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")
        for name in ("val_users", "test_users"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (value >= 1 and value != int(value)):
                raise ValueError(f"{name}: expected a share below 1 or a whole number of users, got {value}")
        if self.split is not None and self.split not in SPLIT_KINDS:
            raise ValueError(f"split: expected one of {', '.join(SPLIT_KINDS)}, got {self.split!r}")


def split_options(given: Mapping[str, Any]) -> tuple[PrepareOptions, dict[str, Any]]:
    """Options by name -> those of ``prepare``, and the others, which are for the source's reader."""
    own = {field.name for field in fields(PrepareOptions)}
    reader_options = {name: value for name, value in given.items() if name not in own}
    return made(PrepareOptions, {name: value for name, value in given.items() if name in own}), reader_options


def prepare(
    source: str,
    path: str | Path,
    out: str | Path,
    options: PrepareOptions | None = None,
    reader_options: Mapping[str, Any] | None = None,
) -> PreparedData:
    """Read ``path`` as ``source`` and write the prepared data set to the folder ``out``.

    ``reader_options``: fields of the source's ``Options`` by name; None leaves one at its default.
    """
    options = options or PrepareOptions()
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {source!r}")
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"{path}: no such file or folder; give PATH, the folder (or the file) with the data of the source {source}"
        )
    # Readers look for files by name, and would say that such a one is not there, or wait for it.
    for file in (path, *(sorted(path.iterdir()) if path.is_dir() else ())):
        if not file.name.startswith("."):
            refuse_special(file)
    reader = reader_of(source)
    reader_names = {field.name for field in fields(reader.Options)}
    unknown = sorted(set(reader_options or {}) - reader_names)
    if unknown:
        known = sorted({field.name for field in fields(PrepareOptions)} | reader_names)
        near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(unknown[0], known, n=1))
        raise ValueError(f"{unknown[0]}: no option of the source {source}, which takes {', '.join(known)}{near}")
    reader_options = {name: value for name, value in (reader_options or {}).items() if value is not None}
    of_reader = made(reader.Options, reader_options)
    if getattr(of_reader, "noun", "Items") not in NOUNS:
        raise ValueError(f"noun: expected one of {', '.join(NOUNS)}, got {reader_options['noun']!r}")

    # Opened before reading, which may take minutes: an --out that cannot be written is reported at once.
    with written_aside(out) as aside:
        before = _made_with(Path(out), reader.Options)
        token = scratch.set(aside)  # goes with it, where the process is killed
        try:
            log = reader.read(path, of_reader, max_bad=options.max_bad)
            meta: dict[str, Any] = {"source": source, "reader_options": reader_options}
            if isinstance(log, Preset):
                meta |= _write_preset(aside, log, options)
            else:
                meta |= _write_log(aside, log, with_defaults(options, source))
            rows = meta["counts"]["rows"]
            if not any(rows.values()) if isinstance(log, Preset) else not rows["train"]:
                what = "is left" if isinstance(log, Preset) else "to train on"
                raise ValueError(
                    f"no row {what}: none of its split has {options.min_history} items before it (min_history); lower "
                    "that, give longer histories, or choose another split"
                )
        finally:
            scratch.reset(token)
        (aside / "dataset.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unused = OF_A_LOG if isinstance(log, Preset) else HELD_OUT if options.split == "leave-last-out" else ()
    _tell_unused(options, unused, f"source {source}" if isinstance(log, Preset) else f"split {options.split}")
    changed = changes(before, _made_with(Path(out), reader.Options)) if before else []
    if changed:
        logger.warning("%s: replaced a data set that was made with other options (%s)", out, "; ".join(changed))
    return PreparedData.load(out)


def _tell_unused(options: PrepareOptions, names: Sequence[str], what: str) -> None:
    """A warning for those of ``names`` that were given, as ``what`` settles what they ask for."""
    default = PrepareOptions()
    given = [name for name in names if getattr(options, name) != getattr(default, name)]
    if given:
        logger.warning("%s: without effect with the %s", ", ".join(given), what)


def _made_with(folder: Path, reader: type) -> dict[str, Any]:
    """Source and options of a prepared data set; none where there is no whole one. ``reader``: the options that a
    source has, and their defaults."""
    try:
        meta = read_json(folder / "dataset.json")
        return {"source": meta["source"], **asdict(reader()), **meta["reader_options"], **meta["options"]}
    except (ValueError, KeyError, TypeError):
        return {}


def with_defaults(settings: PrepareOptions, source: str) -> PrepareOptions:
    """The same with the source's own defaults where options are null and have one."""
    defaults: dict[str, Any] = {"split": "user", "min_user": 5, "min_item": 5} | DEFAULTS.get(source, {})
    return replace(settings, **{name: value for name, value in defaults.items() if getattr(settings, name) is None})


def _write_log(folder: Path, log: Log, settings: PrepareOptions) -> dict[str, Any]:
    """Filter, number, split and write; what ``dataset.json`` says."""
    log.settle_titles()
    filters = Filters(log.parts(), len(log.user_ids), len(log.item_ids))
    titled = np.fromiter((item in log.titles for item in log.item_ids), bool, len(log.item_ids))
    filters.keep_items("items without a title", titled)
    _check_titled(log, filters, settings)
    filters.sort()
    filters.first_meetings()
    filters.core(settings.min_user or 1, settings.min_item or 1)
    if not filters.steps[0]["interactions"]:
        left_out = [f"{reason}: {count}" for reason, count in log.report.get("left_out", {}).items()]
        bad = sum(file.get("bad_lines", 0) + file.get("bad_rows", 0) for file in log.report.get("files", [])[:1])
        why = "; ".join([*left_out, *([f"bad lines: {bad}"] if bad else [])]) or "its file has none"
        raise ValueError(f"no interaction was read ({why})")
    if not filters.size:
        dropped = "; ".join(f"{step['step']}: {step['dropped']}" for step in filters.steps[1:])
        raise ValueError(
            f"no interaction of {filters.steps[0]['interactions']} is left after the filters ({dropped}); "
            "lower min_user or min_item"
        )

    ties = filters.ties()
    if ties["neighbours"] and ties["equal_times"] == ties["neighbours"]:
        logger.warning("all times of every user are equal: the order of the file is taken for the order of time")
    # Users are numbered as they come in the log, items as they come in the file of titles.
    user_numbers = np.flatnonzero(filters.user_counts)
    renumbered_users = np.cumsum(filters.user_counts > 0) - 1
    starts = np.append(0, np.cumsum(filters.user_counts[user_numbers]))
    numbers = np.fromiter((log.item_ids.get(item, -1) for item in log.titles), np.int64, len(log.titles))
    kept = numbers[(numbers >= 0) & (filters.item_counts[numbers] > 0)]
    renumbered = np.full(len(log.item_ids), -1, np.int32)
    renumbered[kept] = np.arange(len(kept))
    times, said_of_times = _times(filters, whole=settings.split == "time")
    repeated = _write_items(folder, log, kept)
    # The catalogue's texts are not needed any more, and all items of the log are about to be in memory at once.
    for texts in (log.item_ids, log.titles, log.years):
        texts.clear()
    item = np.empty(filters.size, np.int32)

    def interactions() -> Iterator[dict[str, np.ndarray]]:
        begin = 0
        for part in range(len(filters.parts)):
            user, number, time, *_ = filters.parts.load(part)
            here = slice(begin, begin + len(user))
            begin = here.stop
            item[here] = renumbered[number]
            yield {
                "user_id": renumbered_users[user],
                "item_id": item[here].astype(np.int64),
                "timestamp": time if times is None else times[here],
            }

    write_tables(folder / "interactions.parquet", interactions())
    filters.parts.close()
    source_users = list(log.user_ids)
    write_table(
        folder / "users.parquet",
        {"user_id": np.arange(len(user_numbers)), "source_id": [source_users[number] for number in user_numbers]},
    )
    rows = _split(starts, times, settings)
    sequences = Sequences(item, starts, len(kept))
    for name, part in rows.items():
        draw = sequences.training_lists if name == "train" else sequences.evaluation_lists
        lists = draw(count=settings.candidates, seed=settings.seed)
        sequences.write_rows(folder / f"{name}.parquet", part, lists, shown=settings.history)
    return {
        "noun": log.noun,
        "has_users": True,
        "users": "as the source names them (users.parquet)",
        "options": asdict(settings),
        "counts": {
            "users": len(user_numbers),
            "items": len(kept),
            "interactions": filters.size,
            "rows": {name: len(part) for name, part in rows.items()},
            "users_with_rows": {name: int(np.count_nonzero(part.counts)) for name, part in rows.items()},
        },
        "steps": filters.steps,
        "ties": ties,
        **said_of_times,
        "repeated_titles": {"count": len(repeated), "first": repeated[:10]},
        **log.report,
    }


def _write_items(folder: Path, log: Log, kept: np.ndarray) -> list[str]:
    """``items.parquet``, of the log's items ``kept`` in their new order; the titles that several of them have."""
    names = list(log.item_ids)
    ids = [names[number] for number in kept.tolist()]
    titles, repeated = disambiguate(
        [article_first(log.titles[name]) if log.noun == "Movies" else log.titles[name] for name in ids],
        [log.years.get(name, "") for name in ids],
    )
    write_table(folder / "items.parquet", {"item_id": np.arange(len(ids)), "title": titles, "source_id": ids})
    return repeated


def _check_titled(log: Log, filters: Filters, settings: PrepareOptions) -> None:
    """Ids that the two files spell differently would drop interactions in silence."""
    read, dropped = filters.steps[0]["interactions"], filters.steps[-1]["dropped"]
    if dropped <= settings.max_untitled * read:
        return
    without = [item for item in log.item_ids if item not in log.titles]
    first = ", ".join(shown(item, 40) for item in without[:3])
    known = ", ".join(shown(item, 40) for item in list(log.titles)[:3]) or "none"
    raise ValueError(
        f"{dropped} of {read} interactions ({_percent(dropped, read)}), of {len(without)} of {len(log.item_ids)} "
        f"items, have no title, more than max_untitled {100 * settings.max_untitled:.4g}% allows; the first: {first}; "
        f"items with a title: {known}; are the ids spelled alike?"
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f}%"


def summary(meta: dict[str, Any]) -> list[str]:
    """Lines about a prepared log: what each step dropped, where times do not decide an order, and which files may have
    been cut."""
    counts = meta["counts"]
    ends = [
        f"{file['name']}: the last line, {file['last_line']}, has no line end; if the file was cut, fetch it again"
        for file in meta.get("files", [])
        if file.get("last_line")
    ]
    ends += _same_titles(meta.get("repeated_titles", {}))
    if "rows_read" in counts:
        return ends + [
            f"{split}: {counts['rows'][split]} of {rows} rows kept, the others have too short a history"
            for split, rows in counts["rows_read"].items()
            if rows != counts["rows"][split]
        ]
    steps = meta.get("steps", [])
    read = steps[0]["interactions"] if steps else 0
    lines = ends + [
        f"{step['step']}: {step['dropped']} of {read} interactions dropped ({_percent(step['dropped'], read)}), "
        f"{step['interactions']} left"
        for step in steps[1:]
    ]
    ties = meta.get("ties", {})
    if ties.get("equal_times"):
        share = _percent(ties["equal_times"], ties["neighbours"])
        lines.append(
            f"equal times: {ties['equal_times']} of {ties['neighbours']} neighbours ({share}), ordered as in the file"
        )
    if steps and "timestamps" in meta:
        lines.append(f"timestamps: {meta['timestamps']}")
    return lines


def _same_titles(repeated: dict[str, Any]) -> list[str]:
    if not repeated.get("count"):
        return []
    told = f"titles of several items: {repeated['count']}, the first is {shown(repeated['first'][0], 60)!r}"
    return [f"{told}; a year or (2), (3) behind a title tells them apart"]


def _warn_of_units(units: Units) -> dict[str, int]:
    """Times of several units have no common order. How many seem to have each, for ``dataset.json``."""
    mixed = units.mixed()
    if mixed:
        logger.warning(
            "times: %s; their order is not that of time: write all in one unit",
            ", ".join(f"{count} look like {name}" for name, count in mixed.items()),
        )
    return mixed


def _given_lists(given: np.ndarray) -> CandidateLists:
    return lambda _, part: given[part]


def _times(filters: Filters, *, whole: bool) -> tuple[np.ndarray | None, dict[str, Any]]:
    """``stamps`` of all times, None where they are whole numbers and nobody needs them at once; and what
    ``dataset.json`` says of them."""
    needed = filters.parts.width > 3 or whole
    limbs = [np.empty(filters.size if needed else 0, np.int64) for _ in range(2, filters.parts.width)]
    units = Units()
    begin = 0
    for part, size in enumerate(filters.parts.sizes):
        columns = filters.parts.load(part)[2:]
        units.add(columns[0])
        if needed:
            for limb, column in zip(limbs, columns, strict=True):
                limb[begin : begin + size] = column
        begin += size
    mixed = _warn_of_units(units)
    said: dict[str, Any] = {"mixed_times": mixed} if mixed else {}
    if not needed:
        return None, said
    times, unit = stamps(limbs)
    return times, {"timestamps": unit, **said} if unit else said


def _split(starts: np.ndarray, times: np.ndarray | None, settings: PrepareOptions) -> dict[str, Rows]:
    if settings.split == "leave-last-out":
        return split_leave_last_out(starts, min_history=settings.min_history)
    if settings.split == "time":
        assert times is not None
        return split_by_time(
            starts,
            times,
            min_history=settings.min_history,
            val_share=settings.val_users,
            test_share=settings.test_users,
            rows_per_user=settings.rows_per_user,
        )
    return split_by_user(
        starts,
        min_history=settings.min_history,
        val_users=settings.val_users,
        test_users=settings.test_users,
        rows_per_user=settings.rows_per_user,
        seed=settings.seed,
    )


def _write_preset(folder: Path, preset: Preset, settings: PrepareOptions) -> dict[str, Any]:
    """Write a source that brings its split; what ``dataset.json`` says. Rows that are too short are dropped."""
    num_items = len(preset.titles)
    titles, repeated = disambiguate([clean_title(title) for title in preset.titles], preset.years or [""] * num_items)
    write_table(
        folder / "items.parquet", {"item_id": np.arange(num_items), "title": titles, "source_id": preset.source_ids}
    )
    users = preset.rebuilt_users()
    # Users that are not known: each row is a sequence of its own.
    parts = users or {split: [[*past, last] for past, last in rows] for split, rows in preset.rows.items()}
    every = [sequence for split in SPLITS for sequence in parts[split]]
    sizes = np.array([len(sequence) for sequence in every], np.int64)
    log = np.fromiter(itertools.chain.from_iterable(every), np.int64)
    starts = np.append(0, np.cumsum(sizes))
    sequences = Sequences(log, starts, num_items)
    counts: dict[str, Any] = {"rows": {}, "rows_read": {split: len(preset.rows[split]) for split in SPLITS}}
    first = 0
    for split in SPLITS:
        members = np.arange(first, first + len(parts[split]))
        first += len(members)
        ends = sizes[members]
        # Users that are rebuilt have a row at each position, others only the last.
        read = Rows(members, np.zeros_like(ends) if users else ends - 1, ends)
        rows = read.at_least(settings.min_history)
        if preset.lists.get(split):
            lists = _given_lists(np.array(preset.lists[split], np.int64)[read.position >= settings.min_history])
        elif split == "train":
            lists = sequences.training_lists(count=settings.candidates, seed=settings.seed)
        else:
            lists = sequences.evaluation_lists(count=settings.candidates, seed=settings.seed, shown=settings.history)
        path = folder / f"{split}.parquet"
        sequences.write_rows(path, rows, lists, shown=settings.history, users_known=bool(users))
        counts["rows"][split] = len(rows)
    # The source has no times: an interaction's is its place in the user's sequence.
    place = np.arange(len(log)) - np.repeat(starts[:-1], sizes)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    known = slice(None) if users else slice(0)
    write_table(
        folder / "interactions.parquet", {"user_id": owner[known], "item_id": log[known], "timestamp": place[known]}
    )
    counts |= {"items": num_items, "interactions": len(log) if users else None, "users": len(sizes) if users else None}
    counts["users_by_split"] = {split: len(parts[split]) for split in SPLITS} if users else None
    return {
        "noun": preset.noun,
        "has_users": bool(users),
        "users": "rebuilt from the rows" if users else "unknown: wherever users count, each row counts as one",
        "timestamps": "place in the user's sequence; the source has no times" if users else "none",
        "options": asdict(settings),
        "counts": counts,
        "repeated_titles": {"count": len(repeated), "first": repeated[:10]},
        **preset.report,
    }
