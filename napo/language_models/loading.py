"""Causal language models with LoRA: loading, the dtype they compute in, saving."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from napo.assets import cannot_load, resolve_model
from napo.data.texts import shown
from napo.language_models.cpu import bf16_is_fast
from napo.language_models.fused.fuse import fuse
from napo.language_models.options import LoraOptions

LARGEST_ALPHA = 1e6
"""Of an adapter: scores would overflow with more."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compute_dtype(wanted: str = "auto", device: str | torch.device = "cpu") -> torch.dtype:
    """The dtype that matmuls run in: the one asked for, or what is fastest on the device.

    On a CPU bf16 pays where matmuls have instructions for it at full rate (``bf16_is_fast``). The environment variable
    ``NAPO_DTYPE`` stands in for "auto": only in fp32 do figures of two kinds of machine compare closely.
    """
    name = "dtype"
    if wanted == "auto":
        name, wanted = "NAPO_DTYPE", os.environ.get("NAPO_DTYPE") or "auto"
    if wanted != "auto":
        if wanted not in DTYPES:
            raise ValueError(f"{name}: expected one of auto, {', '.join(DTYPES)}; got {wanted!r}")
        return DTYPES[wanted]
    kind = torch.device(device).type
    if kind == "cpu":
        return torch.bfloat16 if bf16_is_fast() else torch.float32
    return torch.bfloat16


