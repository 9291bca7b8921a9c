"""Flags of a command from the dataclass of its stage's options.

Every plain option is a flag; ``--help`` shows the usual ones, ``napo options STAGE`` shows all. A dataclass is
imported only when its command was called."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from napo.command_line.run_file import SHARED, entry_of
from napo.data.sources import SOURCES, reader_of
from napo.options import Option, UsageError, nested, options_of, parsed, settings

STAGES = {
    "prepare": "napo.data.prepare.PrepareOptions",
    "sasrec": "napo.recommenders.options.SASRecOptions",
    "sft": "napo.finetuning.options.SFTOptions",
    "train": "napo.finetuning.options.PreferenceOptions",
    "evaluate": "napo.evaluation.evaluate.EvaluateOptions",
    "serve": "napo.serve.limits.Limits",
}
"""The dataclass of each command that has one."""
SHOWN = {
    "prepare": "min_user min_item history candidates test_users val_users rows_per_user max_untitled",
    "sasrec": "dim max_epochs max_minutes patience learning_rate batch_size loss",
    "sft": "tokens epochs examples max_minutes batch_size learning_rate distill history max_length loss_on "
    "normalise dtype lora.r lora.alpha lora.top_layers",
    "train": "users tokens epochs max_minutes batch_size learning_rate negatives negatives_from beta gamma alpha rho "
    "sft_weight prefixes window max_length dtype",
    "evaluate": "greedy_limit tokens_per_batch",
    "serve": "max_batch max_history max_k",
}
"""The options that ``--help`` has."""
METAVARS: dict[type, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
_FILE, _ENTRY, _SECTION = "napo.file", "napo.entry", "napo.section"


def options_class(stage: str) -> type:
    module, _, name = STAGES[stage].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    assert isinstance(kind, type)
    return kind


def options_by_name(stage: str) -> Iterator[tuple[str, Option]]:
    """Options within an option have dotted names."""
    for option in options_of(options_class(stage)):
        if is_dataclass(option.default):
            for inner in options_of(type(option.default)):
                yield f"{option.name}.{inner.name}", inner
        else:
            yield option.name, option


def reader_options() -> dict[str, Option]:
    """The options of all sources of data, by name; those of one name are of one kind."""
    readers = dict.fromkeys(map(reader_of, SOURCES))
    return {option.name: option for reader in readers for option in options_of(reader.Options)}


def own_parameters(command: Callable[..., None]) -> dict[str, inspect.Parameter]:
    """The parameters of a command beside the options of its stage."""
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters.values()
    return {p.name: p.replace(annotation=hints[p.name]) for p in parameters if p.name != "options"}


def with_flags(command: Callable[..., None], *, load: bool = True) -> Callable[..., None]:
    """``command`` with ``--config``. Its parameter ``options``, if it has one, gets what that file, flags and ``--set``
    say about its stage. ``load``: whether this command was called."""
    stage = command.__name__
    own = own_parameters(command)
    described: dict[str, Option] = {}
    if load and stage in STAGES:
        described = {name: option for name, option in options_by_name(stage) if name not in own}
    flags = {name.replace(".", "__"): name for name, option in described.items() if option.kinds}

    def on_config(context: typer.Context, value: Path | None) -> Path | None:
        context.meta[_FILE] = value
        _read_file(context, command, described)
        return value

    def on_entry(context: typer.Context, value: int | None) -> int | None:
        context.meta[_ENTRY] = value
        _read_file(context, command, described)
        return value

    @functools.wraps(command)
    def call(context: typer.Context, **given: Any) -> None:
        values = {name: given[name] for name in own}
        if stage in STAGES:
            by_flag = {
                name: given[flag] if described[name].is_flag else parsed(given[flag], described[name])
                for flag, name in flags.items()
                if given[flag] is not None
            }
            of_readers = reader_options() if stage == "prepare" and given["settings"] else {}
            by_set = settings(given["settings"] or [], "--set", {**of_readers, **described})
            twice = next((name for name in by_flag if name in by_set), None)
            if twice is not None:
                raise UsageError(f"{twice}: given as a flag and with --set; leave out one of the two")
            values["options"] = nested({**context.meta.get(_SECTION, {}), **by_flag, **by_set})
        command(**values)

    parameters = {
        "context": typer.Context,
        **{flag: _flag(name, described[name], name in SHOWN[stage].split()) for flag, name in flags.items()},
    }
    if stage in STAGES:
        parameters["settings"] = Annotated[
            list[str] | None,
            typer.Option(
                "--set",
                metavar="NAME=VALUE",
                help=f"Any option of the step (`napo options {stage}` lists them); repeatable.",
            ),
        ]
    parameters["config"] = Annotated[
        Path | None,
        typer.Option("--config", is_eager=True, callback=on_config, help="File with options; `napo init` writes one."),
    ]
    parameters["entry"] = Annotated[
        int | None,
        typer.Option("--entry", is_eager=True, callback=on_entry, min=1, help="Which of the file's entries, from 1."),
    ]
    kind = inspect.Parameter.KEYWORD_ONLY
    signature = [p.replace(kind=kind) for p in own.values()]
    signature += [
        inspect.Parameter(name, kind, annotation=hint, default=inspect.Parameter.empty if name == "context" else None)
        for name, hint in parameters.items()
    ]
    call.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in signature}
    return call


def _flag(name: str, option: Option, shown: bool) -> Any:
    """The annotation of a flag. Values are parsed by the same rules as those of ``--set``."""
    flag = name.replace(".", "-").replace("_", "-")
    default = "null" if option.default is None else str(option.default)
    default = default.lower() if option.is_flag else default
    limits = f" ({option.range})" if option.range is not None else ""
    text = f"{option.sentence}{limits}  [default: {default}]"
    if option.is_flag:
        return Annotated[bool | None, typer.Option(f"--{flag}/--no-{flag}", help=text, hidden=not shown)]
    metavar = f"[{'|'.join(option.choices)}]" if option.choices else METAVARS[option.kinds[0]]
    return Annotated[str | None, typer.Option(f"--{flag}", metavar=metavar, help=text, hidden=not shown)]


def _read_file(context: typer.Context, command: Callable[..., None], described: Mapping[str, Option]) -> None:
    """Called for the file and for its entry; works once both are known. The file's values become defaults of the
    command's own parameters, and options of its stage."""
    path = context.meta.get(_FILE)
    if path is not None and _ENTRY in context.meta:
        own, options = section_values(path, command, context.meta[_ENTRY], described)
        context.default_map = own
        context.meta[_SECTION] = options


