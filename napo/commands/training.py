"""Training: ``napo sasrec``, ``sft`` and ``train``, and ``napo combine``, which fits weights of scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from napo.command_line.parameters import (
    DataFolder,
    ExistingRun,
    Options,
    Overwrite,
    ReportTo,
    RunFolder,
    Seed,
    Threads,
    one_of,
)
from napo.command_line.process import load, prepare_process
from napo.data.styles import STYLES, PromptStyle
from napo.objectives import OBJECTIVES
from napo.options import UsageError


def sasrec(
    data: DataFolder,
    run_dir: RunFolder,
    export: Annotated[
        Path | None, typer.Option(help="Also write every row's user state and candidates' scores to this folder.")
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    threads: Threads = None,
    *,
    options: Options,
) -> None:
    """Train the auxiliary recommender, which finds similar users, rates negatives, and can teach SFT.

    Example: napo sasrec --data data/ml-100k --run runs/ml
    """
    if export is not None and export.resolve().is_relative_to(run_dir.resolve()):
        raise UsageError(f"export: {export} lies in the run {run_dir}, whose files are its own; give another folder")
    prepared = load(data)
    prepare_process(threads)
    from napo.runs import Run
    from napo.stages import sasrec_stage

    sasrec_stage(Run(run_dir), prepared, seed=seed, options=options, overwrite=overwrite)
    if export is not None:
        from napo.recommenders.sasrec import SASRec, export_rows

        export_rows(SASRec.load(run_dir / "sasrec", num_items=prepared.num_items), prepared, export)


def sft(
    data: DataFolder,
    run_dir: RunFolder,
    model: Annotated[
        str | None,
        typer.Option(
            help="smollm2-135m, a local folder or a name on the hub; left out: that of --init-from, or smollm2-135m."
        ),
    ] = None,
    style: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(STYLES)}: history only, or candidates after or before it.", callback=one_of(STYLES)
        ),
    ] = "history",
    name: Annotated[str, typer.Option(help="What the result is called in RUN/models.")] = "sft",
    init_from: Annotated[str | None, typer.Option(help="Continue from this model of the run.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    threads: Threads = None,
    report_to: ReportTo = None,
    *,
    options: Options,
) -> None:
    """Supervised fine-tuning: the model learns to name the next title.

    Example: napo sft --data data/ml-100k --run runs/ml --model smollm2-135m
    """
    from napo.finetuning.reporting import checked_reporters

    reporters = checked_reporters(report_to)
    prepared = load(data)
    prepare_process(threads)
    from napo.runs import Run
    from napo.stages import sft_stage

    sft_stage(
        Run(run_dir),
        prepared,
        model=model,
        style=cast(PromptStyle, style),
        seed=seed,
        options=options,
        name=name,
        init_from=init_from,
        overwrite=overwrite,
        report_to=reporters,
    )


def train(
    data: DataFolder,
    run_dir: ExistingRun,
    objective: Annotated[
        str, typer.Option(help=f"The preference loss: {', '.join(OBJECTIVES)}.", callback=one_of(OBJECTIVES))
    ] = "napo",
    name: Annotated[
        str | None, typer.Option(help="What the result is called; the objective's name if left out.")
    ] = None,
    init_from: Annotated[str, typer.Option(help="The model of the run to start from.")] = "sft",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    threads: Threads = None,
    report_to: ReportTo = None,
    *,
    options: Options,
) -> None:
    """Preference optimisation: one positive against many negatives.

    Example: napo train --data data/ml-100k --run runs/ml --objective napo
    """
    from napo.finetuning.reporting import checked_reporters

    reporters = checked_reporters(report_to)
    prepared = load(data)
    prepare_process(threads)
    from napo.runs import Run
    from napo.stages import train_stage

    train_stage(
        Run(run_dir, create=False),
        prepared,
        objective=objective,
        name=name or objective,
        init_from=init_from,
        seed=seed,
        options=options,
        overwrite=overwrite,
        report_to=reporters,
    )


def combine(
    data: DataFolder,
    run_dir: ExistingRun,
    model: Annotated[str, typer.Option(help="A language model of the run; sasrec: without one.")] = "napo",
    threads: Threads = None,
) -> None:
    """Combine a model with SASRec, rules and popularity: MODEL+sasrec, a sum of scores, weighted by validation rows.

    Example: napo combine --data data/ml-100k --run runs/ml --model napo
    """
    prepared = load(data)
    prepare_process(threads)
    from napo.evaluation.combine import summary
    from napo.recommenders.combination import Fitted, combined_name
    from napo.runs import Run
    from napo.stages import combine_stage

    run = Run(run_dir, create=False)
    combine_stage(run, prepared, model=model)
    for line in summary(Fitted.read(run.path, combined_name(model))):
        print(line)
