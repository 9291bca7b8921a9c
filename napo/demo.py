"""The main job, end to end: MovieLens-100K, SASRec, SFT on whole sequences, NAPO, evaluation and a report, in one run
folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from napo.assets import SMOLLM2, movielens_100k
from napo.data.prepare import PrepareOptions, prepare, split_options
from napo.data.prepared import PreparedData
from napo.data.prompts import PromptStyle
from napo.data.splits import TooFewUsers
from napo.evaluation.evaluate import EvaluateOptions, evaluate
from napo.evaluation.report import report, table_text
from napo.extras import require
from napo.files import content_hash
from napo.progress import without_max_minutes
from napo.recommenders.combination import CONTROL, combined_name
from napo.recommenders.registry import BASELINES
from napo.runs import Run
from napo.stages import check_titles, combine_stage, require_compiled, sasrec_stage, sft_stage, train_stage


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much each stage computes; the default is meant for 2 cores."""

    style: PromptStyle = "history"
    """The prompt's style."""
    prepare: Mapping[str, Any] = field(
        default_factory=lambda: {"test_users": 400, "val_users": 100, "rows_per_user": 3}
    )
    """Three lists of each test user make the intervals narrower than one."""
    sasrec: Mapping[str, Any] = field(default_factory=lambda: {"max_epochs": 40})
    sft: Mapping[str, Any] = field(
        default_factory=lambda: {"tokens": 600_000, "distill": 0.7, "val_examples": 16, "evaluations": 3},
    )
    """2.2 epochs: the sequences of the training users have 268,000 tokens. SASRec has a part, since that ranked
    validation lists better (studies/recommender.md)."""
    napo: Mapping[str, Any] = field(
        default_factory=lambda: {
            "prefixes": True,
            "window": 20,
            "min_history": 1,
            "tokens": 40_000,
            "batch_size": 4,
            "negatives": 4,
            "negatives_from": "sasrec",
            "learning_rate": 5e-5,
            "sft_weight": 0.5,
        }
    )
    """The rate of `napo train`, the chosen title's likelihood beside the preferences, and negatives of SASRec's best
    hundred, which were best of ten trials on validation lists (studies/recommender.md)."""
    sft_longer: Mapping[str, Any] = field(
        default_factory=lambda: {
            "tokens": 71_000,
            "distill": 0.7,
            "learning_rate": 2e-4,
            "val_examples": 16,
            "evaluations": 1,
        }
    )
    """SFT continued for as many tokens as NAPO computes: 40,000 of windows and 31,000 of negatives."""
    evaluate: EvaluateOptions = field(default_factory=lambda: EvaluateOptions(greedy_limit=100))


COMBINED = ("sft", "napo")
"""The models that are combined with SASRec, sequential rules and popularity."""
MODELS = (
    *BASELINES,
    *("sft", "sft-longer", "napo"),
    *(CONTROL, *map(combined_name, COMBINED)),
)


@without_max_minutes()
def demo(
    run_dir: str | Path,
    *,
    seed: int = 0,
    model: str = SMOLLM2,
    source: str | Path | None = None,
    budget: Budget | None = None,
    overwrite: bool = False,
) -> Run:
    """Run the stages that are not finished yet and print the results.

    ``source``: a folder of RecBole atomic files in place of MovieLens-100K. ``overwrite``: replace results that were
    made with other options."""
    budget = budget or Budget()
    began = time.monotonic()
    require("demo" if model == SMOLLM2 else "report")  # now, and not when the report is made
    require_compiled()
    begun = (Path(run_dir) / "stages").is_dir() or (Path(run_dir) / ".working").is_dir()
    run = Run(run_dir)
    files = Path(source) if source is not None else movielens_100k()
    if not files.is_dir():
        raise ValueError(f"source: no such folder: {files}; expected RecBole atomic files (NAME.inter, NAME.item)")

    called = "MovieLens-100K" if source is None else str(files)

    def work(aside: Path) -> None:
        _prepare(files, aside / "data", budget.prepare)
        run.check_data(aside / "data", called=called)  # now: it would take the place of a finished run's own

    run.stage(
        "prepare",
        work,
        options=budget.prepare,
        defaults=asdict(PrepareOptions()),
        inputs={"files": content_hash(files)},
        outputs=["data"],
        overwrite=overwrite,
    )
    data = PreparedData.load(run.path / "data")
    run.check_data(data.path, called=called)
    run.configure(dataset="MovieLens-100K" if source is None else files.name)
    check_titles(data, model, budget.style)
    sasrec_stage(run, data, seed=seed, options=budget.sasrec, overwrite=overwrite)
    sft_stage(run, data, model=model, style=budget.style, seed=seed, options=budget.sft, overwrite=overwrite)
    train_stage(
        run,
        data,
        objective="napo",
        name="napo",
        init_from="sft",
        seed=seed,
        options=budget.napo,
        overwrite=overwrite,
    )
    require_compiled(run)
    sft_stage(
        run,
        data,
        model=model,
        style=budget.style,
        seed=seed,
        options=budget.sft_longer,
        name="sft-longer",
        init_from="sft",
        overwrite=overwrite,
    )
    for name in COMBINED:
        combine_stage(run, data, model=name)
    evaluate(data, run, MODELS, budget.evaluate, overwrite=overwrite)
    report([run], run.path / "report.html")
    report([run], run.path / "report.md")
    print(f"\n{table_text(run)}\n")
    since = " since it went on" if begun else ""
    print(f"{(time.monotonic() - began) / 60:.1f} minutes{since}; see {run.path / 'report.html'}")
    return run


def _prepare(files: Path, out: Path, options: Mapping[str, Any]) -> None:
    try:
        prepare("recbole", files, out, *split_options(options))
    except TooFewUsers as error:
        raise ValueError(
            f"source: expected more than {held_out(options)} users with enough interactions, since the demo holds so "
            f"many out; got {error.users} in {files}; take a larger data set, or prepare it with `napo prepare`"
        ) from None


def held_out(options: Mapping[str, Any]) -> int:
    """Users that are not trained on, so that a source has to have more."""
    return int(options["val_users"] + options["test_users"])
