"""The trainer refuses arguments that do not go together, and checkpoints of another run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from napo.catalogue import Trie
from napo.files import read_json
from napo.objectives import Objective
from napo.scoring.rope import border_of, check_length
from napo.scoring.scorer import check_packable, check_placed
from napo.trainer.config import NAPOConfig
from napo.trainer.problems import show
from napo.trainer.references import adapter_layers
from napo.trainer.rows import Examples

logger = logging.getLogger(__name__)

RUN_FILE = "preference_run.json"  # beside the optimiser's state


def check_has_no_adapter(model: nn.Module) -> None:
    """PEFT would replace the first adapter by the new one, or train and save a mixture of both."""
    if adapter_layers(model):
        names = ", ".join(getattr(model, "peft_config", {"default": None}))
        raise ValueError(
            f"peft_config: expected a model without an adapter, got one with {names}; leave peft_config out to train "
            "that one (load it with is_trainable=True), or give model.merge_and_unload() to train a new one on top"
        )


def check_config(args: Any, model: Any, ref_model: Any) -> None:
    if not isinstance(args, NAPOConfig):
        raise ValueError(f"args: expected a NAPOConfig, got {type(args).__name__}; NAPOConfig takes the same options")
    if args.model_init_kwargs is not None and not isinstance(model, str) and not isinstance(ref_model, str):
        raise ValueError(
            f"model_init_kwargs: expected None with a model that is loaded, got {args.model_init_kwargs!r}; load the "
            "model with them, or give its name"
        )
    if ref_model is not None and ref_model is model and not isinstance(model, str):
        raise ValueError(
            "ref_model: expected another model than the one that trains, got the same; leave it out: the reference is "
            "then the model as it stands at the start"
        )


def item_numbers(vectors: Any, bias: Any, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """``item_vectors`` and ``item_bias`` as float32 on the device, as the users' states are."""
    if vectors is None:
        if bias is not None:
            raise ValueError("item_bias: expected None without item_vectors, to whose scores it belongs; leave it out")
        return None, None
    vectors = torch.as_tensor(vectors).detach().to(device, torch.float32)
    if vectors.ndim != 2:
        raise ValueError(f"item_vectors: expected (items, D), got {tuple(vectors.shape)}")
    if bias is not None:
        bias = torch.as_tensor(bias).detach().to(device, torch.float32)
        if bias.shape != vectors.shape[:1]:
            raise ValueError(f"item_bias: expected ({len(vectors)},), a number an item; got {tuple(bias.shape)}")
    for name, numbers in (("item_vectors", vectors), ("item_bias", bias)):
        if numbers is not None and not torch.isfinite(numbers).all():
            raise ValueError(f"{name}: expected finite numbers, got some that are not")
    return vectors, bias


def check_states(name: str, examples: Examples, item_vectors: Tensor | None) -> None:
    """``examples``: encoded rows, whose states are as long as one another."""
    state = None if item_vectors is None or not len(examples) else examples[0].state
    if state is not None and item_vectors is not None and len(state) != item_vectors.shape[1]:
        raise ValueError(
            f"item_vectors: expected (items, {len(state)}), as many columns as user_state of {name} has numbers, got "
            f"{tuple(item_vectors.shape)}; take both from one recommender"
        )


def check_titles(name: str, examples: Examples, trie: Trie) -> None:
    """With a trie the loss is computed from item ids: a row's texts must be the titles of these items."""
    for example in examples.examples:
        for place, (item, answer) in enumerate(
            zip((example.chosen_id, *example.rejected_ids.tolist()), example.answers, strict=True)
        ):
            if trie.title(item) != answer:
                field = "chosen" if place == 0 else f"rejected[{place - 1}]"
                raise ValueError(
                    f"{name}[{example.row}].{field}: expected the title of item {item}, whose tokens in the trie are "
                    f"{show(trie.title(item))}, got {show(answer)}; give rows and trie of one catalogue"
                )


def check_reference(ref_model: Any, objective: Objective, args: NAPOConfig) -> None:
    if ref_model is None:
        return
    if not objective.reference:
        raise ValueError(
            f"ref_model: objective {objective.name!r} has no reference; leave it out, or choose one that has, "
            "as objective='sdpo' or 'dpo'"
        )
    if args.precompute_ref_log_probs is False:
        raise ValueError(
            "precompute_ref_log_probs: expected None or True with ref_model, whose log-probabilities are computed "
            "once, got False"
        )


def check_pairs_and_trie(args: NAPOConfig, trie: Trie | None, item_vectors: Any, *, by_pair: bool) -> None:
    if item_vectors is not None and not by_pair:
        raise ValueError(
            "item_vectors: expected None, since the margin is computed from rejected_scores or is constant; leave them "
            "out, or choose objective 'napo' with granularity='pair'"
        )
    if by_pair and item_vectors is None:
        raise ValueError("item_vectors: granularity 'pair' needs the recommender's item vectors (items, D), got None")
    if trie is not None and not args.packed:
        raise ValueError("packed: titles of a trie are scored packed, got packed=False; leave out one of the two")


