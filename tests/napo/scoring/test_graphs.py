"""Which batches are recorded and replayed, and that nothing of a replay leaks into the next: on the CPU with a stand-in
for the recording that writes into the same tensors at each replay, on a GPU with CUDA graphs."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import Tensor, nn

from napo.language_models.fused.fuse import fuse
from napo.language_models.fused.lora import without_adapter
from napo.scoring import CandidateScorer, PackedBatch, graphs, pack
from napo_kernels.ops import body


def adapted(name: str = "llama", dropout: float = 0.0, device: torch.device | str = "cpu") -> Any:
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(tiny_model(name).to(device), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    fuse(model)
    return model


def batch(seed: int, prompt: int = 9, users: int = 2) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(1, 61, (length,), generator=generator).tolist()

    prompts = [draw(prompt) for _ in range(users)]
    return pack(prompts, [[[*draw(3), 0] for _ in range(3)] for _ in prompts], pad_id=0, row_tokens=1)


def scorer_of(model: Any) -> CandidateScorer:
    scorer = CandidateScorer(model, cuda_graphs=True)
    assert isinstance(scorer._body, graphs.BodyGraphs)
    return scorer


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def step(scorer: CandidateScorer, *batches: PackedBatch, reference: bool = True) -> list[Tensor]:
    """Log-probs of the batches and the gradients accumulated over them."""
    logps = []
    for one in batches:
        policy = scorer(one)
        if reference:
            with torch.no_grad(), without_adapter(scorer.model):
                frozen = scorer(one)
            logps.append(frozen)
        logps.append(policy.detach())
        policy.square().sum().backward()
    return [*logps, *gradients(scorer.model)]


def compare(device: torch.device | str) -> None:
    model = adapted(device=device)
    plain, graphed = CandidateScorer(copy.deepcopy(model)), scorer_of(model)
    a, b, c, other = batch(0), batch(1), batch(2), batch(3, prompt=80)
    for number, batches in enumerate([(a,), (b,), (other, c), (b, other, a), (other, a, b)]):
        for ours, theirs in zip(step(graphed, *batches), step(plain, *batches), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for scorer in (plain, graphed):  # the weights move, in place
            generator = torch.Generator().manual_seed(number)
            for p in scorer.model.parameters():
                if p.requires_grad:
                    p.data.add_(torch.randn(p.shape, generator=generator).to(p), alpha=0.1)


def test_replays_give_what_the_body_gives(stand_in: Any) -> None:
    compare("cpu")
    assert stand_in.recorded == 2 * 3  # two shapes, each with forward and backward, and a forward for the reference


@pytest.mark.gpu
def test_replays_give_what_the_body_gives_on_a_gpu(device: torch.device) -> None:
    compare(device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen2_sliding", "qwen3", "mistral"])
def test_fused_layers_and_graphs_on_a_gpu_against_fp64(name: str, device: torch.device) -> None:
    model = adapted(name, device=device)
    scorer = scorer_of(model)
    truth = CandidateScorer(adapted(name).double())
    assert not any(body.serves(p) for p in truth.model.parameters())  # torch's own operations
    for seed in range(3):
        for ours, right in zip(step(scorer, batch(seed)), step(truth, batch(seed)), strict=True):
            torch.testing.assert_close(ours.cpu().double(), right, rtol=1e-3, atol=1e-3 * right.abs().max().item())


@pytest.mark.gpu
def test_fp32_adapters_under_autocast_on_a_gpu(device: torch.device) -> None:
    model = adapted(device=device)
    plain, graphed = CandidateScorer(copy.deepcopy(model)), scorer_of(model)
    for seed in range(4):
        with torch.autocast(device.type, torch.bfloat16):
            ours, theirs = step(graphed, batch(seed)), step(plain, batch(seed))
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2 * y.abs().max().item())
    assert len(graphed._body._graphs) == (2 if device.type == "cuda" else 0)  # type: ignore[union-attr]


def test_a_shape_that_comes_once_is_not_recorded_and_their_number_is_bounded(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    scorer = scorer_of(adapted())
    lengths = (5, 6, 7, 8)
    for length in lengths:
        step(scorer, batch(0, prompt=length), reference=False)
    assert stand_in.recorded == 0
    with pytest.warns(RuntimeWarning, match="cuda_graphs: 2 shapes") as said:
        for _, length in itertools.product(range(2), lengths):
            step(scorer, batch(0, prompt=length), reference=False)
    assert stand_in.recorded == 2 * 2
    assert len(said) == 1


def test_a_second_forward_before_the_backward_keeps_off_the_graph(stand_in: Any) -> None:
    model = adapted()
    scorer = scorer_of(model)
    a, b = batch(0), batch(1)
    step(scorer, a)
    (scorer(a) * 2).sum().backward()
    expected = gradients(model)
    first, second = scorer(a), scorer(b)  # replayed; eager, as the first one's activations are wanted yet
    (first * 2).sum().backward()
    for x, y in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(x, y)
    second.sum().backward()
    with pytest.raises(RuntimeError, match="one backward a forward"):
        total = scorer(a).sum()
        total.backward(retain_graph=True)
        total.backward()
    del first, second, total
    abandoned = scorer(a)
    del abandoned  # nobody can ask for its backward
    assert scorer._body._under_way() is None  # type: ignore[union-attr]


def test_what_a_recording_takes_for_granted_is_watched(stand_in: Any) -> None:
    model = adapted()
    scorer = scorer_of(model)
    one = batch(0)

    def recordings() -> int:
        before = stand_in.recorded
        for _ in range(3):
            step(scorer, one, reference=False)
        return stand_in.recorded - before

    assert (recordings(), recordings()) == (2, 0)
    layer = model.base_model.model.model.layers[1]
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.clone()
    assert (recordings(), recordings()) == (2, 0)
    layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight.detach() * 2, requires_grad=False)
    assert (recordings(), recordings()) == (2, 0)
    layer.self_attn.q_proj.scaling["default"] = 0.5
    assert (recordings(), recordings()) == (2, 0)
    layer.self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    assert (recordings(), recordings()) == (2, 0)
    scorer(one).sum().backward()
    assert layer.self_attn.q_proj.lora_A["default"].weight.grad is None


@pytest.mark.parametrize("reason", ["no dropout", "no gradient checkpointing", "no hooks", "cannot be recorded"])
def test_where_it_cannot_be_it_says_so_once(reason: str, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(dropout=0.5 if reason == "no dropout" else 0.0).train()
    if reason == "no gradient checkpointing":
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable()
    elif reason == "no hooks":
        model.base_model.model.model.norm.register_forward_hook(lambda *_: None)
    elif reason == "cannot be recorded":

        def fail(*_: Any) -> None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

        monkeypatch.setattr(stand_in, "record", fail)
    scorer = scorer_of(model)
    with pytest.warns(RuntimeWarning, match=f"cuda_graphs: .*{reason}") as said:
        for _ in range(3):
            found = step(scorer, batch(0), reference=False)
    assert len([one for one in said if "cuda_graphs" in str(one.message)]) == 1
    assert stand_in.recorded == 0
    assert all(x.isfinite().all() for x in found)


def test_a_model_on_the_cpu_says_so_and_runs() -> None:
    scorer, plain = CandidateScorer(adapted(), cuda_graphs=True), CandidateScorer(adapted())
    with pytest.warns(RuntimeWarning, match="cuda_graphs: expected a model on a CUDA device, got cpu"):
        got = scorer(batch(0))
    assert torch.equal(got, plain(batch(0)))
    with pytest.raises(ValueError, match="cuda_graphs: expected packed=True"):
        CandidateScorer(adapted(), packed=False, cuda_graphs=True)
