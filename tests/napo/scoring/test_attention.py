"""The masks of packed rows in SDPA and FlexAttention."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from napo.language_models.fused import attention
from napo.language_models.fused.attention import packed_mask
from napo.scoring import CandidateScorer, pack
from napo.scoring.attention import block_mask, visible


def drawn_batch(row_tokens=250):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 50, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(n) for n in (150, 40, 90)]
    return pack(prompts, [[draw(5) for _ in range(n)] for n in (20, 3, 11)], pad_id=0, row_tokens=row_tokens)


def attend(mask, tensors, **options):
    """Calls it as a layer of transformers does: (rows, T, heads, d) and the gradients."""
    q, k, v = (t.detach().requires_grad_() for t in tensors[:3])
    module = nn.Module()
    module.num_key_value_groups = q.shape[1] // k.shape[1]
    out = ALL_ATTENTION_FUNCTIONS[attention.PACKED](module, q, k, v, mask, **options)[0]
    grad = tensors[3].to(out.dtype).transpose(1, 2)
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def drawn_heads(mask, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [(mask.shape[0], heads, mask.shape[-1], width) for heads in (4, 2, 2, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("width", [24, 80])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_packed_mask_is_no_further_from_the_truth_than_sdpa(dtype, autocast, width, window):
    mask = visible(drawn_batch(), window).unsqueeze(1)
    tensors = drawn_heads(mask, width, dtype)
    truth = attend(mask, [t.double() for t in tensors], scaling=0.3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = attend(mask, tensors, scaling=0.3)
        ours = attend(packed_mask(mask), tensors, scaling=0.3)
    for got, other, true in zip(ours, plain, truth, strict=True):
        assert got.dtype == other.dtype and type(got) is torch.Tensor and got.shape == other.shape
        assert (got.double() - true).norm() <= 1.5 * (other.double() - true).norm() + 1e-13 * true.norm()


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"position_bias": torch.ones(1)}, {}])
def test_what_the_kernel_does_not_compute_is_torchs_own(options, monkeypatch):
    mask = visible(drawn_batch(), None).unsqueeze(1)
    tensors = drawn_heads(mask, 8, torch.float32 if options else torch.float64)
    monkeypatch.setattr(attention, "masked_attention", None)
    torch.manual_seed(0)
    plain = attend(mask, tensors, **options)
    torch.manual_seed(0)
    assert all(map(torch.equal, attend(packed_mask(mask), tensors, **options), plain))


def test_other_operations_on_the_mask_give_plain_tensors():
    mask = packed_mask(visible(drawn_batch(), None).unsqueeze(1))
    assert mask.ndim == 4
    assert type(mask[:, :, :5]) is torch.Tensor
    assert type(~mask) is torch.Tensor


@pytest.fixture
def kernel_calls(monkeypatch):
    """One entry for each call of the kernel, which must be there."""
    calls, kernel = [], attention.masked_attention
    monkeypatch.setattr(attention, "masked_attention", lambda *given: calls.append(1) or kernel(*given))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return calls


def scored(model):
    with torch.no_grad():
        CandidateScorer(model)(drawn_batch())
    return model


def test_scoring_one_model_leaves_the_attention_of_others_alone(kernel_calls):
    other = tiny_model("llama")
    model = scored(tiny_model("llama"))
    assert kernel_calls and model.config._attn_implementation == attention.PACKED
    assert other.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_a_scored_model_computes_and_generates_as_before(kernel_calls):
    model = tiny_model("qwen2_sliding")
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()

    def outcome():
        logits = model(input_ids=ids, attention_mask=mask).logits
        tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        return [logits, tokens]

    before = outcome()
    scored(model)
    calls = len(kernel_calls)
    assert model.config._attn_implementation == attention.PACKED
    assert all(map(torch.equal, outcome(), before)) and len(kernel_calls) == calls


def test_sdpa_can_be_set_again(kernel_calls):
    model = scored(tiny_model("llama"))
    model.set_attn_implementation("sdpa")
    calls = len(kernel_calls)
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert model.config._attn_implementation == "sdpa" and len(kernel_calls) == calls


def test_a_saved_model_knows_nothing_of_the_name(kernel_calls, tmp_path):
    model = scored(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    assert attention.PACKED not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


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
