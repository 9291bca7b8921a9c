"""results.json: every figure of the study with what it was made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napo import machine
from napo.evaluation import metrics
from napo.evaluation.records import check_same_rows, read_log, read_predictions, read_record
from napo.files import read_json, write_json
from napo.recommenders.combination import CONTROL as WITHOUT_MODEL
from napo.recommenders.combination import combined_name
from napo.recommenders.registry import BASELINES
from napo.runs import Run
from studies.lastfm.config import CANDIDATES, CONTROL, SFT, repeated
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
    "hr@1_greedy",
    "valid_ratio",
    "n_greedy",
    "seconds",
    "lists_sha256",
)
AGAINST = (SFT, CONTROL, "sdpo", "simpo", "rules", "sasrec", WITHOUT_MODEL)
"""Models that the others are compared with."""
ONCE = (SFT, *BASELINES, combined_name(SFT), WITHOUT_MODEL)
"""What a run has once, whatever its repeats."""
MEASURES = ("hr@1", "mrr", "arp")
CONTRASTS = {
    "NAPO - SFT": ("napo", SFT),
    "NAPO - SFT continued": ("napo", CONTROL),
    "NAPO - SimPO": ("napo", "simpo"),
    "NAPO - S-DPO": ("napo", "sdpo"),
    "sharing": ("napo", "napo-alone"),
    "margin": ("napo", "napo-marginless"),
    "sharing and margin": ("napo", "softmax"),
    "negatives' gradient": ("napo", "napo-authors"),
    "SASRec with SFT - SASRec": (combined_name(SFT), "sasrec"),
    "SASRec with SFT - without": (combined_name(SFT), WITHOUT_MODEL),
}
"""What the study asks first, each as the difference of two models."""
SPLITS = {"validation": "validation", "test": ""}
"""Where in a run each split's figures are."""


def write(study: Study, seeds: Sequence[int]) -> None:
    data = study.data() if (study.out / "prepared" / "data" / "dataset.json").is_file() else None
    runs = {seed: study.run(seed) for seed in seeds}
    judged = {
        split: None if data is None else Judged.read(runs, folder, data.training_counts())
        for split, folder in SPLITS.items()
    }
    found = {
        "dataset": study.dataset,
        "counts": None if data is None else data.meta["counts"],
        "size": asdict(study.size),
        "trials": [asdict(trial) for trial in study.trials],
        "machine": machine.facts(),
        "seeds": {seed: _of_seed(study, run) for seed, run in runs.items()},
        "over_seeds": {split: over_seeds(of_split) for split, of_split in judged.items()},
        "contrasts": {split: contrasts(of_split) for split, of_split in judged.items()},
    }
    write_json(study.out / "results.json", found)


