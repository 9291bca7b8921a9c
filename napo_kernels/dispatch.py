"""Which backend runs which op here, and why another one does not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
import warnings
from collections import Counter
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton", "cuda")
_FOLDERS = {"reference": "reference", "cpu": "native", "triton": "triton", "cuda": "native"}
_ops: list[str] = []  # kernels: the module of this name in the folder of every backend that serves the op
_calls: Counter[tuple[str, str]] = Counter()  # (backend, op): how often it was chosen, traced calls left out


@functools.cache
def compiled() -> ModuleType | None:
    """The compiled module, or None where it was not built (``why_not("cpu")`` tells the reason)."""
    try:
        return importlib.import_module("napo_kernels._C")
    except ImportError:
        return None


@functools.cache
def why_not(backend: str) -> str | None:
    """None if ``backend`` can run here (``"cuda"``: on one of the GPUs), else one line that says why not and what to
    do."""
    if backend == "reference":
        return None
    if backend in ("cpu", "cuda"):
        module = compiled()
        reason = _missing() if module is None else _stale(module)
        if reason is not None:
            if backend == "cpu":  # this result is cached, so the warning comes once per process
                warnings.warn(f"napo_kernels runs without its kernels: {reason}", RuntimeWarning, stacklevel=2)
            return reason
        if backend == "cpu":
            return None
        assert module is not None
        if not module.build_config()["cuda"]:
            return (
                "built without CUDA; put nvcc on PATH and build it again: "
                "pip install . --config-settings=cmake.define.NAPO_CUDA=ON"
            )
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton`"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    if backend == "cuda":
        reasons = [_no_code_for(index) for index in range(torch.cuda.device_count())]
        return None if None in reasons else next(iter(reasons), None)
    return None


@functools.cache
def _no_code_for(index: int) -> str | None:
    """None if the compiled module has code for this CUDA device, else one line; Triton's kernels may run there."""
    module = compiled()
    assert module is not None
    architectures = module.build_config().get("cuda_architectures", "")
    major, minor = torch.cuda.get_device_capability(index)
    if runs_on(architectures, major, minor):
        return None
    return (
        f"built for {architectures.replace(' ', ', ')}, which {torch.cuda.get_device_name(index)} ({major}.{minor}) "
        f"cannot run; build it again with --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES={major}{minor}"
    )


def _why_not_on(backend: str, device: torch.device) -> str | None:
    """``why_not``, for tensors on ``device``: another GPU of the machine may be too old, or too new."""
    reason = why_not(backend)
    if reason is None and backend == "cuda" and device.type == "cuda":
        return _no_code_for(torch.cuda.current_device() if device.index is None else device.index)
    return reason


def runs_on(architectures: str, major: int, minor: int) -> bool:
    """Whether a build for ``architectures``, CMake's names with blanks between them, has code for a device of this
    capability: machine code of its generation and of no later member, or PTX, which newer devices compile too. A
    letter binds either to one device (90a) or to its family (100f). Names without a number, such as native, tell
    nothing and are believed."""
    for name in architectures.split():
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", name)
        if found is None:
            return True
        of_major, of_minor, letter, kind = int(found[1]), int(found[2]), found[3], found[4]
        if letter == "a":
            fits = (of_major, of_minor) == (major, minor)
        else:
            fits = of_major == major and of_minor <= minor
            fits |= not letter and kind != "-real" and (of_major, of_minor) <= (major, minor)
        if fits:
            return True
    return not architectures


