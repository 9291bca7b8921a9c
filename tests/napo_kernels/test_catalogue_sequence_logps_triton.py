"""The Triton kernels of catalogue_sequence_logps: compiled ahead of time, interpreted, and on a GPU against fp64.

The tests of a GPU are the cases of test_catalogue_sequence_logps.py. In a dry run they run on the CPU.
"""

from __future__ import annotations

import interpreter
import pytest
import test_catalogue_sequence_logps as cases
import torch
from torch import Tensor

from benchmarks.gpu_code import CATALOGUE, pointer_kind
from napo_kernels import allowed, catalogue_sequence_logps, dispatch

triton = pytest.importorskip("triton")

ARCHITECTURES = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", CATALOGUE)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_ahead_of_time(kernel: str, architecture: str, dtype: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from napo_kernels.triton import catalogue_sequence_logps as module

    amd = architecture.startswith("gfx")
    warps, settings = CATALOGUE[kernel]
    constants = {**settings, "PRECISION": "ieee" if amd else "tf32x3"}
    if dtype == "fp32" and kernel.startswith("tile"):
        constants[list(settings)[-1]] //= 2
    function = getattr(module, kernel)
    signature = {}
    for parameter in function.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants.setdefault(name, True)
        elif name.endswith("_ptr"):
            signature[name] = f"*{pointer_kind(name, dtype, kernel)}"
        else:
            signature[name] = "fp32" if name in ("scale", "softcap") else "i32"
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    source = ASTSource(function, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget(*ARCHITECTURES[architecture]), options={"num_warps": warps})
    assert compiled.asm["hsaco" if amd else "cubin"]


def test_interpreter() -> None:
    """All heads, dtypes, blocks of both kinds, extremes: see the script."""
    interpreter.run("interpret_catalogue_sequence_logps.py")


layout = cases.layout


@pytest.fixture
def backend(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every call that names no backend runs on this one."""
    name = "triton" if device.type == "cuda" else "reference"
    monkeypatch.setattr(dispatch, "_preferred", lambda *_: (name,))
    return name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *cases.HALF])
@pytest.mark.parametrize("head", cases.HEADS)
@pytest.mark.usefixtures("backend", "layout")
def test_every_head_on_a_gpu(head: str, dtype: torch.dtype, device: torch.device) -> None:
    cases.compare(cases.make(**cases.HEADS[head]), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", cases.SHAPES)
@pytest.mark.usefixtures("backend", "layout")
def test_every_shape_on_a_gpu(shape: str, device: torch.device) -> None:
    cases.compare(cases.make(**cases.SHAPES[shape], bias=True, softcap=6.0), torch.float32, device)
    cases.compare(cases.make(**cases.SHAPES[shape]), torch.bfloat16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *cases.HALF])
@pytest.mark.usefixtures("backend")
def test_a_catalogue_of_real_size_on_a_gpu(dtype: torch.dtype, device: torch.device) -> None:
    """Two large sets, many small ones; several tiles each way; two runs agree bit by bit."""
    real = device.type == "cuda"
    sizes = (700, 210, *range(1, 40)) if real else (90, 20, 1, 2, 5)
    case = cases.make(sizes, *((900, 2500, 576, 3000) if real else (50, 90, 33, 300)))
    cases.compare(case, dtype, device)
    runs: list[list[Tensor]] = []
    for _ in range(2):
        mine = case.to(dtype, device=device)
        logps = catalogue_sequence_logps(mine.hidden, mine.weight, mine.allowed().to(device))
        runs.append([logps, *cases.gradients(mine, logps).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("backend", "layout")
def test_extremes_on_a_gpu(device: torch.device) -> None:
    cases.huge(device)
    cases.nan_stays_in_its_row(device)


@pytest.mark.gpu
@pytest.mark.usefixtures("backend")
def test_a_step_waits_for_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen head, as in training: no value is read back from the GPU."""
    monkeypatch.setattr(allowed, "SHARED", 64)
    case = cases.make((1, 3, 9, 90), 300, 600, bias=True).to(torch.bfloat16, device=device)
    plan = case.allowed().to(device)
    weight, bias = case.weight.detach(), case.bias.detach()
    run = lambda: catalogue_sequence_logps(case.hidden, weight, plan, bias=bias).sum().backward()  # noqa: E731
    run()  # compiles
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert bool(case.hidden.grad.isfinite().all())
