"""The tables of studies/demo.md and studies/recommender.md from finished demos of several seeds.

for seed in 0 1 2; do make demo SEED=$seed; done
python -m studies.demo runs/demo-0 runs/demo-1 runs/demo-2 --out demo.json

The JSON has the figures with machine, day and the seconds of every stage.

"pooled" takes the lists of all runs together. Its intervals resample users, each with its lists of all seeds. They
speak of other users, not of other seeds.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from napo.evaluation.metrics import interval
from napo.files import read_json
from studies.lastfm.tables import share

PAIRS = (
    ("sft", "popularity"),
    ("sft", "rules"),
    ("sft", "sasrec"),
    ("sft-longer", "sft"),
    ("napo", "sft"),
    ("napo", "sft-longer"),
    ("sasrec+rules", "sasrec"),
    ("sft+sasrec", "sasrec"),
    ("sft+sasrec", "sasrec+rules"),
    ("napo+sasrec", "sasrec"),
    ("napo+sasrec", "sasrec+rules"),
    ("napo+sasrec", "sft+sasrec"),
)
POPULARITY = ("arp", "gini", "coverage", "tail_share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    runs: list[Path] = options.runs
    records = [{record["model"]: record for record in json.loads((run / "metrics.json").read_text())} for run in runs]
    models = [model for model in records[0] if all(model in others for others in records)]
    hits = {model: [_hits(run, model) for run in runs] for model in models}
    users = [pd.read_parquet(run / "predictions" / f"{models[0]}.parquet")["user"].to_numpy() for run in runs]
    seeds = [f"seed {records_of['sft']['seed']}" for records_of in records]
    names = " | ".join(seeds)
    found: dict[str, Any] = {"runs": [_made(run) for run in runs], "hr@1": {}, "mrr": {}, "hr@1_difference": {}}

    print(f"| HR@1 (MRR) | {names} | pooled |\n|---{'|---' * len(runs)}|---|")
    for model in models:
        pooled = float(np.concatenate(hits[model]).mean())
        mrr = float(np.mean([record[model]["mrr"] for record in records]))
        cells = [f"{share(record[model]['hr@1'])} ({share(record[model]['mrr'])})" for record in records]
        print(f"| {model} | {' | '.join(cells)} | {share(pooled)} ({share(mrr)}) |")
        for key, mean in (("hr@1", pooled), ("mrr", mrr)):
            found[key][model] = {"runs": [record[model][key] for record in records], "pooled": mean}

    print(f"\n| difference in HR@1 (95% interval) | {names} | pooled |\n|---{'|---' * len(runs)}|---|")
    for first, second in PAIRS:
        if first in hits and second in hits:
            differences = [a - b for a, b in zip(hits[first], hits[second], strict=True)]
            figures = [_difference(d, u) for d, u in zip(differences, users, strict=True)]
            figures.append(_difference(np.concatenate(differences), np.concatenate(users)))
            cells = [f"{share(f['mean'], '+')} [{share(f['low'], '+')}, {share(f['high'], '+')}]" for f in figures]
            print(f"| {first} - {second} | {' | '.join(cells)} |")
            found["hr@1_difference"][f"{first} - {second}"] = {"runs": figures[:-1], "pooled": figures[-1]}

    print("\n| recommended first, mean of the runs | ARP | Gini | coverage | tail share |\n|---|---:|---:|---:|---:|")
    found["popularity"] = {}
    for model in models:
        means = {key: float(np.mean([record[model][key] for record in records])) for key in POPULARITY}
        print(f"| {model} | {means['arp']:.1f} | " + " | ".join(share(means[key]) for key in POPULARITY[1:]) + " |")
        found["popularity"][model] = means

    print(f"\n| answers: free HR@1, share of valid ones, under the trie HR@1 | {names} |\n|---{'|---' * len(runs)}|")
    for model in models:
        if all("hr@1_greedy" in record[model] for record in records):
            figures_of = [
                [record[model][key] for key in ("hr@1_greedy", "valid_ratio", "hr@1_trie")] for record in records
            ]
            print(f"| {model} | " + " | ".join(", ".join(map(share, of_seed)) for of_seed in figures_of) + " |")
            found.setdefault("greedy", {})[model] = figures_of
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def _made(run: Path) -> dict[str, Any]:
    """On what machine, when, and how long each stage took."""
    stages = {file.stem: read_json(file) for file in sorted((run / "stages").glob("*.json"))}
    day = datetime.fromtimestamp((run / "metrics.json").stat().st_mtime, tz=timezone.utc).date()
    return {
        "run": run.name,
        "date": day.isoformat(),
        "machine": stages["sft"]["machine"],
        "seconds": {name: round(stage["seconds"], 1) for name, stage in stages.items()},
    }


def _hits(run: Path, model: str) -> NDArray[np.float64]:
    rows = pd.read_parquet(run / "predictions" / f"{model}.parquet")
    return (rows["rank"].to_numpy() == 1).astype(np.float64)


def _difference(values: NDArray[np.float64], users: NDArray[np.int64]) -> dict[str, float]:
    low, high = interval(values, users)
    return {"mean": float(values.mean()), "low": low, "high": high}


if __name__ == "__main__":
    main()
