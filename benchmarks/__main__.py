"""The command of the benchmarks; run it in the repository's root.

python -m benchmarks list                              the benchmarks and what they measure
python -m benchmarks run loss --device cuda            one benchmark; run loss --help has its options, list the others
python -m benchmarks compare build/run-1 build/run-2   how far the ratios of two runs are apart
python -m benchmarks render                            tables and plots of all results
python -m benchmarks code                              what the GPU kernels compile to, without a GPU
python -m benchmarks trials                            settings to decide in the next minutes on a GPU
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from benchmarks import BENCHMARKS

COMMANDS = {"compare": "compare_runs", "render": "render", "code": "gpu_code", "trials": "gpu_trials"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["list", "run", *COMMANDS])
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="what the command takes; its own --help says it")
    given = parser.parse_args(arguments)
    rest: list[str] = given.rest
    if given.command == "list":
        for name, (module, what) in BENCHMARKS.items():
            print(f"{name:12} {what} ({module}.py)")
        return
    if given.command != "run":
        start(COMMANDS[given.command], rest)
    elif rest and rest[0] in ("-h", "--help"):
        parser.print_help()
    elif not rest or rest[0] not in BENCHMARKS:
        parser.error(f"run: expected one of {', '.join(BENCHMARKS)}, got {rest[0] if rest else 'nothing'}")
    else:
        start(BENCHMARKS[rest[0]][0], rest[1:])


def start(module: str, arguments: Sequence[str]) -> None:
    """Import only the module that is asked for: some benchmarks load transformers, others matplotlib."""
    importlib.import_module(f"benchmarks.{module}").main(arguments)


if __name__ == "__main__":
    main()
