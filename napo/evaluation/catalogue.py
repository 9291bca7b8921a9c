"""Evaluation on the whole catalogue: every model ranks every item for every held-out row.

A language model's ranking is exact: the probability of every title, not of a sample. Beside it stands what is served:
SASRec retrieves, the model ranks what was retrieved. Its combination with SASRec is judged in the same pass.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from napo import ranks
from napo.data.prepared import PreparedData
from napo.data.texts import shown
from napo.evaluation import metrics
from napo.evaluation.differences import Judged, Pair, pairs
from napo.evaluation.doubts import MARK, doubts, weights_sha256
from napo.evaluation.evaluate import check_data
from napo.evaluation.held_out import HeldOut
from napo.evaluation.parts import shared_parts
from napo.evaluation.records import (
    BIAS,
    CUTOFFS,
    check_not_lost,
    check_same_rows,
    read_catalogue_ranks,
    read_catalogue_records,
)
from napo.files import content_hash, replacing, text_hash, write_json
from napo.language_models.bases import Bases
from napo.progress import progress
from napo.recommenders.combination import Combination, Fitted, combined_name
from napo.recommenders.protocol import ScoringOptions
from napo.recommenders.registry import BASELINES, available, combinations_of, find
from napo.runs import Run

logger = logging.getLogger(__name__)

DEPTH = max(CUTOFFS)
AT = 10
"""The length of the lists whose popularity and diversity are measured."""
BLOCK = 64
"""Rows that are ranked and then kept: an interrupted evaluation goes on behind them."""
FOLDER = "catalogue"
WHOLE = "catalogue"
RETRIEVER = "sasrec"
MET_ITEMS = ("exclude", "include")
FIGURES = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr@10")


@dataclass(frozen=True, kw_only=True)
class CatalogueOptions:
    """How the whole catalogue is ranked."""

    split: str = "test"
    """Which rows: ``test``, or ``val`` while tuning."""
    limit: int | None = None
    """So many rows, the same ones for every model; None takes all."""
    met_items: str = "exclude"
    """Items of the row's history: ``exclude`` them from what is ranked (the right one never is), or ``include``."""
    retrieve: int = 100
    """SASRec's first so many items, which a language model ranks beside ranking all."""

    def __post_init__(self) -> None:
        if self.split not in ("val", "test"):
            raise ValueError(f"split: expected val or test; got {self.split!r}")
        if self.met_items not in MET_ITEMS:
            raise ValueError(f"met_items: expected {' or '.join(MET_ITEMS)}; got {self.met_items!r}")
        for name in ("limit", "retrieve"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1; got {value}")


@dataclass(frozen=True)
class Rows:
    """n held-out rows."""

    numbers: NDArray[np.int64]  # (n,) position in the split
    users: NDArray[np.int64]  # (n,) codes
    histories: list[list[int]]
    targets: NDArray[np.int64]  # (n,)
    sha256: str

    @classmethod
    def of(cls, data: PreparedData, options: CatalogueOptions) -> Rows:
        rows = HeldOut.of(data, options.split, options.limit)
        rules = [options.split, options.met_items, metrics.TIES]  # ranks by other rules do not compare
        text = json.dumps([*rules, rows.numbers.tolist(), rows.targets.tolist()])
        return cls(rows.numbers, rows.users, rows.histories, rows.targets, text_hash(text))


def evaluate_catalogue(
    data: PreparedData,
    run: Run,
    models: Sequence[str],
    options: CatalogueOptions | None = None,
    *,
    foreign_data: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Rank the whole catalogue with ``models`` and return ``catalogue.json``: records and differences of all models
    that the run has judged so. A model that was judged before, and is unchanged, is not judged again. ``overwrite``:
    figures of fewer rows, other data, another split or rule for met items may take the place of what is there."""
    options = options or CatalogueOptions()
    plan = _plan(data, run, models, options, foreign_data, overwrite)
    rows, note, intact = plan.rows, plan.note, plan.combinations
    for name in plan.left_out:
        logger.warning("models: %s is left out (%s)", name, shown(plan.left_out[name], 1500))
    popularity = data.training_counts()
    train = content_hash(data.path / "train.parquet")
    bases = Bases()
    with run.writing():
        for lead, family in plan.families.items():
            retriever = find(run, RETRIEVER).fingerprint(run) if _retrieves(run, lead) else None

            def work(aside: Path, lead: str = lead, family: list[str] = family) -> None:
                ranker = _Ranker(data, run, lead, family, intact, options, bases)
                records, found = _judge(data, run, ranker, rows, popularity, note, aside / "blocks")
                if ranks.rank() > 0:
                    return
                (aside / FOLDER).mkdir(exist_ok=True)
                found.to_parquet(aside / FOLDER / f"{lead}.parquet")
                write_json(aside / FOLDER / f"{lead}.json", records)

            run.stage(
                f"catalogue-{lead}",
                work,
                options=asdict(options),
                inputs={
                    "models": {name: plan.fingerprints[name] for name in family},
                    "retriever": retriever,
                    "rows": rows.sha256,
                    "train": train,
                    **note,
                },
                outputs=[f"{FOLDER}/{lead}.json", f"{FOLDER}/{lead}.parquet"],
                ask=False,  # figures are made again from what is still there
            )
        return ranks.told(lambda: collect(run))


def check_catalogue(
    data: PreparedData,
    run: Run,
    models: Sequence[str],
    options: CatalogueOptions | None = None,
    *,
    foreign_data: bool = False,
    overwrite: bool = False,
) -> None:
    """Raise ValueError where ``evaluate_catalogue`` would before it computes anything: for those who have something
    else to compute first."""
    _plan(data, run, models, options or CatalogueOptions(), foreign_data, overwrite)


@dataclass(frozen=True)
class _Plan:
    rows: Rows
    families: dict[str, list[str]]  # by model itself and its combination, where one was fitted to it as it is
    fingerprints: dict[str, str]
    combinations: Mapping[str, Fitted]
    left_out: dict[str, str]  # by combination why it does not fit
    note: dict[str, str]


def _plan(
    data: PreparedData, run: Run, models: Sequence[str], options: CatalogueOptions, foreign_data: bool, overwrite: bool
) -> _Plan:
    rows = Rows.of(data, options)
    for name in models:
        find(run, name)
    intact, others = combinations_of(run)
    # A combination is judged with its language model, whose scores it takes.
    leads = dict.fromkeys(name.split("+")[0] for name in models)
    families = {lead: [lead, *filter(intact.__contains__, [combined_name(lead)])] for lead in leads}
    fingerprints = {name: find(run, name).fingerprint(run) for family in families.values() for name in family}
    note = check_data(data, run, models, foreign_data)
    if not overwrite:
        places = {lead: run.path / FOLDER / f"{lead}.json" for lead in leads}
        protocol = {"split": options.split, "met_items": options.met_items, **note}
        weights = partial(weights_sha256, run)
        check_not_lost(places, len(rows.numbers), protocol, "figures over the catalogue", weights=weights)
    left_out = {name: others[name] for name in map(combined_name, leads) if name in others}
    return _Plan(rows, families, fingerprints, intact, left_out, note)


def _retrieves(run: Run, lead: str) -> bool:
    return lead not in BASELINES and RETRIEVER in available(run)


def _judge(
    data: PreparedData,
    run: Run,
    ranker: _Ranker,
    rows: Rows,
    popularity: NDArray[np.int64],
    note: dict[str, str],
    kept: Path,
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """The records of a model and its combination, by what was ranked, and every row's rank in each."""
    began = time.monotonic()
    blocks = _blocks(ranker, rows, kept)
    columns: dict[str, Any] = {"row": rows.numbers, "user": rows.users, "next": rows.targets}
    records = []
    for entry, (name, ranked) in enumerate(ranker.entries):
        places = np.concatenate([block[f"ranks{entry}"] for block in blocks])
        top = np.concatenate([block[f"top{entry}"] for block in blocks])
        columns[_column(name, ranked)] = places
        records.append(
            {
                "model": name,
                "ranked": ranked,
                "n": len(places),
                "users": len(np.unique(rows.users)),
                "items": data.num_items,
                "weights_sha256": weights_sha256(run, name),
                **metrics.cutoff_figures(places, CUTOFFS),
                "hr@10_ci": metrics.interval((places <= 10).astype(float), rows.users),
                "ndcg@10_ci": metrics.interval(metrics.gains(places, 10), rows.users),
                **_bias(top, rows.histories, popularity),
                "by_popularity": _by_popularity(places, rows.targets, popularity),
                "protocol": {
                    "split": ranker.options.split,
                    "met_items": ranker.options.met_items,
                    "right": "one item a row, so Recall@k is HR@k",
                    "ties": metrics.TIES,
                    "bias": f"of the first {AT} of each list",
                    **note,
                },
                "rows_sha256": rows.sha256,
                "seconds": round(time.monotonic() - began, 1),
            }
        )
    return records, pd.DataFrame(columns)


def _blocks(ranker: _Ranker, rows: Rows, kept: Path) -> list[dict[str, NDArray[np.int64]]]:
    """What was ranked, block by block."""
    slices = [slice(begin, begin + BLOCK) for begin in range(0, len(rows.numbers), BLOCK)]
    files = [kept / f"{part.start}.npz" for part in slices]

    def compute(numbers: list[int]) -> dict[int, dict[str, NDArray[np.int64]]]:
        computed = {}
        users = sum(len(rows.targets[slices[number]]) for number in numbers)
        with progress(f"{ranker.lead}: catalogue", users, unit="users", quiet=ranks.rank() > 0) as bar:
            for number in numbers:
                part = slices[number]
                computed[number] = ranker.ranked(rows.histories[part], rows.targets[part])
                kept.mkdir(exist_ok=True)
                with replacing(files[number]) as aside, aside.open("wb") as handle:
                    np.savez(handle, **computed[number])  # type: ignore[arg-type]
                bar.advance(len(rows.targets[part]))
        return computed

    return shared_parts(ranker.lead, len(files), lambda number: _read_block(files[number]), compute)


def _read_block(file: Path) -> dict[str, NDArray[np.int64]] | None:
    """None where there is nothing that can be read: it is computed again."""
    try:
        with np.load(file) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, BadZipFile):
        return None


class _Ranker:
    """Loads the models when the first block needs them: what is kept needs none."""

    def __init__(
        self,
        data: PreparedData,
        run: Run,
        lead: str,
        family: list[str],
        combinations: Mapping[str, Fitted],
        options: CatalogueOptions,
        bases: Bases,
    ) -> None:
        self.data, self.run, self.lead, self.options, self.bases = data, run, lead, options, bases
        # Items of one score are listed in an order that says nothing: ids often follow popularity.
        self.order = np.random.default_rng(0).permutation(data.num_items)  # (I,) place of each item
        self.loaded: dict[str, Any] = {}
        self.combinations = combinations
        self.retrieves = _retrieves(run, lead)
        self.limit = None if lead in BASELINES else self._load(lead).most_items
        pool = self.limit or options.retrieve
        self.pool = min(pool, data.num_items)
        whole = [] if self.limit else [(name, WHOLE) for name in family]
        retrieved = [(name, f"{RETRIEVER}'s first {self.pool}") for name in family] if self.retrieves else []
        if not whole and not retrieved:
            raise ValueError(f"models: the prompts of {lead} list candidates, and no sasrec retrieves them; train one")
        self.entries = [*whole, *retrieved]

    def _load(self, name: str) -> Any:
        if name not in self.loaded:
            self.loaded[name] = find(self.run, name).load(self.run, self.data, ScoringOptions(bases=self.bases))
        return self.loaded[name]

    def ranked(self, histories: list[list[int]], targets: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Of each entry ``ranksE`` (b,) and ``topE`` (b, DEPTH)."""
        if self.options.met_items == "exclude":
            allowed = metrics.unmet_items(histories, targets, self.data.num_items)
        else:
            allowed = np.ones((len(targets), self.data.num_items), bool)
        scores, retrieved = self._scores(histories, targets, allowed)
        found = {}
        for entry, (name, ranked) in enumerate(self.entries):
            among = allowed if ranked == WHOLE else retrieved
            found[f"ranks{entry}"] = metrics.target_ranks(scores[name], targets, among)
            found[f"top{entry}"] = metrics.best_choices(scores[name], targets, DEPTH, among=among, order=self.order)
        return found

    def _scores(
        self, histories: list[list[int]], targets: NDArray[np.int64], allowed: NDArray[np.bool_]
    ) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.bool_]]:
        """Of each member of the family (b, I) scores, and which items SASRec retrieves."""
        parts: dict[str, NDArray[np.float64]] = {}
        names = dict.fromkeys(name for name, _ in self.entries)
        for name in dict.fromkeys(part for combined in names if "+" in combined for part in self._parts(combined)):
            if name not in (self.lead, RETRIEVER):
                parts[name] = self._load(name).all_scores(histories)
        retrieved = allowed
        if self.retrieves:
            parts[RETRIEVER] = self._load(RETRIEVER).all_scores(histories)
            # Whole lists, with items that are not ranked at the end: a prompt is filled up with them.
            values = np.where(allowed, parts[RETRIEVER], -np.inf)
            ids = metrics.best_choices(values, targets, self.pool, order=self.order)
            retrieved = np.zeros_like(allowed)
            np.put_along_axis(retrieved, ids, True, 1)
            retrieved &= allowed
        if self.limit:  # the prompt lists what was retrieved
            parts[self.lead] = np.full(allowed.shape, -np.inf)
            np.put_along_axis(parts[self.lead], ids, self._load(self.lead).scores(histories, ids), 1)
        else:
            parts[self.lead] = self._load(self.lead).all_scores(histories)
        return {name: parts[name] if name in parts else self._combined(name, parts) for name in names}, retrieved

    def _parts(self, combined: str) -> list[str]:
        return list(self.combinations[combined].parts)

    def _combined(self, name: str, parts: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        return Combination(self.combinations[name], {}).combine(parts)


def _bias(top: NDArray[np.int64], histories: list[list[int]], popularity: NDArray[np.int64]) -> dict[str, float]:
    lists = top[:, :AT]
    there = lists >= 0
    whose = np.repeat(np.arange(len(lists)), there.sum(1))
    return metrics.popularity_figures(lists[there], [histories[row] for row in whose], popularity)


def _by_popularity(
    ranks: NDArray[np.int64], targets: NDArray[np.int64], popularity: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    buckets = metrics.popularity_buckets(targets, popularity)
    found = {}
    for code, name in enumerate(metrics.BUCKETS):
        mine = ranks[buckets == code]
        if len(mine):
            found[name] = {
                "n": len(mine),
                "hr@10": float((mine <= 10).mean()),
                "ndcg@10": float(metrics.gains(mine, 10).mean()),
            }
    return found


def collect(run: Run) -> dict[str, Any]:
    """Write ``catalogue.json`` from ``catalogue/``: records, and how far each is from the best on the same rows."""
    order = list(available(run))
    leads = sorted(
        (path.stem for path in (run.path / FOLDER).glob("[!.]*.json")),
        key=lambda name: order.index(name) if name in order else len(order),
    )
    for lead in leads:
        run.check_unchanged(f"catalogue-{lead}", f"{FOLDER}/{lead}.json", f"{FOLDER}/{lead}.parquet")
    run.say_left_out(FOLDER)
    records = [record for lead in leads for record in read_catalogue_records(run.path / FOLDER / f"{lead}.json")]
    found = {"records": records, "differences": _differences(run, records)}
    write_json(run.path / "catalogue.json", found)
    return found


def _differences(run: Run, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every record to the best one on the same rows: NDCG@10, row by row."""
    found = []
    for rows in dict.fromkeys(record["rows_sha256"] for record in records):
        same = [record for record in records if record["rows_sha256"] == rows]
        best = int(np.argmax([record["ndcg@10"] for record in same]))
        names = [_column(record["model"], record["ranked"]) for record in same]
        frames = [_ranks(run, record) for record in same]
        check_same_rows(list(zip(names, frames, strict=True)))
        gains = [metrics.gains(frame["rank"].to_numpy(), 10) for frame in frames]
        judged = Judged(names, np.stack(gains)[None], frames[0]["user"].to_numpy())
        others = [place for place in range(len(same)) if place != best]
        for other, pair in zip(others, pairs(judged, [(best, place) for place in others]), strict=True):
            found.append(
                {
                    "model": same[best]["model"],
                    "ranked": same[best]["ranked"],
                    "other": same[other]["model"],
                    "other_ranked": same[other]["ranked"],
                    "n": len(gains[0]),
                    "ndcg@10_difference": pair.difference,
                    "ndcg@10_difference_ci": (pair.low, pair.high),
                }
            )
    return found


def _ranks(run: Run, record: dict[str, Any]) -> pd.DataFrame:
    path = run.path / FOLDER / f"{record['model'].split('+')[0]}.parquet"
    return read_catalogue_ranks(path, _column(record["model"], record["ranked"]), record)


def _column(name: str, ranked: str) -> str:
    return f"{name} of {ranked}"


def table_text(run: Run, found: dict[str, Any]) -> str:
    """For a terminal: the figures, popularity and diversity, the buckets, and what cannot be told apart. Records may
    be of several evaluations: where these ranked other rows or other items, each line says which."""
    records = found["records"]
    notes = {record["model"]: doubts(run, record) for record in records}
    head: tuple[str, ...] = ("model", "ranked", "n")
    names: list[tuple[str, ...]] = [
        (f"{r['model']} {MARK}" if notes[r["model"]] else r["model"], r["ranked"], str(r["n"])) for r in records
    ]
    protocols = [f"met items {r['protocol'].get('met_items')}d, {r['protocol'].get('split')} rows" for r in records]
    title = f"the whole catalogue, {protocols[0]}:" if records else "the whole catalogue:"
    if len(set(protocols)) > 1:
        title = "the whole catalogue; lines of other rows or other items do not compare:"
        head = (*head[:2], "of", *head[2:])
        names = [(*name[:2], of, *name[2:]) for name, of in zip(names, protocols, strict=True)]
    parts = [
        title,
        _table(
            (*head, *(f.upper() for f in FIGURES)),
            [(*n, *_numbers(r, FIGURES)) for n, r in zip(names, records, strict=True)],
        ),
        f"popularity and diversity of the first {AT}:",
        _table((*head, *BIAS), [(*n, *_numbers(r, BIAS)) for n, r in zip(names, records, strict=True)]),
        "NDCG@10 by popularity of the right item (n):",
        _table(
            (*head, *metrics.BUCKETS),
            [
                (*n, *(_bucket(r["by_popularity"].get(b)) for b in metrics.BUCKETS))
                for n, r in zip(names, records, strict=True)
            ],
        ),
        *undecided(found["differences"]),
        *(f"{MARK} {note}" for note in dict.fromkeys(note for of_model in notes.values() for note in of_model)),
    ]
    return "\n".join(parts)


def undecided(differences: list[dict[str, Any]]) -> list[str]:
    """A warning for each model that the rows do not tell from the best one."""
    found = [
        Pair(
            _column(entry["model"], entry["ranked"]),
            _column(entry["other"], entry["other_ranked"]),
            entry["ndcg@10_difference"],
            *entry["ndcg@10_difference_ci"],
        )
        for entry in differences
    ]
    return [f"NDCG@10: {pair.not_apart}." for pair in found if not pair.apart]


def _numbers(record: dict[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{record[key]:.3f}" if abs(record[key]) < 100 else f"{record[key]:.0f}" for key in keys)


def _bucket(figures: dict[str, Any] | None) -> str:
    return "-" if figures is None else f"{figures['ndcg@10']:.3f} ({figures['n']})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    lines = []
    for line in (head, *rows):
        cells = [
            c.ljust(w) if column < 2 else c.rjust(w) for column, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"
