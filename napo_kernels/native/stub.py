"""The stub ``napo_kernels/_C.pyi``, from the field tables of the compiled module.

``python -m napo_kernels.native.stub`` writes it.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from napo_kernels import rows

FILE = Path(rows.__file__).parent / "_C.pyi"
_HEAD = '''\
"""The compiled module. Written by ``python -m napo_kernels.native.stub`` from csrc/*.h: change those.

Every kernel takes (arguments, cuda, queue): a mapping that C++ copies into its struct of arguments by name, whether to
run on CUDA, and the number of threads on the CPU or the address of the stream on CUDA (``calls.where``).
"""

from typing import Any, TypedDict

import torch
from torch import Tensor

from napo_kernels.rows import {shared}

MASK_BLOCK: int
STRUCTS: dict[str, dict[str, str]]  # type of every field of every struct
KERNELS: dict[str, str]  # struct that each kernel takes

def build_config() -> dict[str, Any]: ...
def set_cpu_isa(name: str) -> None: ...
def gradient_scratch(users: int, terms: int, /) -> int: ...
'''


def text(module: ModuleType) -> str:
    """The stub of a compiled module."""
    shared = sorted(name for name in module.STRUCTS if hasattr(rows, name))  # these are NamedTuples of Python
    parts = [_HEAD.format(shared=", ".join(shared))]
    for struct, fields in module.STRUCTS.items():
        if struct not in shared:
            parts.append(
                "\n".join([f"class {struct}(TypedDict):", *(f"    {f}: {kind}" for f, kind in fields.items())])
            )
    parts.append(
        "\n".join(
            f"def {name}(arguments: {struct}, cuda: bool, queue: int, /) -> None: ..."
            for name, struct in module.KERNELS.items()
        )
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    from napo_kernels import _C

    FILE.write_text(text(_C))
