"""The reference: what switching an adapter off gives, or log-probabilities computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from napo.files import replacing, text_hash
from napo.progress import progress
from napo.scoring.scorer import causal_lm_of
from napo.signals import stop_if_asked
from napo.trainer.collator import Collator, PreferenceBatch
from napo.trainer.rows import Examples

logger = logging.getLogger(__name__)


def reference_logps(
    model: nn.Module,
    examples: Examples,
    collate: Collator,
    *,
    score: Callable[[PreferenceBatch], Tensor],
    average: bool,
    batch_size: int,
    device: torch.device,
    folder: Path,
    weights: str | None = None,
    gone: bool = False,
    computed: str = "",
) -> list[np.ndarray] | None:
    """For every example the log-probabilities of its answers under ``model`` as it stands, from the cache in ``folder``
    where that has them for these weights and tokens. Ranks share the work; the first one keeps the cache.

    ``weights``: the reference's fingerprint where it is known. ``gone``: the model is no longer the reference; then
    None if the cache does not have them. ``computed``: what else decides the numbers, such as autocast."""
    # Over a catalogue the other titles matter as well.
    over = "" if collate.trie is None else text_hash(f"{collate.trie.tokens.tolist()} {collate.trie.start.tolist()}")
    collated = f"{collate.max_length} {collate.truncates} {collate.keep_prefix} {average} {over}"
    function = f"{weights or weights_fingerprint(model)} {settings_fingerprint(model)} {computed}"
    key = text_hash(f"{function} {examples.fingerprint()} {collated}")
    path = folder / f"ref_logps-{key[:16]}.npz"
    counts = [len(example.answers) for example in examples.examples]
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    kept: list[np.ndarray | None] = [None]
    if rank == 0 and path.exists():
        with np.load(path) as stored:
            kept = [stored["logps"]]
        logger.info("reference log-probabilities: read from %s", path)
    if ranks > 1:  # all ranks must do the same, also on machines that do not see the folder
        dist.broadcast_object_list(kept, src=0)
    if kept[0] is not None:
        return np.split(kept[0], np.cumsum(counts)[:-1])
    if gone:
        return None

    order = packing_order([example.prompt for example in examples.examples])
    found: dict[int, np.ndarray] = {}
    quiet = rank > 0
    with progress("reference", len(order), unit="rows", quiet=quiet) as bar, torch.no_grad(), in_evaluation(model):
        for start in range(rank * batch_size, len(order), ranks * batch_size):
            stop_if_asked()  # there is nothing yet that could be saved first
            chosen = order[start : start + batch_size]
            batch = collate([examples[i] for i in chosen])["batch"].to(device)
            logps = score(batch).float().cpu().numpy()
            found.update(zip(chosen, np.split(logps, np.cumsum([counts[i] for i in chosen])[:-1]), strict=True))
            bar.advance(min(ranks * batch_size, len(order) - start))
    if ranks > 1:
        parts: list[dict[int, np.ndarray]] = [{} for _ in range(ranks)]
        dist.all_gather_object(parts, found)
        found = {i: one for part in parts for i, one in part.items()}
    logps_by_row = [found[i] for i in range(len(examples))]
    if rank == 0:
        with replacing(path) as aside, aside.open("wb") as file:
            np.savez(file, logps=np.concatenate(logps_by_row))
    return logps_by_row


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode that each module had: some may be kept out of training."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def packing_order(prompts: Sequence[list[int]]) -> list[int]:
    """The numbers of the prompts so that they pack into few tokens: one that begins with another comes behind it, as
    the packer computes what they share once; and such chains go by length, which leaves little padding."""
    chains: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda i: prompts[i]):
        last = prompts[chains[-1][-1]] if chains else []
        if last and prompts[index][: len(last)] == last:
            chains[-1].append(index)
        else:
            chains.append([index])
    return [index for chain in sorted(chains, key=lambda chain: len(prompts[chain[-1]])) for index in chain]


_NO_MATTER = frozenset(
    {"use_cache", "_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    | {"pad_token_id", "bos_token_id", "eos_token_id"}
)
"""Settings that training changes, or that say nothing of what a model computes beside its weights."""


def settings_fingerprint(model: nn.Module) -> str:
    """A hash of what a model computes with its weights: its configuration, and that of its adapters."""
    config = causal_lm_of(model).config.to_dict()  # type: ignore[arg-type]
    active = getattr(model, "active_adapters", None)
    facts = [
        {name: value for name, value in config.items() if name not in _NO_MATTER},
        {name: one.to_dict() for name, one in (getattr(model, "peft_config", None) or {}).items()},
        list(active) if isinstance(active, (list, tuple)) else None,
    ]
    return text_hash(json.dumps(facts, sort_keys=True, default=_in_order))


def _in_order(value: Any) -> Any:
    """Sets have no order, and another one in each process."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def weights_fingerprint(model: nn.Module, leave_out: frozenset[int] = frozenset()) -> str:
    """A hash of names and values of all parameters and buffers, except the parameters in ``leave_out`` (``id``)."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) in leave_out:
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).cpu().numpy() if flat.numel() else b"")
    return digest.hexdigest()


def adapter_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers in a model, its adapters' and its copies of whole modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def adapter_parameters(model: nn.Module) -> frozenset[int]:
    """The parameters (``id``) that are not used while PEFT's adapters are switched off."""
    found: set[int] = set()
    for layer in adapter_layers(model):
        for name in layer.adapter_layer_names:
            held: Any = layer
            for part in name.split("."):
                held = getattr(held, part, None)
            if isinstance(held, nn.Module):
                found.update(id(parameter) for parameter in held.parameters())
            elif isinstance(held, nn.Parameter):
                found.add(id(held))
    return frozenset(found)


def is_below_its_adapter(model: nn.Module) -> bool:
    """Whether switching the adapter off gives the model as it stands, now and whatever is trained: the adapter does
    nothing yet, and every parameter that trains belongs to it."""
    if not hasattr(model, "disable_adapter"):  # no PEFT model; transformers' own adapters have no such context
        return False
    layers = adapter_layers(model)
    hidden = adapter_parameters(model)
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return bool(layers) and all(map(_does_nothing, layers)) and all(id(parameter) in hidden for parameter in trains)


def _does_nothing(layer: Any) -> bool:
    if hasattr(layer, "lora_B"):
        second = [*layer.lora_B.parameters(), *layer.lora_embedding_B.parameters()]  # zero until it is trained
        return not any(bool(parameter.detach().any()) for parameter in second)
    if hasattr(layer, "modules_to_save"):
        original = layer.original_module.state_dict()
        return all(_equal(copy.state_dict(), original) for copy in layer.modules_to_save.values())
    if hasattr(layer, "trainable_tokens_delta"):
        return _equal(dict(layer.trainable_tokens_delta), dict(layer.trainable_tokens_original))
    return hasattr(layer, "token_adapter")  # its inner layer is among the layers too


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
