"""Evaluation on held-out rows: ``napo evaluate`` and ``napo report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from napo.command_line.parameters import DataFolder, ExistingRun, MetItems, Options, Score, Split, Threads
from napo.command_line.process import load, prepare_process
from napo.options import made
from napo.ranks import rank


def evaluate(
    data: DataFolder,
    run_dir: ExistingRun,
    models: Annotated[
        str | None, typer.Option(help="Names, with commas between; everything the run has if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Judge so many rows, always the same ones.", min=1)] = None,
    split: Annotated[Split, typer.Option(help="Held-out rows to judge on.")] = Split.test,
    score: Annotated[Score, typer.Option(help="Of a title's token log-probabilities.")] = Score.sum,
    greedy: Annotated[bool, typer.Option(help="Generate greedily too.")] = True,
    foreign_data: Annotated[
        bool, typer.Option("--foreign-data", help="Judge on data that the run was not made with; the table says so.")
    ] = False,
    catalogue: Annotated[
        bool, typer.Option("--catalogue", help="Rank the whole catalogue too; writes catalogue.json.")
    ] = False,
    met_items: Annotated[
        MetItems, typer.Option(help="With --catalogue: are items of the history among what is ranked?")
    ] = MetItems.exclude,
    retrieve: Annotated[
        int, typer.Option(help="With --catalogue: language models also rank SASRec's first so many.", min=1)
    ] = 100,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Let figures of fewer rows, or of another kind, replace others.")
    ] = False,
    threads: Threads = None,
    *,
    options: Options,
) -> None:
    """Rank held-out lists with every model, the same lists for all; writes metrics.json.

    Example: napo evaluate --data data/ml-100k --run runs/ml --models popularity,rules,sasrec,sft,napo --limit 400
    """
    prepared = load(data)
    prepare_process(threads)
    from napo.evaluation.evaluate import EvaluateOptions
    from napo.evaluation.evaluate import evaluate as run_evaluate
    from napo.evaluation.report import table_text
    from napo.recommenders.registry import by_default
    from napo.runs import Run

    run = Run(run_dir, create=False)
    names = [name.strip() for name in (models or "").split(",") if name.strip()]
    if not names:
        names = by_default(run)
    own = {"split": split.value, "limit": limit, "score": score.value, "greedy": greedy}
    chosen = made(EvaluateOptions, {**own, **options})
    from napo.evaluation import catalogue as whole

    ranking = whole.CatalogueOptions(split=split.value, limit=limit, met_items=met_items.value, retrieve=retrieve)
    if catalogue:  # what would end it is said before the lists are judged, which takes long
        whole.check_catalogue(prepared, run, names, ranking, foreign_data=foreign_data, overwrite=overwrite)
    run_evaluate(prepared, run, names, chosen, foreign_data=foreign_data, overwrite=overwrite)
    if rank() == 0:  # one of them shows what came out
        print(table_text(run))
    if catalogue:
        found = whole.evaluate_catalogue(prepared, run, names, ranking, foreign_data=foreign_data, overwrite=overwrite)
        if rank() == 0:
            print(f"\n{whole.table_text(run, found)}")


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="One run folder, or several to compare.")
    ] = None,
    run_dir: Annotated[list[Path] | None, typer.Option("--run", help="The same, as other commands have it.")] = None,
    *,
    out: Annotated[Path, typer.Option("--out", help="A name that ends in .html or .md.")],
) -> None:
    """Tables and plots of one run, or of several side by side, in one file that needs no other.

    Example: napo report runs/seed0 runs/seed1 runs/seed2 --out seeds.html
    """
    folders = [*(runs or ()), *(run_dir or ())]
    if not folders:
        raise typer.BadParameter("expected a run folder, as in napo report RUN --out report.html")
    places = [folder.resolve() for folder in folders]
    if twice := next((folder for at, folder in enumerate(folders) if places[at] in places[:at]), None):
        raise typer.BadParameter(f"{twice} is given twice, and would count twice; give each run once")
    from napo.evaluation.report import report as run_report
    from napo.runs import Run

    print(run_report([Run(run, create=False) for run in folders], out))
