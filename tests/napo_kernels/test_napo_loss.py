"""napo_loss against the brute-force oracle, on every backend that runs here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from loss_cases import MARGINS, NOBODY, Case, cast, make_bands, make_case, nobody, oracle

from napo_kernels import PairMargin, backends, napo_loss
from napo_kernels.native import napo_loss as native_loss

BACKENDS = [name for name in ("reference", "cpu") if backends()[name]["available"]]
Runs = list[tuple[torch.dtype, str]]
RUNS: Runs = [(torch.float64, "reference"), *((torch.float32, backend) for backend in BACKENDS)]
CUDA: Runs = [(torch.float32, "cuda")]
FP64 = {"rtol": 1e-12, "atol": 1e-12}
FP32 = {"rtol": 1e-5, "atol": 1e-6}


def run(case: Case, weights: torch.Tensor, dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, ...]:
    chosen = case.chosen.clone().to(dtype).requires_grad_()
    rejected = case.rejected.clone().to(dtype).requires_grad_()
    arguments = {name: cast(value, dtype) for name, value in case.arguments.items()}
    losses = napo_loss(chosen, rejected, **arguments, reduction="none", backend=backend)
    (weights.to(dtype) * losses).sum().backward()
    return losses.detach(), chosen.grad, rejected.grad


def check(case: Case, seed: int, runs: Runs = RUNS) -> None:
    weights = torch.randn(len(case.chosen), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = oracle(case, weights)
    for dtype, backend in runs:
        got = run(case, weights, dtype, backend)
        for name, a, b in zip(("loss", "d_chosen", "d_rejected"), got, expected, strict=True):
            tolerance = FP64 if dtype == torch.float64 else FP32
            where = f"{backend} {dtype} {name}"
            torch.testing.assert_close(a.double(), b, **tolerance, msg=lambda text, where=where: f"{where}: {text}")


@pytest.mark.parametrize("margin", MARGINS)
def test_oracle(margin: str) -> None:
    for seed in range(10):
        check(make_case(1000 * MARGINS.index(margin) + seed, margin), seed)


@pytest.mark.parametrize("margin", ["user+negative", "full", "pair"])
def test_logps_down_to_minus_1e4(margin: str) -> None:
    for seed in range(6):
        check(make_case(seed, margin, scale=2500.0, shift=-5000.0), seed)
        check(make_case(seed, margin, scale=2.0, shift=-9990.0), seed)


@pytest.mark.parametrize("margin", MARGINS)
def test_cuda_emulated(margin: str, emulated_cuda: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_loss, "_BLOCK", 100)  # several blocks of the pair margin
    for seed, order in enumerate(("up", "down", "mixed", "mixed")):
        emulated_cuda(order)
        check(make_case(1000 * MARGINS.index(margin) + seed, margin), seed, CUDA)
        check(make_case(seed, margin, scale=2500.0, shift=-5000.0), seed, CUDA)


@pytest.mark.parametrize("form", NOBODY)
def test_nobody_borrows(form: str, emulated_cuda: Callable[[str], None]) -> None:
    """A rank without users of its own has part in the pool of the others, with a gradient of zeros."""
    emulated_cuda("mixed")
    for dtype, backend in RUNS + CUDA:
        loss, d_chosen, d_rejected = run(nobody(form), torch.zeros(0), dtype, backend)
        assert loss.shape == d_chosen.shape == (0,), backend
        assert torch.equal(d_rejected, torch.zeros_like(d_rejected)), backend


def test_cuda_emulated_does_not_depend_on_the_order_of_threads(emulated_cuda: Callable[[str], None]) -> None:
    """A result that does has a barrier missing, or an atomic."""
    for margin in ("user+negative", "all"):
        case = make_case(7, margin)
        results = []
        for order in ("up", "down", "mixed"):
            emulated_cuda(order)
            results.append(run(case, torch.ones(len(case.chosen)), torch.float32, "cuda"))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", ["separable", "general"])
def test_cuda_emulated_on_several_tiles(form: str, emulated_cuda: Callable[[str], None]) -> None:
    """Rows longer than a tile of exclusions; more users than the gradient keeps together, in two slabs and in one."""
    rng = torch.Generator().manual_seed(0)
    users, owners, n = (140, 4200, 1) if form == "separable" else (140, 44000, 3)
    share = torch.rand(users, owners, generator=rng) < 0.3
    triples = torch.stack([torch.randint(0, size, (9000,), generator=rng) for size in (users, owners, n)], 1)
    margin = torch.rand(users, owners, 1, generator=rng) if form == "general" else torch.rand(owners, n, generator=rng)
    case = Case(
        torch.randn(users, generator=rng, dtype=torch.float64),
        3 * torch.randn(owners, n, generator=rng, dtype=torch.float64),
        {"share": share, "exclude": triples, "margin": margin},
        *torch.empty(2, 0),
    )
    weights = torch.rand(users, generator=rng)
    emulated_cuda("mixed")
    got, truth = (run(case, weights, dtype, name) for dtype, name in (CUDA[0], RUNS[0]))
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, **FP32)


def test_pair_margin_in_several_blocks(isa: str) -> None:
    """More users, places and dimensions than the CPU's kernel scores at a time, no number of them round."""
    rng = torch.Generator().manual_seed(0)
    users, owners, n, d = 75, 411, 3, 37
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    states, items, bias = draw(users, d), draw(owners, n, d), draw(owners, n)
    share = torch.rand(users, owners, generator=rng) < 0.3
    arguments = {"share": share, "margin": PairMargin(states, items, bias, slope=-0.1, offset=0.5)}
    case = Case(draw(users).double(), 3 * draw(owners, n).double(), arguments, *torch.empty(2, 0))
    weights = torch.rand(users, generator=rng)
    got, truth = (run(case, weights, dtype, name) for dtype, name in ((torch.float32, "cpu"), RUNS[0]))
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, **FP32)


