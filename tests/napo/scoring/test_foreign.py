"""Models with code of somebody else, above the body, in it and in the head: compared first, refused where that changes
scores, and scored by their own forward with `packed=False`."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from test_equality import plain_logps, ragged_batch
from test_models import lora_model
from tiny_models import assert_equal_gradients, tiny_model
from torch import nn
from torch.nn.utils import prune
from transformers import LlamaForCausalLM, LlamaModel

from napo.catalogue import CatalogueScorer, Trie, pack_items
from napo.language_models.fused.fuse import fuse
from napo.scoring import CandidateScorer, pack
from napo.scoring.foreign import foreign_part
from napo.scoring.self_check import OwnForward, _is_rough


def packed() -> Any:
    prompts, titles = ragged_batch()
    return pack(prompts, titles, pad_id=0, row_tokens=60)


class Cool(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


class CoolInTraining(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / (2 if self.training else 1)
        return output


class Cosine(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(nn.functional.normalize(x, dim=-1))


class Normed(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.norm = linear, nn.LayerNorm(linear.in_features, dtype=linear.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


class Doubled(ModelHook):  # type: ignore[misc]
    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output * 2


def halved(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output / 2


def of_class(kind: type) -> Any:
    model = tiny_model("llama", torch.float64)
    model.__class__ = kind
    return model


def own_forward() -> Any:
    model = tiny_model("llama", torch.float64)
    model.forward = own_forward_of(model)
    return model


def own_forward_of(model: Any) -> Any:
    def cool(*args: Any, **kwargs: Any) -> Any:
        output = LlamaForCausalLM.forward(model, *args, **kwargs)
        output.logits = output.logits / 2
        return output

    return cool


def hooked(register: str, hook: Any) -> Any:
    model = tiny_model("llama", torch.float64)
    getattr(model.lm_head, register)(hook)
    return model


def wrapped(part: Any) -> Any:
    """Another forward of a part of the model, which `functools.wraps` gives the name and module of the one below it."""
    model = tiny_model("llama", torch.float64)
    module = part(model)
    own = module.forward

    @functools.wraps(own)
    def half(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return output / 2
        output.logits = output.logits / 2
        return output

    module.forward = half
    return model


def below_accelerate() -> Any:
    model = wrapped(lambda model: model)
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu"))
    return model


def with_head(kind: type) -> Any:
    model = tiny_model("llama", torch.float64)
    if kind is Normed:
        model.lm_head = Normed(model.lm_head)
    else:
        model.lm_head.__class__ = kind
    return model


def accelerated() -> Any:
    model = tiny_model("llama", torch.float64)
    add_hook_to_module(model.lm_head, Doubled())
    return model


def pruned() -> Any:
    model = tiny_model("llama", torch.float64)
    prune.l1_unstructured(model.lm_head, "weight", 0.5)
    return model


FOREIGN = {
    "class": (lambda: of_class(Cool), r"Cool with test_foreign\.Cool scores random titles"),
    "head_hook": (lambda: hooked("register_forward_hook", halved), "hook test_foreign.halved at lm_head scores random"),
    "head_pre_hook": (
        lambda: hooked("register_forward_pre_hook", lambda module, inputs: (inputs[0] / 2,)),
        "hook test_foreign.*<lambda> at lm_head scores random",
    ),
    "backward_hook": (lambda: hooked("register_full_backward_hook", halved), "no hook on the output head, .*halved"),
    "accelerate_hook": (accelerated, r"hook test_foreign\.Doubled at lm_head scores random"),
    "wrapped_head": (
        lambda: wrapped(lambda model: model.lm_head),
        "half as forward of Linear at lm_head scores random",
    ),
    "wrapped_forward": (lambda: wrapped(lambda model: model), "half as forward of LlamaForCausalLM scores random"),
    "below_accelerate": (below_accelerate, "half as forward of LlamaForCausalLM scores random"),
    "pruned_head": (pruned, r"no hook on the output head, .*torch\.nn\.utils\.prune"),
    "linear_head": (lambda: with_head(Cosine), r"test_foreign\.Cosine at lm_head scores random titles"),
    "other_head": (lambda: with_head(Normed), r"expected a linear output head, got test_foreign\.Normed"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_the_head_does_not_say_is_refused_and_scored_alone(name: str) -> None:
    make, message = FOREIGN[name]
    model = make()
    with pytest.raises(ValueError, match=rf"^model: .*({message}).*set packed=False \(of") as error:
        CandidateScorer(model)(packed())
    assert "\n" not in str(error.value)
    truth = plain_logps(model, *ragged_batch())
    scores = CandidateScorer(model, packed=False)(packed())
    torch.testing.assert_close(scores, truth, rtol=1e-10, atol=1e-10)
    if name != "backward_hook":  # it has two gradients where autograd expects one
        assert_equal_gradients(model, scores, truth, 1e-6)
    means = CandidateScorer(model, packed=False, average=True)(packed())
    torch.testing.assert_close(means, truth / packed().title_lengths)


def assert_right_alone(model: nn.Module) -> None:
    """With packed=False, scores are those of the model's own forward."""
    with torch.no_grad():
        truth = plain_logps(model, *ragged_batch())
        scores = CandidateScorer(model, packed=False)(packed())
    torch.testing.assert_close(scores, truth, rtol=1e-10, atol=1e-10)


