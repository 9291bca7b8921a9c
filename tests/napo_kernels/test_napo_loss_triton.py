"""The Triton kernels of shared_negatives and napo_loss without a GPU: compiled ahead of time, and interpreted."""

from __future__ import annotations

from pathlib import Path

import interpreter
import pytest

from benchmarks.gpu_code import FULL, compiled, resources

triton = pytest.importorskip("triton")

ARCHITECTURES = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
KERNELS = {
    "select_nearest_kernel": {"BLOCK": 8192, "ONE_BLOCK": True},
    "select_nearest_kernel, long rows": {"BLOCK": 8192, "ONE_BLOCK": False},
    "log_sums_kernel": {"ROWS": 1, "BLOCK": 2048},
    "gradient_kernel": {"ROWS": 16, "BLOCK": 64},
}
POINTERS = {"groups_ptr": "*i64", "pool_groups_ptr": "*i64", "share_ptr": "*u8", "full_keep_ptr": "*u8"}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_ahead_of_time(kernel: str, architecture: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from napo_kernels.triton import napo_loss, shared_negatives

    room = shared_negatives if kernel.startswith("select") else napo_loss
    function = getattr(room, kernel.partition(",")[0])
    signature, constants = {}, {}
    for parameter in function.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", KERNELS[kernel].get(name, True)
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name == "beta" else "i64"
    source = ASTSource(function, signature, constexprs=constants)
    options = {"num_warps": 16 if kernel.startswith("select") else 8 if kernel.startswith("gradient") else 4}
    compiled = triton.compile(source, options=options, target=GPUTarget(*ARCHITECTURES[architecture]))
    assert len(compiled.asm["hsaco" if architecture.startswith("gfx") else "cubin"]) > 0


def test_a_gradient_with_everything_leaves_registers(tmp_path: Path) -> None:
    """As launched on sm_90: 128 registers a thread are two blocks of 256 threads on a multiprocessor."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled("gradient_kernel", "fp32", FULL))
    (registers, stack) = resources(cubin)["gradient_kernel"]
    assert int(registers) <= 128 and stack == "0"


def test_interpreter() -> None:
    """Every form of margin, masks, exclusions, several blocks: see the script."""
    interpreter.run("interpret_napo_loss.py")
