"""The masks of packed rows in SDPA and FlexAttention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from napo.scoring import pack
from napo.scoring.attention import block_mask, visible
from napo.scoring.cpu_attention import PackedMask


def drawn_batch():
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 50, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(n) for n in (150, 40, 90)]
    return pack(prompts, [[draw(5) for _ in range(n)] for n in (20, 3, 11)], pad_id=0, row_tokens=250)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sdpa_in_fp32_is_no_further_from_the_truth_than_sdpa(dtype, autocast):
    mask = visible(drawn_batch(), 30).unsqueeze(1)
    generator = torch.Generator().manual_seed(1)
    shape = (mask.shape[0], 3, mask.shape[-1], 24)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]

    def results(mask, dtype):
        q, k, v = (t.to(dtype).requires_grad_() for t in tensors[:3])
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
        return [out, *torch.autograd.grad(out, (q, k, v), tensors[3].to(out.dtype))]

    truth = results(mask, torch.float64)
    plain = results(mask, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = results(mask.as_subclass(PackedMask), dtype)
    for got, other, true in zip(ours, plain, truth, strict=True):
        assert got.dtype == dtype and type(got) is torch.Tensor
        assert (got.double() - true).norm() <= 1.01 * (other.double() - true).norm() + 1e-13


def test_other_operations_on_the_mask_give_plain_tensors():
    mask = visible(drawn_batch(), None).unsqueeze(1).as_subclass(PackedMask)
    assert mask.ndim == 4
    assert type(mask[:, :, :5]) is torch.Tensor
    assert type(~mask) is torch.Tensor


@pytest.mark.parametrize("window", [None, 30])
def test_flex_attention_with_block_masks_equals_sdpa(window):
    from torch.nn.attention.flex_attention import flex_attention

    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(0, 50, (n,), generator=generator).tolist()  # noqa: E731
    batch = pack(
        [draw(n) for n in (150, 40, 90)], [[draw(5) for _ in range(9)] for _ in range(3)], pad_id=0, row_tokens=300
    )
    dense, blocks = visible(batch, window).unsqueeze(1), block_mask(batch, window)
    q, k, v = (torch.randn(dense.shape[0], 2, dense.shape[-1], 16, generator=generator) for _ in range(3))
    truth = scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=blocks), truth, rtol=1e-5, atol=1e-5)
