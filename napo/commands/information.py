"""``napo options``: what can be chosen. ``napo info``: what is installed."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from napo.command_line.flags import STAGES
from napo.command_line.parameters import one_of


def options(
    stage: Annotated[str, typer.Argument(help=f"One of {', '.join(STAGES)}.", callback=one_of(STAGES))],
) -> None:
    """List every option of a stage with its values, its default and a sentence.

    Each is a flag (learning_rate: --learning-rate) and works with --set and in run.yaml. Those of one source of data
    alone (napo options prepare) are no flags.

    Example: napo options sft
    """
    from napo.command_line.listing import listing

    print(listing(stage))


def info() -> None:
    """Show what is installed: versions, threads, the cache, the backends and why one cannot run.

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
