"""Use of a finished run: ``napo recommend``, ``serve`` and ``export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from napo.command_line.parameters import ExistingRun, Options, Threads, UnknownItems
from napo.command_line.process import prepare_process
from napo.data.texts import shown
from napo.options import made


def recommend(
    run_dir: ExistingRun,
    history: Annotated[list[str] | None, typer.Option(help="A title or an item id, oldest first; repeatable.")] = None,
    user: Annotated[str | None, typer.Option(help="A user id, as your data has it.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="A .csv, .tsv, .jsonl (also .gz) or .parquet file with a column user or history, and exclude and k if "
            "you like; needs --out. In CSV a list has :: between its titles or ids, or is a JSON list.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write for --input: .parquet, .csv or .jsonl.")] = None,
    top: Annotated[
        int,
        typer.Option(
            "--top",
            "-k",
            min=1,
            help="How many to name. From the 101st on, items that SASRec proposes stay in its order.",
        ),
    ] = 10,
    exclude: Annotated[
        list[str] | None, typer.Option(help="A title or an item id that is not wanted; repeatable.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Titles letter by letter: no other case, no start, no slip.")
    ] = False,
    unknown: Annotated[
        UnknownItems, typer.Option(help="Items of a history that are not known: stop, or leave them out.")
    ] = UnknownItems.error,
    model: Annotated[str | None, typer.Option(help="Left out: the best on validation, see `napo combine`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; of a file, give --out NAME.jsonl.")] = False,
    threads: Threads = None,
) -> None:
    """Recommend what to watch, hear or read next: for a history, a user, or a file of them.

    Example: napo recommend --run runs/demo --history "Toy Story" --history "Aladdin" --top 10
    """
    if sum(given is not None for given in (history, user, source)) != 1:
        raise typer.BadParameter("expected one of --history, --user and --input")
    if (source is None) != (out is None):
        raise typer.BadParameter("--input and --out go together")
    if as_json and source is not None:
        raise typer.BadParameter("--json prints one answer; for --input give --out a name that ends in .jsonl")
    prepare_process(threads)
    from napo.recommend import Recommender, check_files, recommend_file

    if source is not None and out is not None:
        check_files(source, out)
    recommender = Recommender.from_run(run_dir, model=model)
    if source is not None and out is not None:
        report = recommend_file(
            recommender, source, out, k=top, exclude=tuple(exclude or ()), exact=exact, unknown=unknown.value
        )
        for note in report.notes:
            print(note, file=sys.stderr)
        print(f"{out}: {report.line(recommender.model)}")
        return
    found = recommender.recommend(history, user=user, k=top, exclude=exclude or (), exact=exact, unknown=unknown.value)
    if as_json:
        import json

        print(json.dumps(found.as_dict(), ensure_ascii=False, allow_nan=False))
        return
    for note in (*found.notes, f"by {found.model}"):
        print(shown(note), file=sys.stderr)
    for place, one in enumerate(found.items, 1):
        print(f"{place:>3}. {shown(one.title)}  ({one.score:.2f})")


def serve(
    run_dir: ExistingRun,
    model: Annotated[str | None, typer.Option(help="Left out: the best on validation, see `napo combine`.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    threads: Threads = None,
    *,
    options: Options,
) -> None:
    """Serve recommendations over HTTP: POST /recommend; /docs describes it.

    Example: napo serve --run runs/ml --port 8000
    """
    prepare_process(threads)
    from napo.extras import require
    from napo.recommend import Recommender
    from napo.serve import Limits

    limits = made(Limits, options)
    require("serve")
    from napo.serve.server import bound
    from napo.serve.server import serve as run_server

    with bound(host, port) as listener:  # before the model is loaded, which takes a while
        run_server(Recommender.from_run(run_dir, model=model), listener, limits=limits)


def export(
    run_dir: ExistingRun,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    model: Annotated[str, typer.Option(help="The language model of the run.")] = "sft",
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or auto: as the base model's weights.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a model of the run as a plain transformers folder: adapter merged into its base, tokenizer, model card.

    Example: napo export --run runs/ml --model napo --out exported/napo
    """
    prepare_process(None)
    from napo.export import export as run_export
    from napo.runs import Run

    print(run_export(Run(run_dir, create=False), model, out, dtype=dtype, overwrite=overwrite))