def known_items(trie: Trie | None, item_vectors: Tensor | np.ndarray | None) -> int | None:
    """The number that item ids must be below; None if any ids will do."""
    if trie is not None and item_vectors is not None and len(item_vectors) != trie.num_items:
        raise ValueError(
            f"item_vectors: expected a row for each of the {trie.num_items} items of the trie, got {len(item_vectors)}"
        )
    return trie.num_items if trie is not None else None if item_vectors is None else len(item_vectors)


def check_distribution(
    args: NAPOConfig, objective: Objective, *, even_batches: bool, fresh_adapter: bool, precomputes: bool
) -> None:
    """Check what several processes, and borrowed answers, need. ``fresh_adapter``: switching the adapter off gives the
    reference. ``precomputes``: the reference's log-probabilities are computed before training."""
    if args.world_size > 1 and not even_batches:
        raise ValueError("accelerator_config.even_batches: expected True, so that all ranks bring as many users")
    if getattr(args.accelerator_config, "dispatch_batches", False):
        raise ValueError(
            "accelerator_config.dispatch_batches: expected None or False, since each rank reads its own rows, got True"
        )
    if args.n_gpu > 1:
        raise ValueError(f"nn.DataParallel over {args.n_gpu} GPUs is not supported; start with torchrun")
    if args.exact and args.world_size > 1 and args.pool_ranks:
        raise ValueError("pool_ranks: expected False with exact, whose pool is one rank's micro-batch")
    if objective.reference and args.precompute_ref_log_probs is False and not fresh_adapter:
        raise ValueError(
            f"precompute_ref_log_probs: the reference of {objective.name} is the model as it stands, which "
            "switching its adapter off does not give (there is none, it was trained before, or other parameters "
            "train too); expected None or True"
        )
    if args.exact and precomputes:
        raise ValueError("exact: borrowed answers have no precomputed reference; use a fresh adapter or exact=False")


def check_trains(model: nn.Module) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            "model: expected parameters that train, got none; load an adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True), or give peft_config"
        )
    short = [parameter for parameter in trained if parameter.dtype in (torch.bfloat16, torch.float16)]
    if short:
        logger.warning(
            "model: %d of %d parameter tensors that train are in %s, where small updates round to nothing; load the "
            "model with dtype=torch.float32 (bf16=True computes in bf16 all the same)",
            len(short),
            len(trained),
            str(short[0].dtype).removeprefix("torch."),
        )


def check_models(args: NAPOConfig, models: list[PreTrainedModel]) -> None:
    """``models``: the one that trains, and its reference where there is one."""
    for model in models:
        check_placed(model)
        if args.packed:
            check_packable(model)
    # transformers adds the loss that keeps experts in balance within its own loss, which is not computed here.
    config: Any = models[0].config.get_text_config()
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 1.0):
        raise ValueError(
            "model: expected output_router_logits=False, since the loss that keeps experts in balance is left out "
            "here, got True; set model.config.output_router_logits = False to train without it"
        )


def check_lengths(model: PreTrainedModel, args: NAPOConfig, longest: int | None, *parts: Any) -> None:
    """Refuse data sets with rows that the model turns by what is beside them, before the first step and not at theirs.
    ``longest``: the tokens that a row is shortened to."""
    border = border_of(model)
    if border is None:
        return
    for part in parts:
        for examples in part.values() if isinstance(part, dict) else [part]:
            if isinstance(examples, Examples):
                most = max((example.length for example in examples.examples), default=1)
                # The last token is a target and no input.
                check_length(border, min(most, longest or most) - 1, packed=args.packed)


def check_checkpoint(checkpoint: Path, settings: dict[str, Any], weights: str | None, objective: str) -> None:
    """A resumed run is the same run: the same loss, from the same reference, with the optimiser's state."""
    if not (checkpoint / RUN_FILE).exists():
        raise ValueError(
            f"resume_from_checkpoint: expected a checkpoint with the optimiser's state and {RUN_FILE}, got "
            f"{checkpoint}, which save_only_model or another trainer has written; start a run with it as the model"
        )
    saved = read_json(checkpoint / RUN_FILE)
    for name, ours in settings.items():
        theirs = saved["loss"].get(name)
        if theirs != ours:
            raise ValueError(
                f"{name}: expected {theirs!r}, with which the run of {checkpoint} began, got {ours!r}; resume with "
                "the same options, or start a run with it as the model"
            )
    if saved["weights"] != weights:
        raise ValueError(
            f"model: expected the weights that the run of {checkpoint} began with, which are the reference of "
            f"{objective}, got others; resume with the model and adapter that it was started with"
        )
