"""DynamicMargin against its definition written out, its state, and false_negative_triples against a double loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from napo_kernels import DynamicMargin, PairMargin, false_negative_triples

GAMMA, ALPHA, DECAY = 2.0, 0.3, 0.9


def batch(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    share = torch.rand(3, 5, generator=rng) < 0.5
    share.diagonal(1).fill_(True)
    mask = torch.rand(5, 4, generator=rng) < 0.8
    mask[:, 0] = True
    arguments = {"user_states": draw(3, 6), "item_vectors": draw(5, 4, 6), "item_bias": draw(5, 4)}
    return {"scores": draw(5, 4) - 4.8, "share": share, "mask": mask, **arguments}


def pair_scores(x: dict[str, Tensor]) -> Tensor:
    return torch.einsum("ud,vnd->uvn", x["user_states"], x["item_vectors"]) + x["item_bias"]  # (B, B', N)


def gammas(margin: Tensor | PairMargin, x: dict[str, Tensor]) -> Tensor:
    """The margin for every user, owner and negative."""
    if isinstance(margin, PairMargin):
        margin = (margin.offset + margin.slope * pair_scores(x)).clamp(min=0.0)
    return margin.expand(3, 5, 4)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("granularity", ["batch", "user", "negative", "pair"])
def test_definition(granularity: str, standardize: bool) -> None:
    margin = DynamicMargin(GAMMA, ALPHA, DECAY, granularity, standardize)
    mean = variance = None
    for step in range(4):
        x = batch(step)
        used = x["share"][:, :, None] & x["mask"]  # (B, B', N)
        z = pair_scores(x) if granularity == "pair" else x["scores"].expand(3, 5, 4)
        of_pool = z[used].double()
        now, spread = of_pool.mean(), of_pool.var(unbiased=False)
        m_ema, deviation = (now, spread) if mean is None else (mean, variance)
        deviation = deviation.sqrt() if standardize else 1.0
        m = z.double()
        if granularity == "batch":
            m = now.expand(3, 5, 4)
        elif granularity == "user":
            m = torch.stack([z[u][used[u]].double().mean() for u in range(3)])[:, None, None].expand(3, 5, 4)
        expected = (GAMMA * (1 - ALPHA * (m - m_ema) / deviation)).clamp(min=0.0)
        margin.train(step != 2)  # the third batch is evaluation: no update
        got = gammas(margin(x.pop("scores"), **x), x | batch(step))
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        if step != 2:
            mean = now if mean is None else DECAY * mean + (1 - DECAY) * now
            variance = spread if variance is None else DECAY * variance + (1 - DECAY) * spread
        torch.testing.assert_close(margin.mean.double(), mean, rtol=1e-5, atol=1e-6)


def test_state_survives_a_checkpoint() -> None:
    one, two = DynamicMargin(standardize=True), DynamicMargin(standardize=True)
    for step in range(3):
        one(batch(step)["scores"])
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(batch(3)["scores"]), two(batch(3)["scores"]))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_deferred_makes_one_update_of_several_batches() -> None:
    whole, parts = DynamicMargin(), DynamicMargin()
    whole(batch(0)["scores"])
    parts(batch(0)["scores"])
    rows = batch(1)["scores"]
    parts.deferred = True
    before = parts.mean.clone()
    first = parts(rows[:2])
    assert torch.equal(parts.mean, before)
    gamma = torch.cat((first, parts(rows[2:])))
    parts.commit()
    assert torch.equal(gamma, whole(rows))
    torch.testing.assert_close(parts.mean, whole.mean)
    parts.commit()  # nothing since: no second update
    torch.testing.assert_close(parts.mean, whole.mean)


def test_no_deviation_no_standard() -> None:
    """A first batch without variance, of one score or of equal ones, leaves nothing to measure in: gamma is gamma0
    until a batch has some."""
    for first in (torch.tensor([[0.5]]), torch.full((8, 4), 0.25), torch.full((8, 4), 1000.1), torch.zeros(0, 4)):
        margin = DynamicMargin(GAMMA, standardize=True)
        assert bool((margin(first) == GAMMA).all())
        assert bool((margin(torch.tensor([[-0.5]])) == GAMMA).all())
        scores, mean = batch(0)["scores"], margin.mean.double()
        deviation = scores.double().std(unbiased=False)
        expected = (GAMMA * (1 - ALPHA * (scores.double() - mean) / deviation)).clamp(min=0.0)
        torch.testing.assert_close(margin(scores).double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(margin.variance.double(), deviation.square(), rtol=1e-5, atol=0)


def test_a_variance_far_from_zero_mean_keeps_its_digits() -> None:
    """Scores near 1e4 that differ by 1, in several forwards of a step: sums of squares in float32 would lose them."""
    scores = 1e4 + batch(0)["scores"]
    margin = DynamicMargin(standardize=True)
    margin.deferred = True
    for row in scores:
        margin(row[None])
    margin.commit()
    torch.testing.assert_close(margin.variance.double(), scores.double().var(unbiased=False), rtol=1e-3, atol=0)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("granularity", ["batch", "user", "negative", "pair"])
def test_a_nan_shows_and_is_forgotten(granularity: str, value: float, deferred: bool) -> None:
    margins = [DynamicMargin(GAMMA, granularity=granularity, standardize=True) for _ in range(2)]
    for step in range(4):
        for margin, spoilt in zip(margins, (False, True), strict=True):
            margin.deferred = deferred
            x = batch(step)
            margin(x.pop("scores"), **x)
            if spoilt:
                x = batch(step)
                x["mask"][2, 1] = x["share"][1, 2] = True
                x["item_bias"][2, 1] = x["scores"][2, 1] = value
                got = gammas(margin(x.pop("scores"), **x), x)
                if granularity == "batch" or value != value:
                    assert not bool(got[1, 2, 1].isfinite())
                    assert granularity == "batch" or bool(got[~x["share"][:, 2], 0, 0].isfinite().all())
            margin.commit()
    for name, expected in margins[0].state_dict().items():
        torch.testing.assert_close(margins[1].state_dict()[name], expected)


def test_what_is_left_out_may_hold_anything() -> None:
    for granularity in ("batch", "user", "negative", "pair"):
        one, two = (DynamicMargin(GAMMA, granularity=granularity, standardize=True) for _ in range(2))
        for step in range(3):
            x = batch(step)
            x["share"][:, 4] = False  # an owner whom nobody has, and padding
            hidden = ~(x["mask"] & x["share"].any(0)[:, None])
            y = {name: tensor.clone() for name, tensor in x.items()}
            for value in (torch.nan, torch.inf):
                y["scores"][hidden] = y["item_bias"][hidden] = value
                y["item_vectors"][hidden] = value
            seen = (x["share"][:, :, None] & x["mask"]).expand(3, 5, 4)
            expected, got = (gammas(m(v.pop("scores"), **v), v) for m, v in ((one, x), (two, y)))
            torch.testing.assert_close(got[seen], expected[seen])
        for name, expected in one.state_dict().items():
            torch.testing.assert_close(two.state_dict()[name], expected)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_the_running_figures_stay_float32(cast: str) -> None:
    """From 12,000 scores half() made NaN, and bfloat16() left three digits."""
    plain, margin = DynamicMargin(), getattr(DynamicMargin(), cast)()
    scores = torch.randn(256, 8, generator=torch.Generator().manual_seed(0)) + 3
    share = torch.ones(128, 256, dtype=torch.bool)
    for _ in range(2):
        assert torch.equal(margin(scores, share=share), plain(scores, share=share))
    assert margin.mean.dtype == torch.float32 and margin.initialized.dtype == torch.bool
    assert torch.equal(margin.mean, plain.mean)
    within = torch.nn.Sequential(DynamicMargin()).to(torch.float16)
    assert within[0].variance.dtype == torch.float32
    assert DynamicMargin().to("meta").mean.is_meta


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("share", {"share": torch.ones(3, 4, dtype=torch.bool)}),
        ("share", {"share": torch.ones(3, 5)}),
        ("share", {"share": torch.ones(5, dtype=torch.bool)}),
        ("share", {"share": torch.ones(3, 5, dtype=torch.bool, device="meta")}),
        ("mask", {"mask": torch.ones(4, 5, dtype=torch.bool)}),
        ("mask", {"mask": torch.ones(5, 4)}),
        ("scores", {"scores": torch.ones(5, 4, dtype=torch.int64)}),
        ("scores", {"scores": torch.ones(5, 4, dtype=torch.complex64)}),
        ("scores", {"scores": torch.ones(5, 4, device="meta")}),
        ("scores", {"scores": [[1.0]]}),
        ("scores", {"scores": None}),
    ],
)
def test_refuses_other_shapes_and_dtypes(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        DynamicMargin()(**{"scores": torch.ones(5, 4), **arguments})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user_states", torch.ones(3, 5)),
        ("user_states", torch.ones(3, 6).long()),
        ("item_vectors", torch.ones(5, 4)),
        ("item_bias", torch.ones(5, 3)),
        ("item_bias", torch.ones(5, 4, device="meta")),
        ("share", torch.ones(2, 5, dtype=torch.bool)),
        ("share", None),
        ("mask", torch.ones(5, 3, dtype=torch.bool)),
    ],
)
def test_refuses_other_shapes_and_dtypes_of_pairs(name: str, value: Tensor | None) -> None:
    with pytest.raises(ValueError, match=f"^{name.replace('user_states', '(user_states|item_vectors)')}: "):
        DynamicMargin(granularity="pair")(**{**batch(0), name: value})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, "1", None, True])
@pytest.mark.parametrize("name", ["gamma", "alpha", "decay"])
def test_its_numbers_are_finite(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        DynamicMargin(**{name: value})


def test_refuses_what_makes_no_sense() -> None:
    for arguments, name in [
        ({"granularity": "row"}, "granularity"),
        ({"gamma": -1.0}, "gamma"),
        ({"decay": 1.0}, "decay"),
    ]:
        with pytest.raises(ValueError, match=name):
            DynamicMargin(**arguments)
    with pytest.raises(ValueError, match="user_states"):
        DynamicMargin(granularity="pair")(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="scores"):
        DynamicMargin()(torch.zeros(2))


def test_false_negatives_are_found() -> None:
    rng = np.random.default_rng(0)
    for users, owners, n in ((1, 1, 1), (7, 12, 5), (20, 20, 3)):
        histories = [rng.integers(0, 30, rng.integers(0, 25)).tolist() for _ in range(users)]
        chosen = rng.integers(0, 30, users).tolist()
        negatives = rng.integers(-1, 30, (owners, n))  # -1 is the padding of ragged rows
        known = [{*history, item} - {-1} for history, item in zip(histories, chosen, strict=True)]
        expected = [
            [u, v, j] for u in range(users) for v in range(owners) for j in range(n) if negatives[v, j] in known[u]
        ]
        got = false_negative_triples(histories, chosen, torch.from_numpy(negatives))
        assert got.tolist() == expected
        padded = false_negative_triples(histories, chosen, negatives.tolist(), pad_to=len(expected) + 3)
        assert padded.tolist() == expected + [[-1, -1, -1]] * 3
    with pytest.raises(ValueError, match="pad_to"):
        false_negative_triples([[1]], [2], [[1, 2]], pad_to=1)
    with pytest.raises(ValueError, match="chosen"):
        false_negative_triples([[1]], [2, 3], [[1, 2]])
