"""Scoring and training on a GPU against the CPU, and what a step there may not do: wait, or compile again."""

from __future__ import annotations

import pytest
import torch
from test_equality import gradients, plain_logps, ragged_batch
from tiny_models import ARCHITECTURES, tiny_model
from torch import Tensor
from trainer_cases import distance, make_rows, step_gradients
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from napo.scoring import CandidateScorer, PackedBatch, pack
from napo_kernels import napo_loss

pytestmark = pytest.mark.gpu
VOCABULARY = 512


def llama(device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_attn_implementation(attention)
    return model.to(device, torch.bfloat16).to(dtype)  # the same weights in every dtype


def drawn_batch(prompt: int, users: int = 4, titles: int = 9) -> PackedBatch:
    generator = torch.Generator().manual_seed(prompt)
    draw = lambda n: torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(prompt) for _ in range(users)]
    return pack(prompts, [[[*draw(6), 0] for _ in range(titles)] for _ in prompts], pad_id=0)


def scores_and_gradients(model: PreTrainedModel, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """All gradients as one vector, in fp64."""
    model.zero_grad()
    logps = CandidateScorer(model)(batch)
    (logps * torch.linspace(-1, 1, len(logps), device=logps.device)).sum().backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return logps.detach().double(), torch.cat(grads)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_every_title_alone_in_fp64(name: str, device: torch.device) -> None:
    prompts, titles = ragged_batch()
    wide = tiny_model(name, torch.float64)
    truth = plain_logps(wide, prompts, titles)
    expected = gradients(wide, truth)
    model = tiny_model(name).to(device)
    logps = CandidateScorer(model)(pack(prompts, titles, pad_id=0))
    assert (logps.cpu() - truth).abs().max() <= 1e-3
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps), device=device)).sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = expected[key].abs().max().clamp_min(1)
            assert (parameter.grad.cpu() - expected[key]).abs().max() <= 1e-3 * scale, key


@pytest.mark.parametrize("prompt", [200, 201, 333])
def test_bf16_is_no_further_from_the_truth_than_eager_attention_at_any_width(prompt: int, device: torch.device) -> None:
    batch = drawn_batch(prompt)
    truth = scores_and_gradients(llama(device, torch.float32, "eager"), batch)
    eager = scores_and_gradients(llama(device, torch.bfloat16, "eager"), batch)
    ours = scores_and_gradients(llama(device, torch.bfloat16), batch)
    for got, other, right in zip(ours, eager, truth, strict=True):
        assert (got - right).norm() <= 2 * (other - right).norm()


def test_a_model_serves_batches_of_different_widths(device: torch.device) -> None:
    """One after the other, as in training: nothing that a width leaves behind reaches the next."""
    model = llama(device, torch.float32)
    batches = [drawn_batch(prompt) for prompt in (40, 131, 40, 64)]
    assert len({batch.input_ids.shape[1] for batch in batches}) == 3
    for batch in batches:
        got = scores_and_gradients(model, batch)
        right = scores_and_gradients(llama(torch.device("cpu"), torch.float64), batch)
        for name, a, b in zip(("log-probs", "gradients"), got, right, strict=True):
            assert (a.cpu() - b).norm() <= 1e-4 * b.norm(), f"{name}, row of {batch.input_ids.shape[1]}"


OPTIONS = {
    "napo": {},
    "pool of users over two batches": {
        "granularity": "user",
        "pool": "accumulated",
        "gradient_accumulation_steps": 2,
    },
    "simpo": {"objective": "simpo"},
    "own gradient, all negatives": {"shared_gradient": False, "exclude_false_negatives": False},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_trainers_step_has_the_gradients_of_the_cpu(options: str, device: torch.device, tmp_path) -> None:
    rows = make_rows(8)
    here, there = (
        step_gradients(tmp_path / where, rows, use_cpu=where == "cpu", **OPTIONS[options])[0]
        for where in ("cpu", device.type)
    )
    assert all(grad.device.type == device.type for grad in there.values())
    assert distance({name: grad.cpu() for name, grad in there.items()}, here) < 1e-4


def test_a_step_does_not_wait_for_the_device(device: torch.device) -> None:
    """From packing to the optimiser's step."""
    model = llama(device, torch.bfloat16)
    scorer = CandidateScorer(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)

    def step() -> Tensor:
        logps = scorer(drawn_batch(200)).view(4, 9)
        loss = napo_loss(logps[:, 0], logps[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    first = step()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert second < first


def test_flex_attention_is_that_of_sdpa_and_is_not_compiled_for_every_shape(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("FlexAttention has no backward on a CPU")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flex, plain = (llama(device, torch.float32, attention) for attention in ("flex_attention", "sdpa"))
    graphs = []
    for prompt, users in ((150, 3), (333, 4), (401, 2), (77, 5), (210, 3)):
        batch = drawn_batch(prompt, users)
        got, right = (scores_and_gradients(model, batch) for model in (flex, plain))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert (got[0] - right[0]).norm() <= 1e-4 * right[0].norm()
        assert (got[1] - right[1]).norm() <= 1e-2 * right[1].norm()
    assert graphs[0] > 0, "it was not compiled"
    assert graphs[1] == graphs[-1], f"compiled again for a new shape: {graphs}"
