"""napo_loss where numbers are no numbers: a NaN is seen by exactly the users that it reaches, and masked places are
ignored whatever they hold."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import MARGINS, SPOILS, cast, make_case, oracle, spoil

from napo_kernels import PairMargin, napo_loss

NAN, INF = math.nan, math.inf


def check(seed: int, margin: str, how: str, backend: str) -> None:
    case = spoil(make_case(seed, margin), seed, how)
    weights = torch.rand(len(case.chosen), generator=torch.Generator().manual_seed(seed)) + 0.5
    expected = oracle(case, weights.double())
    chosen, rejected = (x.float().requires_grad_() for x in (case.chosen, case.rejected))
    arguments = {name: cast(value, torch.float32) for name, value in case.arguments.items()}
    losses = napo_loss(chosen, rejected, **arguments, reduction="none", backend=backend)
    (weights * losses).sum().backward()
    for name, a, b in zip(("loss", "chosen", "rejected"), (losses, chosen.grad, rejected.grad), expected, strict=True):
        where = f"{margin} {seed} {how} {name}"
        torch.testing.assert_close(
            a.double(), b, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m, where=where: f"{where}: {m}"
        )


@pytest.mark.parametrize("how", SPOILS)
@pytest.mark.parametrize("margin", MARGINS)
def test_reaches_whom_it_reaches(margin: str, how: str, backend: str) -> None:
    for seed in range(6):
        check(1000 * MARGINS.index(margin) + seed, margin, how, backend)


@pytest.mark.parametrize("how", SPOILS)
def test_in_every_instruction_set(how: str, isa: str) -> None:
    for margin in MARGINS:
        for seed in range(2):
            check(seed, margin, how, "cpu")


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("form", ["own", "separable", "full", "pair"])
def test_all_negatives(form: str, value: float, backend: str) -> None:
    """No number among them that a maximum could start from."""
    chosen, rejected = torch.zeros(3, requires_grad=True), torch.full((3, 4), value, requires_grad=True)
    share = None if form == "own" else torch.ones(3, 3, dtype=torch.bool)
    margin = {"full": torch.zeros(3, 3, 4), "pair": PairMargin(torch.ones(3, 2), torch.ones(3, 4, 2), None, 1.0, 1.0)}
    losses = napo_loss(chosen, rejected, share=share, margin=margin.get(form, 0.0), reduction="none", backend=backend)
    losses.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert losses.isnan().all() and chosen.grad.isnan().all() and rejected.grad.isnan().all()


@pytest.mark.parametrize("form", ["own", "separable", "excluded", "full"])
def test_a_nan_far_above_or_below_the_pool(form: str, backend: str) -> None:
    """The owner with the NaN has another negative hundreds of nats away from all others: the user that has the NaN
    excluded keeps that one, and nothing is measured from it where it is not in the set."""
    for far in (300.0, -300.0):
        rejected = torch.tensor([[-1.0, -2.0], [far, NAN], [-3.0, -4.0]], requires_grad=True)
        chosen = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
        share = None if form == "own" else torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1]]).bool()
        margin = torch.zeros(3, 3, 2) if form == "full" else 0.0
        exclude = torch.tensor([[0, 1, 1]]) if form != "separable" else None
        losses = napo_loss(
            chosen, rejected, share=share, margin=margin, exclude=exclude, reduction="none", backend=backend
        )
        losses[[0, 2]].sum().backward()
        kept = {0: [-1.0, -2.0] if form == "own" else [-1.0, -2.0, far, -3.0, -4.0], 2: [-3.0, -4.0]}
        kept[2] += [] if form == "own" else [-1.0, -2.0]
        for user, negatives in kept.items():
            if form == "separable" and user == 0:
                assert losses[0].isnan()
                continue
            t = torch.tensor(negatives).logsumexp(0) + 1.0 + user
            torch.testing.assert_close(losses[user], torch.nn.functional.softplus(t))
        assert losses[1].isnan()


@pytest.mark.parametrize("form", ["own", "separable", "excluded", "full"])
def test_no_probability(form: str, backend: str) -> None:
    """Negatives at -inf weigh nothing; with a chosen at -inf too, nothing can be said. A user without a negative has
    no loss, whatever its chosen one has but NaN."""
    chosen = torch.tensor([-1.0, -INF, -INF, -1.0, NAN], requires_grad=True)
    rejected = torch.tensor([[-INF, -INF], [-INF, -INF], [0.0, -INF], [-INF, -1.0], [0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1], [0, 0]]).bool()
    share = None if form == "own" else torch.eye(5).bool()
    margin = torch.zeros(5, 5, 2) if form == "full" else 0.0
    exclude = torch.tensor([[2, 2, 0], [3, 3, 0]]) if form == "excluded" else None
    losses = napo_loss(
        chosen, rejected, share=share, margin=margin, mask=mask, exclude=exclude, reduction="none", backend=backend
    )
    losses.sum().backward()
    half = math.log(2.0)
    torch.testing.assert_close(losses, torch.tensor([0.0, NAN, 0.0, half, NAN]), equal_nan=True)
    torch.testing.assert_close(chosen.grad, torch.tensor([0.0, NAN, 0.0, -0.5, NAN]), equal_nan=True)
    expected = torch.tensor([[0.0, 0.0], [NAN, 0.0], [0.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
    torch.testing.assert_close(rejected.grad, expected, equal_nan=True)


@pytest.mark.parametrize("margin", [-INF, torch.full((2, 1, 1), -INF), torch.full((2, 3), -INF)])
def test_a_margin_that_leaves_all_out(margin: float | torch.Tensor, backend: str) -> None:
    chosen = torch.tensor([-1.0, -INF], requires_grad=True)
    rejected = torch.tensor([[-1.0, NAN, -INF], [-1.0, -2.0, -3.0]], requires_grad=True)
    share = torch.ones(2, 2, dtype=torch.bool)
    losses = napo_loss(chosen, rejected, share=share, margin=margin, reduction="none", backend=backend)
    losses.sum().backward()
    for tensor in (losses, chosen.grad, rejected.grad):
        assert tensor is not None and not tensor.any()


def test_masks_of_other_bytes_than_1(backend: str) -> None:
    """A bool tensor seen through a view of bytes may hold any: what is not 0 is True."""
    chosen, rejected = torch.tensor([-1.0, -2.0]), torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -1.5, -2.5]])
    bytes_of = lambda x, byte: (x.to(torch.uint8) * byte).view(torch.bool)  # noqa: E731
    share, mask = (
        torch.tensor([[1, 1], [0, 1]]).bool(),
        torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(1)) < 0.6,
    )
    expected = napo_loss(chosen, rejected, share=share, mask=mask, reduction="none", backend=backend)
    got = napo_loss(
        chosen, rejected, share=bytes_of(share, 2), mask=bytes_of(mask, 4), reduction="none", backend=backend
    )
    assert torch.equal(got, expected)
    assert expected.ne(0.0).all()
