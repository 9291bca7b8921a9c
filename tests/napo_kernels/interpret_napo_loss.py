"""Runs the Triton kernels of shared_negatives and napo_loss in Triton's interpreter, on the CPU, against the oracle.

A script and no test, because TRITON_INTERPRET must be set before Triton is imported: test_napo_loss_triton.py runs it
in a process of its own.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import test_napo_loss_nan as nan
import torch
from loss_cases import MARGINS, NOBODY, SPOILS, Case, cast, make_bands, make_case, nobody, oracle, spoil

from napo_kernels import dispatch, napo_loss
from napo_kernels.reference import shared_negatives as reference
from napo_kernels.triton import napo_loss as loss_kernels
from napo_kernels.triton import shared_negatives as select_kernels


def check_loss(case: Case, seed: int, margin: str) -> None:
    weights = torch.randn(len(case.chosen), generator=torch.Generator().manual_seed(seed))
    expected = oracle(case, weights.double())
    chosen, rejected = case.chosen.float().requires_grad_(), case.rejected.float().requires_grad_()
    arguments = {name: cast(value, torch.float32) for name, value in case.arguments.items()}
    losses = napo_loss(chosen, rejected, **arguments, reduction="none")
    (weights * losses).sum().backward()
    for name, a, b in zip(["loss", "chosen", "rejected"], (losses, chosen.grad, rejected.grad), expected, strict=True):
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=1e-5,
            atol=1e-6,
            equal_nan=True,
            msg=lambda m, name=name: f"{margin} {seed} {name}: {m}",
        )


def check_select() -> None:
    rng = torch.Generator().manual_seed(0)
    for owners, offset, k in ((1, 0, 0), (9, 2, 3), (40, 11, 27), (40, 0, 39), (33, 1, 0), (9, 9, 5)):
        pool = torch.randint(-2, 3, (owners, 3), generator=rng).float()  # exact similarities, many ties
        states = pool[offset : offset + 5]
        groups = torch.randint(0, 6, (owners,), generator=rng)
        for ids in ((None, None), (groups[offset : offset + 5], groups)):
            arguments = (states, pool, k, offset, *ids)
            assert torch.equal(select_kernels.shared_negatives(*arguments), reference.shared_negatives(*arguments)), (
                arguments
            )


def check_nobody() -> None:
    for form in NOBODY:
        case = nobody(form)
        chosen, rejected = case.chosen.float().requires_grad_(), case.rejected.float().requires_grad_()
        arguments = {name: cast(value, torch.float32) for name, value in case.arguments.items()}
        losses = napo_loss(chosen, rejected, **arguments, reduction="none")
        losses.sum().backward()
        assert losses.shape == (0,) and torch.equal(rejected.grad, torch.zeros_like(rejected)), form


def main() -> None:
    dispatch.resolve = lambda *_: "triton"
    loss_kernels._BLOCK_PLACES = 64  # several blocks of rows
    select_kernels._BLOCK = 16  # several blocks of columns
    check_select()
    for margin in MARGINS:
        for seed in range(3):
            case = make_case(seed, margin)
            check_loss(case, seed, margin)
            for how in SPOILS:
                check_loss(spoil(case, seed, how), seed, f"{margin}, {how}")
    for margin in ("user+negative", "pair"):
        check_loss(make_case(1, margin, scale=2500.0, shift=-5000.0), 1, margin)
    check_loss(make_bands(0), 0, "bands")
    check_nobody()
    for form in ("own", "separable", "excluded", "full", "pair"):
        nan.test_a_nan_far_above_or_below_the_pool(form, "triton")
        nan.test_no_probability(form, "triton")
        for value in (nan.NAN, nan.INF):
            nan.test_all_negatives(form, value, "triton")
    nan.test_masks_of_other_bytes_than_1("triton")
    print("interpreted: ok")


if __name__ == "__main__":
    main()
