"""RMSNorm that keeps its input and one number per row for the backward, where autograd keeps fp32 copies of the input.

transformers computes the norm by six operations in fp32, and each of them keeps what its backward needs. A kernel does
it in one pass (the compiled module on a CPU, Triton on a GPU); without one the forward is the same operations, so the
same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from napo_kernels.ops import body

# Classes of transformers whose forward is weight * (x / rms(x)); Gemma's has another form.
RMS_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})


def fuse_norms(model: nn.Module) -> int:
    """Give every RMSNorm of ``model`` that this file can compute its forward; returns how many.

    A norm whose weight is trained keeps its own forward, decided at each call.
    """
    norms = [module for module in model.modules() if type(module).__name__ in RMS_NORMS]
    for module in norms:
        module.forward = _Forward(module)  # type: ignore[method-assign]
    return len(norms)


class _Forward:
    """The forward of one norm: a callable object, so that the model still pickles."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm

    def __call__(self, hidden_states: Tensor) -> Tensor:  # (..., H) -> (..., H)
        norm = self.norm
        if not norm.weight.requires_grad and body.serves(hidden_states, norm.weight):
            return body.rms_norm(hidden_states, norm.weight, norm.variance_epsilon)
        if norm.weight.requires_grad or not (torch.is_grad_enabled() and hidden_states.requires_grad):
            return type(norm).forward(norm, hidden_states)
        return _RmsNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)


class _RmsNorm(torch.autograd.Function):
    """y = w n with n = x r and r = (mean(x^2) + eps)^-1/2, in fp32; dx = r (w dy - n mean(w dy n))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, r)
        return weight * (wide * r).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        normed = x.float() * r
        g = (grad * weight).float()
        inner = torch.linalg.vecdot(g, normed).unsqueeze(-1).div_(-x.shape[-1])  # (..., 1)
        return normed.mul_(inner).add_(g).mul_(r).to(x.dtype), None, None
