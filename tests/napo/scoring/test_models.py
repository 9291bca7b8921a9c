"""The scorer through adapters, wrappers and checkpointing; what it refuses, and what it scores the slow way."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig, AdaptionPromptConfig, LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from test_equality import gradients, plain_logps, ragged_batch
from tiny_models import VOCAB, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from napo.scoring import CandidateScorer, pack


def packed(rows=60):
    prompts, titles = ragged_batch()
    return pack(prompts, titles, pad_id=0, row_tokens=rows)


def lora_model(name="llama", dtype=torch.float64, targets=("q_proj", "v_proj"), **options):
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(name, dtype), LoraConfig(r=4, target_modules=list(targets), **options))
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = torch.randn_like(parameter, dtype=dtype) * 0.3
    return model


def assert_equals_plain(model, tolerance=1e-10, grad_tolerance=1e-6):
    prompts, titles = ragged_batch()
    truth = plain_logps(model, prompts, titles)
    expected = gradients(model, truth)
    scores = CandidateScorer(model)(packed())
    torch.testing.assert_close(scores, truth, rtol=tolerance, atol=tolerance)
    got = gradients(model, scores)
    assert got.keys() == expected.keys() and got
    for key, grad in got.items():
        allowed = grad_tolerance * expected[key].abs().max().clamp_min(1)
        torch.testing.assert_close(grad, expected[key], rtol=0, atol=allowed.item())


@pytest.mark.parametrize(
    "name, targets, options",
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"], {}),
        ("llama", ["q_proj", "lm_head"], {"lora_alpha": 3}),
        ("gemma3", ["q_proj", "lm_head"], {}),
        ("gpt2", ["c_attn"], {"fan_in_fan_out": True}),
        ("llama", ["q_proj"], {"modules_to_save": ["lm_head"]}),
    ],
    ids=["body", "head", "tied_head", "gpt2", "saved_head"],
)
def test_peft(name, targets, options):
    assert_equals_plain(lora_model(name, targets=targets, **options))


def test_disabled_and_merged_adapters():
    model = lora_model(targets=["q_proj", "lm_head"])
    prompts, titles = ragged_batch()
    with torch.no_grad():
        with model.disable_adapter():
            truth = plain_logps(model, prompts, titles)
            torch.testing.assert_close(CandidateScorer(model)(packed()), truth, rtol=1e-10, atol=1e-10)
        adapted = plain_logps(model, prompts, titles)
        assert not torch.allclose(adapted, truth, rtol=1e-3)
        model.merge_adapter()
        torch.testing.assert_close(CandidateScorer(model)(packed()), adapted, rtol=1e-9, atol=1e-9)


def four_bit_model(tmp_path, **options):
    """LoRA on a base in NF4, which bitsandbytes computes on the CPU too."""
    pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 16}  # blocks are of 64
    tiny_model("llama", **shape).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
    )
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    return model


def test_four_bit_base(tmp_path):
    model = four_bit_model(tmp_path)
    assert model.base_model.model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert_equals_plain(model, 1e-4, 1e-4)


def test_a_four_bit_head_is_refused(tmp_path):
    model = four_bit_model(tmp_path, llm_int8_skip_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"output head in floating point, got torch\.uint8; leave it out"):
        CandidateScorer(model)(packed())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = lora_model()
    scores = CandidateScorer(model)(packed())
    expected = gradients(model, scores)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    got = gradients(model, CandidateScorer(model)(packed()))
    for key, grad in got.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-9)


def test_average_is_the_mean_over_a_titles_tokens():
    model, titles = tiny_model("llama"), ragged_batch()[1]
    lengths = torch.tensor([len(title) for group in titles for title in group])
    with torch.no_grad():
        total = CandidateScorer(model)(packed())
        mean = CandidateScorer(model, average=True)(packed())
    torch.testing.assert_close(mean, total / lengths)


@pytest.mark.parametrize("name", ["llama", "qwen2_sliding", "gemma3"])
def test_eager_attention(name):
    model = tiny_model(name)
    with torch.no_grad():
        sdpa = CandidateScorer(model)(packed())
        model.set_attn_implementation("eager")
        torch.testing.assert_close(CandidateScorer(model)(packed()), sdpa, rtol=1e-5, atol=1e-5)


def test_ddp_synchronises_the_gradients(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = lora_model()
        expected = gradients(model, CandidateScorer(model)(packed()))
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        buckets = []

        def count(state, bucket):
            buckets.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, count)
        got = gradients(model, CandidateScorer(wrapped)(packed()))
        assert buckets, "the backward did not go through DDP"
        for key, grad in got.items():
            torch.testing.assert_close(grad, expected[key])
    finally:
        torch.distributed.destroy_process_group()


def test_autocast_that_accelerate_put_around_the_forward():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    model = tiny_model("llama")
    AcceleratorState._reset_state()  # of a test before this one, with another precision
    PartialState._reset_state()
    try:
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
        forward = vars(model)["forward"]
        with torch.no_grad():
            scores = CandidateScorer(prepared)(packed())
            with torch.autocast("cpu", torch.bfloat16):
                expected = CandidateScorer(tiny_model("llama"))(packed())
        assert torch.equal(scores, expected)
        assert vars(model)["forward"] is forward
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()


def test_the_forward_comes_back_after_an_error():
    model = tiny_model("llama")
    batch = packed()
    broken = batch.to("cpu")
    broken.input_ids[0, 0] = VOCAB + 5
    with pytest.raises(IndexError):
        CandidateScorer(model)(broken)
    assert "forward" not in vars(model)


def mamba():
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **shape))


def test_state_space_models_are_refused_and_scored_alone():
    with pytest.raises(ValueError, match=r"MambaForCausalLM has layers with .*, which carry one title into the next"):
        CandidateScorer(mamba())
    model, (prompts, titles) = mamba(), ragged_batch()
    with torch.no_grad():
        truth = plain_logps(model, prompts, titles)
        torch.testing.assert_close(CandidateScorer(model, packed=False)(packed()), truth, rtol=1e-4, atol=1e-4)


def bloom():
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "n_head": 2, "n_layer": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **shape))


def flash():
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    return model


def dropped_head():
    return lora_model(targets=["lm_head"], lora_dropout=0.1).train()


def virtual_tokens():
    return get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))


def singular_values():
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["lm_head"])
    return get_peft_model(tiny_model("llama"), config)


def prompts_in_attention():
    config = AdaptionPromptConfig(task_type=TaskType.CAUSAL_LM, adapter_len=2, adapter_layers=2)
    return get_peft_model(tiny_model("llama"), config)


def begins_where_invoked():
    return lora_model(alora_invocation_tokens=[3, 4])


@pytest.mark.parametrize(
    "make, message",
    [
        (bloom, "BloomForCausalLM takes no position ids"),
        (flash, "LlamaForCausalLM runs attention as 'flash_attention_2'"),
        (dropped_head, "expected no dropout on the output head's LoRA, got 0.1"),
        (virtual_tokens, "virtual tokens"),
        (singular_values, r"expected LoRA or nothing on the output head, got peft\.tuners\.adalora\.layer\.SVDLinear"),
        (prompts_in_attention, "expected LoRA-like adapters, got AdaptionPrompt"),
        (begins_where_invoked, "expected LoRA-like adapters, got aLoRA, .*; make the adapter without them"),
        (lambda: tiny_model("llama").model, "LlamaModel has no language-model head"),
        (lambda: torch.nn.Linear(2, 2), "expected a causal LM of transformers, got Linear"),
    ],
    ids=[
        "bloom",
        "flash",
        "head_dropout",
        "prompt_tuning",
        "adalora",
        "adaption_prompt",
        "alora",
        "headless",
        "linear",
    ],
)
def test_refusals_say_why(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        CandidateScorer(model)(packed())


def test_an_unknown_architecture_must_agree_with_its_own_forward(monkeypatch):
    model = tiny_model("granite")
    monkeypatch.setattr(model.config, "logits_scaling", 1.0)  # what we read; the forward is made to use another
    own = type(model).forward

    def scaled(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.logits = output.logits * 3
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(ValueError, match=r"GraniteForCausalLM with .*scaled as .*forward scores random titles"):
        CandidateScorer(model)(packed())


def test_an_unknown_architecture_that_agrees_also_gives_averages():
    model, batch = tiny_model("granite"), packed()
    average = CandidateScorer(model, average=True)(batch)
    torch.testing.assert_close(average, CandidateScorer(model)(batch) / batch.title_lengths)
