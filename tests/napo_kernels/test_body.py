"""RMSNorm, silu(gate) * up and rotary positions in one pass, against fp64 and torch, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from body_cases import check, norm_case, product_case, rotated, rotation_case
from torch import Tensor
from torch.nn.functional import silu

from napo_kernels import backends
from napo_kernels.ops import body

pytestmark = pytest.mark.skipif(
    not backends()["cpu"]["available"], reason=f"no compiled module: {backends()['cpu']['why_not']}"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 17), (7, 33), (260, 576)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(isa: str, dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    check(*norm_case(dtype, shape, scale))


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("shape", [(3, 5, 48), (1,), (7, 33), (260, 576)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_product(isa: str, dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    check(*product_case(dtype, shape, scale))


@pytest.mark.parametrize("one_row", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 6, 2, 16), (1, 1, 1, 1, 2), (2, 7, 3, 1, 34), (2, 130, 9, 3, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation(isa: str, dtype: torch.dtype, shape: tuple[int, ...], one_row: bool) -> None:
    check(*rotation_case(dtype, shape, one_row))


def test_rotation_of_other_strides_and_of_nothing() -> None:
    (q, k), _, (cos, sin) = rotated(torch.float32, (2, 5, 4, 2, 16), False)
    expected = body.rotate(q, k, cos, sin)
    for ours, theirs in zip(body.rotate(q.contiguous(), k.contiguous(), cos, sin), expected, strict=True):
        assert torch.equal(ours, theirs)
    (q, k), _, (cos, sin) = rotated(torch.float32, (2, 0, 4, 2, 16), False)
    assert body.rotate(q, k, cos, sin)[0].shape == (2, 4, 0, 16)
    assert not body.serves_rotation(q.double(), k, cos, sin) and not body.serves_rotation(q, k, cos[:, :, :8], sin)


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


def test_a_compiled_model_is_not_cut_at_the_question_whether_there_is_a_kernel() -> None:
    def layer(x: Tensor) -> Tensor:
        return x * 2 if body.serves(x) else x * 3

    x = torch.ones(3, 16)
    assert torch.equal(layer(x), x * 2)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), x * 3)  # fullgraph: no break
