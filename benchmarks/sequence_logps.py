"""Forward and backward of sequence_logps from logits (S, T, V) in bf16, against PyTorch, peers and bare traffic.

    python -m benchmarks run rows [--device cuda]

Two cases: every position valid, and one label in four (the prompt ignored). Bytes that must move: the valid rows are
read forward and backward, the gradient is written once, zeros where a label is ignored. The floor is those bytes at the
bandwidth of a copy measured in the same run; on the CPU the bare passes themselves ("floor: traffic alone"). There all
variants run in memory that the process keeps: fresh pages would cost more than the traffic, and several times as much
as the arithmetic of a variant that allocates a lot. Log-probs and gradients of four sequences are compared with fp64.

On the CPU the row kernel of linear_sequence_logps is timed as well, by instruction set.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import device
from benchmarks.comparison import Comparison, compare, distance, sweep
from benchmarks.options import command_line
from benchmarks.peers import compile_for, eager_from_logits, logits_peers
from benchmarks.report import Report
from benchmarks.timing import Variant, Variants, copy_bandwidth
from napo_kernels import sequence_logps
from napo_kernels.dispatch import backends, compiled
from napo_kernels.native import linear_sequence_logps
from napo_kernels.rows import LogitMap, RowsProblem, RowStats, plan_targets

CHECKED = 4  # sequences
TOLERANCE = 2e-2


def main(arguments: Sequence[str]) -> None:
    options = command_line(__doc__, arguments)
    report = Report("sequence_logps", options)
    on_gpu = device.on_gpu()
    s, t, v = (6, 5, 300) if options.smoke else (64, 128, 128256) if on_gpu else (32, 64, 49152)
    bandwidth = copy_bandwidth(1 << 20 if options.smoke else 1 << 30 if on_gpu else 1 << 28)
    cases = []
    if not on_gpu and report.has_time("row kernel"):
        cases.append(row_kernel(report, 300 if options.smoke else v))
    for every in (4, 1):
        labels = "every label valid" if every == 1 else f"1 label in {every} valid"
        case = f"logits S {s}, T {t}, V {v}, bf16, {labels}"
        if report.has_time(case):
            cases.append(from_logits(report, case, (s, t, v), every, bandwidth, options))
            report.write()
        if on_gpu:
            torch._dynamo.reset()
    sweep(report, cases)
    report.finish()


def from_logits(
    report: Report, case: str, shape: tuple[int, int, int], every: int, bandwidth: float, options: argparse.Namespace
) -> Comparison:
    s, t, v = shape
    torch.manual_seed(0)
    logits = torch.randn(s, t, v, dtype=torch.bfloat16, device=device.current).requires_grad_()
    counted = torch.arange(s * t, device=device.current).view(s, t) % every == 0
    labels = torch.randint(v, (s, t), device=device.current).masked_fill(~counted, -100)
    upstream = torch.randn(s, device=device.current)
    Result = tuple[Tensor, Tensor]

    def ours(x: Tensor = logits, **how: Any) -> Result:
        logps = sequence_logps(x, labels, **how)
        return logps, torch.autograd.grad(logps, x, upstream)[0]

    def theirs(function: Callable[[Tensor, Tensor], Tensor], x: Tensor = logits) -> Result:
        """Every position through `function`, as their trainers do, then the mask."""
        logp = function(x.flatten(0, 1), labels.clamp(min=0).flatten()).view(s, t)
        logps = logp.masked_fill(~counted, 0.0).sum(1)
        return logps, torch.autograd.grad(logps, x, upstream)[0]

    def copy() -> Tensor:
        return logits.detach().clone().requires_grad_()

    few = logits.detach()[:CHECKED].double().requires_grad_()
    logp = eager_from_logits_fp64(few, labels[:CHECKED])
    (gradient,) = torch.autograd.grad(logp, few, upstream[:CHECKED].double())

    def error(_: str, result: Result) -> float:
        return max(distance(result[0][:CHECKED], logp), distance(result[1][:CHECKED], gradient))

    variants: Variants = {"napo": ours}
    if device.on_gpu():
        for name in ("triton", "cuda"):
            if backends()[name]["available"]:
                variants[f"napo, {name}"] = Variant(lambda name=name: ours(backend=name), required=True)
    else:
        variants["floor: traffic alone"] = traffic(logits, every)
    variants["napo, inplace_backward"] = Variant(lambda x: ours(x, inplace_backward=True), copy, required=True)
    variants["eager"] = Variant(lambda: theirs(eager_from_logits), required=True)
    compiled_eager = compile_for(device.current, eager_from_logits, smoke=options.smoke)
    variants["torch.compile of eager"] = lambda: theirs(compiled_eager)
    for name, function in logits_peers(device.current).items():
        overwrites = name in ("Liger", "quack")
        variants[name] = (
            Variant(lambda x, f=function: theirs(f, x), copy) if overwrites else lambda f=function: theirs(f)
        )
    bytes_moved = 2 * v * int(2 * counted.sum() + s * t)

    def of_copy(rows: list[dict[str, Any]]) -> None:
        """The rate of the bytes that must move, as a share of the bandwidth of a copy."""
        for row in rows:
            if "best_ms" in row:
                row["of_copy_bandwidth"] = round(bytes_moved / bandwidth / row["best_ms"] * 1e3, 2)

    return compare(
        report,
        case,
        variants,
        error=error,
        tolerance=TOLERANCE,
        floor=bytes_moved / bandwidth,
        derive=of_copy,
    )


def eager_from_logits_fp64(logits: Tensor, labels: Tensor) -> Tensor:
    logp = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return logp.masked_fill(labels == -100, 0.0).sum(1)


def traffic(logits: Tensor, every: int) -> Callable[[], Tensor]:
    """Two reads of as many bytes as the valid rows have, and a write of all rows to another place."""
    words = logits.detach().flatten()[: logits.numel() // every // 4 * 4].view(torch.int64)

    def run() -> Tensor:
        words.sum()
        words.sum()
        return torch.empty_like(logits).zero_()

    return run


def row_kernel(report: Report, v: int) -> Comparison:
    """The row kernel of linear_sequence_logps on one chunk, by instruction set."""
    rows = 240
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, v)).bfloat16()
    plan, _ = plan_targets(torch.randint(v, (rows,)), None, rows, v)
    z = torch.zeros(rows)
    chunk = logits.clone()
    module = compiled()
    assert module is not None, "the compiled module is missing"
    best = module.build_config()["cpu_isa"]

    def run(isa: str) -> None:
        module.set_cpu_isa(isa)
        stats = RowStats(*torch.zeros(2, rows), *torch.zeros(3, rows))
        problem = RowsProblem(plan, LogitMap(), z, stats, 1.0, v)
        linear_sequence_logps.rows_forward(chunk, chunk, 0, problem)
        module.set_cpu_isa(best)

    def rate(found: list[dict[str, Any]]) -> None:
        for row in found:
            if "best_ms" in row:
                row["gb_per_s"] = round(3 * chunk.numel() * 2 / row["best_ms"] / 1e6, 1)  # two reads, one write

    sets = [isa for isa in ("avx512_bf16", "avx512", "avx2", "portable") if has(module, isa)]
    variants: Variants = {isa: lambda isa=isa: run(isa) for isa in sets}
    module.set_cpu_isa(best)
    return compare(report, f"row kernel, {rows} rows of {v}, bf16", variants, derive=rate)


def has(module: Any, isa: str) -> bool:
    try:
        module.set_cpu_isa(isa)
    except ValueError:
        return False
    return True
