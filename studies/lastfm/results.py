"""results.json: every figure of the study with what it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from napo import machine
from napo.evaluation import metrics
from napo.evaluation.records import read_log, read_predictions, read_record
from napo.files import read_json, write_json
from napo.runs import Run
from studies.lastfm.config import CONTROL, SFT
from studies.lastfm.measured import summary

if TYPE_CHECKING:
    from studies.lastfm.study import Study

FIGURES = (
    "n",
    "users",
    "hr@1",
    "hr@1_ci",
    "mrr",
    "ndcg@5",
    "ndcg@10",
    "arp",
    "gini",
    "coverage",
    "tail_share",
    "hr@1_by_popularity",
    "seconds",
    "lists_sha256",
)
AGAINST = (SFT, CONTROL, "sdpo", "simpo", "sasrec", "sasrec+popularity")
"""Models that the others are compared with."""
SPLITS = {"validation": "validation", "test": ""}
"""Where in a run each split's figures are."""


def write(study: Study, seeds: Sequence[int]) -> None:
    data = study.data() if (study.out / "prepared" / "data" / "dataset.json").is_file() else None
    runs = {seed: study.run(seed) for seed in seeds}
    found = {
        "dataset": study.dataset,
        "counts": None if data is None else data.meta["counts"],
        "size": asdict(study.size),
        "trials": [asdict(trial) for trial in study.trials],
        "machine": machine.facts(),
        "seeds": {seed: _of_seed(study, run) for seed, run in runs.items()},
        "over_seeds": {split: over_seeds(list(runs.values()), folder) for split, folder in SPLITS.items()},
    }
    write_json(study.out / "results.json", found)


def _of_seed(study: Study, run: Run) -> dict[str, Any]:
    models = {}
    for name in ("sasrec", *run.model_names()):
        models[name] = {
            "options": None if name == "sasrec" else run.origin(name).options,
            "tokens": _tokens(run, name),
            **summary(run, name),
            "log": [] if name == "sasrec" else read_log(run.path / "models" / name / "log_history.json"),
        }
    inside = {path.stem: read_json(path) for path in sorted((run.path / "inside").glob("[!.]*.json"))}
    combined = {path.stem: read_json(path) for path in sorted((run.path / "combinations").glob("[!.]*.json"))}
    return {
        "models": models,
        **{split: _of_split(run, folder) for split, folder in SPLITS.items()},
        "inside": inside,
        "combinations": combined,
        "catalogue": read_json(run.path / "catalogue.json") if (run.path / "catalogue.json").is_file() else None,
    }


def _tokens(run: Run, name: str) -> int | None:
    """What the training computed: counted by the trainer, or by SFT as it drew its windows."""
    folder = run.path / "models" / name
    if (folder / "budget.json").is_file():
        return int(read_json(folder / "budget.json")["tokens"])
    seen = [entry.get("num_input_tokens_seen", 0) for entry in read_log(folder / "log_history.json")]
    return int(max(seen)) if any(seen) else None


def _of_split(run: Run, folder: str) -> dict[str, Any]:
    records = [read_record(path) for path in sorted((run.path / folder / "predictions").glob("[!.]*.json"))]
    pairs = run.path / folder / "comparisons.json"
    differences = read_json(pairs) if pairs.is_file() else []
    return {
        "models": {record["model"]: {key: record.get(key) for key in FIGURES} for record in records},
        "differences": [_towards(pair) for pair in differences if {pair["model"], pair["other"]} & set(AGAINST)],
    }


def _towards(pair: dict[str, Any]) -> dict[str, Any]:
    """Turned so that the model that others are compared with comes second."""
    if pair["other"] in AGAINST:
        return pair
    turned = {**pair, "model": pair["other"], "other": pair["model"]}
    for key in ("hr@1", "mrr"):
        low, high = pair[f"{key}_difference_ci"]
        turned |= {f"{key}_difference": -pair[f"{key}_difference"], f"{key}_difference_ci": [-high, -low]}
    return turned


def over_seeds(runs: Sequence[Run], folder: str) -> list[dict[str, Any]]:
    """Of models that every seed so far has judged: the mean HR@1 over the seeds, and paired differences that resample
    users. A row counts with its mean over the seeds."""
    if len(runs) < 2:
        return []
    per_run = []
    for run in runs:
        place = run.path / folder
        records = {p.stem: read_record(p) for p in (place / "predictions").glob("[!.]*.json")}
        if records:
            per_run.append({name: read_predictions(place, record) for name, record in records.items()})
    if len(per_run) < 2:
        return []
    shared = sorted(set.intersection(*(set(frames) for frames in per_run)))
    users = per_run[0][shared[0]]["user"].to_numpy()
    each = {name: np.stack([(frames[name]["rank"] == 1).to_numpy(float) for frames in per_run]) for name in shared}
    found = []
    for name, hits in each.items():
        record: dict[str, Any] = {"model": name, "seeds": len(per_run), "hr@1": hits.mean(1).tolist()}
        record["hr@1_mean"], record["differences"] = float(hits.mean()), {}
        for other in AGAINST:
            if other in each and other != name:
                difference = (hits - each[other]).mean(0)
                interval = metrics.interval(difference, users)
                record["differences"][other] = {"hr@1": float(difference.mean()), "ci": interval}
        found.append(record)
    return found