def test_users_far_below_the_pool() -> None:
    """A user's sum must not depend on how far the pool's best negatives, which it does not have, are above its own."""
    for seed in range(4):
        case = make_bands(seed)
        check(case, seed)
        check(dataclasses.replace(case, arguments={**case.arguments, "exclude": None}, keep=kept(case)), seed)


def kept(case: Case) -> torch.Tensor:
    return case.arguments["share"][:, :, None].expand(case.keep.shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_in_finite_out(backend: str) -> None:
    share = torch.ones(3, 4, dtype=torch.bool)
    for low, high in ((-1e4, 0.0), (-1e8, 1e8), (-1e30, 1e30), (-1e-30, 1e-30)):
        chosen = torch.tensor([low, high, 0.0]).requires_grad_()
        rejected = torch.tensor([[low, high], [high, high], [low, low], [0.0, low]]).requires_grad_()
        for margin in (0.0, torch.full((4, 2), 300.0), torch.full((3, 4, 2), -300.0)):
            loss = napo_loss(chosen, rejected, share=share, margin=margin, backend=backend, reduction="none")
            gradients = torch.autograd.grad(loss.sum(), (chosen, rejected))
            assert all(t.isfinite().all() for t in (loss, *gradients)), (low, high)


def test_users_without_negatives_have_no_loss(backend: str) -> None:
    chosen, rejected = torch.randn(4).requires_grad_(), torch.randn(6, 3).requires_grad_()
    share = torch.zeros(4, 6, dtype=torch.bool)
    share[2, 5] = True
    for arguments in ({}, {"margin": torch.zeros(4, 6, 3)}, {"exclude": torch.tensor([[1, 1, 1]])}):
        losses = napo_loss(chosen, rejected, share=share, reduction="none", backend=backend, **arguments)
        gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
        assert (losses != 0).tolist() == (gradients[0] != 0).tolist() == [False, False, True, False]
        assert (gradients[1] != 0).any(1).tolist() == [False] * 5 + [True]
    all_gone = napo_loss(chosen, rejected[:4], mask=torch.zeros(3, dtype=torch.bool), backend=backend)
    assert all_gone.item() == 0.0 and torch.autograd.grad(all_gone, chosen)[0].tolist() == [0.0] * 4
    assert napo_loss(chosen[:0], rejected[:0], backend=backend).item() == 0.0


def test_pools_without_negatives(backend: str) -> None:
    pair = PairMargin(torch.ones(4, 2), torch.ones(6, 0, 2), None, slope=-0.1, offset=0.5)
    for margin in (0.0, torch.zeros(4, 6, 1), pair):
        chosen, rejected = torch.randn(4).requires_grad_(), torch.randn(6, 0).requires_grad_()
        share = torch.ones(4, 6, dtype=torch.bool)
        losses = napo_loss(chosen, rejected, share=share, margin=margin, reduction="none", backend=backend)
        gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
        assert not losses.any() and not gradients[0].any() and gradients[1].shape == (6, 0)


def test_many_users_and_views(backend: str) -> None:
    """More rows and columns than a block of the kernels, non-contiguous inputs, bf16, reductions, from run to run."""
    rng = torch.Generator().manual_seed(0)
    chosen = torch.randn(600, generator=rng)[::2].requires_grad_()
    rejected = torch.randn(5, 700, generator=rng).mul(3).T.requires_grad_()
    share = (torch.rand(700, 300, generator=rng) < 0.7).T
    triples = torch.stack([torch.randint(0, size, (4000,), generator=rng) for size in (300, 700, 5)], 1)

    def run(dtype: torch.dtype, name: str) -> tuple[torch.Tensor, ...]:
        pair = (chosen.to(dtype), rejected.to(dtype))
        losses = napo_loss(*pair, share=share, exclude=triples, reduction="none", backend=name)
        assert napo_loss(*pair, share=share, exclude=triples, backend=name).item() == pytest.approx(
            losses.mean().item()
        )
        return losses, *torch.autograd.grad(losses.sum(), (chosen, rejected))

    got, truth = run(torch.float32, backend), run(torch.float64, "reference")
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(got, run(torch.float32, backend), strict=True))
    assert run(torch.bfloat16, backend)[0].dtype == torch.float32


