"""The study's command; run it in the repository's root.

    make study-lastfm DATA=FOLDER BUDGET=500000 OUT=runs/study-lastfm
    python -m studies.lastfm --data FOLDER --budget 500000 --out runs/study-lastfm --seeds 0

Begin it again with the same options after any interruption: what is finished is skipped, and a training goes on at its
last checkpoint. OUT/results.json has every figure so far, OUT/plots the plots, OUT/report.html the report of all seeds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from napo.evaluation.report import report
from napo.finetuning.options import PreferenceOptions, SFTOptions
from napo.options import made, settings
from napo.signals import Stopped, handle_signals
from studies.lastfm.config import DATASETS, TRIALS, Size, selected
from studies.lastfm.plots import draw
from studies.lastfm.study import Study


def main() -> None:
    size = Size()
    parser = argparse.ArgumentParser(
        prog="python -m studies.lastfm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=[*DATASETS], default="lastfm")
    parser.add_argument("--data", type=Path, help="folder with the data set's files; ml-100k needs none")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budget", type=int, default=size.budget, help="tokens of SFT (%(default)s)")
    parser.add_argument("--trial", type=int, help="tokens of each preference trial (3/20 of the budget)")
    parser.add_argument("--val-lists", type=int, default=size.val_lists, help="(%(default)s)")
    parser.add_argument("--test-lists", type=int, help="(all)")
    parser.add_argument("--catalogue-rows", type=int, default=0, help="test rows that rank the whole catalogue (0)")
    parser.add_argument("--protocol-a", action="store_true", help="SFT with candidates in the prompt as well (no)")
    parser.add_argument("--model", default=size.model)
    for of, what in (("sft", "SFT"), ("preferences", "every trial that has no other value of its own")):
        parser.add_argument(f"--{of}", action="append", default=[], metavar="NAME=VALUE", help=f"an option of {what}")
    parser.add_argument("--trials", help=f"some of {','.join(trial.name for trial in TRIALS)} (all)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no piece is begun afterwards")
    given = parser.parse_args()
    sft, preferences = settings(given.sft, "--sft"), settings(given.preferences, "--preferences")
    if given.data is None and not DATASETS[given.dataset].asset:
        parser.error(f"--data: {given.dataset} is not in the package index; name the folder with its files")
    study = Study(
        out=given.out,
        dataset=given.dataset,
        files=given.data,
        size=Size(
            budget=given.budget,
            trial=given.trial,
            val_lists=given.val_lists,
            test_lists=given.test_lists,
            catalogue_rows=given.catalogue_rows,
            protocol_a=given.protocol_a,
            model=given.model,
            sft={**size.sft, **sft},
            preferences={**size.preferences, **preferences},
        ),
        trials=selected(given.trials),
    )
    for of, options, own in (("sft", sft, "--budget"), ("preferences", preferences, "--trial")):
        if "tokens" in options:
            parser.error(f"--{of} tokens: is what {own} says; use {own}")
    made(SFTOptions, study.size.sft_options())  # what cannot be is said now, not behind SASRec
    for trial in study.trials:
        if trial.objective != "sft":
            made(PreferenceOptions, study.size.preference_options(trial))
    began = time.monotonic()
    handle_signals()
    left = study.go(given.seeds, lambda: time.monotonic() - began < given.seconds)
    draw(study.out / "results.json", study.out / "plots")
    judged = [run for run in map(study.run, given.seeds) if (run.path / "metrics.json").is_file()]
    if judged:
        report(judged, study.out / "report.html")
    print(f"{len(left)} pieces are left for another call" if left else f"finished; see {study.out}")


if __name__ == "__main__":
    try:
        main()
    except Stopped as stopped:
        print("stopped; begin again with the same options to go on", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
