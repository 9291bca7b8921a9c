"""Forward and backward of sequence_logps from logits (64, 64, 49152) in bf16 with one label in four valid.

    python benchmarks/bench_sequence_logps.py [--repeats N]

Bytes that must move: the valid rows are read forward and backward (2 x 100 MB), the gradient is written once (403 MB,
of which 100 MB are not zero) into memory that the process does not have yet.
"""

from __future__ import annotations

import argparse

import torch
from harness import Report, interleave, peak_memory, peer, require_close
from torch import Tensor

from napo_kernels import sequence_logps
from napo_kernels.backends import compiled
from napo_kernels.native import softmax_rows
from napo_kernels.rows import LogitMap, RowStats, plan_targets

S, T, V = 64, 64, 49152


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    report = Report("bench_sequence_logps")
    from_logits(report, options.repeats)
    row_kernel(report, 3 * options.repeats)
    report.write()


def from_logits(report: Report, repeats: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(S, T, V, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(V, (S, T)).masked_fill(torch.arange(S * T).view(S, T) % 4 != 0, -100)
    upstream = torch.randn(S)

    def ours() -> Tensor:
        return torch.autograd.grad(sequence_logps(logits, labels), logits, upstream)[0]

    def eager() -> Tensor:
        valid = labels != -100
        logp = torch.log_softmax(logits.float(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.autograd.grad(logp.masked_fill(~valid, 0.0).sum(1), logits, upstream)[0]

    def trl_way() -> Tensor:
        valid = labels != -100
        logp = selective_log_softmax(logits, labels.clamp(min=0))
        return torch.autograd.grad(logp.masked_fill(~valid, 0.0).float().sum(1), logits, upstream)[0]

    words = logits.detach()[: S // 4].view(torch.int64)  # as many bytes as the valid rows

    def traffic() -> Tensor:
        words.sum()
        words.sum()
        return torch.empty(S, T, V, dtype=torch.bfloat16).zero_()

    require_close("gradient", ours(), eager(), relative=1e-2)
    variants = {"ours": ours, "traffic alone": traffic, "eager": eager}
    selective_log_softmax = peer("trl.trainer.utils", "selective_log_softmax")
    if selective_log_softmax is not None:
        require_close("TRL's gradient", trl_way(), eager(), relative=2e-2)
        variants["TRL selective_log_softmax"] = trl_way
    timings = interleave(variants, repeats=repeats, warmup=0)
    for name, timing in timings.items():
        report.add(
            f"logits ({S}, {T}, {V}), bf16, 1 in 4",
            name,
            timing,
            ours_is_faster=round(timing.median / timings["ours"].median, 3),
        )
    report.add(f"logits ({S}, {T}, {V}), bf16, 1 in 4", "ours, memory", peak_mib=round(peak_memory(ours) / 2**20))


def row_kernel(report: Report, repeats: int) -> None:
    """The row kernel of linear_sequence_logps on one chunk, by instruction set."""
    rows = 240
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, V)).bfloat16()
    plan, _ = plan_targets(torch.randint(V, (rows,)), None, rows, V)
    z = torch.zeros(rows)
    chunk = logits.clone()

    def run(isa: str) -> None:
        module.set_cpu_isa(isa)
        stats = RowStats(*torch.zeros(2, rows), *torch.zeros(3, rows))
        softmax_rows.rows_forward(chunk, chunk, 0, plan, LogitMap(), z, stats, 1.0)

    module = compiled()
    assert module is not None, "the compiled module is missing"
    best = module.build_config()["cpu_isa"]
    sets = [isa for isa in ("avx512", "avx2", "portable") if has(module, isa)]
    timings = interleave({isa: lambda isa=isa: run(isa) for isa in sets}, repeats=repeats)
    module.set_cpu_isa(best)
    for isa in sets:
        report.add(
            f"row kernel, {rows} rows of {V}, bf16",
            isa,
            timings[isa],
            of_best=round(timings[isa].median / timings[sets[0]].median, 3),
            gb_per_s=round(3 * chunk.numel() * 2 / timings[isa].median / 1e9, 1),  # two reads, one write
        )


def has(module: object, isa: str) -> bool:
    try:
        module.set_cpu_isa(isa)  # type: ignore[attr-defined]
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main()
