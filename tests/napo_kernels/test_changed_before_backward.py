"""A caller may change the arguments between forward and backward: no kernel then reads or writes elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from napo_kernels import linear_sequence_logps, napo_loss, sequence_logps

FAR = 5_000_000


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("value", [FAR, -FAR, 0])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_labels(value: int, inplace: bool, shift: bool, backend: str) -> None:
    """Overwritten behind autograd's back, and before its eyes: the gradient is that of the labels that were given."""
    labels = torch.tensor([[1, 3, -100], [6, 0, 2]])
    given, options = labels.clone(), {"shift": shift, "backend": backend}
    (expected,) = gradients(lambda x: sequence_logps(x, given, **options), draw(2, 3, 7))
    for overwrite in (lambda x: x.data.fill_(value), lambda x: x.fill_(value)):
        labels = given.clone()
        leaf = draw(2, 3, 7).requires_grad_()
        logps = sequence_logps(leaf * 1.0, labels, inplace_backward=inplace, **options)
        overwrite(labels)
        logps.sum().backward()
        assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("value", [FAR, -FAR, -1, 0])
@pytest.mark.parametrize("name", ["targets", "rows", "sequence_ids"])
@pytest.mark.parametrize("average", [False, True])
def test_indices_of_linear(name: str, value: int, average: bool, backend: str) -> None:
    index = {
        "targets": torch.tensor([1, 3, 6]),
        "rows": torch.tensor([0, 1, 1]),
        "sequence_ids": torch.tensor([0, 1, 1]),
    }

    def op(hidden: Tensor, weight: Tensor, given: dict[str, Tensor]) -> Tensor:
        targets, rest = given["targets"], {k: v for k, v in given.items() if k != "targets"}
        options = {"num_sequences": 2, "average": average, "backend": backend}
        return linear_sequence_logps(hidden, weight, targets, **rest, **options).square()

    expected = gradients(lambda h, w: op(h, w, index), draw(2, 8), draw(7, 8))
    given = {key: tensor.clone() for key, tensor in index.items()}

    def overwritten(hidden: Tensor, weight: Tensor) -> Tensor:
        logps = op(hidden, weight, given)
        given[name].data.fill_(value)
        return logps

    got = gradients(overwritten, draw(2, 8), draw(7, 8))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("value", [FAR, -1])
def test_exclude(value: int, backend: str) -> None:
    """Looked at anew: an error on the CPU's kernels, padding elsewhere."""
    exclude = torch.tensor([[0, 1, 2]])
    leaf = draw(3, 4).requires_grad_()
    share = torch.ones(3, 3, dtype=torch.bool)
    loss = napo_loss(draw(3), leaf, share=share, exclude=exclude, backend=backend)
    exclude.data.fill_(value)
    if backend == "cpu" and value == FAR:
        with pytest.raises(ValueError, match="exclude: expected user indices below 3"):
            loss.backward()
    else:
        loss.backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all()


SMALLER: dict[str, tuple[Callable[..., Tensor], list[Tensor], int]] = {
    "sequence_logps": (lambda x: sequence_logps(x, torch.tensor([[5, 6]])), [draw(1, 2, 7)], 0),
    "linear": (
        lambda h, w: linear_sequence_logps(
            h, w, torch.tensor([5, 6]), sequence_ids=torch.tensor([0, 1]), num_sequences=2
        ),
        [draw(2, 8), draw(7, 8)],
        1,
    ),
    "napo_loss": (lambda c, r: napo_loss(c, r, share=torch.ones(3, 3, dtype=torch.bool)), [draw(3), draw(3, 4)], 1),
}


@pytest.mark.parametrize("name", SMALLER)
def test_an_argument_of_another_shape_is_refused(name: str) -> None:
    op, tensors, which = SMALLER[name]
    leaves = [x.clone().requires_grad_() for x in tensors]
    result = op(*leaves)
    leaves[which].data = leaves[which].data[..., :1].clone()
    with pytest.raises(RuntimeError, match="another shape between forward and backward"):
        result.sum().backward()


def gradients(op: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(op(*leaves).sum(), leaves)


OVERLAPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "windows": lambda x: x.unfold(0, 7, 2)[None][:, :3],
    "windows, transposed": lambda x: x.unfold(0, 7, 2)[None][:, :3].transpose(0, 1),
    "expanded": lambda x: x[:7].expand(2, 3, 7),
    "diagonals": lambda x: x.as_strided((2, 3, 7), (1, 1, 2)),
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_no_gradient_is_written_over_overlapping_logits(name: str) -> None:
    view = OVERLAPPING[name](draw(30).requires_grad_() * 1.0)
    labels = torch.zeros(view.shape[:2], dtype=torch.int64)
    with pytest.raises(ValueError, match="inplace_backward: expected logits with memory of their own"):
        sequence_logps(view, labels, inplace_backward=True)
    sequence_logps(view, labels).sum().backward()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(2, 3, 7),
        lambda x: x.view(3, 2, 7).transpose(0, 1),
        lambda x: x.view(7, 2, 3).permute(1, 2, 0),
        lambda x: x.view(2, 3, 7)[:, ::2, ::3],
        lambda x: x.view(2, 3, 7)[:1, :, :1],
    ],
)
def test_other_views_may_be_written_over(view: Callable[[Tensor], Tensor]) -> None:
    labels = torch.zeros(view(draw(42)).shape[:2], dtype=torch.int64)
    (expected,) = gradients(lambda x: sequence_logps(view(x * 1.0), labels), draw(42))
    (got,) = gradients(lambda x: sequence_logps(view(x * 1.0), labels, inplace_backward=True), draw(42))
    assert torch.equal(got, expected)
