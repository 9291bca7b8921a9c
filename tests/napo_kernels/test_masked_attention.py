"""Attention under a mask, against the formula in fp64, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from napo_kernels import backends
from napo_kernels.ops.masked_attention import masked_attention, pad_mask, serves

pytestmark = pytest.mark.skipif(
    not backends()["cpu"]["available"], reason=f"no compiled module: {backends()['cpu']['why_not']}"
)

every_isa = pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"], indirect=True)


def drawn_mask(rows: int, length: int) -> Tensor:
    """Causal, with most pairs hidden in blocks as in packed rows; two queries see nothing."""
    torch.manual_seed(rows * length)
    mask = torch.rand(rows, length, length).lt(0.7).tril()
    for start in range(length // 3, length, 11):
        mask[:, start + 11 :, start : start + 11] = False
    mask[:, torch.arange(length), torch.arange(length)] = True
    mask[0, 1] = mask[-1, -1] = False
    return mask


def drawn(rows: int, heads: int, key_heads: int, length: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value and an upstream gradient, in the layouts that a model makes: tokens first, heads first."""
    torch.manual_seed(length)
    query, grad = (torch.randn(rows, length, heads, width).to(dtype).transpose(1, 2) for _ in range(2))
    key = torch.randn(rows, length, key_heads, width).to(dtype).transpose(1, 2)
    return [query, key, torch.randn(rows, key_heads, length, width).to(dtype), grad]


def formula(tensors: list[Tensor], mask: Tensor, scale: float) -> list[Tensor]:
    query, key, value, grad = (x.double().requires_grad_() for x in tensors)
    group = query.shape[1] // key.shape[1]
    scores = scale * query @ key.repeat_interleave(group, 1).transpose(2, 3)
    shown = mask[:, None]
    p = scores.masked_fill(~shown, -1e300).softmax(-1) * shown
    out = p @ value.repeat_interleave(group, 1)
    return [out, *torch.autograd.grad(out, (query, key, value), grad)]


def ours(tensors: list[Tensor], mask: Tensor, scale: float) -> list[Tensor]:
    query, key, value = (x.detach().requires_grad_() for x in tensors[:3])
    padded = pad_mask(mask)
    assert padded is not None
    out = masked_attention(query, key, value, padded, scale)
    return [out, *torch.autograd.grad(out, (query, key, value), tensors[3])]


def sdpa(tensors: list[Tensor], mask: Tensor, scale: float) -> list[Tensor]:
    query, key, value = (x.detach().requires_grad_() for x in tensors[:3])
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=scale, enable_gqa=True)
    return [out, *torch.autograd.grad(out, (query, key, value), tensors[3])]


SHAPES = [  # rows, heads, key heads, T, d
    (2, 9, 3, 150, 64),
    (5, 4, 2, 63, 64),  # enough key heads that a thread takes them whole
    (1, 2, 1, 130, 33),
    (1, 1, 1, 1, 8),
    (1, 3, 3, 64, 80),
    (2, 2, 2, 65, 128),
]


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula(isa: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    mask = drawn_mask(shape[0], shape[3]) if shape[3] > 1 else torch.ones(1, 1, 1, dtype=torch.bool)
    tensors = drawn(*shape, dtype)
    truth = formula(tensors, mask, 0.2)
    for got, right, theirs in zip(ours(tensors, mask, 0.2), truth, sdpa(tensors, mask, 0.2), strict=True):
        assert got.dtype == dtype
        error = (got.double() - right).norm()
        # torch's kernel gives NaN for a query that sees nothing
        other = (theirs.double() - right)[theirs.isfinite()].norm() if theirs.isfinite().any() else right.norm()
        assert error <= 1.5 * other + 2 * torch.finfo(dtype).eps * right.norm()


@every_isa
def test_a_query_that_sees_nothing_gives_zeros(isa: str) -> None:
    mask = drawn_mask(2, 70)
    out, d_query, *others = ours(drawn(2, 2, 1, 70, 16, torch.float32), mask, 0.3)
    for hidden in (out, d_query):
        assert not hidden[0, :, 1].any() and not hidden[1, :, -1].any()
    assert all(x.isfinite().all() for x in (out, d_query, *others))


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_stay_finite(isa: str, dtype: torch.dtype) -> None:
    mask = drawn_mask(1, 40)
    tensors = drawn(1, 2, 2, 40, 16, dtype)
    tensors[0] = tensors[0] * 1e4
    for got, right in zip(ours(tensors, mask, 1.0), formula(tensors, mask, 1.0), strict=True):
        assert got.isfinite().all()
        allowed = 1e-4 if dtype == torch.float32 else 0.02
        assert (got.double() - right).norm() <= allowed * right.norm() + 1e-3


@every_isa
def test_repeats_bit_by_bit_and_hidden_pairs_count_for_nothing(isa: str) -> None:
    mask = drawn_mask(2, 90)
    tensors = drawn(2, 4, 2, 90, 32, torch.bfloat16)
    first = ours(tensors, mask, 0.2)
    assert all(map(torch.equal, first, ours(tensors, mask, 0.2)))
    mask[:, 40:, 30:40] = False
    before = ours(tensors, mask, 0.2)
    for x in tensors[1:3]:
        x[:, :, 30:40] = 7.0
    after = ours(tensors, mask, 0.2)
    assert torch.equal(before[0][:, :, 40:], after[0][:, :, 40:])
    assert torch.equal(before[1][:, :, 40:], after[1][:, :, 40:])


def test_gradcheck_against_finite_differences_of_the_formula() -> None:
    """The kernel is fp32, so its gradient is held against differences of the fp64 formula along random directions."""
    mask = drawn_mask(1, 30)
    tensors = drawn(1, 2, 1, 30, 8, torch.float32)
    grads = ours(tensors, mask, 0.4)[1:]
    for which, grad in enumerate(grads):
        along = torch.randn_like(grad).double()
        moved = [x.double() for x in tensors]
        values = []
        for step in (1e-5, -1e-5):
            moved[which] = tensors[which].double() + step * along
            values.append((formula(moved, mask, 0.4)[0] * moved[3]).sum())
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((grad.double() * along).sum(), slope, rtol=1e-4, atol=1e-4)


def test_what_it_does_not_compute_is_refused_by_name() -> None:
    query, key, value, _ = drawn(1, 4, 2, 10, 8, torch.float32)
    padded = pad_mask(torch.ones(1, 10, 10, dtype=torch.bool))
    assert padded is not None and serves(query, key, value)
    for bad in ((query.double(), key, value), (query, key[..., :4], value), (query[:, :3], key, value)):
        assert not serves(*bad)
        with pytest.raises(ValueError, match="query, key, value: expected one dtype"):
            masked_attention(*bad, padded, 1.0)
