"""No call leaves memory behind: counted in bytes of malloc and in objects of Python, so that a few bytes show."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from napo_kernels import backends, linear_sequence_logps, napo_loss, sequence_logps, shared_negatives
from napo_kernels.ops import body, masked_attention

CALLS = 1_000  # of each, 10,000 together
SHARE = torch.ones(3, 3, dtype=torch.bool)
LABELS = torch.zeros(2, 2, dtype=torch.int64)
INDEX = torch.zeros(3, dtype=torch.int64)


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, requires_grad=True)


def attention() -> torch.Tensor:
    heads = leaf(1, 2, 4, 8)
    mask = masked_attention.pad_mask(torch.ones(1, 4, 4, dtype=torch.bool))
    assert mask is not None
    return masked_attention.masked_attention(heads, heads, heads, mask, 1.0)


OPS: dict[str, Callable[[], Any]] = {
    "sequence_logps": lambda: sequence_logps(leaf(2, 2, 7), LABELS),
    "linear_sequence_logps": lambda: linear_sequence_logps(
        leaf(3, 8), leaf(7, 8), INDEX, sequence_ids=INDEX, num_sequences=1
    ),
    "napo_loss": lambda: napo_loss(leaf(3), leaf(3, 4), share=SHARE, exclude=torch.zeros(1, 3, dtype=torch.int64)),
    "napo_loss, general": lambda: napo_loss(leaf(3), leaf(3, 4), share=SHARE, margin=torch.zeros(3, 3, 4)),
    "shared_negatives": lambda: shared_negatives(torch.ones(3, 4), 1),
    "rms_norm": lambda: body.rms_norm(leaf(3, 8), torch.ones(8), 1e-6),
    "silu_product": lambda: body.silu_product(leaf(3, 8), leaf(3, 8)),
    "masked_attention": attention,
    "refused by the op": lambda: sequence_logps(leaf(2, 2, 7), LABELS + 7),
    "refused by the module": lambda: _refused_by_the_module(),
}


def _refused_by_the_module() -> None:
    from napo_kernels import _C

    _C.rms_norm_forward({"norm": {"x": torch.ones(3)}}, False, 1)  # type: ignore[arg-type, typeddict-item]


class Mallinfo2(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def held() -> tuple[int, int]:
    """Bytes that malloc has given out and objects that Python has."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd, sys.getallocatedblocks()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.skipif(not backends()["cpu"]["available"], reason="the compiled module is missing")
@pytest.mark.parametrize("name", OPS)
def test_a_thousand_calls_hold_nothing(name: str) -> None:
    def call(times: int) -> None:
        for _ in range(times):
            with contextlib.suppress(ValueError):
                out = OPS[name]()
                if out.requires_grad:
                    out.sum().backward()

    call(300)  # what is made once
    bytes_before, objects_before = held()
    call(CALLS)
    bytes_after, objects_after = held()
    assert bytes_after - bytes_before < CALLS  # less than a byte a call
    assert objects_after - objects_before < CALLS / 2  # Python keeps a few hundred for itself, or gives them back