def test_a_forward_of_the_model_alone_is_seen() -> None:
    model = own_forward()
    with pytest.raises(ValueError, match=r"own_forward.*cool as forward of LlamaForCausalLM scores random"):
        CandidateScorer(model)(packed())
    assert_right_alone(model)


def test_code_for_training_alone_is_seen() -> None:
    with pytest.raises(ValueError, match="CoolInTraining scores random titles"):
        CandidateScorer(of_class(CoolInTraining).train())(packed())


@pytest.mark.parametrize("alone", [False, True])
def test_hooks_on_the_whole_model_are_refused(alone: bool) -> None:
    """They are given log-probabilities where they expect a model's output."""
    model = tiny_model("llama")

    def cool(module: nn.Module, inputs: Any, output: Any) -> Any:
        if hasattr(output, "logits"):
            output.logits = output.logits / 2
        return output

    model.register_forward_hook(cool)
    with pytest.raises(ValueError, match=r"with hook .*cool scores random titles .*; take off what is put around"):
        CandidateScorer(model, packed=not alone)(packed())


def test_a_hook_that_cannot_be_compared_gives_one_line() -> None:
    model = tiny_model("llama")
    model.register_forward_hook(lambda module, inputs, output: output.logits)
    with pytest.raises(
        ValueError, match=r"^model: LlamaForCausalLM with hook .* cannot be compared .*take off what is put around"
    ):
        CandidateScorer(model)(packed())


