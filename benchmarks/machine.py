"""Hardware and versions of a result, and whether a peer is here."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Peers unpacked by `make bench-peers`, for a machine without a network. Their folder comes last on the path, so that
# they replace no installed package. `datasets` among them needs two compiled packages: without these transformers would
# find a `datasets` that does not import, and fail itself.
if all(importlib.util.find_spec(needed) for needed in ("xxhash", "pyarrow")):
    sys.path.append(str(ROOT / "build" / "peers"))

PEERS: dict[str, str] = {}


def peer(module: str, name: str, *also: str) -> Any | None:
    """A peer's function, or None with a line that says so; its package's version goes into the results either way.
    `also`: modules that it imports only when it runs."""
    package = module.partition(".")[0]
    try:
        found = getattr(importlib.import_module(module), name)
        for other in also:
            importlib.import_module(other)
        PEERS[package] = version_of(package)
    except Exception as error:  # a peer may fail to import in any way; that must not cost us the run
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        PEERS[package] = f"absent ({reason[:80]})"
        print(f"{package}: not measured ({reason}); pip install '.[bench]' brings it", file=sys.stderr)
        return None
    return found


def absent(package: str, reason: str) -> None:
    """Names a peer that cannot run on this device."""
    PEERS.setdefault(package, f"absent ({reason})")


def version_of(package: str) -> str:
    names = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(names[0])


def facts_of_machine(device: torch.device) -> dict[str, Any]:
    from napo_kernels.dispatch import compiled

    module = compiled()
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiled_module": dict(module.build_config()) if module else None,
        "peers": dict(sorted(PEERS.items())),
    }
    for package in ("triton", "transformers"):
        if importlib.util.find_spec(package) is not None:
            facts[package] = importlib.metadata.version(package)
    if device.type == "cuda":
        facts |= facts_of_gpu()
    return facts


@functools.cache
def facts_of_gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "cuda": torch.version.cuda,
        "gpu_gib": round(properties.total_memory / 2**30, 1),
        "gpu_processors": properties.multi_processor_count,
        "gpu_l2_mib": properties.L2_cache_size >> 20,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in pairs}
    flags = fields.get("flags", "").split()
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    model = " ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    return f"{fields.get('model name', platform.processor())} ({model}; {', '.join(wide)})"


def slug(facts: dict[str, Any]) -> str:
    """The hardware in a file's name: of a CPU family and model as well, since virtual machines hide its number."""
    if "gpu" in facts:
        words = facts["gpu"]
    else:
        name, _, more = facts["cpu"].partition(" (cpu ")
        words = f"{name} {more.partition(';')[0]} {facts['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)", "", words).lower()).strip("-")