def _missing() -> str:
    """Why there is no compiled module, and what to do. Python started in a clone takes the sources there for the
    package, and not the one that is installed."""
    here = Path(__file__).resolve().parent
    for entry in sys.path:
        other = Path(entry).resolve() / here.name
        if other != here and any((other / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
            return (
                f"the sources in {here.parent} stand before the installed package in {other.parent}; start Python in "
                "another folder, or install the sources in place: `pip install --editable .`"
            )
    reason: object = "it was not there before"
    try:
        importlib.import_module(f"{here.name}._C")
    except ImportError as error:
        reason = error
    return f"the compiled module is missing ({reason}); build it with `pip install .`"


def _stale(module: ModuleType) -> str | None:
    """What of the stub a compiled module lacks, and what to do: an in-place build is stale once the sources change."""
    from napo_kernels.native import stub

    declared = stub.FILE.read_text()
    missing = [name for name in re.findall(r"^def (\w+)", declared, re.MULTILINE) if not hasattr(module, name)]
    lacks = f"no {', '.join(missing)}" if missing else "kernels with other arguments"
    if not missing and stub.text(module) == declared:
        return None
    return f"the compiled module is of other sources ({lacks}); build it again, `make ext`"


def register(op: str) -> str:
    """Makes ``op`` known. Its kernels are the module of that name in the folder of every backend that has one."""
    _ops.append(op)
    return op


@functools.cache
def room(backend: str, op: str) -> ModuleType:
    """The kernels of ``op`` in ``backend``, imported where it can run."""
    return importlib.import_module(f"napo_kernels.{_FOLDERS[backend]}.{op}")


def kernels(op: str, tensor: Tensor, wanted: str | None) -> ModuleType:
    """The module that runs ``op`` on ``tensor``; see `resolve`."""
    return room(resolve(op, tensor.device, wanted, tensor.dtype), op)


@functools.cache
def serves(backend: str, op: str) -> bool:
    """Whether ``backend`` has kernels for ``op``. A native module that serves only one device says so."""
    if importlib.util.find_spec(f"napo_kernels.{_FOLDERS[backend]}.{op}") is None:
        return False
    if backend != "cuda" or compiled() is None:
        return True
    return bool(getattr(room(backend, op), "ON_CUDA", True))


def resolve(op: str, device: torch.device, wanted: str | None = None, dtype: torch.dtype = torch.float32) -> str:
    """The backend that runs ``op`` on ``device``: the one asked for, or the best available.

    Raises ValueError for a backend that is unknown, cannot run here, or does not serve this device or dtype; never
    falls back. The kernels compute in fp32, so fp64 inputs go to the reference.
    """
    chosen = _choose(op, device, wanted, dtype)
    if not torch.compiler.is_compiling():
        _calls[chosen, op] += 1
    return chosen


def check_backend(backend: Any) -> None:
    """Called before an op, because its schema would refuse another type with a long message."""
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise ValueError(f"backend: expected None or one of {', '.join(BACKENDS)}; got {backend!r}")


def _choose(op: str, device: torch.device, wanted: str | None, dtype: torch.dtype) -> str:
    check_backend(wanted)
    if wanted is not None:
        if wanted == "reference":
            return wanted
        reason = _why_not_on(wanted, device)
        if reason is not None:
            raise ValueError(f"backend: {wanted!r} cannot run {op} here: {reason}")
        if not serves(wanted, op):
            having = ", ".join(name for name in BACKENDS if serves(name, op))
            raise ValueError(f"backend: {wanted!r} has no kernels for {op}; expected None or one of {having}")
        if (wanted == "cpu") != (device.type == "cpu"):
            raise ValueError(f"backend: {wanted!r} does not serve tensors on {device}")
        if dtype == torch.float64:
            raise ValueError(f"backend: {wanted!r} computes in float32; for float64 inputs pass None or 'reference'")
        return wanted
    if dtype == torch.float64:
        return "reference"
    for name in _preferred(op, device.type):
        if _why_not_on(name, device) is None and serves(name, op):
            return name
    return "reference"


def _preferred(op: str, device: str) -> tuple[str, ...]:
    """Best first, as measured (benchmarks/HOPPER.md): selection and loss are many small kernels, and CUDA C++ launches
    them in half of Triton's time; the row kernels are few and large."""
    if device == "cpu":
        return ("cpu",)
    if device == "cuda":
        return ("cuda", "triton") if op in ("shared_negatives", "napo_loss") else ("triton", "cuda")
    return ()


def backends() -> dict[str, dict[str, Any]]:
    """The backends that are available and in use: ``{backend: {"available": bool, "why_not": str or None, "ops": [...],
    "calls": {op: times it ran here in this process}}}``; the compiled backends also carry ``"config"``, how the module
    was built."""
    table: dict[str, dict[str, Any]] = {}
    for name in BACKENDS:
        reason = why_not(name)
        table[name] = {"available": reason is None, "why_not": reason}
        table[name]["ops"] = [op for op in _ops if serves(name, op)]
        table[name]["calls"] = {op: _calls[name, op] for op in _ops if _calls[name, op]}
        module = compiled()
        if name in ("cpu", "cuda") and module is not None:
            table[name]["config"] = dict(module.build_config())
    return table


def describe() -> list[str]:
    """Lines to print: where the package is, how the compiled module was built, which backends run and why not."""
    module = compiled()
    config = {} if module is None else module.build_config()
    built = ", ".join(f"{key} {value}" for key, value in config.items())
    lines = [f"napo_kernels  {Path(__file__).parent}", f"{'built with':<14}{built or 'no compiled module'}"]
    lines.append(f"backends of {', '.join(backends()['reference']['ops'])}")
    for name, row in backends().items():
        lines.append(f"  {name:<12}{'yes' if row['available'] else 'no: ' + row['why_not']}")
    return lines
