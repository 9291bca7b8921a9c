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
    """What the margin is for every user, owner and negative."""
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
