"""The norm and the MLP that keep little equal transformers' own, forward and backward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from napo.language_models.fused.mlp import fuse_mlps
from napo.language_models.fused.norms import fuse_norms
from napo.language_models.fused.self_attention import fuse_attentions
from napo_kernels.ops import body


def pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = LlamaRMSNorm(48)
    nn.init.normal_(plain.weight)
    plain = plain.to(dtype).requires_grad_(False)
    fused = copy.deepcopy(plain)
    assert fuse_norms(fused) == 1
    return plain, fused


def results(norm: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, x, grad)]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers(dtype: torch.dtype, scale: float) -> None:
    plain, fused = pair(dtype)
    x, grad = (torch.randn(3, 5, 48) for _ in range(2))
    x = (x * scale).to(dtype)
    truth = results(copy.deepcopy(plain).float(), x.float(), grad.to(dtype).float())
    for got, theirs, right in zip(*(results(norm, x, grad.to(dtype)) for norm in (fused, plain)), truth, strict=True):
        assert got.dtype == dtype
        error, other = ((result.float() - right).norm() / right.norm() for result in (got, theirs))
        assert error <= 1.5 * other + 1e-6


def test_without_the_kernel_the_forward_is_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "serves", lambda *tensors: False)
    plain, fused = pair(torch.bfloat16)
    x, grad = (torch.randn(3, 5, 48).bfloat16() for _ in range(2))
    assert torch.equal(results(fused, x, grad)[0], results(plain, x, grad)[0])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("kernels", [True, False])
def test_every_norm_and_mlp_of_a_model_is_served_and_gradients_stay(
    name: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(body, "serves", lambda *tensors: False)
    plain = tiny_model(name).requires_grad_(False)
    fused = copy.deepcopy(plain)
    norms = [module for module in fused.modules() if type(module).__name__.endswith("RMSNorm")]
    assert fuse_norms(fused) == len(norms) > 0
    assert fuse_mlps(fused) == fused.config.num_hidden_layers
    fused = pickle.loads(pickle.dumps(fused))
    grads = []
    for model in (plain, fused):
        model.get_input_embeddings().weight.requires_grad_()
        model(torch.arange(12)[None]).logits.square().sum().backward()
        grads.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4 * grads[0].abs().max().item())


def rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    turn = torch.view_as_complex(torch.stack(torch.stack((cos, sin))[..., : cos.shape[-1] // 2].unbind(), -1))
    pairs = (torch.view_as_complex(torch.stack(x.chunk(2, -1), -1).contiguous()) * turn[:, None] for x in (q, k))
    return tuple(torch.cat((pair.real, pair.imag), -1) for pair in pairs)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2_sliding", "qwen3", "mistral"])
@pytest.mark.parametrize("kernel", [True, False])
def test_attention_equals_transformers(name: str, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_model(name)
    fused = copy.deepcopy(plain)
    assert fuse_attentions(fused) == fused.config.num_hidden_layers
    fused = pickle.loads(pickle.dumps(fused))
    ids, calls = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(1)), []
    monkeypatch.setattr(body, "rotates", lambda x: True)  # also where there is no compiled module
    monkeypatch.setattr(body, "serves_rotation", lambda *_: kernel)
    if kernel:
        monkeypatch.setattr(body, "rotate", lambda *given: calls.append(1) or rotated(*given))
    results = []
    for model in (plain, fused):
        logits = model(ids, use_cache=False).logits
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert len(calls) == (fused.config.num_hidden_layers if kernel else 0)
    generated = [model.generate(ids, max_new_tokens=4, do_sample=False) for model in (plain, fused)]  # with a cache
    assert torch.equal(*generated)


def test_gemma_and_trained_weights_keep_their_own_forward() -> None:
    assert fuse_norms(tiny_model("gemma2")) == fuse_mlps(tiny_model("gemma2")) == 0
    norm = LlamaRMSNorm(8)
    fuse_norms(norm)
    norm(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert norm.weight.grad is not None
    assert norm(torch.randn(2, 8)).shape == (2, 8)


def test_it_keeps_its_input_and_a_number_a_row() -> None:
    _, fused = pair(torch.bfloat16)
    x = torch.randn(7, 48, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fused(x)
    own = {x.data_ptr(), fused.weight.data_ptr()}
    assert sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in own) == 7
