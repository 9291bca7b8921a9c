"""CandidateScorer: the log-probability of every title of a packed batch, through the model that DDP or FSDP wraps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from napo.language_models.fused.attention import PACKED
from napo.scoring.attention import IMPLEMENTATIONS, attention_mask
from napo.scoring.foreign import hooks_of
from napo.scoring.graphs import BodyGraphs
from napo.scoring.head import ALONE, is_plain, no_hook, own_weight, read_head, weight_maker
from napo.scoring.packing import PackedBatch, width_multiple
from napo.scoring.rope import border_of, check_length
from napo.scoring.self_check import OwnForward, logits_of
from napo.scoring.unpacking import Alone, unpack
from napo_kernels import linear_sequence_logps, sequence_logps

# Compared with the unpacked computation by our tests.
PROVEN = frozenset({"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "phi"})
ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention"})


class CandidateScorer:
    """Scores the titles of a `PackedBatch` under a causal LM, with gradients for whatever of the model is trainable.

    `model` is a causal LM of transformers: bare, with PEFT adapters, under DDP, FSDP or DeepSpeed up to ZeRO-2. Its
    forward is entered from the outside, so hooks, autocast and gradient synchronisation of the wrappers work; inside,
    the body runs without its head, and the head sees only the positions that predict a title token.
    """

    _unpacks = True  # whether the titles of its batches can be scored alone too

    def __init__(
        self, model: nn.Module, *, average: bool = False, packed: bool = True, cuda_graphs: bool = False
    ) -> None:
        """`average`: mean instead of sum over a title's tokens. `packed=False`: each title in a row of its own behind
        its prompt, the slow way that is exact for every architecture, through the model's own forward unless that is
        one that we know. `cuda_graphs`: the packed body is recorded for each shape of rows and replayed, which takes
        the launches from the host; where it cannot be, that is said once (see `napo.scoring.graphs`)."""
        self.model = model
        self.average = average
        self.packed = packed
        self.causal_lm = causal_lm_of(model)
        check_placed(self.causal_lm)
        self._border = border_of(self.causal_lm)
        self._believed: list[tuple[list[Any], bool]] = []  # the model's facts at each comparison, and `_fused`
        self._fused = False  # whether titles alone go through body and head
        self._body: Callable[[PackedBatch], Tensor] = (
            BodyGraphs(self.causal_lm, self._eager_body) if cuda_graphs else self._eager_body
        )
        if packed:
            check_packable(self.causal_lm)
        elif cuda_graphs:
            raise ValueError("cuda_graphs: expected packed=True; titles in rows of their own have many shapes")

    def __call__(self, batch: PackedBatch) -> Tensor:
        """(S,) log-probabilities, user by user, title by title."""
        self.compare_once()
        self._check_lengths(batch)
        device = self.causal_lm.device
        if self.packed:
            batch = batch.widened(width_multiple(device))
        scores: Tensor = self._enter(self._score, batch.to(device))
        return scores

    def each(self, batches: Sequence[Any]) -> list[Tensor]:
        """The scores of several batches whose rows are all of one width, as ``__call__`` gives them one by one. The
        body sees all rows at once; the head goes batch by batch, since its matmuls round differently with the number of
        rows, and only so does a batch's score not depend on the others."""
        self.compare_once()
        if not self.packed:
            return [self(batch) for batch in batches]
        for batch in batches:
            self._check_lengths(batch)
        scores: list[Tensor] = self._enter(self._score_each, [batch.to(self.causal_lm.device) for batch in batches])
        return scores

    def compare_once(self) -> None:
        """Before the first batch: scores are compared with the model's own forward, and again where that is another one
        than at the last comparison, or in another mode. Whoever changes what the model's layers do while they score
        calls it before that."""
        facts = _facts(self.causal_lm)
        for believed, fused in self._believed:
            if len(facts) == len(believed) and all(map(operator.is_, facts, believed)):
                self._fused = fused
                return
        weight = own_weight(self.causal_lm)
        own = OwnForward(self.model, self.causal_lm)
        maker = weight_maker(self.causal_lm)
        if self.packed and maker is not None and own_weight(self.causal_lm) is not weight:
            raise no_hook(maker)
        kind = self.causal_lm.config.get_text_config().model_type
        # Alone, body and head are faster than the model's own forward, which is right but for what is put around it.
        known = own.foreign is None and kind in PROVEN and is_plain(self.causal_lm)
        reason = None
        for fused in (True, False) if known and not self.packed else (False,):
            self._fused = fused
            reason = own.refuses(self._compared)
            if reason is None:
                self._believed.append((facts, fused))
                return
        raise ValueError(f"model: {reason}; {self._way_out(own)}")

    def _way_out(self, own: OwnForward) -> str:
        """What to do about a model that has been refused: the first of the ways that would be believed."""
        if self.packed and self._unpacks:
            self.packed = False
            try:
                if own.refuses(self._compared) is None:
                    return f"set {ALONE}"
            finally:
                self.packed = True
        return "take off what is put around the model's own forward, or put it below that"

    def _check_lengths(self, batch: Any) -> None:
        packed: PackedBatch = getattr(batch, "packed", batch)
        if self._border is not None:
            check_length(self._border, packed.longest, packed=self.packed)

    def _enter(self, forward: Callable[..., Any], batch: Any) -> Any:
        """`forward` of a batch, in place of the causal LM's, from the outside."""
        self._own_forward = _own_forward(self.causal_lm)
        with _lent_forward(self.causal_lm, forward):
            return self.model(napo_batch=batch)

    def _compared(self, batch: PackedBatch) -> Tensor:  # (S,)
        """For the comparison, whose rows are no shape to record."""
        body, self._body = self._body, self._eager_body
        try:
            return self._sums(batch)
        finally:
            self._body = body

    def _sums(self, batch: PackedBatch) -> Tensor:  # (S,)
        """Sums, whatever is asked for."""
        scores: Tensor = self._enter(self._score, batch)
        return scores * batch.title_lengths if self.average else scores

    def _score_each(self, napo_batch: list[Any], **_: Any) -> list[Tensor]:
        packed = [getattr(batch, "packed", batch) for batch in napo_batch]
        names = ("input_ids", "position_ids", "ends")
        together = {name: torch.cat([getattr(one, name) for one in packed]) for name in names}
        hidden = self._body(dataclasses.replace(packed[0], **together))  # (rows, T, H)
        parts = hidden.split([len(one.input_ids) for one in packed])
        return [self._of_hidden(part, batch) for part, batch in zip(parts, napo_batch, strict=True)]

    def _score(self, napo_batch: PackedBatch, **_: Any) -> Tensor:
        """Runs in place of the causal LM's forward."""
        return self._score_packed(napo_batch) if self.packed else self._score_alone(napo_batch)

    def _score_packed(self, batch: PackedBatch) -> Tensor:
        return self._of_hidden(self._body(batch), batch)

    def _of_hidden(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        rows = hidden.flatten(0, 1).index_select(0, batch.predicting_rows)  # (R, H)
        return self._head(rows, batch.pair_rows, batch.targets, batch.sequence_ids, batch.num_sequences)

    def _eager_body(self, batch: PackedBatch) -> Tensor:  # (rows, T, H)
        masks = packed_masks(self.causal_lm, batch)
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": masks}
        return run_body(self.causal_lm, **inputs)

    def _score_alone(self, batch: PackedBatch) -> Tensor:
        score = self._fused_alone if self._fused and is_plain(self.causal_lm) else self._own_alone
        logps = []
        for alone in unpack(batch):
            # Padding is as long as the title that is beside it.
            logps += [score(one) for one in (alone.one_by_one() if self._border is not None else (alone,))]
        return torch.cat(logps)

    def _fused_alone(self, alone: Alone) -> Tensor:  # (n,)
        hidden = run_body(self.causal_lm, input_ids=alone.input_ids, attention_mask=alone.attention_mask)
        rows = hidden[alone.sequence_ids, alone.columns]  # (Q, H)
        return self._head(rows, None, alone.targets, alone.sequence_ids, len(alone.input_ids))

    def _own_alone(self, alone: Alone) -> Tensor:  # (n,)
        """Through the model's own forward and head, whatever they are."""
        takes = inspect.signature(self._own_forward).parameters
        inputs = {"input_ids": alone.input_ids, "attention_mask": alone.attention_mask, "use_cache": False}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
            inputs = {name: value for name, value in inputs.items() if name in takes}
        if "logits_to_keep" in takes:  # elsewhere all logits are computed
            inputs["logits_to_keep"] = alone.kept
        logits = logits_of(self._own_forward(**inputs))[:, -alone.kept :]
        return sequence_logps(logits, alone.labels, average=self.average)

    def _head(
        self,
        hidden: Tensor,  # (R, H)
        pair_rows: Tensor | None,  # (Q,)
        targets: Tensor,  # (Q,)
        sequence_ids: Tensor,  # (Q,)
        count: int,
    ) -> Tensor:  # (count,)
        head = read_head(self.causal_lm)
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(head.weight.dtype)
        return linear_sequence_logps(
            hidden,
            head.weight,
            targets,
            sequence_ids=sequence_ids,
            num_sequences=count,
            rows=pair_rows,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            lora=head.lora,
            average=self.average,
        )


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside the wrappers of torch.compile, DDP, FSDP, DeepSpeed and PEFT."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "peft_config") and any(config.is_prompt_learning for config in inner.peft_config.values()):
            raise ValueError("model: expected LoRA-like adapters, got one that puts virtual tokens before the prompt")
        if hasattr(inner, "peft_config") and any(config.is_adaption_prompt for config in inner.peft_config.values()):
            # PEFT calls the forward that the model had when it was wrapped, past the one that is lent to it here.
            raise ValueError("model: expected LoRA-like adapters, got AdaptionPrompt, with prompts in attention")
        if any(
            getattr(config, "alora_invocation_tokens", None) for config in getattr(inner, "peft_config", {}).values()
        ):
            # It does nothing until it is trained, so that a comparison at the beginning would not show it.
            raise ValueError(
                "model: expected LoRA-like adapters, got aLoRA, which begins where it finds its "
                "alora_invocation_tokens in a sequence; make the adapter without them"
            )
        step = next((name for name in ("_orig_mod", "module", "get_base_model") if hasattr(inner, name)), None)
        if step is None:
            raise ValueError(f"model: expected a causal LM of transformers, got {type(model).__name__}")
        inner = inner.get_base_model() if step == "get_base_model" else getattr(inner, step)
    if inner.get_output_embeddings() is None:
        raise ValueError(f"model: {type(inner).__name__} has no language-model head; load it with AutoModelForCausalLM")
    return inner


def check_packable(model: PreTrainedModel) -> None:
    """Refuse by name the architectures in which a mask and positions cannot keep titles apart."""
    name, config = type(model).__name__, model.config.get_text_config()
    way_out = f"set {ALONE}"
    if config.is_encoder_decoder:
        raise ValueError(f"model: {name} is an encoder-decoder; a causal LM is expected")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION_KINDS)
    if model._is_stateful or other:
        kinds = ", ".join(other) or "a recurrent state"
        raise ValueError(f"model: {name} has layers with {kinds}, which carry one title into the next; {way_out}")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"model: {name} attends in both directions; {way_out}")
    if not _takes(_below_compilation(model.base_model), "position_ids"):
        raise ValueError(f"model: {name} takes no position ids, so titles cannot restart behind the prompt; {way_out}")
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"model: {name} runs attention as {config._attn_implementation!r}, which takes no mask of one's own; "
            f"call model.set_attn_implementation('sdpa') (or 'eager', 'flex_attention'), or {way_out}"
        )


