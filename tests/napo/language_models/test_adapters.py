"""Adapters come from folders that anybody may have written: what PEFT fills in or lets through is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from napo.files import read_json, write_json
from napo.language_models.loading import load_model
from napo.language_models.options import LoraOptions


@pytest.fixture
def adapter(small_world: Path, tmp_path: Path) -> Path:
    model, _ = load_model(small_world / "model", lora=LoraOptions(r=2), trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_a_whole_adapter_loads_as_it_was_saved(small_world: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    for trainable in (False, True):
        model, _ = load_model(small_world / "model", adapter=adapter, trainable=trainable)
        own = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
        assert own.keys() == tensors.keys()
        assert all(torch.equal(own[name], tensors[name]) for name in own)
        assert {p.requires_grad for p in own.values()} == {trainable} and {p.dtype for p in own.values()} == {
            torch.float32
        }
        assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)


def test_tensors_that_do_not_belong_are_refused(small_world: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    nan, infinite = tensors[first].clone(), tensors[first].clone()
    nan[0, 0], infinite[-1, -1] = float("nan"), float("inf")
    rest = {name: tensor for name, tensor in tensors.items() if name != first}
    cases = {
        "holds numbers that are not finite": ({**tensors, first: nan}, {**tensors, first: infinite}),
        "is missing; train it again": (rest, {}),
        "belongs to no layer of this model": ({**tensors, "x\x1b[2J": nan.nan_to_num()},),
        r"has shape \(3, 32\); expected \(2, 64\)": ({**tensors, first: torch.zeros(3, 32)},),
    }
    for pattern, variants in cases.items():
        for variant in variants:
            save_file(variant, file)
            with pytest.raises(ValueError, match=pattern) as caught:
                load_model(small_world / "model", adapter=adapter)
            assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_files_that_are_no_adapter_are_refused(small_world: Path, adapter: Path, tmp_path: Path) -> None:
    file, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole, config = file.read_bytes(), read_json(settings)
    file.write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"cannot be read .*; train it again"):
        load_model(small_world / "model", adapter=adapter)
    file.unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        load_model(small_world / "model", adapter=adapter)
    file.write_bytes(whole)
    for change in (
        {"peft_type": "IA3"},
        {"peft_type": "nothing"},
        {"target_modules": ["none"]},
        {"r": -1},
        {"r": "two"},
    ):
        write_json(settings, config | change)
        with pytest.raises(ValueError, match=r"adapter_config\.json does not fit the model"):
            load_model(small_world / "model", adapter=adapter)
    settings.write_text("[]")
    with pytest.raises(ValueError, match="adapter_config"):
        load_model(small_world / "model", adapter=adapter)
