"""The masks of packed rows in SDPA and FlexAttention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from napo.scoring import cpu_attention, pack
from napo.scoring.attention import block_mask, visible
from napo.scoring.cpu_attention import PackedMask, chunked


def drawn_batch(row_tokens=250):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 50, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(n) for n in (150, 40, 90)]
    return pack(prompts, [[draw(5) for _ in range(n)] for n in (20, 3, 11)], pad_id=0, row_tokens=row_tokens)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("width", [24, 80])  # of a head: probabilities computed again in the backward, and kept for it
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_in_fp32_are_no_further_from_the_truth_than_sdpa(dtype, autocast, width, window):
    mask = visible(drawn_batch(), window).unsqueeze(1)
    generator = torch.Generator().manual_seed(1)
    shape = (mask.shape[0], 3, mask.shape[-1], width)
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
        allowed = 1.01 if dtype == torch.bfloat16 else 2  # in fp32 the order of sums alone differs
        assert (got.double() - true).norm() <= allowed * (other.double() - true).norm() + 1e-13 * true.norm()


@pytest.mark.parametrize("row_tokens", [250, 1000])
@pytest.mark.parametrize("window", [None, 30])
def test_chunks_hold_every_visible_pair_and_leave_most_of_the_others_out(window, row_tokens):
    mask = visible(drawn_batch(row_tokens), window).unsqueeze(1)
    put_together = torch.zeros_like(mask)
    for queries, keys, part in chunked(mask, torch.float32):
        assert set(part.unique().tolist()) <= {0.0, -torch.inf}
        put_together[:, :, queries, keys] = part == 0
    assert torch.equal(put_together, mask)
    computed = sum(part.numel() for *_, part in chunked(mask, torch.float32))
    assert computed < 0.75 * mask.numel()


def test_attention_in_chunks_repeats_bit_by_bit_kept_or_computed_again(monkeypatch):
    mask = visible(drawn_batch(), None).unsqueeze(1)
    generator = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(mask.shape[0], 3, mask.shape[-1], 80, generator=generator) for _ in range(4))

    def results():
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = scaled_dot_product_attention(*leaves, attn_mask=mask.as_subclass(PackedMask))
        kept = len(out.grad_fn.saved_tensors) > 3
        return kept, [out, *torch.autograd.grad(out, leaves, grad)]

    kept, first = results()
    assert kept and all(map(torch.equal, first, results()[1]))
    monkeypatch.setattr(cpu_attention, "KEPT", 0)
    kept, again = results()
    assert not kept and all(map(torch.equal, first, again))


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"enable_gqa": True}])
def test_what_the_chunks_do_not_compute_is_torchs_own(options):
    mask = visible(drawn_batch(), None).unsqueeze(1)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(mask.shape[0], 2, mask.shape[-1], 8, generator=generator) for _ in range(3))
    torch.manual_seed(0)
    plain = scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    torch.manual_seed(0)
    assert torch.equal(scaled_dot_product_attention(q, k, v, attn_mask=mask.as_subclass(PackedMask), **options), plain)


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


def test_flex_attention_is_not_compiled_again_for_every_shape_of_a_batch():
    """First shapes make sizes dynamic; after these, no shape does (traced as for a GPU, run without its kernels)."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attention, backend=counter)
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(0, 50, (n,), generator=generator).tolist()  # noqa: E731
    counts, shapes = [], set()
    for users, prompt, titles in [(3, 150, 9), (4, 130, 8), (5, 90, 20), (2, 200, 3), (6, 250, 5), (7, 77, 11)]:
        prompts = [draw(prompt + user) for user in range(users)]
        batch = pack(prompts, [[draw(5) for _ in range(titles)] for _ in prompts], pad_id=0, row_tokens=400)
        dense, blocks = visible(batch, 30).unsqueeze(1), block_mask(batch, 30)
        q, k, v = (torch.randn(dense.shape[0], 2, dense.shape[-1], 16, generator=generator) for _ in range(3))
        truth = scaled_dot_product_attention(q, k, v, attn_mask=dense)
        torch.testing.assert_close(compiled(q, k, v, block_mask=blocks), truth, rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
        shapes.add(dense.shape)
    assert len(shapes) == len(counts) == 6
    assert counts[0] == 1 and counts[3] == counts[-1] <= 4, counts
    torch._dynamo.reset()
