"""The compiled module with its CUDA kernels built for the CPU (tests/cuda_emulation): the very sources and bindings
that nvcc compiles, run without a GPU."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[2]
HEADERS = (ROOT / "tests" / "cuda_emulation", ROOT / "csrc", Path(torch.__file__).parent / "include")
PYTHON = Path(sysconfig.get_path("include"))
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DNAPO_WITH_CUDA", "-U_FORTIFY_SOURCE", "-w"]
# A misaligned vector, an index outside an array of the block or an overflow stops the process.
CHECKED = ["-O1", "-fno-strict-aliasing", "-fsanitize-undefined-trap-on-error"]
CHECKED += ["-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"]
SUPPORT = ("lib/dispatch.cpp", "lib/parallel.cpp", "lib/scratch.cpp", "exclude.cpp")
# Linked because the bindings name them, never run.
UNUSED = tuple(f"cpu/{file.name}" for file in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if file.name not in SUPPORT)


def why_not() -> str | None:
    """None where the module can be built, else the reason."""
    if shutil.which("g++") is None:
        return "g++ is not on PATH"
    if not (PYTHON / "Python.h").exists():
        return "no headers of Python"
    if not (HEADERS[2] / "pybind11").is_dir():
        return "torch has no headers of pybind11"
    return None


def load() -> ModuleType:
    """Builds it into build/ unless it is there of the same sources."""
    folder = ROOT / "build" / "cuda_emulation"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "_C.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist runs several of us
        stamp, state = folder / "sources", _digest()
        if not (library.exists() and stamp.exists() and stamp.read_text() == state):
            stamp.unlink(missing_ok=True)
            _build(folder, library)
            stamp.write_text(state)
    spec = importlib.util.spec_from_file_location("napo_emulated._C", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _digest() -> str:
    digest = hashlib.sha256(repr((FLAGS, CHECKED, UNUSED, torch.__version__, PYTHON)).encode())
    for folder in HEADERS[:2]:
        for file in sorted(folder.rglob("*.*")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _build(folder: Path, library: Path) -> None:
    csrc = ROOT / "csrc"
    sources = dict.fromkeys(sorted((csrc / "cuda").glob("*.cu")), CHECKED)
    sources |= {csrc / "bindings.cpp": ["-O0"]}
    sources |= {csrc / name: ["-O0", "-DNAPO_ISA=portable"] for name in UNUSED}
    sources |= {csrc / "cpu" / name: ["-O0"] for name in SUPPORT}
    include = [f"-I{header}" for header in (*HEADERS, PYTHON)]
    objects, compiling = [], []
    for source, flags in sources.items():
        objects.append(str(folder / f"{source.parent.name}_{source.stem}.o"))
        command = ["g++", *FLAGS, *flags, *include, "-x", "c++", "-c", str(source), "-o", objects[-1]]
        compiling.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in compiling:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    command = ["g++", "-shared", "-pthread", *objects, "-ldl", "-o", str(library)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
