"""Runs the Triton kernels of catalogue_sequence_logps in Triton's interpreter, on the CPU, against the definition.

A script and no test, because TRITON_INTERPRET must be set before Triton is imported:
test_catalogue_sequence_logps_triton.py runs it in a process of its own.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import test_catalogue_sequence_logps as cases
import torch

from napo_kernels import allowed, catalogue_sequence_logps, dispatch
from napo_kernels.ops import catalogue_sequence_logps as op
from napo_kernels.reference import catalogue_sequence_logps as reference
from napo_kernels.triton import catalogue_sequence_logps as kernels

LAYOUTS = {"both kinds of blocks": 60, "all shared": 0, "none shared": 1 << 40}
# Tiles and blocks smaller than on a GPU, so that small cases have several of each.
SMALL = {"TILE_ROWS": 16, "TILE_COLUMNS": 32, "LANES": 8}
SMALL_BLOCKS = {"WIDTH": 16, "GATHERED": 4, "GATHERED_WIDTH": 16, "BLOCK": 16, "GRADIENT_BLOCK": 16, "PAIRS": 4}
SMALL_BLOCKS |= {"SEQUENCES": 8, "DEPTH_BYTES": 64}
SHAPE = {"sizes": (1, 2, 3, 7, 40), "rows": 33, "pairs": 50, "width": 21, "vocabulary": 60}


def main() -> None:
    dispatch.kernels = lambda _, tensor, __: reference if tensor.dtype == torch.float64 else kernels
    op._takes_half = lambda _: True
    for name, size in SMALL.items():
        setattr(allowed, name, size)
        setattr(kernels, name, size)
    for name, size in SMALL_BLOCKS.items():
        setattr(kernels, name, size)
    for layout, shared in LAYOUTS.items():
        allowed.SHARED = shared
        for head, dtype in (
            ("plain", torch.float32),
            ("plain", torch.bfloat16),
            ("negative scale, softcap, bias", torch.float32),
            ("lora, softcap, bias", torch.bfloat16),
            ("bias and scale", torch.float16),
        ):
            cases.compare(cases.make(**SHAPE, **cases.HEADS[head]), dtype)
            print(f"{layout}, {head}, {dtype}", flush=True)
        cases.huge()
        cases.nan_stays_in_its_row()
        print(f"{layout}, extremes", flush=True)
    allowed.SHARED = 60
    for name in ("one row", "one hidden number", "all forced", "no pair", "many pairs a row"):
        cases.compare(cases.make(**{**cases.SHAPES[name], "vocabulary": 301}), torch.float32)
    cases.compare(cases.make((61,), 20, 30, 8, 61), torch.float32)
    check_strides()
    check_runs_agree()
    check_fakes()
    print("interpreted: ok")


def check_strides() -> None:
    """Hidden states and weight that are slices and transposes."""
    case = cases.make(**SHAPE).to(torch.float32, trains=False)
    expected = catalogue_sequence_logps(case.hidden, case.weight, case.allowed())
    wide = torch.cat((case.hidden, case.hidden), 1)[:, : case.hidden.shape[1]]
    for hidden in (wide, case.hidden.t().contiguous().t()):
        leaf = hidden.detach().requires_grad_()
        weight = case.weight.t().contiguous().t()
        assert torch.equal(catalogue_sequence_logps(leaf, weight, case.allowed()), expected)


def check_runs_agree() -> None:
    case = cases.make(**SHAPE, bias=True)
    runs = []
    for _ in range(2):
        mine = case.to(torch.bfloat16)
        logps = catalogue_sequence_logps(mine.hidden, mine.weight, mine.allowed(), bias=mine.bias)
        runs.append([logps, *cases.gradients(mine, logps).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def check_fakes() -> None:
    """What the fakes of both ops say of halves, and the schema."""
    case = cases.make((1, 3, 9), 8, 12, 5, 20).to(torch.bfloat16)
    plan = case.allowed()
    small = case.weight.detach()[plan.used].requires_grad_()
    arguments = (case.hidden, small, None, *plan.plan, plan.num_sequences, 0.5, 0.0, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.napo.catalogue_sequence_logps.default, arguments, test_utils=tests)


if __name__ == "__main__":
    main()
