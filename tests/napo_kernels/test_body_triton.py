"""The Triton kernels of a transformer's body: compiled ahead of time, in the interpreter, and on a GPU against fp64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import interpreter
import pytest
import torch
from body_cases import check, norm_case, product_case, rotation_case
from torch._subclasses.fake_tensor import FakeTensorMode

from napo_kernels.ops import body

triton = pytest.importorskip("triton")

ARCHITECTURES = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
KERNELS = {
    "rms_norm_forward_kernel": {"COLUMNS": 2048},
    "rms_norm_backward_kernel": {"COLUMNS": 2048},
    "silu_product_forward_kernel": {"BLOCK": 1024},
    "silu_product_backward_kernel": {"BLOCK": 1024},
    "rotate_kernel": {"Q_HEADS": 9, "K_HEADS": 3, "HALF": 32, "Q_BLOCK": 16, "K_BLOCK": 4, "H_HALF": 32, "BACK": True},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
    interpreter.run("interpret_body.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 17), (2080, 2048), (520, 576), (9, 8192), (3, 16384)])
def test_norm_and_product_on_a_gpu(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    for scale in (1e-4, 1.0, 100.0):
        check(*norm_case(dtype, shape, scale, device))
    for scale in (1.0, 30.0):
        check(*product_case(dtype, shape, scale, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 3, 1, 8), (8, 260, 32, 8, 64), (4, 254, 9, 3, 64), (2, 33, 16, 8, 128)])
def test_rotation_on_a_gpu(dtype: torch.dtype, shape: tuple[int, ...], one_row: bool, device: torch.device) -> None:
    check(*rotation_case(dtype, shape, one_row, device))


@pytest.mark.gpu
def test_what_is_served_on_a_gpu(device: torch.device) -> None:
    x = torch.randn(4, 64, device=device, dtype=torch.bfloat16)
    assert body.serves(x, x) and not body.serves(x.double()) and not body.serves(x.t())
    assert body.serves(torch.empty(1, body.WIDEST + 1, device=device)) == (device.type == "cpu")
    q, k = torch.randn(2, 1, 3, 8, 16, device=device)
    cos, sin = torch.randn(2, 1, 8, 16, device=device)
    assert body.serves_rotation(q, k, cos, sin)
    assert not body.serves_rotation(q, k, cos[..., :8], sin[..., :8])


def test_kernels_are_launched_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        entered.append(tensor.device)
        yield
        entered.append(torch.device("cpu"))

    def kernel(*_: torch.Tensor) -> torch.device:
        return entered[-1]

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(body, "_kernels", lambda _: SimpleNamespace(rotate=kernel))
    with FakeTensorMode():
        tensor = torch.empty(1, device="cuda:1")
    assert body._run("rotate", tensor) == torch.device("cuda:1")
    assert len(entered) == 2
