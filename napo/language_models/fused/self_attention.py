"""The self-attention of Llama and its kin: projections together, queries and keys rotated in one kernel.

transformers' own forward rotates with a dozen operations per layer, and adapters add to them. Everything else is done
as there: the norms of queries and keys where the model has them, and the attention function of the model's choice.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from napo.language_models.fused.lora import linear_together
from napo_kernels.ops import body

# Classes of transformers that project, norm (Qwen3), rotate all of a head, attend and project.
ATTENTIONS = frozenset({"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"})


def fuse_attentions(model: nn.Module) -> int:
    """Give every self-attention of ``model`` that this file knows its forward; returns how many.

    Where there is no kernel (fp64), with a cache and for eager attention they keep their own, decided at each call.
    """
    modules = [module for module in model.modules() if type(module).__name__ in ATTENTIONS]
    for module in modules:
        module.forward = _Forward(module)  # type: ignore[method-assign]
    return len(modules)


class _Forward:
    """The forward of one layer's attention: a callable object, so that the model still pickles."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def __call__(
        self,
        hidden_states: Tensor,  # (rows, T, H)
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Any]:
        own = self.attention
        function = ALL_ATTENTION_FUNCTIONS.get(own.config._attn_implementation)
        if (
            position_embeddings is None
            or past_key_values is not None
            or function is None
            or not body.rotates(hidden_states)
        ):
            return type(own).forward(
                own, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **others
            )
        layers = (own.q_proj, own.k_proj, own.v_proj)
        projected = linear_together(layers, hidden_states) or [layer(hidden_states) for layer in layers]
        q, k, v = (x.view(*x.shape[:-1], -1, own.head_dim) for x in projected)
        if hasattr(own, "q_norm"):
            q, k = own.q_norm(q), own.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        cos, sin = position_embeddings
        if body.serves_rotation(q, k, cos, sin):
            q, k = body.rotate(q, k, cos, sin)
        else:
            q, k = sys.modules[type(own).__module__].apply_rotary_pos_emb(q, k, cos, sin)  # type: ignore[attr-defined]
        if "Llama" not in type(own).__name__:
            others["sliding_window"] = _window(own)
        dropout = own.attention_dropout if own.training else 0.0
        out, weights = function(own, q, k, v, attention_mask, dropout=dropout, scaling=own.scaling, **others)
        return own.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def _window(attention: Any) -> int | None:
    window: int | None = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return window
