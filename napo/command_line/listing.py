"""The listing of ``napo options`` and the commented template of ``napo init``."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml

from napo.command_line.flags import STAGES, options_by_name, own_parameters
from napo.command_line.run_file import SECTIONS, SHARED
from napo.data.sources import SOURCES, reader_of
from napo.options import Option, options_of, plain

WIDTH = 110
SHARED_VALUES = {"run": "runs/ml-100k", "data": "data/ml-100k", "seed": 0, "threads": None}
SHARED_TEXTS = {
    "run": "Run folder; made if it is not there.",
    "data": "Prepared data set; `napo run` prepares it where it is not there.",
    "seed": "Seed of everything random.",
    "threads": "CPU threads; null: every core.",
}
GIVEN: dict[str, dict[str, Any]] = {
    "prepare": {"source": "movielens", "path": "raw/ml-100k", "download": "ml-100k"},
    "sasrec": {},
    "sft": {"model": "smollm2-135m", "tokens": 300_000},
    "train": {"objective": "napo"},
    "combine": {"model": "napo"},
    "evaluate": {"limit": 400},
    "report": {"out": "report.html"},
}
"""The values that the template sets; everything else in it is a comment."""
NOT_IN_FILE = (*SHARED, "overwrite", "run_dir", "runs")


def listing(stage: str) -> str:
    """Every option of a stage, with what it may be, its default and a sentence."""
    lines = _described(options_by_name(stage))
    if stage == "prepare":
        for reader in dict.fromkeys(map(reader_of, SOURCES)):
            options = options_of(reader.Options)
            if options:
                names = ", ".join(source for source in SOURCES if reader_of(source) is reader)
                lines += [
                    "",
                    f"With {names} also, as --set NAME=VALUE:",
                    *_described((option.name, option) for option in options),
                ]
    return "\n".join(lines)


def _described(options: Iterable[tuple[str, Option]]) -> list[str]:
    lines = []
    for name, option in options:
        lines.append(f"{name}  ({option.expected}; default {shown_default(option)})")
        lines += textwrap.wrap(option.sentence, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return lines


def template(commands: Mapping[str, Callable[..., None]]) -> str:
    """A run file that trains on MovieLens-100K, with all other options as comments."""
    lines = [
        "# Options of all stages. `napo run --config FILE` does them all; `napo sft --config FILE` one of them.",
        "# What a command is given beside the file goes first. Lines like #epochs: 1.0 show defaults: take the # away.",
        "# Paths start at the folder that the command is called in. A section may be a list, to train several models:",
        "#   train:",
        "#     - {objective: napo}",
        "#     - {objective: sdpo, name: sdpo}",
        "",
    ]
    for name in SHARED:
        lines.append(f"{name}: {_yaml(SHARED_VALUES[name])}  # {SHARED_TEXTS[name]}")
    for stage in SECTIONS:
        command = commands[stage]
        lines += ["", f"# {(command.__doc__ or '').strip().splitlines()[0]}"]
        given = GIVEN[stage]
        own = {n: p for n, p in own_parameters(command).items() if n not in NOT_IN_FILE and (stage, n) != _OUT}
        lines.append(f"{stage}:")
        rows = [(name, _default(parameter), _help(parameter)) for name, parameter in own.items()]
        if stage in STAGES:
            rows += [
                (name, option.default, f"{option.sentence} ({option.expected})")
                for name, option in options_by_name(stage)
                if name not in own and name not in NOT_IN_FILE
            ]
        for name, default, text in rows:
            lines += textwrap.wrap(text, WIDTH, initial_indent="  # ", subsequent_indent="  # ")
            lines.append(f"  {name}: {_yaml(given[name])}" if name in given else f"  #{name}: {_yaml(default)}")
    return "\n".join(lines) + "\n"


def shown_default(option: Option) -> str:
    return _yaml(option.default)


_OUT = ("prepare", "out")  # `data` gives it


def _default(parameter: inspect.Parameter) -> Any:
    return None if parameter.default is inspect.Parameter.empty else plain(parameter.default)


def _help(parameter: inspect.Parameter) -> str:
    return next((m.help for m in getattr(parameter.annotation, "__metadata__", ()) if m.help), "")


def _yaml(value: Any) -> str:
    """A value in one line of YAML."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=10_000)).removesuffix("...\n").strip()