def test_every_instruction_set(isa: str) -> None:
    for margin in ("user+negative", "all"):
        for seed in range(3):
            check(make_case(seed, margin), seed)
    check(make_bands(1), 1)
    check(make_case(1, "negative", scale=2500.0, shift=-5000.0), 1)


def test_refuses_what_makes_no_sense() -> None:
    chosen, rejected, share = torch.zeros(3), torch.zeros(5, 2), torch.ones(3, 5, dtype=torch.bool)
    for arguments, name in [
        ({}, "share:"),
        ({"share": share.T}, "share:"),
        ({"share": share.float()}, "share:"),
        ({"share": share, "margin": torch.zeros(3)}, "margin:"),
        ({"share": share, "mask": torch.ones(5, 2)}, "mask:"),
        ({"share": share, "exclude": torch.zeros(4, 2, dtype=torch.long)}, "exclude:"),
        ({"share": share, "beta": 0.0}, "beta:"),
        ({"share": share, "reduction": "max"}, "reduction:"),
        ({"share": share, "backend": "tpu"}, "backend:"),
    ]:
        with pytest.raises(ValueError, match=name):
            napo_loss(chosen, rejected, **arguments)
    if "cpu" in BACKENDS:
        with pytest.raises(ValueError, match="exclude: expected owner"):
            napo_loss(chosen, rejected, share=share, exclude=torch.tensor([[0, 5, 0]]), backend="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("margin", MARGINS)
def test_on_a_gpu(margin: str, backend: str) -> None:
    for seed in range(10):
        for options in ({}, {"scale": 2500.0, "shift": -5000.0}):
            case = make_case(1000 * MARGINS.index(margin) + seed, margin, **options)
            weights = torch.randn(len(case.chosen), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            there, upstream = on_gpu(case), weights.cuda()
            torch.cuda.set_sync_debug_mode("error")  # nothing waits for the device
            try:
                got, again = (run(there, upstream, torch.float32, backend) for _ in range(2))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for name, a, b, c in zip(
                ("loss", "d_chosen", "d_rejected"), got, again, oracle(case, weights), strict=True
            ):
                assert torch.equal(a, b)
                torch.testing.assert_close(a.cpu().double(), c, **FP32, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("form", NOBODY)
def test_nobody_borrows_on_a_gpu(form: str, backend: str) -> None:
    loss, _, d_rejected = run(on_gpu(nobody(form)), torch.zeros(0, device="cuda"), torch.float32, backend)
    assert loss.shape == (0,) and torch.equal(d_rejected, torch.zeros_like(d_rejected))


def on_gpu(case: Case) -> Case:
    def move(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(move(part) for part in value)
        if isinstance(value, PairMargin):
            return PairMargin(*(move(getattr(value, f.name)) for f in dataclasses.fields(value)))
        return value.cuda() if isinstance(value, torch.Tensor) else value

    return Case(
        *(move(getattr(case, name)) for name in ("chosen", "rejected")),
        {k: move(v) for k, v in case.arguments.items()},
        case.gamma,
        case.keep,
    )


@pytest.mark.parametrize("general", [False, True])
def test_triples_of_a_pool_without_negatives(general: bool, backend: str) -> None:
    """Only padding, which every form skips."""
    chosen, rejected = torch.randn(3).requires_grad_(), torch.randn(6, 0).requires_grad_()
    share, exclude = torch.ones(3, 6, dtype=torch.bool), torch.full((2, 3), -1)
    margin = torch.zeros(3, 6, 0) if general else torch.zeros(6, 0)
    loss = napo_loss(chosen, rejected, share=share, margin=margin, exclude=exclude, backend=backend)
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    assert loss == 0 and not gradients[0].any() and gradients[1].shape == (6, 0)