@pytest.mark.parametrize("make", [own_forward, lambda: with_head(Cosine), accelerated], ids=["forward", "head", "hook"])
def test_what_nobody_names_is_found_by_comparison(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("napo.scoring.self_check.foreign_part", lambda model: None)
    model = make()
    with pytest.raises(ValueError, match=r"^model: LlamaForCausalLM scores random titles .*; set packed=False \(of"):
        CandidateScorer(model)(packed())
    assert_right_alone(model)


@pytest.mark.parametrize("alone", [False, True])
def test_code_that_comes_after_the_first_batch_is_seen(alone: bool) -> None:
    model = tiny_model("llama", torch.float64)
    scorer = CandidateScorer(model, packed=not alone)
    with torch.no_grad():
        scorer(packed())
    model.forward = own_forward_of(model)
    if not alone:
        with pytest.raises(ValueError, match="cool as forward of LlamaForCausalLM scores random"):
            scorer(packed())
        return
    cool = model.forward
    for _ in range(2):  # put on, taken off, put on again
        model.forward = cool
        with torch.no_grad():
            torch.testing.assert_close(scorer(packed()), plain_logps(model, *ragged_batch()), rtol=1e-10, atol=1e-10)
        del model.forward
        scorer(packed())


def test_a_head_that_comes_after_the_first_batch_is_seen() -> None:
    model = tiny_model("llama", torch.float64)
    scorer = CandidateScorer(model)
    scorer(packed())
    model.lm_head.__class__ = Cosine
    with pytest.raises(ValueError, match=r"test_foreign\.Cosine at lm_head scores random titles"):
        scorer(packed())


def test_the_model_is_compared_once_in_each_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compared = tiny_model("llama"), []
    monkeypatch.setattr("napo.scoring.scorer.OwnForward", lambda *args: compared.append(1) or OwnForward(*args))
    scorer = CandidateScorer(model)
    for training in (True, False, True, False):
        scorer.model.train(training)
        scorer(packed())
    assert len(compared) == 2


def test_hooks_that_only_look_are_no_reason() -> None:
    model, seen = tiny_model("llama", torch.float64), []
    truth = plain_logps(model, *ragged_batch())
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    for alone in (False, True):
        scores = CandidateScorer(model, packed=not alone)(packed())
        torch.testing.assert_close(scores, truth, rtol=1e-10, atol=1e-10)
    assert seen


def test_weights_that_are_no_numbers_are_found_elsewhere() -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(float("nan"))
    assert CandidateScorer(model)(packed()).isnan().all()


def test_offloaded_weights_are_refused() -> None:
    model = tiny_model("llama")
    spread = tiny_model("llama")
    spread.hf_device_map = {"model": 0, "lm_head": "cpu"}
    cpu_offload(model, execution_device="cpu")
    for packs in (True, False):
        with pytest.raises(
            ValueError, match=r"^model: expected all weights on one device, got weights that accelerate"
        ):
            CandidateScorer(model, packed=packs)
        with pytest.raises(ValueError, match=r"^model: expected all weights on one device, got layers on 0, cpu; load"):
            CandidateScorer(spread, packed=packs)


@pytest.mark.parametrize("way", ["model", "in_place", "body", "handed_on"])
def test_a_body_that_is_compiled_or_hands_on_its_arguments_packs(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama").eval()
    with torch.no_grad():
        truth = plain_logps(model, *ragged_batch())
    scored = model
    if way == "model":
        scored = torch.compile(model, backend="eager")
    elif way == "in_place":
        model.compile(backend="eager")
    elif way == "body":
        model.model = torch.compile(model.model, backend="eager")
    else:
        own = LlamaModel.forward
        monkeypatch.setattr(LlamaModel, "forward", lambda self, *args, **kwargs: own(self, *args, **kwargs))
    with torch.no_grad():
        torch.testing.assert_close(CandidateScorer(scored)(packed()), truth, rtol=1e-4, atol=1e-4)


def blind_attention() -> Any:
    """An attention layer that sees the whole row, whatever the mask says."""
    model = tiny_model("llama")
    layer = model.model.layers[1].self_attn
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **{**kwargs, "attention_mask": None})
    return model


def test_a_body_that_mixes_titles_is_refused() -> None:
    with pytest.raises(ValueError, match=r"as forward of LlamaAttention at model\.layers\.1\.self_attn scores random"):
        CandidateScorer(blind_attention())(packed())


def test_a_body_that_keeps_titles_apart_is_believed() -> None:
    model = tiny_model("llama", torch.float64)
    model.model.layers[1].mlp.register_forward_hook(halved)
    assert foreign_part(model) == "hook test_foreign.halved at model.layers.1.mlp"
    truth = plain_logps(model, *ragged_batch())
    scores = CandidateScorer(model)(packed())
    torch.testing.assert_close(scores, truth, rtol=1e-10, atol=1e-10)
    assert_equal_gradients(model, scores, truth, 1e-6)


def test_the_catalogue_scorer_is_protected_too() -> None:
    trie = Trie.of([[4, 5, 2], [4, 6, 2], [7, 2]])
    batch = pack_items([[9, 8]], [[0, 1, 2]], trie, pad_id=0)
    for name in ("class", "head_hook", "linear_head", "other_head"):
        make, message = FOREIGN[name]
        with pytest.raises(ValueError, match=message):
            CatalogueScorer(make())(batch)


def test_what_rounds_to_half_precision_is_compared_as_that() -> None:
    assert not _is_rough(tiny_model("llama")) and not _is_rough(tiny_model("llama", torch.float64))
    assert _is_rough(tiny_model("llama", torch.bfloat16))
    mixed = tiny_model("llama")
    mixed.model.layers[1].to(torch.bfloat16)  # and the embeddings, whose dtype is the model's, are not
    assert mixed.dtype == torch.float32 and _is_rough(mixed)
    prepared = tiny_model("llama")
    prepared._original_forward = prepared.forward
    assert _is_rough(prepared)
    with torch.autocast("cpu", torch.bfloat16):
        assert _is_rough(tiny_model("llama"))
    torch.set_float32_matmul_precision("high")
    try:
        assert _is_rough(tiny_model("llama"))
    finally:
        torch.set_float32_matmul_precision("highest")


# ---- what is known --------------------------------------------------------------------------------------------------


def test_hooks_that_move_tensors_are_no_reason() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        expected = CandidateScorer(model)(packed())
        add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        add_hook_to_module(model.model.layers[0], AlignDevicesHook(execution_device="cpu"))
        assert foreign_part(model) is None
        assert torch.equal(CandidateScorer(model)(packed()), expected)


def test_adapters_and_fused_layers_are_known() -> None:
    model = lora_model(targets=["q_proj", "v_proj", "o_proj", "gate_proj", "lm_head"], dtype=torch.float32)
    fuse(model)
    model.enable_input_require_grads()
    assert any("forward" in vars(module) for module in model.modules())
    assert foreign_part(model) is None
    compiled = torch.compile(tiny_model("llama"), backend="eager")
    assert foreign_part(compiled) is None


def test_layers_that_fsdp_made_are_known(tmp_path: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with torch.no_grad():
            expected = CandidateScorer(tiny_model("llama"))(packed())
        model = tiny_model("llama")
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model.lm_head, model):
            fully_shard(part, mesh=mesh)
        assert foreign_part(model) is None
        scorer = CandidateScorer(model)
        scores = scorer(packed())
        torch.testing.assert_close(scores.detach(), expected)
    finally:
        torch.distributed.destroy_process_group()


# ---- adapters on the head that are no plain LoRA --------------------------------------------------------------------


def dora() -> Any:
    return lora_model(targets=["lm_head"], use_dora=True)


def adalora() -> Any:
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["lm_head"])
    return get_peft_model(tiny_model("llama", torch.float64), config)


def ia3() -> Any:
    return get_peft_model(
        tiny_model("llama", torch.float64), IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    )


def two_adapters() -> Any:
    model = lora_model(targets=["lm_head"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (dora, "expected plain LoRA on the output head"),
        (adalora, r"expected LoRA or nothing on the output head, got peft\.tuners\.adalora\.layer\.SVDLinear"),
        (ia3, r"expected LoRA or nothing on the output head, got peft\.tuners\.ia3"),
        (two_adapters, "expected one active adapter on the output head, got default, other"),
    ],
)
def test_other_adapters_on_the_head_are_refused_and_scored_alone(make: Any, message: str) -> None:
    model = make()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double() + 0.2 * torch.randn_like(parameter, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"^model: {message}.*set packed=False"):
        CandidateScorer(model)(packed())
    assert_right_alone(model)
