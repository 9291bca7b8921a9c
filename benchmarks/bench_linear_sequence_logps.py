"""Forward and backward of linear_sequence_logps with a frozen head against the two bare matmuls and against PyTorch.

    python benchmarks/bench_linear_sequence_logps.py [--case small|large] [--repeats N] [--seconds S]

FLOPs: two matmuls of 2 R H V each. Bytes that must move: weight (2 V H) once a chunk and matmul, hidden states and
context (2 R H each); the logits (2 R V) stay in the cache, a chunk at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Report, Timing, interleave, peak_memory, require_close
from torch import Tensor

from napo_kernels import linear_sequence_logps

CASES = {"small": (2016, 576, 49152), "large": (2016, 2048, 128256)}
MATMUL_CHUNKS = {"small": (256, 1008, 2016), "large": (256, 2016)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=None, help="stop a case after about this long")
    options = parser.parse_args()
    for case in CASES if options.case == "all" else [options.case]:
        report = Report(f"bench_linear_sequence_logps_{case}")
        run_case(report, case, options.repeats, options.seconds)
        report.write()


def run_case(report: Report, case: str, repeats: int, seconds: float | None) -> None:
    r, h, v = CASES[case]
    torch.manual_seed(0)
    hidden = torch.randn(r, h).bfloat16()
    weight = (torch.randn(v, h) / h**0.5).bfloat16()
    targets = torch.randint(v, (r,))
    sequences = r // 7
    ids = torch.arange(r) % sequences
    upstream = torch.randn(sequences)

    def ours() -> Tensor:
        x = hidden.detach().requires_grad_()
        linear_sequence_logps(x, weight, targets, sequence_ids=ids, num_sequences=sequences).backward(upstream)
        return x.grad

    def eager() -> Tensor:
        x = hidden.detach().requires_grad_()
        logp = torch.log_softmax(F.linear(x, weight).float(), -1).gather(1, targets[:, None])[:, 0]
        torch.zeros(sequences).index_add(0, ids, logp).backward(upstream)
        return x.grad

    def linear_cross_entropy() -> Tensor:
        x = hidden.detach().requires_grad_()
        options = torch.nn.LinearCrossEntropyOptions()
        loss = F.linear_cross_entropy(x, weight, targets, reduction="none", options=options)
        torch.zeros(sequences).index_add(0, ids, -loss.float()).backward(upstream)
        return x.grad

    expected = eager()
    require_close(f"{case}: gradient", ours(), expected, relative=2e-2)
    variants: dict[str, Callable[[], object]] = {"ours": ours}
    for chunk in MATMUL_CHUNKS[case]:
        variants[f"two matmuls, {chunk} rows"] = bare_matmuls(hidden, weight, chunk)
    variants["eager"] = eager
    timings = interleave(variants, repeats=repeats, seconds=seconds)
    if hasattr(F, "linear_cross_entropy"):
        peer = interleave({"F.linear_cross_entropy": linear_cross_entropy}, repeats=1, warmup=0)
        timings |= peer
    floor = min((t for name, t in timings.items() if name.startswith("two matmuls")), key=lambda t: t.median)
    flops = 4 * r * h * v
    for name, timing in timings.items():
        report.add(
            f"R {r}, H {h}, V {v}, bf16",
            name,
            timing,
            of_matmuls=ratio(timing, floor),
            ours_is_faster=ratio(timing, timings["ours"]),
            tflops=round(flops / timing.median / 1e12, 3),
        )
    report.add(f"R {r}, H {h}, V {v}, bf16", "ours, memory", peak_mib=round(peak_memory(ours) / 2**20, 1))
    if case == "small":
        report.add(f"R {r}, H {h}, V {v}, bf16", "eager, memory", peak_mib=round(peak_memory(eager) / 2**20, 1))


def bare_matmuls(hidden: Tensor, weight: Tensor, chunk: int) -> Callable[[], object]:
    """Logits and their product with weight, nothing between, ``chunk`` rows at a time into memory that exists."""
    logits = torch.empty(chunk, len(weight), dtype=hidden.dtype)
    context = torch.empty_like(hidden)

    def run() -> None:
        for first in range(0, len(hidden), chunk):
            rows = hidden[first : first + chunk]
            out = logits[: len(rows)]
            torch.mm(rows, weight.t(), out=out)
            torch.mm(out, weight, out=context[first : first + chunk])

    return run


def ratio(a: Timing, b: Timing) -> float:
    return round(a.median / b.median, 3)


if __name__ == "__main__":
    main()
