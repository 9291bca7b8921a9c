"""The demo's comparison at the size of a GPU: SmolLM2-135M on all windows of MovieLens-100K, in pieces.

    make study-gpu                                                    GPU_RESULTS=FOLDER STUDY_RESUME=FOLDER SEED=0
    python studies/gpu_study.py --run build/study/run --results FOLDER [--resume FOLDER] [--seconds 400]

A piece is a stage of the run: what is finished is skipped, and none is begun after `--seconds`. After every piece the
run lies packed in `--results`, a tar a model and one for the rest, so that it can leave a machine that keeps nothing;
`--resume` names the folder from which another machine takes it up again. SFT trains first; NAPO, S-DPO and SFT
continued each start from it and take as many windows. Which kernels trained is in models/NAME/kernels.json.
"""

from __future__ import annotations

import argparse
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from napo.assets import SMOLLM2, movielens_100k
from napo.data.prepare import prepare, split_options
from napo.data.prepared import PreparedData
from napo.demo import Budget
from napo.evaluation.evaluate import EvaluateOptions, evaluate
from napo.evaluation.report import report, table_text
from napo.files import content_hash
from napo.runs import Run
from napo.stages import sasrec_stage, sft_stage, train_stage

WINDOWS: dict[str, Any] = {"batch_size": 16, "min_history": 6}
SFT: dict[str, Any] = {**WINDOWS, "loss_on": "titles", "val_examples": 64, "evaluations": 3}
PREFERENCES: dict[str, Any] = {**WINDOWS, "prefixes": True, "negatives": 8, "learning_rate": 1e-3}
SIZE = Budget(
    style="candidates-first",
    sft={**SFT, "epochs": 2.0, "learning_rate": 2e-3},
    napo=PREFERENCES,
    sft_longer={**SFT, "learning_rate": 1e-3, "evaluations": 1},
    evaluate=EvaluateOptions(greedy_limit=100, tokens_per_batch=16384),
)
TUNED = ("sft", "sft-longer", "sdpo", "napo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run folder, on this machine")
    parser.add_argument("--results", type=Path, required=True, help="folder in which the run is packed")
    parser.add_argument("--resume", type=Path, help="folder with what an earlier call packed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no piece is begun afterwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--source", type=Path, help="RecBole atomic files in place of MovieLens-100K")
    options = parser.parse_args()
    if options.resume is not None and not options.run.exists():
        unpack(options.resume, options.run)
    files = options.source or movielens_100k()
    began = time.monotonic()
    has_time = lambda: time.monotonic() - began < options.seconds  # noqa: E731
    study(options.run, options.results, files, has_time, model=options.model, seed=options.seed)


def study(
    folder: Path,
    results: Path,
    files: Path,
    has_time: Callable[[], bool],
    *,
    model: str,
    seed: int,
    size: Budget = SIZE,
) -> list[str]:
    """Returns the pieces that are left."""
    run = Run(folder)
    run.configure(dataset=files.name)
    left = list(pieces(run, files, model, seed, size).items())
    while left and has_time():
        left.pop(0)[1]()
        pack(run.path, results)
    names = [name for name, _ in left]
    print(f"left for another call: {', '.join(names)}" if names else table_text(run))
    return names


def pieces(run: Run, files: Path, model: str, seed: int, size: Budget) -> dict[str, Callable[[], Any]]:
    def data() -> PreparedData:
        return PreparedData.load(run.path / "data")

    def prepared() -> None:
        work = lambda aside: prepare("recbole", files, aside / "data", *split_options(size.prepare))  # noqa: E731
        inputs = {"files": content_hash(files)}
        run.stage("prepare", work, options=size.prepare, inputs=inputs, outputs=["data"])

    def tune(name: str) -> None:
        if name in ("napo", "sdpo"):
            return train_stage(run, data(), objective=name, name=name, init_from="sft", seed=seed, options=size.napo)
        how = {"options": size.sft} if name == "sft" else {"options": size.sft_longer, "init_from": "sft"}
        return sft_stage(run, data(), model=model, style=size.style, seed=seed, name=name, **how)

    def judge(name: str) -> None:
        evaluate(data(), run, [name], size.evaluate)

    def reported() -> None:
        report([run], run.path / "report.html")
        report([run], run.path / "report.md")

    found: dict[str, Callable[[], Any]] = {
        "prepare": prepared,
        "sasrec": lambda: sasrec_stage(run, data(), seed=seed, options=size.sasrec),
    }
    for name in TUNED:
        found[name] = lambda name=name: tune(name)
    for name in ("popularity", "itemknn", "sasrec", *TUNED):
        found[f"evaluate {name}"] = lambda name=name: judge(name)
    return found | {"report": reported}


def pack(run_dir: Path, results: Path) -> None:
    """A tar for each model and one for the rest, each whole or as it was."""
    results.mkdir(parents=True, exist_ok=True)
    members = [path for path in run_dir.iterdir() if path.name != "models"]
    models = sorted(run_dir.glob("models/[!.]*"))
    for name, paths in [("run", members), *((f"model-{path.name}", [path]) for path in models)]:
        aside = results / f".{name}.tmp"
        with tarfile.open(aside, "w:gz", compresslevel=1) as tar:
            for path in sorted(paths):
                tar.add(path, path.relative_to(run_dir))
        aside.replace(results / f"{name}.tar.gz")


def unpack(packed: Path, run_dir: Path) -> None:
    archives = sorted(packed.glob("*.tar.gz"))
    if not archives:
        raise SystemExit(f"--resume: {packed} has no *.tar.gz; expected the --results folder of an earlier call")
    for archive in archives:
        with tarfile.open(archive) as tar:
            tar.extractall(run_dir, filter="data")


if __name__ == "__main__":
    main()
