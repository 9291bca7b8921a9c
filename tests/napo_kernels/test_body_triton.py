"""The Triton kernels of a transformer's body: compiled ahead of time, in the interpreter, and on a GPU against fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from body_cases import check, norm_case, product_case, rotation_case

from napo_kernels.ops import body

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
ARCHITECTURES = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
KERNELS = {
    "rms_norm_forward_kernel": {"COLUMNS": 2048},
    "rms_norm_backward_kernel": {"COLUMNS": 2048},
    "silu_product_forward_kernel": {"BLOCK": 1024},
    "silu_product_backward_kernel": {"BLOCK": 1024},
    "rotate_kernel": {"Q_HEADS": 9, "K_HEADS": 3, "HALF": 32, "Q_BLOCK": 16, "K_BLOCK": 4, "H_HALF": 32, "BACK": True},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_ahead_of_time(kernel: str, architecture: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from napo_kernels.triton import body as triton_body

    function = getattr(triton_body, kernel)
    signature = {
        parameter.name: "constexpr"
        if parameter.is_constexpr
        else "*fp32"
        if parameter.name == "r_ptr"
        else "*bf16"
        if parameter.name.endswith("_ptr")
        else "fp32"
        if parameter.name == "eps"
        else "i32"
        for parameter in function.params
    }
    source = ASTSource(function, signature, constexprs=KERNELS[kernel])
    compiled = triton.compile(source, target=GPUTarget(*ARCHITECTURES[architecture]))
    assert compiled.asm["hsaco" if architecture.startswith("gfx") else "cubin"]


def test_interpreter() -> None:
    script = Path(__file__).with_name("interpret_body.py")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{script.parent}", "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "interpreted: ok" in run.stdout


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 17), (2080, 2048), (520, 576), (9, 8192), (3, 16384)])
def test_norm_and_product_on_a_gpu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for scale in (1e-4, 1.0, 100.0):
        check(*norm_case(dtype, shape, scale, "cuda"))
    for scale in (1.0, 30.0):
        check(*product_case(dtype, shape, scale, "cuda"))


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 3, 1, 8), (8, 260, 32, 8, 64), (4, 254, 9, 3, 64), (2, 33, 16, 8, 128)])
def test_rotation_on_a_gpu(dtype: torch.dtype, shape: tuple[int, ...], one_row: bool) -> None:
    check(*rotation_case(dtype, shape, one_row, "cuda"))


@pytest.mark.gpu
@NEEDS_GPU
def test_what_is_served_on_a_gpu() -> None:
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    assert body.serves(x, x) and not body.serves(x.double()) and not body.serves(x.t())
    assert not body.serves(torch.empty(1, body.WIDEST + 1, device="cuda", dtype=torch.bfloat16))
    q, k = torch.randn(2, 1, 3, 8, 16, device="cuda")
    cos, sin = torch.randn(2, 1, 8, 16, device="cuda")
    assert body.serves_rotation(q, k, cos, sin) and not body.serves_rotation(q, k, cos[..., :8], sin[..., :8])
