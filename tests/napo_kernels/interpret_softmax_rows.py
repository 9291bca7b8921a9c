"""Runs the Triton row kernel in Triton's interpreter, on the CPU, against fp64 eager PyTorch.

A script and no test, because TRITON_INTERPRET must be set before Triton is imported: test_softmax_rows_triton.py runs
it in a process of its own.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import test_softmax_rows_extremes as extremes
import torch
from logps_cases import eager_linear, eager_tokens, linear_case

from napo_kernels import dispatch, linear_sequence_logps, sequence_logps
from napo_kernels.native import linear_sequence_logps as native
from napo_kernels.ops.linear_sequence_logps import forward, pieces
from napo_kernels.rows import LogitMap, RowsProblem, RowStats, Upstream, plan_targets
from napo_kernels.triton import linear_sequence_logps as triton_rows
from napo_kernels.triton import sequence_logps as triton_tokens
from napo_kernels.triton.softmax_rows import WALK_BLOCK

CASES = {
    "one target a row": {},
    "several targets a row, duplicates": {"pairs": 40},
    "softcap, bias, scale": {"pairs": 30, "softcap": 4.0, "bias": True, "logit_scale": 0.7},
    "lora, average": {"pairs": 30, "lora": True, "average": True},
    "nearly certain": {"peak": 20.0},
}


def main() -> None:
    modules = {"linear_sequence_logps": triton_rows, "sequence_logps": triton_tokens}
    dispatch.kernels = lambda op, *_: modules[op]
    pieces.cuts_columns = lambda _: False  # as on a GPU, where a piece is whole rows
    keeps, pieces.keeps = pieces.keeps, lambda *_: False
    for name, options in CASES.items():
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 8e-2)):
            check_linear(name, linear_case(dtype, shape=(11, 20, 83), **options), dtype, tolerance)
    for dtype in extremes.DTYPES:
        for name in (*extremes.ROWS, *extremes.ALONE):
            extremes.check(name, dtype, "triton")
        extremes.test_tokens_of_one_column(-1000.0, dtype, "triton")
        for name in extremes.NO_OTHERS:
            extremes.check_no_others(name, dtype, "triton")
    for size in (1e20, -3e38):
        extremes.test_linear_with_a_huge_bias(size, None, "triton")
    for where in ((1,), (7,)):
        extremes.test_a_logit_of_infinity_leaves_no_probability(where, torch.float32, "triton")
        extremes.test_a_bias_of_infinity_leaves_no_probability(where[0], "triton")
    pieces.keeps = keeps
    for dtype in extremes.DTYPES:
        for name in extremes.NO_OTHERS:
            extremes.check_no_others(name, dtype, "triton")
    forward.head_backward = None
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 8e-2)):
        check_linear("kept", linear_case(dtype, shape=(11, 20, 83), pairs=40, lora=True), dtype, tolerance)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        check_tokens(dtype, tolerance)
    check_wide_vocabulary()
    check_wide_tokens()
    check_padding()
    print("interpreted: ok")


def check_linear(name, case, dtype, tolerance) -> None:
    truth = case.to(torch.float64)
    expected = eager_linear(truth)
    expected.backward(case.upstream.double())
    ours = case.to(dtype)
    got = linear_sequence_logps(ours.hidden, ours.weight, ours.targets, chunk_bytes=2000, **ours.arguments())
    got.backward(case.upstream)
    close(f"{name}, {dtype}: log-probs", got, expected, tolerance)
    assert bool((got <= 0).all()), f"{name}: a positive log-prob"
    for (leaf, mine), theirs in zip(ours.leaves().items(), truth.leaves().values(), strict=True):
        close(f"{name}, {dtype}: {leaf}", mine.grad, theirs.grad, tolerance)


def check_tokens(dtype, tolerance) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(3, 5, 83)).to(dtype)
    labels = torch.randint(83, (3, 5)).masked_fill(torch.rand(3, 5) < 0.4, -100)
    logits[0, 0, labels[0, 0].clamp(min=0)] += 25
    truth, ours, inplace = (logits.to(t).clone().requires_grad_() for t in (torch.float64, dtype, dtype))
    upstream = torch.randn(3)
    expected = eager_tokens(truth, labels)
    expected.backward(upstream.double())
    got = sequence_logps(ours, labels)
    got.backward(upstream)
    (gradient,) = torch.autograd.grad(sequence_logps(inplace * 1, labels, inplace_backward=True), inplace, upstream)
    close(f"tokens, {dtype}: log-probs", got, expected, 2e-6)
    close(f"tokens, {dtype}: gradient", ours.grad, truth.grad, tolerance)
    assert torch.equal(gradient, ours.grad), "tokens: in place differs"


def check_padding() -> None:
    """What is behind a row, here NaN, reaches nothing; where rows are not padded, nothing behind them is written."""
    torch.manual_seed(0)
    rows, vocabulary, step = 3, 83, 128
    plan, _ = plan_targets(torch.randint(vocabulary, (12,)), torch.randint(rows, (12,)), rows, vocabulary)
    logits, upstream = torch.randn(rows, vocabulary), torch.randn(12)
    of_row = torch.repeat_interleave(torch.arange(rows), plan.start.diff())
    z = torch.cat([logits[of_row, plan.columns[: len(of_row)]], torch.zeros(12 - len(of_row))])
    results = []
    for width, first in ((vocabulary, 0), (step, 0), (step, 5)):
        memory = torch.full((2, rows, width), torch.nan)
        scratch, out = memory[..., first : first + vocabulary]
        scratch.copy_(logits)
        stats = RowStats(*torch.zeros(2, 12), *torch.zeros(3, rows))
        stats.target_slope.fill_(1.0)
        triton_rows.rows_forward(scratch, out, 0, RowsProblem(plan, LogitMap(), z, stats, 1.0, vocabulary))
        stored = out.clone()
        triton_rows.rows_gradient(scratch, out, 0, LogitMap(), Upstream(plan, stats, upstream))
        results.append((stored, out, *stats))
        if first:
            behind = memory[..., first + vocabulary :], memory[..., :first]
            assert all(bool(part.isnan().all()) for part in behind), "padding: what is behind a row was written"
    for name, *others, expected in zip(
        ("stored", "gradient", *RowStats._fields), *results[1:], results[0], strict=True
    ):
        for got in others:
            assert torch.equal(got, expected), f"padding: {name} differs"


def check_wide_vocabulary() -> None:
    """Rows of several blocks, and fp32 logits stored as bf16, as on CUDA, or in place; equal to the compiled module.
    The largest logit of a row is in the first block, in reach of it or far above, or the first block is all -inf."""
    torch.manual_seed(0)
    rows, vocabulary = 4, 2 * WALK_BLOCK + 100
    logits = wide_logits(rows, vocabulary)
    plan, _ = plan_targets(torch.randint(vocabulary, (80,)), torch.randint(rows - 1, (80,)), rows, vocabulary)
    z = torch.zeros(80)
    used = int(plan.start[-1])
    of_row = torch.repeat_interleave(torch.arange(rows), plan.start.diff())
    z[:used] = logits[of_row, plan.columns[:used]]
    results = []
    for kernel, in_place in ((triton_rows, False), (triton_rows, True), (native, True)):
        stats = RowStats(*torch.zeros(2, 80), *torch.zeros(3, rows))
        scratch = logits.clone()
        out = scratch if in_place else torch.empty(rows, vocabulary, dtype=torch.bfloat16)
        kernel.rows_forward(scratch, out, 0, RowsProblem(plan, LogitMap(), z, stats, 0.25, vocabulary))
        results.append((out.double() * stats.store_rescale[:, None], *stats[:-1]))
    for name, *mine, theirs in zip(("stored", *RowStats._fields[:-1]), *results, strict=True):
        for got in mine:
            close(f"wide: {name}", got, theirs, 5e-3 if name == "stored" else 1e-5)


def wide_logits(rows, vocabulary) -> torch.Tensor:
    logits = 4 * torch.randn(rows, vocabulary)
    logits[:, WALK_BLOCK:] += torch.tensor([0.0, 30.0, 500.0, -200.0])[:, None]
    logits[3, :WALK_BLOCK] = -torch.inf
    return logits


def check_wide_tokens() -> None:
    """Like the test above, with labels in the first block (one cannot be), in the last, and at the largest logit."""
    torch.manual_seed(0)
    logits = wide_logits(4, 2 * WALK_BLOCK + 100)
    for columns in ([0, 5, 7, -1], [-1, -2, -3, -4], logits.argmax(1).tolist()):
        labels = torch.tensor(columns) % logits.shape[1]
        truth = logits.double().log_softmax(1).gather(1, labels[:, None])
        logp, m, log_sum = triton_tokens.token_forward(logits[None], labels[None], -100)
        close("wide tokens: log-probs", logp[0], truth[:, 0], 2e-6)
        close("wide tokens: log-sum-exp", (m.double() + log_sum)[0], logits.double().logsumexp(1), 1e-6)


def close(name, got, expected, tolerance) -> None:
    got, expected = got.detach().double(), expected.detach().double()
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"


if __name__ == "__main__":
    main()
