"""The Triton row kernel without a GPU: compiled ahead of time for every architecture, and run in the interpreter."""

from __future__ import annotations

from pathlib import Path

import interpreter
import pytest

from benchmarks import gpu_code

triton = pytest.importorskip("triton")

ARCHITECTURES = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
POINTERS = {  # the types that are not fp32
    "start_ptr": "*i64",
    "columns_ptr": "*i64",
    "labels_ptr": "*i64",
    "hidden_ptr": "*bf16",
    "weight_ptr": "*bf16",
    "low_ptr": "*bf16",
    "lora_b_ptr": "*bf16",
    "context_ptr": "*bf16",
    "out_ptr": "*bf16",
}
FLOATS = ("scale", "softcap", "lora_scale", "store_scale")
KERNELS = (
    "target_logits_kernel",
    "rows_forward_kernel",
    "rows_gradient_kernel",
    "hidden_gradient_kernel",
    "token_forward_kernel",
    "token_backward_kernel",
)
FLAGS = {"COLUMNS": 4096, "TARGETS": 64, "WIDTH": 256}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_ahead_of_time(kernel: str, architecture: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from napo_kernels.triton import linear_sequence_logps, sequence_logps

    function = getattr(sequence_logps if kernel.startswith("token") else linear_sequence_logps, kernel)
    signature, constants = {}, {}
    for parameter in function.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", FLAGS.get(name, True)
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name in FLOATS else "i64"
    source = ASTSource(function, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget(*ARCHITECTURES[architecture]), options={"num_warps": 8})
    binary = "hsaco" if architecture.startswith("gfx") else "cubin"
    assert len(compiled.asm[binary]) > 0


@pytest.mark.parametrize("logits", ["bf16", "fp32"])
@pytest.mark.parametrize("constants", [{}, {"HAS_CAP": True}, {"HAS_CAP": True, "HAS_BIAS": True}], ids=str)
def test_forward_spills_nothing(constants: dict[str, bool], logits: str, tmp_path: Path) -> None:
    """As launched on sm_90."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(gpu_code.compiled("rows_forward_kernel", logits, constants))
    assert gpu_code.resources(cubin)["rows_forward_kernel"][1] == "0"


@pytest.mark.parametrize("logits", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["rows_forward_kernel", "rows_gradient_kernel"])
def test_an_odd_vocabulary_is_read_as_wide_as_any(kernel: str, logits: str, tmp_path: Path) -> None:
    """Its rows are padded, so loads and stores may reach to the next multiple of 16."""
    counts = []
    for odd in (False, True):
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(gpu_code.compiled(kernel, logits, {}, odd=odd))
        code = [line.split(".") for line in gpu_code.functions(cubin)[kernel]]
        counts.append([sum(kind in line and "128" in line for line in code) for kind in ("LDG", "STG")])
    assert counts[0] == counts[1] and min(counts[1]) > 0


def test_interpreter() -> None:
    """Several chunks, several targets a row, duplicates, softcap, bias, LoRA, in place: see the script."""
    interpreter.run("interpret_softmax_rows.py")
