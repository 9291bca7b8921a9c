"""Derivatives that the ops do not have are refused, never dropped: the second one, and forward mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from napo_kernels import PairMargin, linear_sequence_logps, napo_loss, sequence_logps
from napo_kernels.dispatch import why_not
from napo_kernels.ops import body, masked_attention

Op = Callable[[Tensor], Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


INDEX = torch.tensor([0, 1, 2])
LABELS = torch.tensor([[1, 2], [0, -100]])


def linear(hidden: Tensor, weight: Tensor, **options: object) -> Tensor:
    return linear_sequence_logps(hidden, weight, INDEX, sequence_ids=INDEX, num_sequences=3, **options)  # type: ignore


SHARE = torch.ones(3, 3, dtype=torch.bool)
OPS: dict[str, tuple[Op, Tensor]] = {
    "sequence_logps": (lambda x: sequence_logps(x, LABELS), draw(2, 2, 7)),
    "sequence_logps in place": (lambda x: sequence_logps(x * 1.0, LABELS, inplace_backward=True), draw(2, 2, 7)),
    "linear, frozen head": (lambda x: linear(x, draw(7, 8)), draw(3, 8)),
    "linear, in fp64": (lambda x: linear(x, draw(7, 8).double()), draw(3, 8).double()),
    "linear, by the weight": (lambda x: linear(draw(3, 8), x), draw(7, 8)),
    "linear, by the weight, anew": (lambda x: linear(draw(3, 8), x, chunk_bytes=64), draw(700, 8)),
    "linear, by a bias": (lambda x: linear(draw(3, 8), draw(7, 8), bias=x), draw(7)),
    "linear, by lora": (lambda x: linear(draw(3, 8), draw(7, 8), lora=(x, draw(7, 2), 1.0)), draw(2, 8)),
    "napo_loss, chosen": (lambda x: napo_loss(x, draw(3, 4), share=SHARE), draw(3)),
    "napo_loss, rejected": (lambda x: napo_loss(draw(3), x, share=SHARE), draw(3, 4)),
    "napo_loss, pair": (
        lambda x: napo_loss(draw(3), x, share=SHARE, margin=PairMargin(draw(3, 2), draw(3, 4, 2), None, 1.0, 1.0)),
        draw(3, 4),
    ),
}
if why_not("cpu") is None:
    MASK = masked_attention.pad_mask(torch.ones(1, 4, 4, dtype=torch.bool))
    assert MASK is not None
    OPS |= {
        "rms_norm": (lambda x: body.rms_norm(x, draw(8), 1e-6), draw(3, 8)),
        "silu_product": (lambda x: body.silu_product(x, draw(3, 8)), draw(3, 8)),
        "masked_attention": (
            lambda x: masked_attention.masked_attention(x, draw(1, 2, 4, 8), draw(1, 2, 4, 8), MASK, 1.0),
            draw(1, 2, 4, 8),
        ),
    }


@pytest.mark.parametrize("name", OPS)
def test_the_second_derivative_is_refused(name: str) -> None:
    """Also where nothing else in the graph needs a gradient."""
    op, given = OPS[name]
    leaf = given.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="the second derivative is not implemented"):
        (gradient,) = torch.autograd.grad(op(leaf).sum(), leaf, create_graph=True)
        (op(leaf).sum() + gradient.square().sum()).backward()
    with pytest.raises(RuntimeError, match="the second derivative is not implemented"):
        (gradient,) = torch.autograd.grad(op(leaf).sum(), leaf, create_graph=True)
        torch.autograd.grad(gradient.sum(), leaf, allow_unused=True)


@pytest.mark.parametrize("name", OPS)
def test_a_gradient_without_a_graph_is_given(name: str) -> None:
    op, given = OPS[name]
    leaf = given.clone().requires_grad_()
    op(leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.any()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused(name: str, requires_grad: bool) -> None:
    op, given = OPS[name]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given.clone().requires_grad_(requires_grad), torch.ones_like(given))
        with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
            op(dual)
    op(given)  # nothing is left behind


@pytest.mark.parametrize("name", OPS)
def test_transforms_of_torch_func_are_refused(name: str) -> None:
    op, given = OPS[name]
    value = lambda x: op(x).sum()  # noqa: E731
    for transform in (
        lambda: torch.func.jvp(value, (given,), (torch.ones_like(given),)),
        lambda: torch.func.jacfwd(value)(given),
        lambda: torch.func.grad(value)(given),
        lambda: torch.func.hessian(value)(given),
    ):
        with pytest.raises((NotImplementedError, RuntimeError)):
            transform()


class _Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize("name", OPS)
def test_no_gradient_from_above_is_none_below(name: str) -> None:
    op, given = OPS[name]
    leaf = given.clone().requires_grad_()
    _Stop.apply(op(leaf)).sum().backward()
    assert leaf.grad is None or not leaf.grad.any()


def test_gradcheck_in_fp64() -> None:
    """It asks for the gradient of nothing too."""
    chosen, rejected = draw(3).double().requires_grad_(), draw(3, 4).double().requires_grad_()
    pair = PairMargin(draw(3, 2).double(), draw(3, 4, 2).double(), None, 1.0, 1.0)
    for margin in (0.0, pair):
        assert torch.autograd.gradcheck(
            lambda a, b, m=margin: napo_loss(a, b, share=SHARE, margin=m), (chosen, rejected)
        )
