"""RMSNorm and silu(gate) * up in one pass, against fp64 and torch's own operations, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from napo_kernels import backends
from napo_kernels.ops import body

pytestmark = pytest.mark.skipif(
    not backends()["cpu"]["available"], reason=f"no compiled module: {backends()['cpu']['why_not']}"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def as_transformers(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def check(ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    def results(op: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = op(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    dtype = inputs[0].dtype
    for got, theirs, truth in zip(
        results(ours, dtype), results(plain, dtype), results(plain, torch.float64), strict=True
    ):
        assert got.dtype == dtype and got.shape == truth.shape
        error, other = ((x.double() - truth).norm() for x in (got, theirs))
        assert error <= 1.1 * other + 2e-7 * truth.norm()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 17), (7, 33), (260, 576)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(isa: str, dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    x, grad = (scale * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    check(
        lambda x: body.rms_norm(x, weight.to(x.dtype), 1e-5),
        lambda x: as_transformers(x, weight.to(x.dtype), 1e-5),
        [x],
        grad,
    )


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("shape", [(3, 5, 48), (1,), (7, 33), (260, 576)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_product(isa: str, dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    check(body.silu_product, lambda gate, up: silu(gate) * up, [gate * scale, up], grad)


def test_extreme_gates_are_finite_and_runs_repeat(isa: str) -> None:
    gate = torch.tensor([-3e38, -1e4, -100.0, -88.0, -0.0, 0.0, 88.0, 1e4, 3e38]).repeat(9)
    up, grad = torch.full_like(gate, 0.5), torch.full_like(gate, 0.25)

    def results() -> list[Tensor]:
        leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        out = body.silu_product(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    first = results()
    assert all(x.isfinite().all() for x in first)
    assert all(map(torch.equal, first, results()))
    torch.testing.assert_close(first[0], silu(gate) * up)


def test_serves_contiguous_tensors_of_one_narrow_dtype() -> None:
    x = torch.zeros(4, 6)
    assert body.serves(x, x)
    assert not body.serves(x.double()) and not body.serves(x, x.bfloat16()) and not body.serves(x.t())