def _of_seed(study: Study, run: Run) -> dict[str, Any]:
    models = {}
    for name in ("sasrec", *run.model_names()):
        models[name] = {
            "seed": None if name == "sasrec" else run.origin(name).seed,
            "options": None if name == "sasrec" else run.origin(name).options,
            "tokens": _tokens(run, name),
            **summary(run, name),
            "log": [] if name == "sasrec" else _log(run.path / "models" / name / "log_history.json"),
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


def _log(path: Path) -> list[dict[str, float]]:
    """Six digits of each figure: with all of them the logs of some 40 trainings are most of results.json."""
    return [
        {key: value if isinstance(value, int) else float(f"{value:.6g}") for key, value in entry.items()}
        for entry in read_log(path)
    ]


def _tokens(run: Run, name: str) -> int | None:
    """What the training computed: counted by the trainer, or as SFT's windows or rows were drawn."""
    folder = run.path / "models" / name
    if (folder / "budget.json").is_file():
        return int(read_json(folder / "budget.json")["tokens"])
    if name == CANDIDATES:
        return int(read_json(run.path / "inside" / f"{CANDIDATES}.json")["tokens"])
    seen = [entry.get("num_input_tokens_seen", 0) for entry in read_log(folder / "log_history.json")]
    return int(max(seen)) if any(seen) else None


def _of_split(run: Run, folder: str) -> dict[str, Any]:
    records = [read_record(path) for path in sorted((run.path / folder / "predictions").glob("[!.]*.json"))]
    pairs = run.path / folder / "comparisons.json"
    differences = read_json(pairs) if pairs.is_file() else []
    return {
        "models": {
            record["model"]: {key: record.get(key) for key in FIGURES} | _greedy(run.path / folder, record)
            for record in records
        },
        "differences": [_towards(pair) for pair in differences if {pair["model"], pair["other"]} & set(AGAINST)],
    }


def _greedy(place: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The interval of greedy answers' HR@1, where the model gave any."""
    if "hr@1_greedy" not in record:
        return {}
    frame = read_predictions(place, record).iloc[: record["n_greedy"]]
    hits = (frame["answer_item"] == frame["next"]).to_numpy(float)
    return {"hr@1_greedy_ci": metrics.interval(hits, frame["user"].to_numpy())}


def _towards(pair: dict[str, Any]) -> dict[str, Any]:
    """Turned so that the model that others are compared with comes second."""
    if pair["other"] in AGAINST:
        return pair
    turned = {**pair, "model": pair["other"], "other": pair["model"]}
    for key in ("hr@1", "mrr"):
        low, high = pair[f"{key}_difference_ci"]
        turned |= {f"{key}_difference": -pair[f"{key}_difference"], f"{key}_difference_ci": [-high, -low]}
    return turned


Trainings = dict[tuple[int, int], NDArray[np.float64]]
"""By seed of the run and of the training: (3, n), what each row is worth by each of MEASURES."""


@dataclass(frozen=True)
class Judged:
    """All trainings of all models on the same n rows. Repeats are trainings of the trial that they repeat."""

    models: dict[str, Trainings]
    users: NDArray[np.int64]  # (n,)

    @classmethod
    def read(cls, runs: Mapping[int, Run], folder: str, popularity: NDArray[np.int64]) -> Judged | None:
        """From the predictions in ``folder`` of the runs; None where there are none yet."""
        found = []
        for seed, run in runs.items():
            for path in sorted((run.path / folder / "predictions").glob("[!.]*.json")):
                found.append((seed, run, read_record(path)))
        if not found:
            return None
        # Where lists of another number are being judged, those that most models were judged on.
        lists = Counter(record["lists_sha256"] for _, _, record in found).most_common(1)[0][0]
        models: dict[str, Trainings] = {}
        frames = []
        for seed, run, record in found:
            if record["lists_sha256"] != lists:
                continue
            name = record["model"]
            frame = read_predictions(run.path / folder, record)
            frames.append((name, frame))
            own = run.origin(name).seed if name in run.model_names() else seed
            ranks = frame["rank"].to_numpy()
            worth = [ranks == 1, 1.0 / ranks, popularity[frame["recommended"].to_numpy()]]
            models.setdefault(repeated(name), {})[seed, own] = np.stack(worth).astype(float)
        check_same_rows(frames)
        return cls(models, frames[0][1]["user"].to_numpy())

    def both(self, name: str, other: str) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """What two models are worth in every training that both have. What a run has once stands beside each of its
        trainings."""
        mine, theirs = self.models.get(name, {}), self.models.get(other, {})
        pairs = []
        for (run, seed), values in mine.items():
            known = theirs.get((run, run) if other in ONCE else (run, seed))
            if known is not None:
                pairs.append((values, known))
        return pairs

    def differences(self, chosen: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """Of the ``chosen`` pairs of models. A row counts with its mean over the trainings; users are resampled."""
        pairs = {pair: both for pair in chosen if (both := self.both(*pair))}
        if not pairs:
            return []
        means = [np.mean([a - b for a, b in both], axis=0) for both in pairs.values()]  # of (3, n)
        bounds = metrics.intervals(np.concatenate(means).T, self.users)
        found = []
        for number, ((name, other), both) in enumerate(pairs.items()):
            record: dict[str, Any] = {"model": name, "other": other, "seeds": len(both)}
            record |= {"n": len(self.users), "users": len(np.unique(self.users))}
            for at, key in enumerate(MEASURES):
                own, theirs = (np.mean([pair[side][at] for pair in both]) for side in (0, 1))
                each = [float((a[at] - b[at]).mean()) for a, b in both]
                record[key] = {"model": float(own), "other": float(theirs), "difference": float(np.mean(each))}
                record[key] |= {"ci": bounds[len(MEASURES) * number + at].tolist(), "each": each}
            found.append(record)
        return found


def over_seeds(judged: Judged | None) -> list[dict[str, Any]]:
    """Of models that were trained several times, by runs or by repeats in one: the mean HR@1 over their trainings, and
    paired differences."""
    if judged is None:
        return []
    several = {name: trainings for name, trainings in judged.models.items() if len(trainings) > 1}
    pairs = judged.differences([(name, other) for name in several for other in AGAINST if other != name])
    found = []
    for name, trainings in several.items():
        hits = [float(values[0].mean()) for values in trainings.values()]
        own = [pair for pair in pairs if pair["model"] == name]
        found.append(
            {
                "model": name,
                "seeds": len(hits),
                "hr@1": hits,
                "hr@1_mean": float(np.mean(hits)),
                "differences": {pair["other"]: pair["hr@1"] | {"seeds": pair["seeds"]} for pair in own},
            }
        )
    return found


def contrasts(judged: Judged | None) -> list[dict[str, Any]]:
    """The questions of CONTRASTS, over as many trainings as both sides have so far."""
    if judged is None:
        return []
    names = {pair: name for name, pair in CONTRASTS.items()}
    return [{"name": names[pair["model"], pair["other"]], **pair} for pair in judged.differences([*CONTRASTS.values()])]
