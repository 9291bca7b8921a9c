"""The registrations of shared_negatives and napo_loss: opcheck, and one graph under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from napo_kernels import DynamicMargin, PairMargin, napo_loss, shared_negatives


def inputs(b: int = 6, n: int = 4, d: int = 5) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    exclude = torch.tensor([[0, 1, 2], [3, 3, 0], [-1, -1, -1]])
    return {
        "chosen": draw(b).requires_grad_(),
        "rejected": draw(b, n).requires_grad_(),
        "states": draw(b, d),
        "vectors": draw(b, n, d),
        "scores": draw(b, n),
        "groups": torch.arange(b) // 2,
        "exclude": exclude,
    }


def test_opcheck_of_shared_negatives() -> None:
    x = inputs()
    op = torch.ops.napo.shared_negatives.default
    torch.library.opcheck(op, (x["states"], x["states"], 3, 0, x["groups"], x["groups"], None))
    torch.library.opcheck(op, (x["states"][2:4], x["states"], 3, 2, None, None, "reference"))


@pytest.mark.parametrize("form", ["separable", "full", "pair"])
def test_opcheck_of_napo_loss(form: str) -> None:
    x = inputs()
    share = shared_negatives(x["states"], 3)
    full = x["scores"][:, None] if form == "full" else None
    keep = x["scores"][:, None] > -1.0 if form == "full" else None
    pair = (x["states"], x["vectors"], x["scores"], torch.tensor([-0.3, 1.0])) if form == "pair" else (None,) * 4
    fields = (share, x["chosen"].detach(), x["scores"], x["scores"] > -1.5, full, keep, *pair, x["exclude"], 0.7)
    torch.library.opcheck(torch.ops.napo.napo_loss.default, (x["chosen"], x["rejected"], *fields, None))
    lse = torch.ops.napo.napo_loss(x["chosen"], x["rejected"], *fields, None)[1].detach()
    arguments = (torch.ones(6), x["chosen"].detach(), x["rejected"].detach(), *fields, lse, None)
    torch.library.opcheck(torch.ops.napo.napo_loss_backward.default, arguments)


@pytest.mark.parametrize("granularity", ["batch", "user", "negative", "pair"])
def test_a_step_is_one_graph(granularity: str) -> None:
    x = inputs()

    def step(margin: DynamicMargin, chosen: Tensor, rejected: Tensor) -> Tensor:
        share = shared_negatives(x["states"], 3, group_ids=x["groups"], metric="cosine")
        gamma = margin(x["scores"], share=share, user_states=x["states"], item_vectors=x["vectors"])
        return napo_loss(chosen, rejected, share=share, margin=(gamma, 0.1), exclude=x["exclude"], beta=0.5)

    eager_margin, compiled_margin = (DynamicMargin(granularity=granularity, standardize=True) for _ in range(2))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        expected = step(eager_margin, x["chosen"], x["rejected"])
        got = compiled(compiled_margin, x["chosen"], x["rejected"])
        gradients = [torch.autograd.grad(loss, (x["chosen"], x["rejected"])) for loss in (got, expected)]
        torch.testing.assert_close((got, gradients[0]), (expected, gradients[1]))
    torch.testing.assert_close(compiled_margin.state_dict(), eager_margin.state_dict())


def test_a_step_through_inductor_is_one_graph() -> None:
    x = inputs()
    margin = DynamicMargin()

    def step(chosen: Tensor, rejected: Tensor) -> Tensor:
        share = shared_negatives(x["states"], 3)
        pair = PairMargin(x["states"], x["vectors"], slope=-0.1, offset=1.0)
        gamma = margin(x["scores"], share=share)
        return napo_loss(chosen, rejected, share=share, margin=(gamma, pair), exclude=x["exclude"])

    torch.compile(step, fullgraph=True)(x["chosen"], x["rejected"]).backward()
    got = x["chosen"].grad.clone(), x["rejected"].grad.clone()
    x["chosen"].grad = x["rejected"].grad = None
    margin = DynamicMargin()
    step(x["chosen"], x["rejected"]).backward()
    torch.testing.assert_close(got, (x["chosen"].grad, x["rejected"].grad))