def section_values(
    path: Path, command: Callable[..., None], entry: int | None, described: Mapping[str, Option] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file's values for the command's own parameters, and for the options of its stage."""
    stage, own = command.__name__, own_parameters(command)
    if described is None:
        described = dict(options_by_name(stage)) if stage in STAGES else {}
    section = entry_of(path, stage, entry)
    outer = {name.partition(".")[0] for name in described}
    options: dict[str, Any] = {}
    for name, value in section.items():
        if name in own or (name in (*SHARED, "out", "runs", "run_dir") and name not in outer):
            continue
        # Options that prepare does not know belong to the source's reader, which checks them.
        if name.partition(".")[0] not in outer and stage != "prepare":
            known = ", ".join(sorted({*own, *outer} - set(SHARED)))
            raise UsageError(f"config: {path}: {stage}: {name}: no such option; expected one of {known}")
        for inner, part in _parts(name, value):
            option = described.get(inner)
            # YAML reads 1e-4 as text
            options[inner] = parsed(part, option) if isinstance(part, str) and not _is_text(option) else part
    return {name: _as_given(value, own[name]) for name, value in section.items() if name in own}, options


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for inner, part in value.items():
            yield f"{name}.{inner}", part
    else:
        yield name, value


def _is_text(option: Option | None) -> bool:
    return option is None or str in option.kinds or not option.kinds


def _as_given(value: Any, parameter: inspect.Parameter) -> Any:
    """In a file, names may be a list; on the command line they have commas between them."""
    if isinstance(value, list) and "list[" not in str(parameter.annotation):
        return ",".join(map(str, value))
    return value