def autocast(model: torch.nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The context to run ``model`` in: autocast to the base's dtype where the adapter's master weights are fp32."""
    parameter = next(model.parameters())
    if parameter.dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(parameter.device.type, parameter.dtype)


def most_positions(model: Any) -> int | None:
    """How many tokens the model has positions for, where it has a limit."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def vocabulary_size(model: Any) -> int:
    """How many tokens the model has embeddings for."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is not None and weight.ndim == 2 and len(weight):
        return len(weight)
    return int(model.config.get_text_config().vocab_size)  # sharded or packed in another shape


def pad_id(tokenizer: Any, model: Any) -> int:
    """Any id that the model has an embedding for will do: nothing attends to padding. A tokenizer may know none, or one
    that was added to it and not to the model."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in known if i is not None and i < vocabulary_size(model)), 0)


def leave_out_auxiliary_loss(model: Any) -> str | None:
    """What to say of a model of experts, whose loss that keeps them in balance is a part of transformers' own loss,
    which is not computed here."""
    config = model.config.get_text_config()
    share = getattr(config, "router_aux_loss_coef", None)
    if not share:
        return None
    config.output_router_logits = False
    return f"model: the loss that keeps its experts in balance (router_aux_loss_coef {share:g}) is left out"


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token."""
    with _found(name):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    adapter: str | Path | None = None,
    lora: LoraOptions | None = None,
    trainable: bool = False,
    seed: int = 0,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer.

    ``name``: the asset ``smollm2-135m``, a local folder, or a name on the hub. ``adapter``: a folder of a saved PEFT
    adapter, ``trainable`` or not; ``lora`` instead begins a new one, drawn from ``seed``. The base stays frozen in
    ``dtype``; adapters are fp32 master weights, cast for the matmuls (bf16 weights stand still at small rates).
    Raises FileNotFoundError for what cannot be found, ValueError for what is not a causal LM or not an adapter of it.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    computes_in = compute_dtype(dtype, device)
    source = resolve_model(name)
    tokenizer = load_tokenizer(name)
    try:
        with _found(name):
            config = AutoConfig.from_pretrained(source)
            architectures = config.architectures or []
            if architectures and not any("CausalLM" in a or "LMHead" in a for a in architectures):
                raise ValueError(f"its config.json names {', '.join(architectures)}")
            base = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=computes_in)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model: {name} has no causal language-model head ({reason}); give a decoder model") from None
    base.to(device)  # type: ignore[arg-type]
    base.config.use_cache = False
    if adapter is not None:
        return put_on(base, Path(adapter), trainable=trainable), tokenizer
    if lora is not None:
        model = get_peft_model(base, _lora_config(base, lora, seed))
        fuse(model)
        return model, tokenizer  # type: ignore[return-value]
    return _ready(base, trainable), tokenizer


def put_on(base: PreTrainedModel, adapter: Path, *, trainable: bool = False) -> PeftModel:
    """``base`` with a saved adapter. The base becomes a part of what is returned, until its ``unload``."""
    return _ready(_with_adapter(base, adapter, trainable), trainable)


M = TypeVar("M", bound=torch.nn.Module)


def _ready(model: M, trainable: bool) -> M:
    fuse(model)
    return model if trainable else model.requires_grad_(False).eval()


@contextlib.contextmanager
def _found(name: str | Path) -> Iterator[None]:
    """transformers names a missing file, an unknown repository and an unreachable hub each in a page of its own."""
    try:
        yield
    except OSError as error:
        raise cannot_load(name, error) from None


def _with_adapter(base: PreTrainedModel, adapter: Path, trainable: bool) -> PeftModel:
    """PEFT itself takes an adapter with tensors missing, left over or not finite, and says nothing."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise ValueError(f"adapter: {adapter} has no {name}; expected a folder that napo sft or train wrote")
    file = adapter / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"adapter: {file} cannot be read ({reason}); train it again") from None
    if not tensors:
        raise ValueError(f"adapter: {file}: every tensor is missing; train it again")
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            raise ValueError(
                f"adapter: {file}: {shown(name)} has dtype {tensor.dtype}; expected floats; train it again"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"adapter: {file}: {shown(name)} holds numbers that are not finite; train it again")
    most = max((tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name and tensor.dim()), default=0)
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"peft_type is {config.peft_type}; expected LORA")
        # Before memory is taken for what the settings say.
        for rank in (config.r, *(config.rank_pattern or {}).values()):
            if type(rank) is not int or not 0 < rank <= most:
                raise ValueError(f"rank {shown(rank, 40)}; expected up to {most}, what its tensors have")
        for value in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
            if type(value) not in (int, float) or not 0 < value < LARGEST_ALPHA:
                raise ValueError(f"lora_alpha {shown(value, 40)}; expected a number above 0")
        for name in ("layer_replication", "megatron_config"):  # layers without end; a module that is imported by name
            if getattr(config, name) is not None:
                raise ValueError(f"{name} is not supported")
        config.inference_mode = not trainable
        config.init_lora_weights = True  # all of it is overwritten below
        config.base_model_name_or_path = None
        model = get_peft_model(base, config)
        expected = get_peft_model_state_dict(model)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, re.error) as error:
        reason = shown(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        raise ValueError(f"adapter: {adapter / 'adapter_config.json'} does not fit the model ({reason})") from None
    for name in sorted(expected.keys() | tensors.keys()):
        have, want = tensors.get(name), expected.get(name)
        if have is None:
            raise ValueError(f"adapter: {file}: {name} is missing; train it again")
        if want is None:
            raise ValueError(f"adapter: {file}: {shown(name)} belongs to no layer of this model; is it another base?")
        if have.shape != want.shape:
            raise ValueError(
                f"adapter: {file}: {name} has shape {tuple(have.shape)}; expected {tuple(want.shape)} for this model"
            )
    set_peft_model_state_dict(model, tensors)
    return model  # type: ignore[return-value]


def _lora_config(base: PreTrainedModel, options: LoraOptions, seed: int) -> LoraConfig:
    torch.manual_seed(seed)  # A is drawn when the adapter is made
    layers = pattern = None
    targets: str | list[str] = options.targets if isinstance(options.targets, str) else list(options.targets)
    if options.top_layers is not None:
        total = base.config.num_hidden_layers
        if not 0 < options.top_layers <= total:
            raise ValueError(f"top_layers: expected 1..{total} for this model, got {options.top_layers}")
        named = dict(base.named_modules())
        lists = (name for name, of in named.items() if isinstance(of, torch.nn.ModuleList) and len(of) == total)
        stack = next(lists, None)
        if stack is None:
            raise ValueError(
                f"top_layers: {type(base).__name__} has no list of its {total} layers; leave top_layers out"
            )
        layers, pattern = list(range(total - options.top_layers, total)), stack.rsplit(".", 1)[-1]
        if targets == "all-linear":  # PEFT takes a choice of layers only with names
            linear = (name for name, module in named.items() if isinstance(module, (torch.nn.Linear, Conv1D)))
            targets = sorted({name.rsplit(".", 1)[-1] for name in linear if name.startswith(f"{stack}.")})
    return LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        layers_to_transform=layers,
        layers_pattern=pattern,
        task_type="CAUSAL_LM",
    )
