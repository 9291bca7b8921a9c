"""The command line of a benchmark: the common options and its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import device
from benchmarks.machine import RESULTS
from napo_kernels.dispatch import backends


def command_line(
    doc: str | None,
    arguments: Sequence[str],
    add: Callable[[argparse.ArgumentParser], Any] | None = None,
    *,
    default_device: str = "cpu",
) -> argparse.Namespace:
    """The parsed command line, with the options of `add`; the device becomes the one that is measured."""
    parser = parser_for(doc)
    parser.add_argument("--device", default=default_device, choices=["cpu", "cuda"])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    parser.add_argument("--budget", type=float, default=None, help="seconds after which no further case is begun")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads on the CPU; default: one per core")
    if add is not None:
        add(parser)
    options = parser.parse_args(arguments)
    device.use(options.device)
    missing = backends()["cpu"]["why_not"]
    if options.device == "cpu" and missing and not options.smoke:
        raise SystemExit(f"our C++ kernels cannot run: {missing}")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def parser_for(doc: str | None) -> argparse.ArgumentParser:
    """With the options of a report."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--day", default=None, help="date in the JSON file's name; default: today (UTC)")
    return parser
