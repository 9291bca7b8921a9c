"""Models whose layers, tokens or losses are not those of a Llama with a tokenizer of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from napo.data.prompts import PromptEncoder
from napo.finetuning.lengths import check_tokens
from napo.language_models.loading import leave_out_auxiliary_loss, load_model, load_tokenizer, pad_id, vocabulary_size
from napo.language_models.options import LoraOptions

SIZE = 320


def saved(kind: str, folder: Path, small_world: Path, **config: object) -> Path:
    """A tiny model of that kind with the small world's tokenizer."""
    shutil.copytree(small_world / "model", folder)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=SIZE, **config)).save_pretrained(folder)
    return folder


def test_top_layers_of_gpt2(small_world: Path, tmp_path: Path) -> None:
    """Its layers are no model.layers, and its linear layers are Conv1D."""
    path = saved("gpt2", tmp_path / "gpt2", small_world, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model, _ = load_model(path, lora=LoraOptions(top_layers=1), trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".h.1." in name for name in trained)
    assert {name.split(".")[-4] for name in trained} == {"c_attn", "c_proj", "c_fc"}


def test_padding_is_a_token_that_the_model_knows() -> None:
    weight = SimpleNamespace(weight=torch.zeros(10, 2))
    model = SimpleNamespace(get_input_embeddings=lambda: weight)
    assert vocabulary_size(model) == 10
    for pad, eos, expected in ((3, 5, 3), (None, 5, 5), (10, 5, 5), (None, None, 0), (12, 11, 0)):
        assert pad_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos), model) == expected


def test_tokens_without_an_embedding_are_an_error(small_world: Path) -> None:
    encoder = PromptEncoder(load_tokenizer(small_world / "model"), ["Blue Red", "Red Blue"], noun="Movies")
    most = max(map(max, (encoder.header, *encoder.lines)))
    check_tokens(encoder, most + 1)
    with pytest.raises(ValueError, match=rf"model: expected embeddings for .*, got {most}, and token {most} in titles"):
        check_tokens(encoder, most)


def test_a_loss_of_experts_that_is_left_out_is_said(small_world: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4}
    path = saved("mixtral", tmp_path / "moe", small_world, output_router_logits=True, **sizes)
    model, _ = load_model(path, lora=LoraOptions(r=2), trainable=True)
    line = "model: the loss that keeps its experts in balance (router_aux_loss_coef 0.001) is left out"
    assert leave_out_auxiliary_loss(model) == line
    assert model.config.output_router_logits is False  # NAPOTrainer refuses the others
    assert leave_out_auxiliary_loss(load_model(small_world / "model")[0]) is None