def _below_compilation(module: Any) -> Any:
    while hasattr(module, "_orig_mod"):
        module = module._orig_mod
    return module


def _takes(module: nn.Module, name: str) -> bool:
    """Whether the forward of ``module`` takes an argument of that name. One that hands on whatever it is given is
    believed: the comparison tells."""
    parameters = inspect.signature(type(module).forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return name in parameters or {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds


def check_placed(model: PreTrainedModel) -> None:
    """Refuse weights that are not all here: tokens go to the body and hidden states to the head, on one device."""
    places = sorted({str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()})
    offloaded = any(getattr(hook, "offload", False) for module in model.modules() for hook in hooks_of(module))
    if len(places) > 1 or offloaded:
        there = (
            f"layers on {', '.join(places)}" if len(places) > 1 else "weights that accelerate fetches layer by layer"
        )
        raise ValueError(
            f"model: expected all weights on one device, got {there}; load it with device_map={{'': 0}}, in 4 bits if "
            "it is too large"
        )


def packed_masks(model: PreTrainedModel, batch: PackedBatch) -> Any:
    """One mask, or one for each kind of layer where the model's layers differ."""
    config = model.config.get_text_config()
    if batch.ends.is_cpu and config._attn_implementation == "sdpa" and config.model_type in PROVEN:
        # Only these: elsewhere in transformers there are layers that ask whether the name is "sdpa".
        config._attn_implementation = PACKED
    implementation, dtype = config._attn_implementation, model.dtype
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return attention_mask(batch, window, implementation, dtype)
    windows = {"full_attention": None, "sliding_attention": window}
    return {kind: attention_mask(batch, windows[kind], implementation, dtype) for kind in sorted(set(kinds))}


def run_body(model: PreTrainedModel, **inputs: Any) -> Tensor:  # (rows, T, H)
    return model.base_model(**inputs, use_cache=False)[0]


def _facts(model: PreTrainedModel) -> list[Any]:
    """What is called for the model and its head, and in which mode. Where one of these is another object than before,
    scores are compared anew: looking at objects costs little at each batch."""
    facts: list[Any] = []
    for module in (model, model.get_output_embeddings()):
        kind = type(module)
        facts += [kind, kind.forward, vars(module).get("forward"), module.training, *hooks_of(module)]
    return facts


def _own_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """The forward that `_lent_forward` stands in for."""
    own = vars(model).get("forward")
    if own is None:
        return functools.partial(type(model).forward, model)
    return getattr(model, "_original_forward", own)  # accelerate's autocast is put around the lent one


@contextlib.contextmanager
def _lent_forward(model: PreTrainedModel, forward: Callable[..., Any]) -> Iterator[None]:
    """`model.forward` is `forward` for one call, entered through every wrapper around the model."""
    own = vars(model).get("forward")
    if own is not None and hasattr(model, "_original_forward"):
        # accelerate has put autocast around this forward; ours computes under the same
        from accelerate.utils import get_mixed_precision_context_manager

        forward = get_mixed_precision_context_manager(native_amp=True)(forward)
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own
