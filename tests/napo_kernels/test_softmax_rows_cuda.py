"""The CUDA row kernel without a GPU: emulated on the CPU, against eager PyTorch in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from logps_cases import LinearCase, assert_rows_close, eager_linear, eager_tokens, linear_case
from torch import Tensor

from napo_kernels import linear_sequence_logps, sequence_logps
from napo_kernels.native import linear_sequence_logps as native
from napo_kernels.native import sequence_logps as native_tokens
from napo_kernels.ops.linear_sequence_logps import forward
from napo_kernels.reference import linear_sequence_logps as reference
from napo_kernels.rows import LogitMap, LowRank, RowsProblem, RowStats, Upstream, plan_targets

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PAIRS = (*((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.bfloat16), (torch.float32, torch.float16))
SAMPLE = 4096  # columns that a block looks at before the others, at most
LONG = 16384 + 4096 + 13  # columns: more than a block has under way at a time, of each dtype
HEADS: dict[str, dict[str, Any]] = {
    "one target a row": {},
    "several targets a row, duplicates": {"pairs": 40},
    "softcap, bias, scale": {"pairs": 30, "softcap": 4.0, "bias": True, "logit_scale": 0.7},
    "lora, average": {"pairs": 30, "lora": True, "average": True},
    "nearly certain": {"peak": 20.0},
}


def run(case: LinearCase, f: Callable[..., Tensor]) -> list[Tensor]:
    logps = f(case)
    logps.backward(case.upstream.to(logps.dtype))
    return [logps.detach(), *(leaf.grad for leaf in case.leaves().values())]


def ours(case: LinearCase) -> Tensor:
    return linear_sequence_logps(case.hidden, case.weight, case.targets, chunk_bytes=2000, **case.arguments())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_linear(head: str, dtype: torch.dtype, emulated_cuda: Callable[[str], None]) -> None:
    case = linear_case(dtype, shape=(11, 20, 83), **HEADS[head])
    truth, theirs = run(case.to(torch.float64), eager_linear), run(case.to(dtype), eager_linear)
    results = []
    for order in ("up", "down", "mixed"):
        emulated_cuda(order)
        results.append(run(case.to(dtype), ours))
    assert bool((results[0][0] <= 0).all())
    names = ["log-probs", *case.to(dtype).leaves()]
    for name, got, exact, peer, *again in zip(names, results[0], truth, theirs, *results[1:], strict=True):
        assert all(torch.equal(got, other) for other in again), f"{name} depends on the order of the threads"
        assert_rows_close(name, got, exact, peer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", [name for name, options in HEADS.items() if "bias" not in options])
def test_head_from_what_was_kept(
    head: str, dtype: torch.dtype, emulated_cuda: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks as on a GPU: some whole rows each."""
    case = linear_case(dtype, shape=(11, 20, 83), **HEADS[head])
    truth, theirs = run(case.to(torch.float64), eager_linear), run(case.to(dtype), eager_linear)
    monkeypatch.setattr(forward, "head_backward", None)
    emulated_cuda("mixed")
    for name, got, exact, peer in zip(
        ["log-probs", *case.leaves()], run(case.to(dtype), ours), truth, theirs, strict=True
    ):
        assert_rows_close(name, got, exact, peer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens(dtype: torch.dtype, emulated_cuda: Callable[[str], None]) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 5, 83, generator=g)).to(dtype)
    labels = torch.randint(83, (3, 5), generator=g).masked_fill(torch.rand(3, 5, generator=g) < 0.4, -100)
    logits[0, 0, labels[0, 0].clamp(min=0)] += 25
    logits = torch.where((labels == -100)[..., None], torch.nan, logits)  # they are not read
    upstream = torch.randn(3, generator=g)
    truth, theirs, mine, inplace = (
        x.clone().requires_grad_() for x in (logits.nan_to_num().double(), logits.nan_to_num(), logits, logits)
    )
    expected, peer, got = eager_tokens(truth, labels), eager_tokens(theirs, labels), sequence_logps(mine, labels)
    for logps in (expected, peer, got):
        logps.backward(upstream.to(logps.dtype))
    emulated_cuda("mixed")
    again = sequence_logps(inplace * 1, labels, inplace_backward=True)
    (gradient,) = torch.autograd.grad(again, inplace, upstream)
    assert torch.equal(again, got) and torch.equal(gradient, mine.grad)
    assert bool((got <= 0).all()) and float(mine.grad[labels == -100].abs().sum()) == 0.0
    assert_rows_close("log-probs", got, expected, peer)
    assert_rows_close("gradient", *(x.grad.flatten(0, 1) for x in (mine, truth, theirs)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_longer_than_a_block_written_in_half_the_bytes(
    dtype: torch.dtype, emulated_cuda: Callable[[str], None]
) -> None:
    """fp32 logits of unaligned rows, as a matmul on CUDA leaves them, into another dtype; no and many targets."""
    g = torch.Generator().manual_seed(0)
    rows, vocabulary, pairs = 4, 2051, 80
    targets, of_pair = torch.randint(vocabulary, (pairs,), generator=g), torch.randint(1, rows, (pairs,), generator=g)
    plan, _ = plan_targets(targets, of_pair, rows, vocabulary)
    a = 4 * torch.randn(rows, vocabulary, generator=g)
    logit_map = LogitMap(0.7, torch.randn(vocabulary, generator=g), 9.0)
    used = int(plan.start[-1])
    of_row = torch.repeat_interleave(torch.arange(rows), plan.start.diff())
    z, slope = torch.zeros(2, pairs)
    mapped, slopes = reference.apply_map(a, logit_map)
    z[:used], slope[:used] = mapped[of_row, plan.columns[:used]], slopes[of_row, plan.columns[:used]]
    grad = torch.randn(pairs, generator=g)
    results = []
    for kernel, kind, out_dtype in ((reference, torch.float64, torch.float64), (native, torch.float32, dtype)):
        stats = RowStats(torch.zeros(pairs, dtype=kind), slope.to(kind), *torch.zeros(3, rows, dtype=kind))
        stored, gradient = (torch.full((rows, vocabulary), torch.nan, dtype=out_dtype) for _ in range(2))
        there = logit_map._replace(bias=logit_map.bias.to(kind))
        kernel.rows_forward(a.to(kind), stored, 0, RowsProblem(plan, there, z.to(kind), stats, 0.25, vocabulary))
        upstream = Upstream(plan, stats, grad.to(kind))
        kernel.rows_gradient(a[:, 5:].to(kind), gradient[:, 5:], 5, there, upstream)
        results.append([stored, gradient[:, 5:], *stats])
    for result in results:
        make_independent_of_the_shift(result)
    for name, exact, got in zip(("stored", "gradient", *RowStats._fields[:-1]), *results, strict=True):
        # half a step of the dtype, and fp32's own errors, which grow with the size of an exponent
        tolerance = 0.6 * torch.finfo(dtype if name in ("stored", "gradient") else got.dtype).eps + 3e-5
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


# logits are overwritten only by numbers of their own dtype
@pytest.mark.parametrize(("dtype", "in_place"), [*((dtype, False) for dtype in DTYPES), (torch.float32, True)])
def test_a_row_whose_first_columns_tell_little_of_its_largest_logit(
    dtype: torch.dtype, in_place: bool, emulated_cuda: Callable[[str], None]
) -> None:
    """The largest logit lies in reach of that of the first SAMPLE columns, or far above it, or those are all -inf."""
    g = torch.Generator().manual_seed(0)
    a = 4 * torch.randn(6, SAMPLE + 2051, generator=g)
    far = torch.tensor([0.0, 30.0, 100.0, 1000.0, -500.0, 20.0])
    a[:, SAMPLE:] += far[:, None]
    a[4:, :SAMPLE] = -torch.inf
    targets, of_pair = torch.tensor([SAMPLE + 952, 4, SAMPLE + 12, SAMPLE + 13, SAMPLE, SAMPLE + 2050]), torch.arange(6)
    plan, _ = plan_targets(targets, of_pair, *a.shape)
    results = []
    for kernel, kind, out_dtype in ((reference, torch.float64, torch.float64), (native, torch.float32, dtype)):
        logits = a.to(kind)
        stats = RowStats(torch.zeros(6, dtype=kind), torch.ones(6, dtype=kind), *torch.zeros(3, 6, dtype=kind))
        stored = logits if in_place else torch.full(a.shape, torch.nan, dtype=out_dtype)
        z = logits[of_pair, targets].clone()
        kernel.rows_forward(logits, stored, 0, RowsProblem(plan, LogitMap(), z, stats, 0.25, a.shape[1]))
        results.append([stored, *stats])
        make_independent_of_the_shift(results[-1])
    for name, exact, got in zip(("stored", *RowStats._fields[:-1]), *results, strict=True):
        tolerance = 0.6 * torch.finfo(dtype if name == "stored" else got.dtype).eps + 2e-4  # of logits up to 1000
        # atol: half of fp16's least number, 2^-24, over the scale that numbers are stored with
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=1.2e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 3, 17, LONG])
def test_tokens_of_any_alignment(dtype: torch.dtype, columns: int, emulated_cuda: Callable[[str], None]) -> None:
    """Rows that begin and end anywhere, differently where the gradient is written; nothing beside them is written."""
    emulated_cuda("mixed")
    g = torch.Generator().manual_seed(0)
    rows = 8
    logits = places(rows, columns, dtype, 1)
    logits.copy_(3 * torch.randn(rows, columns, generator=g))
    labels = torch.tensor([0, columns - 1, columns // 2, -100, 5, 8, 16, 11]).clamp(max=columns - 1)
    upstream = torch.randn(rows, generator=g)
    z = logits.double()
    truth = torch.log_softmax(z, 1)[torch.arange(rows), labels.clamp(min=0)].masked_fill(labels < 0, 0.0)
    exact = (torch.nn.functional.one_hot(labels.clamp(min=0), columns) - z.softmax(1)) * upstream[:, None]
    exact[labels < 0] = 0.0
    stats = native_tokens.token_forward(logits[:, None], labels[:, None], -100)
    torch.testing.assert_close(stats[0][:, 0].double(), truth, rtol=2e-6, atol=1e-7)
    for step in (1, 6):  # the place of a row in its vectors: that of the logits, or in each row another one from there
        out = places(rows, columns, dtype, step)
        native_tokens.token_backward(
            logits[:, None], labels[:, None], -100, stats, upstream, out[:, None], out_is_zero=False
        )
        assert_written(out, exact, 0.6 * torch.finfo(dtype).eps + 1e-5)
    native_tokens.token_backward(
        logits[:, None], labels[:, None], -100, stats, upstream, logits[:, None], out_is_zero=False
    )
    assert_written(logits, exact, 0.6 * torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_whose_first_columns_tell_little_of_its_largest_logit(
    dtype: torch.dtype, emulated_cuda: Callable[[str], None]
) -> None:
    emulated_cuda("mixed")
    g = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(7, 1, SAMPLE + 2051, generator=g)
    logits[:6, :, SAMPLE:] += torch.tensor([0.0, 30.0, 100.0, 1000.0, -500.0, 20.0])[:, None, None]
    logits[4:6, :, :SAMPLE] = -torch.inf
    labels = torch.tensor([SAMPLE + 952, 4, SAMPLE + 12, SAMPLE + 13, SAMPLE, 4, SAMPLE + 2050])[:, None]
    logits[6] = -torch.inf  # but for the label, which is certain then
    logits[6, 0, labels[6]] = 3.0
    logits = logits.to(dtype)
    logp, m, log_sum = (x.double() for x in native_tokens.token_forward(logits, labels, -100))
    z = logits.double()
    truth = torch.log_softmax(z, 2).gather(2, labels[:, :, None])[:, :, 0]
    torch.testing.assert_close(logp, truth, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(m + log_sum, z.logsumexp(2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS)
@pytest.mark.parametrize("columns", [3, 17, LONG])
@pytest.mark.parametrize("mapped", [False, True], ids=["", "bias, softcap"])
def test_rows_of_any_alignment(
    dtype: torch.dtype, out_dtype: torch.dtype, columns: int, mapped: bool, emulated_cuda: Callable[[str], None]
) -> None:
    """Like test_tokens_of_any_alignment, with targets at the ends of rows and side by side, and a row without one."""
    emulated_cuda("mixed")
    g = torch.Generator().manual_seed(0)
    rows, vocabulary, first_column = 8, columns + 9, 4
    logits = places(rows, columns, dtype, 1)
    logits.copy_(3 * torch.randn(rows, columns, generator=g))
    per_row = [[0], [columns - 1], [0, 1, 2], [], [columns - 2, columns - 1], *[list(range(2, columns, 5))[:40]] * 3]
    targets = torch.tensor([v for some in per_row for v in some])
    of_pair = torch.repeat_interleave(torch.arange(rows), torch.tensor([len(some) for some in per_row]))
    logit_map = LogitMap(0.7, torch.randn(vocabulary, generator=g), 9.0) if mapped else LogitMap(0.7)
    # Forward takes the row as it is, the gradient a stretch of a longer one with targets outside.
    whole, _ = plan_targets(targets, of_pair, rows, columns)
    outside = torch.tensor([1, vocabulary - 1])
    stretch, _ = plan_targets(
        torch.cat([targets + first_column, outside]), torch.cat([of_pair, outside.clamp(max=7)]), rows, vocabulary
    )
    z, slope = reference.apply_map(
        logits.double(), logit_map._replace(bias=None if logit_map.bias is None else logit_map.bias[:columns].double())
    )
    z, slope = z[of_pair, targets], slope[of_pair, targets]
    grad = torch.randn(len(targets) + 2, generator=g)
    results = []
    for kernel, kind in ((reference, torch.float64), (native, torch.float32)):
        there = logit_map._replace(bias=None if logit_map.bias is None else logit_map.bias.to(kind))
        here = there._replace(bias=None if there.bias is None else there.bias[:columns])
        a = logits.double() if kernel is reference else logits
        stats = RowStats(torch.zeros(len(targets), dtype=kind), slope.to(kind), *torch.zeros(3, rows, dtype=kind))
        for step in (1, 6):
            stored, gradient = (
                torch.empty(rows, columns, dtype=kind)
                if kernel is reference
                else places(rows, columns, out_dtype, step)
                for _ in range(2)
            )
            kernel.rows_forward(a, stored, 0, RowsProblem(whole, here, z.to(kind), stats, 0.25, columns))
            longer = RowStats(
                torch.cat([stats.target_logp, -torch.ones(2, dtype=kind)]),
                torch.cat([stats.target_slope, torch.ones(2, dtype=kind)]),
                *stats[2:],
            )
            kernel.rows_gradient(a, gradient, first_column, there, Upstream(stretch, longer, grad.to(kind)))
            results.append((stored, gradient, stats))
    (exact_stored, exact_gradient, exact), _, *mine = results
    tolerance = 0.6 * torch.finfo(out_dtype).eps + 3e-5
    for stored, gradient, stats in mine:
        assert_written(gradient, exact_gradient, tolerance)
        assert_written(stored, exact_stored * exact.store_rescale[:, None] / stats.store_rescale[:, None], tolerance)
        for name in ("target_logp", "row_max", "row_log_sum"):
            torch.testing.assert_close(getattr(stats, name).double(), getattr(exact, name), rtol=3e-6, atol=3e-6)


def places(rows: int, columns: int, dtype: torch.dtype, step: int) -> Tensor:
    """(rows, columns) in memory full of 7, the first row a vector from its begin; each begins ``step`` numbers further
    in its vectors than the one before, so that eight of an odd step are all places that there are."""
    stride = -(-(columns + 16) // 16) * 16 + step
    memory = torch.full((16 + rows * stride,), 7.0, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory[8:].as_strided((rows, columns), (stride, 1))


def assert_written(got: Tensor, exact: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=1e-7)
    memory = torch.empty(0, dtype=got.dtype).set_(got.untyped_storage()).clone()
    memory[got.storage_offset() :].as_strided(got.shape, got.stride()).fill_(7.0)
    assert bool((memory == 7).all()), "numbers beside the rows were written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 40, 123, 4104])
@pytest.mark.parametrize("rank", [4, 16])
def test_gathers(dtype: torch.dtype, width: int, rank: int, emulated_cuda: Callable[[str], None]) -> None:
    """target_logits and hidden_gradient: rows of a whole number of vectors and others; more targets in a row than a
    block has threads, none, and fewer rows than a block has warps."""
    emulated_cuda("mixed")
    g = torch.Generator().manual_seed(0)
    rows, vocabulary = 5, 97
    hidden, weight, low, lora_b = (
        torch.randn(n, k, generator=g).to(dtype) / k**0.5
        for n, k in ((rows, width), (vocabulary, width), (rows, rank), (vocabulary, rank))
    )
    of_pair = torch.tensor([0] * 90 + [2, 2, 4])
    plan, _ = plan_targets(
        torch.cat([torch.randperm(vocabulary, generator=g)[:90], torch.tensor([3, 96, 0])]), of_pair, rows, vocabulary
    )
    grad, logp = torch.randn(len(of_pair), generator=g), -torch.rand(len(of_pair), generator=g)
    stats = RowStats(logp, torch.rand(len(of_pair), generator=g), *torch.rand(3, rows, generator=g))
    results = []
    for kernel, kind in ((reference, torch.float64), (native, dtype)):
        h, w, a, b = (x.to(kind) for x in (hidden, weight, low, lora_b))
        wide = torch.promote_types(kind, torch.float32)
        there = RowStats(*(x.to(wide) for x in stats))
        out, float_out = (
            torch.full((rows, width), torch.nan, dtype=kind),
            torch.full((rows, width), torch.nan, dtype=wide),
        )
        upstream = Upstream(plan, there, grad.to(wide))
        for target in (out, float_out):
            kernel.hidden_gradient(target, w, h, upstream, 0.7)
        alone = torch.full((rows, rank), torch.nan, dtype=wide)
        kernel.hidden_gradient(alone, b, None, upstream, 0.7)
        of_targets = kernel.target_logits(h, w, LowRank(a, b, 0.5), plan, LogitMap(0.7, None, 9.0))
        results.append([*of_targets, out, float_out, alone])
    for exact, got in zip(*results, strict=True):
        size = float(exact.abs().max())
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), exact, rtol=0.6 * eps, atol=(1e-6 + 0.1 * eps) * size)


def test_dtypes_that_no_kernel_writes_are_refused(emulated_cuda: Callable[[str], None]) -> None:
    emulated_cuda("up")
    plan, _ = plan_targets(torch.zeros(1, dtype=torch.int64), None, 1, 8)
    stats = RowStats(*torch.zeros(2, 1), *torch.zeros(3, 1))
    logits = torch.zeros(1, 8, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match="out: expected the dtype of the logits, bfloat16, or logits of float32; got float32"
    ):
        native.rows_forward(logits, torch.zeros(1, 8), 0, RowsProblem(plan, LogitMap(), torch.zeros(1), stats, 1.0, 8))
    with pytest.raises(
        ValueError, match="out: expected the dtype of the logits, bfloat16, or logits of float32; got float16"
    ):
        native.rows_gradient(logits, logits.half(), 0, LogitMap(), Upstream(plan, stats, torch.zeros(1)))


def make_independent_of_the_shift(result: list[Tensor]) -> None:
    """The numbers stored are relative to one that a kernel chooses near the row's largest logit, and so is their scale
    (the last of the statistics). Their product is not."""
    result[0] = result[0].double() * result.pop().double()[:, None]
