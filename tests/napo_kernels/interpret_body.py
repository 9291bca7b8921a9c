"""Runs the Triton kernels of a transformer's body in Triton's interpreter, on the CPU, against fp64.

A script and no test, because TRITON_INTERPRET must be set before Triton is imported: test_body_triton.py runs it in a
process of its own.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from body_cases import check, norm_case, product_case, rotated, rotation_case

from napo_kernels.ops import body
from napo_kernels.triton import body as triton_body


def main() -> None:
    body._kernels = lambda x: triton_body
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        times = 3.0 if dtype == torch.bfloat16 else 1.1  # the interpreter cuts fp32 off where a GPU rounds it
        for shape in ((3, 5, 48), (1, 17), (7, 33)):
            check(*norm_case(dtype, shape), times)
            check(*product_case(dtype, shape), times)
        for shape in ((2, 5, 3, 1, 8), (1, 3, 4, 4, 12), (3, 2, 2, 1, 2)):
            for one_row in (False, True):
                check(*rotation_case(dtype, shape, one_row=one_row), times)
    layout_stays()
    print("interpreted: ok")


def layout_stays() -> None:
    """The heads of a token stay side by side, as attention wants them and as the projection made them."""
    (q, k), _, (cos, sin) = rotated(torch.float32, (2, 5, 3, 1, 8), one_row=False)
    for out, given in zip(body.rotate(q, k, cos, sin), (q, k), strict=True):
        assert out.stride() == given.stride()


main()
