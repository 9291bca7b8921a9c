"""The command line as an application of typer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from napo.command_line.flags import STAGES, with_flags
from napo.command_line.run_file import SECTIONS


def application_of(commands: Mapping[str, Callable[..., None]], called: str | None) -> typer.Typer:
    """The application of these commands. The one that is ``called`` gets the flags of its stage's options."""
    app = typer.Typer(
        name="napo",
        no_args_is_help=False,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback(invoke_without_command=True)(main_options)
    for name, function in commands.items():
        app.command(name)(with_flags(function, load=name == called) if name in SECTIONS or name in STAGES else function)
    return app


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
