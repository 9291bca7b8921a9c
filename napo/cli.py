"""The command line: which commands it has, and how it ends."""

from __future__ import annotations

import io
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import typer

from napo.command_line.application import application_of
from napo.commands.data import prepare
from napo.commands.deployment import export, recommend, serve
from napo.commands.evaluation import evaluate, report
from napo.commands.information import info, options
from napo.commands.pipeline import demo, init, run
from napo.commands.training import combine, sasrec, sft, train
from napo.data.texts import shown
from napo.extras import MissingExtra
from napo.options import UsageError
from napo.program import call
from napo.ranks import FirstRankFailed
from napo.signals import Stopped, handle_signals

COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        *(demo, prepare, sasrec, sft, train, combine, evaluate),
        *(recommend, serve, export, report, init, run, options, info),
    )
}
"""Name and function of each command, in the order of the help."""


WHOLE = ("prepare", "export", "recommend", "report")
"""Commands whose file or folder is written whole or not at all."""


def application(called: str | None) -> typer.Typer:
    """The command line. The command that is ``called`` gets the flags of its stage's options."""
    return application_of(COMMANDS, called)


def main() -> None:
    """Exit with 0 on success, 2 on bad usage, 1 on failure, 130 and 143 on SIGINT and SIGTERM; failures are one line,
    with a traceback under --debug."""
    survive_narrow_encodings()
    handle_signals()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not debug:  # warnings of other libraries are not for users of a command
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
        if hasattr(error, "format_message"):  # an error of typer: wrong usage
            _fail(f"{error.format_message()} (see `{_command_path(error)} --help`)", 2)
        if isinstance(error, FirstRankFailed):  # the first rank has said why
            sys.exit(1)
        _fail(_one_line(error), 1)
    except (Stopped, KeyboardInterrupt) as stopped:
        code = stopped.exit_code if isinstance(stopped, Stopped) else 130
        _fail(_how_to_continue(called, getattr(stopped, "lost", None)), code)
    sys.exit(code if isinstance(code, int) else 0)


def _how_to_continue(called: str | None, lost: str | None) -> str:
    """``lost``: what is not kept, of a training that was not waited for."""
    command = call(sys.argv[1:])
    if called in WHOLE:
        download = any(argument.startswith("--download") for argument in sys.argv)
        return f"stopped; nothing {'but a finished download ' if download else ''}is kept; to begin again: {command}"
    if lost is not None:
        return f"stopped without saving; {lost}; to continue: {command}"
    kept = "" if called == "serve" else "what is finished or was saved is kept; "
    return f"stopped; {kept}to continue: {command}"


def survive_narrow_encodings() -> None:
    """Under an ASCII locale print other characters as escapes; Python would stop at them."""
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
    if isinstance(error, (ValueError, MissingExtra)) and len(lines) == 1:
        return text
    if isinstance(error, OSError):
        return f"{text}; --debug shows where"
    return f"{type(error).__name__}: {text}; --debug shows where"


def _fail(message: str, code: int) -> None:
    # Messages quote files, and a terminal would obey control characters in them.
    print(f"napo: {shown(' '.join(message.split()), 2000)}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
