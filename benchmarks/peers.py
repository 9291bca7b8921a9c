"""The peers as functions of one form, each at the setting that its authors document as the best for this use.

`head_peers`: (hidden (R, H), weight (V, H), targets (R,), softcap) -> log-probs (R,), with gradients.
`logits_peers`: (logits (n, V), targets (n,)) -> log-probs (n,), with gradients.

A preference loss needs another upstream gradient for every sequence, so peers run with `reduction="none"`. The faster
scalar modes of Liger and quack compute something else (one upstream for all rows); they stand in the tables as what
they are, marked "one upstream".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import absent, peer

HeadFunction = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
LogitsFunction = Callable[[Tensor, Tensor], Tensor]
TRL_VOCABULARY_CHUNK = 32768  # what TRL's trainers pass
ONE_UPSTREAM = ", one upstream"


def eager(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(hidden, weight).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


def eager_from_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def compile_for(device: torch.device, function: Callable[..., Tensor], *, smoke: bool) -> Callable[..., Tensor]:
    """torch.compile of `function`. On the CPU for any shape, since a compilation takes longer than a case; on a GPU
    for the shape at hand."""
    return torch.compile(function, dynamic=device.type == "cpu", backend="eager" if smoke else "inductor")


def head_peers(device: torch.device, softcap: float | None) -> dict[str, HeadFunction]:
    found: dict[str, HeadFunction] = {}
    if not hasattr(F, "linear_cross_entropy"):
        absent("F.linear_cross_entropy", f"torch {torch.__version__} has none")
    elif softcap is None:

        def torch_linear_cross_entropy(x: Tensor, w: Tensor, y: Tensor, _: float | None) -> Tensor:
            options = torch.nn.LinearCrossEntropyOptions()
            return -F.linear_cross_entropy(x, w, y, reduction="none", options=options)

        found["F.linear_cross_entropy"] = torch_linear_cross_entropy

    cce = peer("cut_cross_entropy", "linear_cross_entropy")
    if cce is not None:
        implementation = "cce" if device.type == "cuda" else "torch_compile"
        found[f"Apple CCE ({implementation})"] = lambda x, w, y, cap: (
            -cce(x, w, y, softcap=cap, reduction="none", impl=implementation)
        )
    trl = peer("trl.kernels", "ChunkedLogProbFunction", "trl.trainer.utils")
    if trl is not None:
        found["TRL chunked log-probs"] = lambda x, w, y, cap: trl.apply(
            x, w, None, y, 1.0, TRL_VOCABULARY_CHUNK, cap, 1.0, ("log_probs",)
        )[0]
    if not _gpu_peers(device):
        return found

    liger = peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    if liger is not None:
        for chunks in (1, 16):  # its default, and the memory that its documentation offers to trade for speed
            found[f"Liger (chunk_mem_const {chunks})"] = lambda x, w, y, cap, c=chunks: (
                -liger(x, w, y, reduction="none", softcap=cap, chunk_mem_const=c)
            )
        found[f"Liger{ONE_UPSTREAM}"] = lambda x, w, y, cap: (
            -liger(x, w, y, reduction="sum", softcap=cap, chunk_mem_const=16)
        )
    quack = peer("quack.linear_cross_entropy", "linear_cross_entropy_func") if softcap is None else None
    if quack is not None:
        found["quack"] = lambda x, w, y, _: -quack(x, w, None, y, reduction="none", inplace_backward=True)
        chunked = peer("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
        if chunked is not None:
            found[f"quack chunked{ONE_UPSTREAM}"] = lambda x, w, y, _: -chunked(x, w, y, reduction="sum")
    return found


def _gpu_peers(device: torch.device) -> bool:
    """Whether Liger and quack can run; where they cannot they are named as absent."""
    if device.type != "cuda":
        absent("liger_kernel", "needs a GPU")
        absent("quack", "needs a Hopper GPU or newer")
    return device.type == "cuda"


def logits_peers(device: torch.device) -> dict[str, LogitsFunction]:
    """Those of Liger and quack overwrite their logits."""
    found: dict[str, LogitsFunction] = {}
    trl = peer("trl.trainer.utils", "selective_log_softmax")
    if trl is not None:
        found["TRL selective_log_softmax"] = lambda logits, targets: trl(logits, targets).float()
    if not _gpu_peers(device):
        return found
    liger = peer("liger_kernel.transformers.functional", "liger_cross_entropy")
    if liger is not None:
        found["Liger"] = lambda logits, targets: -liger(logits, targets, reduction="none").float()
    quack = peer("quack.cross_entropy", "cross_entropy")
    if quack is not None:
        found["quack"] = lambda logits, targets: -quack(logits, targets, reduction="none", inplace_backward=True)
    return found
