"""All stages at once: ``napo demo``, or ``napo init`` and ``napo run`` on your own data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from napo.command_line.application import application_of
from napo.command_line.flags import STAGES, options_class, own_parameters, section_values
from napo.command_line.parameters import Overwrite, RunFolder, Seed, Threads
from napo.command_line.process import prepare_process
from napo.command_line.run_file import entries
from napo.commands.data import prepare
from napo.commands.evaluation import evaluate, report
from napo.commands.training import combine, sasrec, sft, train
from napo.options import UsageError, made, nested

STAGE_COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command for command in (prepare, sasrec, sft, train, combine, evaluate, report)
}
"""The commands that have a section in a run file."""


def demo(
    run_dir: RunFolder = Path("runs/demo"),
    seed: Seed = 0,
    model: Annotated[str, typer.Option(help="smollm2-135m, a local folder or a name on the hub.")] = "smollm2-135m",
    source: Annotated[
        Path | None,
        typer.Option(help="Folder of RecBole atomic files, of more than 500 users, in place of MovieLens-100K."),
    ] = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
) -> None:
    """Train and evaluate a recommender on MovieLens-100K: data, SASRec, SFT, NAPO, report. Started again, it continues.

    Example: napo demo --run runs/demo --seed 0
    """
    prepare_process(threads)
    from napo.demo import demo as run_demo

    run_demo(run_dir, seed=seed, model=model, source=source, overwrite=overwrite)


def init(
    out: Annotated[Path, typer.Argument(metavar="[FILE]", help="File to write.")] = Path("run.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a file with the options of all stages, each with a sentence, for `napo run`.

    Example: napo init run.yaml
    """
    from napo.command_line.listing import template
    from napo.files import write_text

    if out.exists() and not overwrite:
        raise UsageError(f"file: {out} is there; pass --overwrite to replace it, or give another name")
    write_text(out, template(STAGE_COMMANDS))
    print(f"{out}: change what you like, then: napo run --config {out}")


def run(
    config: Annotated[Path, typer.Option("--config", help="File with the options of the stages.")] = Path("run.yaml"),
    overwrite: Overwrite = False,
) -> None:
    """Do all stages of a file: prepare, sasrec, sft, train, combine, evaluate, report. Called again, it continues.

    Example: napo run --config run.yaml
    """
    stages = entries(config)
    for stage, number, _ in stages:  # all are checked before the first begins
        _, given = section_values(config, STAGE_COMMANDS[stage], number)
        if stage == "prepare":
            from napo.data.prepare import split_options

            split_options(given)
        elif stage in STAGES:
            made(options_class(stage), nested(given))
        elif given:
            raise UsageError(f"config: {config}: {stage}: {next(iter(given))}: no such option")
    for stage, number, _ in stages:
        if stage == "prepare" and is_prepared(config, number):
            continue
        replace = overwrite and "overwrite" in own_parameters(STAGE_COMMANDS[stage])
        arguments = [stage, "--config", str(config), "--entry", str(number), *(["--overwrite"] if replace else [])]
        application_of({stage: STAGE_COMMANDS[stage]}, stage)(args=arguments, prog_name="napo", standalone_mode=False)


def is_prepared(config: Path, number: int) -> bool:
    """Whether the data of a run file exists. It is not replaced: other options or files need another folder."""
    from napo.data.prepare import PrepareOptions, with_defaults
    from napo.data.prepared import PreparedData
    from napo.data.source_files import compare
    from napo.data.texts import shown

    own, given = section_values(config, prepare, number)
    out = Path(str(own.get("out", "")))
    if not own.get("out") or not (out / "dataset.json").is_file():
        return False
    meta = PreparedData.load(out).meta
    there = {**_reader_defaults(str(meta.get("source"))), **meta.get("reader_options", {}), **meta.get("options", {})}
    there["source"] = meta.get("source")
    wanted = {**given, **{name: own[name] for name in ("source", "split", "seed") if own.get(name) is not None}}
    of_source = asdict(with_defaults(PrepareOptions(), str(there["source"])))  # dataset.json has them in place of null
    for name, value in wanted.items():
        if value is None and there.get(name) is not None:
            value = of_source.get(name)
        if there.get(name) != value:
            raise ValueError(
                f"data: {out} was prepared with {name} {there.get(name)}, and {config} says {value}; give another "
                "folder, or move that one away"
            )
    said = f"prepare: {out} is there, skipped"
    if own.get("path") is not None:
        path = Path(str(own["path"]))
        other, gone = compare(meta, path, given.get("items"))
        if other is not None:
            raise ValueError(
                f"data: {out} was prepared from {other[0]}, and {config} says path {path}, {other[1]}; give another "
                "folder, or move that one away"
            )
        if gone:
            said += f"; it could not be compared with {shown(', '.join(gone), 200)}, which {path} does not have"
    print(said)
    return True


def _reader_defaults(source: str) -> dict[str, Any]:
    """What options of a source's reader mean that dataset.json does not have, as they were not given."""
    from napo.data.sources import SOURCES, reader_of

    return asdict(reader_of(source).Options()) if source in SOURCES else {}
