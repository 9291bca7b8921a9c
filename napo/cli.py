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

from napo.data.sources import SOURCES
from napo.data.styles import STYLES, PromptStyle
from napo.data.texts import shown
from napo.objectives import OBJECTIVES
from napo.signals import Stopped, handle_signals

app = typer.Typer(
    name="napo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


class Score(str, Enum):
    sum = "sum"
    average = "average"


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


RunFolder = Annotated[Path, typer.Option("--run", help="Run folder; made if it is not there.")]
DataFolder = Annotated[Path, typer.Option("--data", help="Prepared data set, from `napo prepare`.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a finished result that was made with other options.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; the default is every core.", min=1)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other option of the step; repeatable.")
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="On failure show the traceback. Works anywhere.")] = False,
) -> None:
    """Preference optimisation of LLM recommenders with shared negatives (NAPO).

    The whole way on a real model and real data: napo demo
    """


@app.command()
def demo(
    run: RunFolder = Path("runs/demo"),
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

    run_demo(run, seed=seed, model=model, source=source, overwrite=overwrite)


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help=f"The format of PATH: {', '.join(SOURCES)}.", callback=_one_of(SOURCES))
    ],
    path: Annotated[Path, typer.Argument(help="A file or a folder, as the source has it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    split: Annotated[str | None, typer.Option(help="user, leave-last-out or time.")] = None,
    download: Annotated[
        str | None,
        typer.Option(
            help="Fetch it into PATH first, where it is not there yet: "
            "ml-100k, ml-1m, ml-20m, ml-25m, ml-latest-small or lastfm-2k."
        ),
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
    settings: Settings = None,
) -> None:
    """Read interactions, filter, split and draw candidate lists.

    Example: napo prepare movielens raw/ml-1m --download ml-1m --out data/ml-1m --set test_users=400
    """
    from napo.data.prepare import prepare as run_prepare
    from napo.data.prepare import split_options, summary

    if download is not None:
        from napo.data.downloads import download as run_download

        run_download(download, path, source=source)
    options = {"split": split, "seed": seed, "max_bad": _share("--max-bad", max_bad), **_parse(settings)}
    data = run_prepare(source, path, out, *split_options(options))
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


@app.command()
def sasrec(
    data: DataFolder,
    run: RunFolder,
    export: Annotated[
        Path | None, typer.Option(help="Also write every row's user state and candidates' scores to this folder.")
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    threads: Threads = None,
    settings: Settings = None,
) -> None:
    """Train the auxiliary recommender that says who is similar and which negative is one.

    Example: napo sasrec --data data/ml-100k --run runs/ml
    """
    prepared = _load(data)
    _prepare_process(threads)
    from napo.runs import Run
    from napo.stages import sasrec_stage

    sasrec_stage(Run(run), prepared, seed=seed, options=_parse(settings), overwrite=overwrite)
    if export is not None:
        from napo.recommenders.sasrec import SASRec, export_rows

        export_rows(SASRec.load(run / "sasrec"), prepared, export)


@app.command()
def sft(
    data: DataFolder,
    run: RunFolder,
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
    settings: Settings = None,
) -> None:
    """Supervised fine-tuning: the model learns to name the next title.

    Example: napo sft --data data/ml-100k --run runs/ml --model smollm2-135m
    """
    prepared = _load(data)
    _prepare_process(threads)
    from napo.runs import Run
    from napo.stages import sft_stage

    options = _parse(settings)
    sft_stage(
        Run(run),
        prepared,
        model=model,
        style=cast(PromptStyle, style),
        seed=seed,
        options=options,
        name=name,
        init_from=init_from,
        overwrite=overwrite,
    )


@app.command()
def train(
    data: DataFolder,
    run: RunFolder,
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
    settings: Settings = None,
) -> None:
    """Preference optimisation: one positive against many negatives.

    Example: napo train --data data/ml-100k --run runs/ml --objective napo
    """
    prepared = _load(data)
    _prepare_process(threads)
    from napo.runs import Run
    from napo.stages import train_stage

    train_stage(
        Run(run, create=False),
        prepared,
        objective=objective,
        name=name or objective,
        init_from=init_from,
        seed=seed,
        options=_parse(settings),
        overwrite=overwrite,
    )


@app.command()
def combine(
    data: DataFolder,
    run: RunFolder,
    model: Annotated[str, typer.Option(help="The model of the run that SASRec is combined with.")] = "napo",
    threads: Threads = None,
) -> None:
    """Combine a model with SASRec: MODEL+sasrec, a weighted sum of their scores, fitted on validation rows.

    Example: napo combine --data data/ml-100k --run runs/ml --model napo
    """
    prepared = _load(data)
    _prepare_process(threads)
    from napo.evaluation.combine import summary
    from napo.recommenders.combination import Fitted, combined_name
    from napo.runs import Run
    from napo.stages import combine_stage

    folder = Run(run, create=False)
    combine_stage(folder, prepared, model=model)
    for line in summary(Fitted.read(folder.path, combined_name(model))):
        print(line)


@app.command()
def evaluate(
    data: DataFolder,
    run: RunFolder,
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
    threads: Threads = None,
) -> None:
    """Rank held-out lists with every model, the same lists for all; writes metrics.json.

    Example: napo evaluate --data data/ml-100k --run runs/ml --models popularity,itemknn,sasrec,sft,napo --limit 400
    """
    prepared = _load(data)
    _prepare_process(threads)
    from napo.evaluation.evaluate import EvaluateOptions
    from napo.evaluation.evaluate import evaluate as run_evaluate
    from napo.evaluation.report import table_text
    from napo.recommenders.registry import available
    from napo.runs import Run

    folder = Run(run, create=False)
    names = [name.strip() for name in (models or "").split(",") if name.strip()]
    if not names:
        names = [name for name, kind in available(folder).items() if kind.by_default]
    chosen = EvaluateOptions(split=split.value, limit=limit, score=score.value, greedy=greedy)
    run_evaluate(prepared, folder, names, chosen, foreign_data=foreign_data)
    print(table_text(folder))


@app.command()
def recommend(
    run: Annotated[Path, typer.Option("--run", help="Run folder.")],
    history: Annotated[list[str], typer.Option(help="A title, oldest first; repeatable.")],
    top: Annotated[int, typer.Option(help="How many to name.", min=1)] = 10,
    model: Annotated[str | None, typer.Option(help="Left out: what won on validation, or napo, or the newest.")] = None,
    threads: Threads = None,
) -> None:
    """What to watch, hear or read next.

    Example: napo recommend --run runs/demo --history "Toy Story" --history "Aladdin" --top 10
    """
    _prepare_process(threads)
    from napo.recommend import recommend as run_recommend
    from napo.runs import Run

    for place, found in enumerate(run_recommend(Run(run, create=False), history, top=top, model=model), 1):
        print(f"{place:>3}. {shown(found.title)}  ({found.score:.2f})")


@app.command()
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


@app.command()
def info() -> None:
    """What is installed here: versions, threads, the backends of each op and why one is missing, the cache.

    Example: napo info
    """
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import napo_kernels
    from napo.assets import cache_dir

    for name in ("napo", "torch", "transformers", "peft", "accelerate", "triton"):
        try:
            print(f"{name:<14}{version(name)}")
        except PackageNotFoundError:
            print(f"{name:<14}not installed")
    print(f"{'python':<14}{sys.version.split()[0]}")
    print(f"{'threads':<14}{torch.get_num_threads()} (of {os.cpu_count()} cores), {_capability()}")
    print(f"{'cuda device':<14}{torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    cached = sorted(path.name for path in cache_dir().glob("*") if path.is_dir() and not path.name.startswith("."))
    print(f"{'cache':<14}{cache_dir()} ({', '.join(cached) or 'empty'})")
    print("\nbackends of " + ", ".join(napo_kernels.backends()["reference"]["ops"]))
    for name, row in napo_kernels.backends().items():
        built = ", ".join(f"{key} {value}" for key, value in dict(row.get("config") or {}).items())
        state = f"yes{f' ({built})' if built else ''}" if row["available"] else f"no: {row['why_not']}"
        print(f"  {name:<12}{state}")


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

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if threads is not None:
        torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _parse(settings: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE; a value is a number, true, false, null (or True, False, None), JSON, or else text."""
    import json
    import re

    words: dict[str, Any] = {"True": True, "False": False, "None": None}
    parsed: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"--set: expected NAME=VALUE; got {setting!r}")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = words.get(value, value)
            if re.fullmatch(r"[+-]?(\d+\.?|\d*\.\d+)(e[+-]?\d+)?", value, re.IGNORECASE):  # .5 and 1. are no JSON
                parsed[name] = float(value)
    return parsed


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
    try:
        code = app(args=arguments, prog_name="napo", standalone_mode=False)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if hasattr(error, "format_message"):  # typer's own: wrong usage
            _fail(f"{error.format_message()} (see `{_command(error)} --help`)", 2)
        _fail(_one_line(error), 1)
    except (Stopped, KeyboardInterrupt) as stopped:
        again = shlex.join(["napo", *sys.argv[1:]])
        code = stopped.exit_code if isinstance(stopped, Stopped) else 130
        _fail(f"stopped; what is finished or was saved is kept; to continue: {again}", code)
    sys.exit(code if isinstance(code, int) else 0)


def survive_narrow_encodings() -> None:
    """Under an ASCII locale the other characters of a title are printed as escapes, where Python would stop."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _command(error: Any) -> str:
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
