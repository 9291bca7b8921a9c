"""The command line: a thin skin over the functions of the same names. Imports wait until a command needs them."""

from __future__ import annotations

import io
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Collection
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from napo.command_line.flags import STAGES, options_class, own_parameters, section_values, with_flags
from napo.command_line.run_file import SECTIONS, entries
from napo.data.archives import ARCHIVES
from napo.data.sources import SOURCES
from napo.data.split_kinds import SPLIT_KINDS
from napo.data.styles import STYLES, PromptStyle
from napo.data.texts import shown
from napo.objectives import OBJECTIVES
from napo.options import UsageError, made, nested
from napo.ranks import FirstRankFailed, only_one
from napo.signals import Stopped, handle_signals

COMMANDS: dict[str, Callable[..., None]] = {}
"""Name and function of each command, in the order of the help."""


def _command(function: Callable[..., None]) -> Callable[..., None]:
    COMMANDS[function.__name__] = function
    return function


def application(called: str | None) -> typer.Typer:
    """The command line. The command that is ``called`` gets the flags of its stage's options."""
    app = typer.Typer(
        name="napo",
        no_args_is_help=False,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback(invoke_without_command=True)(main_options)
    for name, function in COMMANDS.items():
        app.command(name)(with_flags(function, load=name == called) if name in SECTIONS or name in STAGES else function)
    return app


class Score(str, Enum):
    sum = "sum"
    average = "average"


class MetItems(str, Enum):
    exclude = "exclude"
    include = "include"


class Split(str, Enum):
    val = "val"
    test = "test"


def _one_of(names: Collection[str]) -> Callable[[str], str]:
    """Checks a parameter's value. The names stay in one list, where they are defined."""

    def check(value: str) -> str:
        if value not in names:
            raise typer.BadParameter(f"expected one of {', '.join(names)}; got {value!r}")
        return value

    return check


RunFolder = Annotated[Path, typer.Option("--run", "--run-dir", help="Run folder; made if it is not there.")]
DataFolder = Annotated[Path, typer.Option("--data", help="Prepared data set, from `napo prepare`.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a finished result that was made with other options.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; the default is every core.", min=1)]
ReportTo = Annotated[
    str | None,
    typer.Option(help="Also report to these, with commas between: tensorboard (in RUN/logs), wandb, trackio."),
]
Options = dict[str, Any]
"""What ``--config``, flags and ``--set`` say of a stage (``napo.command_line.flags``)."""


def main_options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="On failure show the traceback. Works anywhere.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Preference optimisation of LLM recommenders with shared negatives (NAPO).

    The whole way on a real model and real data: napo demo
    """
    if version:
        from importlib.metadata import version as version_of

        print(f"napo {version_of('napo')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@_command
def demo(
    run_dir: RunFolder = Path("runs/demo"),
    seed: Seed = 0,
    model: Annotated[str, typer.Option(help="smollm2-135m, a local folder or a name on the hub.")] = "smollm2-135m",
    source: Annotated[
        Path | None, typer.Option(help="Folder of RecBole atomic files in place of MovieLens-100K.")
    ] = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
) -> None:
    """Train and judge a recommender on MovieLens-100K: data, SASRec, SFT, NAPO, report. Started again, it continues.

    Example: napo demo --run runs/demo --seed 0
    """
    _prepare_process(threads)
    from napo.demo import demo as run_demo

    run_demo(run_dir, seed=seed, model=model, source=source, overwrite=overwrite)


@_command
def prepare(
    source: Annotated[
        str, typer.Argument(help=f"The format of PATH: {', '.join(SOURCES)}.", callback=_one_of(SOURCES))
    ],
    path: Annotated[Path, typer.Argument(help="A file or a folder, as the source has it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    split: Annotated[str | None, typer.Option(help=f"One of {', '.join(SPLIT_KINDS)}.")] = None,
    download: Annotated[
        str | None,
        typer.Option(help=f"Fetch it into PATH first, unless it is there already. One of {', '.join(ARCHIVES)}."),
    ] = None,
    max_bad: Annotated[str, typer.Option(help="Share of bad lines above which a file is refused.")] = "1%",
    check_tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Then fail if this model's tokenizer cannot tell the titles apart; OUT stays.",
        ),
    ] = None,
    seed: Seed = 0,
    *,
    options: Options,
) -> None:
    """Read interactions, filter, split and draw candidate lists.

    Example: napo prepare movielens raw/ml-1m --download ml-1m --out data/ml-1m --set test_users=400
    """
    from napo.data.prepare import prepare as run_prepare
    from napo.data.prepare import split_options, summary

    if download is not None:
        from napo.data.downloads import download as run_download

        run_download(download, path, source=source)
    chosen = {"split": split, "seed": seed, "max_bad": _share("--max-bad", max_bad), **options}
    data = run_prepare(source, path, out, *split_options(chosen))
    counts = data.meta["counts"]
    rows = ", ".join(f"{number} {name}" for name, number in counts["rows"].items())
    known = f"{counts['users']} users, {counts['interactions']} interactions" if data.has_users else "users unknown"
    for line in summary(data.meta):
        print(line)
    print(f"{out}: {counts['items']} items, {known}; rows: {rows}")
    if check_tokenizer is not None:
        _prepare_process(None)
        from napo.stages import check_titles

        check_titles(data, check_tokenizer)
        print(f"{check_tokenizer}: its tokenizer tells all titles apart")


@_command
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
    """Train the auxiliary recommender that says who is similar and which negative is one.

    Example: napo sasrec --data data/ml-100k --run runs/ml
    """
    prepared = _load(data)
    _prepare_process(threads)
    from napo.runs import Run
    from napo.stages import sasrec_stage

    sasrec_stage(Run(run_dir), prepared, seed=seed, options=options, overwrite=overwrite)
    if export is not None:
        from napo.recommenders.sasrec import SASRec, export_rows

        export_rows(SASRec.load(run_dir / "sasrec"), prepared, export)


@_command
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
            help=f"{', '.join(STYLES)}: history only, or candidates behind or before it.", callback=_one_of(STYLES)
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
    prepared = _load(data)
    _prepare_process(threads)
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


@_command
def train(
    data: DataFolder,
    run_dir: RunFolder,
    objective: Annotated[
        str, typer.Option(help=f"The preference loss: {', '.join(OBJECTIVES)}.", callback=_one_of(OBJECTIVES))
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
    prepared = _load(data)
    _prepare_process(threads)
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


@_command
def combine(
    data: DataFolder,
    run_dir: RunFolder,
    model: Annotated[str, typer.Option(help="A language model of the run; sasrec: without one.")] = "napo",
    threads: Threads = None,
) -> None:
    """Combine a model with SASRec and popularity: MODEL+sasrec, a weighted sum of scores, fitted on validation rows.

    Example: napo combine --data data/ml-100k --run runs/ml --model napo
    """
    prepared = _load(data)
    _prepare_process(threads)
    from napo.evaluation.combine import summary
    from napo.recommenders.combination import Fitted, combined_name
    from napo.runs import Run
    from napo.stages import combine_stage

    run = Run(run_dir, create=False)
    combine_stage(run, prepared, model=model)
    for line in summary(Fitted.read(run.path, combined_name(model))):
        print(line)


@_command
def evaluate(
    data: DataFolder,
    run_dir: RunFolder,
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
    threads: Threads = None,
    *,
    options: Options,
) -> None:
    """Rank held-out lists with every model, the same lists for all; writes metrics.json.

    Example: napo evaluate --data data/ml-100k --run runs/ml --models popularity,itemknn,sasrec,sft,napo --limit 400
    """
    only_one("napo evaluate")
    prepared = _load(data)
    _prepare_process(threads)
    from napo.evaluation.evaluate import EvaluateOptions, undecided
    from napo.evaluation.evaluate import evaluate as run_evaluate
    from napo.evaluation.report import table_text
    from napo.recommenders.registry import available
    from napo.runs import Run

    run = Run(run_dir, create=False)
    names = [name.strip() for name in (models or "").split(",") if name.strip()]
    if not names:
        names = [name for name, kind in available(run).items() if kind.by_default]
    own = {"split": split.value, "limit": limit, "score": score.value, "greedy": greedy}
    chosen = made(EvaluateOptions, {**own, **options})
    run_evaluate(prepared, run, names, chosen, foreign_data=foreign_data)
    print(table_text(run))
    for line in undecided(run):
        print(line)
    if catalogue:
        from napo.evaluation import catalogue as whole

        ranking = whole.CatalogueOptions(split=split.value, limit=limit, met_items=met_items.value, retrieve=retrieve)
        found = whole.evaluate_catalogue(prepared, run, names, ranking, foreign_data=foreign_data)
        print(f"\nthe whole catalogue, met items {met_items.value}d:\n{whole.table_text(found)}")


@_command
def recommend(
    run_dir: Annotated[Path, typer.Option("--run", "--run-dir", help="Run folder.")],
    history: Annotated[list[str] | None, typer.Option(help="A title or an item id, oldest first; repeatable.")] = None,
    user: Annotated[str | None, typer.Option(help="A user id, as your data has it.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", help="A .parquet, .csv or .jsonl file with a column user or history; needs --out."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write for --input: .parquet, .csv or .jsonl.")] = None,
    top: Annotated[int, typer.Option("--top", "-k", help="How many to name.", min=1)] = 10,
    exclude: Annotated[
        list[str] | None, typer.Option(help="A title or an item id that is not wanted; repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Left out: the best on validation, see `napo combine`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    threads: Threads = None,
) -> None:
    """What to watch, hear or read next: for a history, for a user, or for a file of them.

    Example: napo recommend --run runs/demo --history "Toy Story" --history "Aladdin" --top 10
    """
    if sum(given is not None for given in (history, user, source)) != 1:
        raise typer.BadParameter("expected one of --history, --user and --input")
    if (source is None) != (out is None):
        raise typer.BadParameter("--input and --out go together")
    _prepare_process(threads)
    from napo.recommend import Recommender, recommend_file

    recommender = Recommender.from_run(run_dir, model=model)
    if source is not None and out is not None:
        rows, popular = recommend_file(recommender, source, out, k=top, exclude=tuple(exclude or ()))
        print(f"{out}: {rows} rows by {recommender.model}, {popular} of them without a history: what is popular")
        return
    found = recommender.recommend(history, user=user, k=top, exclude=exclude or ())
    if as_json:
        import json

        print(json.dumps(found.as_dict(), ensure_ascii=False))
        return
    for note in found.notes:
        print(shown(note), file=sys.stderr)
    for place, one in enumerate(found.items, 1):
        print(f"{place:>3}. {shown(one.title)}  ({one.score:.2f})")


@_command
def serve(
    run_dir: Annotated[Path, typer.Option("--run", "--run-dir", help="Run folder.")],
    model: Annotated[str | None, typer.Option(help="Left out: the best on validation, see `napo combine`.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    threads: Threads = None,
    *,
    options: Options,
) -> None:
    """Recommendations over HTTP: POST /recommend; /docs describes it.

    Example: napo serve --run runs/ml --port 8000
    """
    _prepare_process(threads)
    from napo.extras import require
    from napo.recommend import Recommender
    from napo.serve import Limits

    limits = made(Limits, options)
    require("serve")
    from napo.serve.server import serve as run_server

    run_server(Recommender.from_run(run_dir, model=model), host=host, port=port, limits=limits)


@_command
def export(
    run_dir: Annotated[Path, typer.Option("--run", "--run-dir", help="Run folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    model: Annotated[str, typer.Option(help="The language model of the run.")] = "sft",
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, or auto: as the base model's weights.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder where it is there.")] = False,
) -> None:
    """A model of the run as a plain transformers folder: the adapter merged into its base, tokenizer, model card.

    Example: napo export --run runs/ml --model napo --out exported/napo
    """
    _prepare_process(None)
    from napo.export import export as run_export
    from napo.runs import Run

    print(run_export(Run(run_dir, create=False), model, out, dtype=dtype, overwrite=overwrite))


@_command
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run folder, or several to compare.")],
    out: Annotated[Path, typer.Option("--out", help="A name that ends in .html or .md.")],
) -> None:
    """Tables and plots of one run, or of several side by side, in one file that needs no other.

    Example: napo report runs/seed0 runs/seed1 runs/seed2 --out seeds.html
    """
    from napo.evaluation.report import report as run_report
    from napo.runs import Run

    print(run_report([Run(run, create=False) for run in runs], out))


@_command
def init(
    out: Annotated[Path, typer.Argument(metavar="[FILE]", help="File to write.")] = Path("run.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write a file with the options of all stages, each with a sentence, for `napo run`.

    Example: napo init run.yaml
    """
    from napo.command_line.listing import template
    from napo.files import write_text

    if out.exists() and not overwrite:
        raise UsageError(f"file: {out} is there; pass --overwrite to replace it, or give another name")
    write_text(out, template(COMMANDS))
    print(f"{out}: change what you like, then: napo run --config {out}")


@_command
def run(
    config: Annotated[Path, typer.Option("--config", help="File with the options of the stages.")] = Path("run.yaml"),
    overwrite: Overwrite = False,
) -> None:
    """Do all stages of a file: prepare, sasrec, sft, train, combine, evaluate, report. Called again, it continues.

    Example: napo run --config run.yaml
    """
    stages = entries(config)
    for stage, number, _ in stages:  # all are checked before the first begins
        _, given = section_values(config, COMMANDS[stage], number)
        if stage == "prepare":
            from napo.data.prepare import split_options

            split_options(given)
        elif stage in STAGES:
            made(options_class(stage), nested(given))
        elif given:
            raise UsageError(f"config: {config}: {stage}: {next(iter(given))}: no such option")
    for stage, number, _ in stages:
        if stage == "prepare" and _is_prepared(config, number):
            continue
        replace = overwrite and "overwrite" in own_parameters(COMMANDS[stage])
        arguments = [stage, "--config", str(config), "--entry", str(number), *(["--overwrite"] if replace else [])]
        application(stage)(args=arguments, prog_name="napo", standalone_mode=False)


@_command
def options(
    stage: Annotated[str, typer.Argument(help=f"One of {', '.join(STAGES)}.", callback=_one_of(STAGES))],
) -> None:
    """List every option of a stage with what it may be, its default and a sentence.

    Each is a flag (learning_rate: --learning-rate) and works with --set and in run.yaml.

    Example: napo options sft
    """
    from napo.command_line.listing import listing

    print(listing(stage))


@_command
def info() -> None:
    """What is installed here: versions, threads, the backends of each op and why one is missing, the cache.

    Example: napo info
    """
    import platform

    import torch

    from napo.assets import cache_dir
    from napo.extras import EXTRAS, missing
    from napo_kernels.dispatch import describe

    for name in ("napo", "torch", "triton", "numpy", "transformers", "peft", "accelerate", "pandas", "pyarrow"):
        print(f"{name:<14}{_version(name)}")
    print(f"{'python':<14}{platform.python_version()}, {platform.platform()}")
    print(f"{'threads':<14}{torch.get_num_threads()} (of {os.cpu_count()} cores), torch uses {_capability()}")
    print(f"{'cuda device':<14}{torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    cached = sorted(path.name for path in cache_dir().glob("*") if path.is_dir() and not path.name.startswith("."))
    print(f"{'cache':<14}{cache_dir()} ({', '.join(cached) or 'empty'})")
    lacking = {extra: missing(extra) for extra in EXTRAS}
    states = [f"{extra} (no {', '.join(names)})" if names else extra for extra, names in lacking.items()]
    print(f"{'extras':<14}{', '.join(states)}")
    chosen = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NAPO_")]
    print(f"{'variables':<14}{', '.join(chosen) or 'none'}\n")
    for line in describe():
        print(line)


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _capability() -> str:
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def _load(path: Path) -> Any:
    """The prepared data, before torch is imported: a wrong path is answered at once."""
    from napo.data.prepared import PreparedData

    return PreparedData.load(path)


def _prepare_process(threads: int | None) -> None:
    """Threads, and no chatter of the libraries between our own lines."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stdout.isatty() else "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers.utils import logging

    if threads is not None:
        torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _is_prepared(config: Path, number: int) -> bool:
    """Whether the data of a run file is there. It is not replaced: with other options it needs another folder."""
    from napo.data.prepared import PreparedData

    own, given = section_values(config, COMMANDS["prepare"], number)
    out = Path(str(own.get("out", "")))
    if not own.get("out") or not (out / "dataset.json").is_file():
        return False
    meta = PreparedData.load(out).meta
    there = {**meta.get("reader_options", {}), **meta.get("options", {}), "source": meta.get("source")}
    wanted = {**given, **{name: own[name] for name in ("source", "split", "seed") if own.get(name) is not None}}
    for name, value in wanted.items():
        if there.get(name) != value:
            raise ValueError(
                f"data: {out} was prepared with {name} {there.get(name)}, and {config} says {value}; give another "
                "folder, or move that one away"
            )
    print(f"prepare: {out} is there, skipped")
    return True


def _share(option: str, text: str) -> float:
    """ "1%" or "0.01"."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise typer.BadParameter(f"{option}: expected a share like 1% or 0.01; got {text!r}") from None


def main() -> None:
    """Exit with 0 on success, 2 on bad usage, 1 on failure, 130 and 143 on SIGINT and SIGTERM; failures are one line,
    with a traceback under --debug."""
    survive_narrow_encodings()
    handle_signals()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not debug:  # what other libraries warn of is not for users of a command
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="napo")
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        code = application(called)(args=arguments, prog_name="napo", standalone_mode=False)
    except UsageError as error:
        if debug:
            traceback.print_exc()
        _fail(f"{error} (see `{f'napo {called}' if called in COMMANDS else 'napo'} --help`)", 2)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if hasattr(error, "format_message"):  # typer's own: wrong usage
            _fail(f"{error.format_message()} (see `{_command_path(error)} --help`)", 2)
        if isinstance(error, FirstRankFailed):  # which has said why
            sys.exit(1)
        _fail(_one_line(error), 1)
    except (Stopped, KeyboardInterrupt) as stopped:
        code = stopped.exit_code if isinstance(stopped, Stopped) else 130
        _fail(_how_to_continue(), code)
    sys.exit(code if isinstance(code, int) else 0)


def _how_to_continue() -> str:
    again = shlex.join(["napo", *sys.argv[1:]])
    return f"stopped; what is finished or was saved is kept; to continue: {again}"


def survive_narrow_encodings() -> None:
    """Under an ASCII locale the other characters of a title are printed as escapes, where Python would stop."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def _command_path(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else "napo"


def _one_line(error: Exception) -> str:
    """Our own errors say everything; others also get their kind and where to see more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if isinstance(error, ValueError) and len(lines) == 1:
        return text
    if isinstance(error, OSError):
        return f"{text}; --debug shows where"
    return f"{type(error).__name__}: {text}; --debug shows where"


def _fail(message: str, code: int) -> None:
    # Messages quote files, and a terminal would obey what those hold.
    print(f"napo: {shown(' '.join(message.split()), 2000)}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
