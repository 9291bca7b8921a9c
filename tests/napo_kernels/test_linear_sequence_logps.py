from __future__ import annotations

from typing import Any

import pytest
import torch
from logps_cases import LinearCase, assert_rows_close, eager_linear, linear_case
from torch import Tensor

from napo_kernels import linear_sequence_logps
from napo_kernels.ops.linear_sequence_logps import forward, pieces
from napo_kernels.ops.linear_sequence_logps.arguments import Head

HALF = (torch.bfloat16, torch.float16)
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several targets a row": {"pairs": 80},
    "bias and scale": {"pairs": 80, "bias": True, "logit_scale": 0.5, "average": True},
    "softcap": {"softcap": 3.0},
    "negative scale, softcap, bias": {"pairs": 80, "bias": True, "logit_scale": -0.7, "softcap": 4.0},
    "lora": {"pairs": 80, "lora": True},
    "lora, softcap, average": {"lora": True, "softcap": 5.0, "average": True},
}
SIZES: dict[str, dict[str, Any]] = {
    "random": {},
    "tiny": {"size": 1e-3},
    "peaked": {"peak": 9.0},
    "nearly certain": {"peak": 23.0},  # p(target) up to 1 - 1e-6 and beyond
    "large logits": {"size": 300.0},
}


@pytest.fixture(params=["kept", "anew"])
def logits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether backward has what forward kept of the logits, or computes them again."""
    if request.param == "anew":
        monkeypatch.setattr(pieces, "keeps", lambda *_: False)
    return str(request.param)


def frozen_where(logits: str) -> tuple[str, ...]:
    """A bias that trains would have the logits computed anew."""
    return ("bias",) if logits == "kept" else ()


def run(case: LinearCase, **options: Any) -> Tensor:
    logps = linear_sequence_logps(case.hidden, case.weight, case.targets, **case.arguments(), **options)
    logps.backward(case.upstream.to(logps.dtype))
    return logps


def eager(case: LinearCase) -> Tensor:
    logps = eager_linear(case)
    logps.backward(case.upstream.to(logps.dtype))
    return logps


def compare(case: LinearCase, dtype: torch.dtype, frozen: tuple[str, ...] = (), **options: Any) -> None:
    truth, theirs, ours = case.to(torch.float64, frozen), case.to(dtype, frozen), case.to(dtype, frozen)
    expected, peer, got = eager(truth), eager(theirs), run(ours, **options)
    assert bool((got <= 0).all())
    assert_rows_close("log-probs", got, expected, peer)
    for name, leaf in ours.leaves().items():
        if leaf.requires_grad:
            assert_rows_close(name, leaf.grad, truth.leaves()[name].grad, theirs.leaves()[name].grad)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("head", HEADS)
def test_every_head(head: str, dtype: torch.dtype, logits: str) -> None:
    compare(linear_case(dtype, **HEADS[head]), dtype, frozen_where(logits), chunk_bytes=9000)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_logits(size: str, dtype: torch.dtype, logits: str) -> None:
    compare(linear_case(dtype, shape=(48, 96, 1021), **SIZES[size]), dtype)


def test_the_nearly_certain_case_is_one() -> None:
    case = linear_case(torch.bfloat16, shape=(48, 96, 1021), **SIZES["nearly certain"])
    logits = case.hidden.double() @ case.weight.double().t()
    missing = -torch.expm1(torch.log_softmax(logits, -1).gather(1, case.targets[:, None]))
    assert float(missing.min()) < 1e-6 < float(missing.max()) < 1e-4


def test_huge_logits_in_bf16() -> None:
    """Logits up to 3e4, where a bf16 step is 128."""
    case = linear_case(torch.bfloat16, size=8e3, peak=0.0)
    assert float((case.hidden.float() @ case.weight.float().t()).abs().max()) > 3e4
    compare(case, torch.bfloat16)


def test_every_instruction_set(isa: str) -> None:
    for dtype in (*HALF, torch.float32):
        compare(linear_case(dtype, pairs=70, bias=True, softcap=6.0, seed=3), dtype)
        compare(linear_case(dtype, shape=(20, 33, 1029), seed=4), dtype)
        compare(linear_case(dtype, shape=(20, 33, 1029), pairs=70, seed=5), dtype, chunk_bytes=9000)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("bias", ["growing", "falling", "masked"])
def test_pieces_of_the_vocabulary(bias: str, dtype: torch.dtype, backend: str | None, logits: str) -> None:
    """Maxima that grow or fall by more than fp16 holds from piece to piece of 4 columns, pieces whose logits are all
    -inf, pieces that hold only targets of a row (its first, its last), and targets of a row in several pieces."""
    vocabulary, rows = 64, 6
    of_row = [[0, 1, 2, 3, 20, 21, 63], [16, 17, 18, 19, 33], [60, 61, 62, 63], [5], [40, 40, 2], [0]]
    case = linear_case(dtype, shape=(rows, 16, vocabulary), pairs=sum(map(len, of_row)))
    values = {
        "growing": torch.linspace(0.0, 90.0, vocabulary),
        "falling": torch.linspace(90.0, 0.0, vocabulary),
        "masked": torch.zeros(vocabulary).index_fill(0, torch.tensor([*range(6, 16), *range(24, 32), 59]), -torch.inf),
    }
    case = case._replace(
        targets=torch.tensor([v for row in of_row for v in row]),
        rows=torch.repeat_interleave(torch.arange(rows), torch.tensor([len(x) for x in of_row])),
        bias=values[bias].to(dtype),
    )
    compare(case, dtype, frozen_where(logits), backend=backend, chunk_bytes=4 * rows * dtype.itemsize)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_upstreams_that_cancel(dtype: torch.dtype, logits: str) -> None:
    """A prompt's last row predicts the first token of the chosen title and of four others, one of them twice: its
    upstreams sum to exactly 0, those of its targets do not. One token is a target of several rows."""
    case = linear_case(dtype, shape=(4, 24, 90), pairs=8)._replace(
        targets=torch.tensor([7, 80, 3, 80, 41, 7, 7, 12]),
        rows=torch.tensor([0, 0, 0, 0, 0, 1, 2, 3]),
        sequence_ids=torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]),
        num_sequences=5,
        upstream=torch.tensor([1.0, -0.25, -0.25, -0.25, -0.25]),
    )
    for chunk_bytes in (None, 4 * 16 * dtype.itemsize):
        compare(case, dtype, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("head", ["several targets a row", "softcap", "lora"])
def test_rows_in_pieces_are_kept(head: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes as on a GPU: kernels take whole rows, some rows at a time."""
    monkeypatch.setattr(pieces, "cuts_columns", lambda _: False)
    monkeypatch.setattr(pieces, "keeps", lambda *_: True)
    monkeypatch.setattr(forward, "head_backward", None)
    case = linear_case(dtype, **HEADS[head])
    plan = pieces.Plan.of(Head(case.hidden, case.weight, None, None, None), 9000)
    assert plan.keeps and plan.row_piece < len(case.hidden) and plan.column_piece == len(case.weight)
    compare(case, dtype, backend="reference", chunk_bytes=9000)


@pytest.mark.parametrize(
    ("trains", "expected"),
    [("hidden", 2), ("weight", 2), ("hidden, weight", 3), ("hidden, lora A, lora B", 2), ("hidden, weight, bias", 4)],
)
def test_matmuls_of_a_step(trains: str, expected: int) -> None:
    """Nothing is computed again where it was kept."""
    rows, width, vocabulary = 24, 40, 300
    case = linear_case(torch.bfloat16, shape=(rows, width, vocabulary), bias="bias" in trains, lora="lora" in trains)
    case = case.to(torch.bfloat16)
    for name, leaf in case.leaves().items():
        leaf.requires_grad_(name in trains.split(", "))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run(case)
    matmuls = [e.input_shapes[:2] for e in profile.events() if e.name == "aten::mm"]
    assert sum({*a, *b} == {rows, width, vocabulary} for a, b in matmuls) == expected


def test_what_is_kept() -> None:
    def kept(num_rows: int, *, budget: int = 12_000, trains: str = "weight", on: str = "cpu") -> int:
        shapes = {"hidden": (num_rows, 20), "weight": (300, 20), "bias": (300,), "a": (2, 20), "b": (300, 2)}
        tensors = {k: torch.empty(v, device=on, requires_grad=k in trains.split(", ")) for k, v in shapes.items()}
        plan = pieces.Plan.of(Head(*tensors.values()), budget)
        return plan.column_piece if plan.keeps else 0

    assert kept(10) == 300 and kept(10, trains="a, b") == 300 and kept(10, trains="hidden") == 0
    assert kept(20) == 128 and kept(21) == 0, "no more than the weight's gradient"
    assert kept(20, trains="a, b") == 0, "no more than a chunk"
    assert kept(20, on="meta") == 300, "rows are cut"
    assert kept(10, trains="weight, bias") == 0
    with torch.no_grad():
        assert kept(10) == 0


@pytest.mark.parametrize("head", HEADS)
def test_the_reference_in_fp64(head: str, logits: str) -> None:
    """The equations themselves: equal to autograd through log_softmax, and to differences (gradcheck)."""
    options = HEADS[head]
    frozen = frozen_where(logits)
    case = linear_case(torch.float64, **options).to(torch.float64, frozen)
    same = case.to(torch.float64, frozen)
    torch.testing.assert_close(run(case, chunk_bytes=9000), eager(same), rtol=1e-11, atol=1e-11)
    for name, leaf in case.leaves().items():
        torch.testing.assert_close(leaf.grad, same.leaves()[name].grad, rtol=1e-9, atol=1e-11)
    small = linear_case(torch.float64, shape=(4, 3, 6), **(options | ({"pairs": 9} if "pairs" in options else {})))
    small = small.to(torch.float64, frozen)
    names = list(small.leaves())

    def f(*leaves: Tensor) -> Tensor:
        values = dict(zip(names, leaves, strict=True))
        lora = (values["lora A"], values["lora B"], small.lora[2]) if small.lora else None
        changed = small._replace(bias=values.get("bias"), lora=lora)
        return linear_sequence_logps(values["hidden"], values["weight"], small.targets, **changed.arguments())

    assert torch.autograd.gradcheck(f, tuple(small.leaves().values()))


@pytest.mark.parametrize("size", SIZES)
def test_the_reference_in_bf16(size: str, logits: str) -> None:
    compare(linear_case(torch.bfloat16, pairs=60, **SIZES[size]), torch.bfloat16, backend="reference")


@pytest.mark.parametrize("trains", ["nothing", "head", "weight", "lora", "body"])
def test_what_is_frozen_does_not_matter(trains: str) -> None:
    case = linear_case(torch.float32, pairs=60, bias=True, lora=True)
    everything, some = case.to(torch.float32), case.to(torch.float32)
    expected = run(everything)
    for name, leaf in some.leaves().items():
        leaf.requires_grad_(trains in ("body" if name == "hidden" else "head", name.split()[0]))
    logps = linear_sequence_logps(some.hidden, some.weight, some.targets, **some.arguments())
    assert torch.equal(logps, expected)
    assert logps.requires_grad == (trains != "nothing")
    if logps.requires_grad:
        logps.backward(case.upstream)
    for name, leaf in some.leaves().items():
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, everything.leaves()[name].grad)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_and_runs(dtype: torch.dtype, logits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise equal from run to run; equal within rounding for any chunk size."""
    case = linear_case(dtype, pairs=90, bias=True)
    results = []
    for chunk_bytes, rows in ((None, 37), (None, 37), (5000, 37), (5000, 37), (1, 37), (40000, 37), (5000, 16)):
        monkeypatch.setattr(pieces, "ROWS", rows)
        mine = case.to(dtype, frozen_where(logits))
        logps = run(mine, chunk_bytes=chunk_bytes)
        results.append([logps, *(x.grad for x in mine.leaves().values() if x.requires_grad)])
    for first, again in (results[:2], results[2:4]):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in results[2:]:
        for a, b in zip(results[0], other, strict=True):
            assert float((a - b).detach().norm() / b.detach().norm()) <= 2 * torch.finfo(dtype).eps


def planned(hidden: Tensor, vocabulary: int, budget: int) -> tuple[pieces.Pieces, pieces.Pieces]:
    """Rows and columns of the logits that exist at a time."""
    plan = pieces.Plan(0, 0, 0, keeps=False, budget=budget).known(hidden, vocabulary)
    return pieces.Pieces(len(hidden), plan.row_piece), pieces.Pieces(vocabulary, plan.column_piece)


@pytest.mark.parametrize("rows", [1, 7, 63, 126, 504, 2016, 9000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pieces_are_whole_tiles_within_the_budget(rows: int, dtype: torch.dtype) -> None:
    hidden = torch.empty(rows, 8, dtype=dtype)
    for vocabulary in (1, 31, 1029, 32000, 151936):
        for budget in (1, 100 * dtype.itemsize, 1 << 20, pieces.default_budget(hidden, vocabulary)):
            by_rows, by_columns = planned(hidden, vocabulary, budget)
            widths = [width for _, width in by_columns]
            assert sum(widths) == vocabulary and sum(size for _, size in by_rows) == rows
            assert max(widths) == 1 or max(widths) * by_rows.size * dtype.itemsize <= budget
            if len(widths) > 1 and budget >= 2 * pieces.COLUMNS * by_rows.size * dtype.itemsize:
                assert widths[0] % pieces.COLUMNS == 0


@pytest.mark.parametrize(("width", "whole"), [(576, 2048), (2048, 2048), (2304, 1024), (4096, 1024)])
def test_pieces_on_a_gpu_are_rows_that_fill_it(width: int, whole: int) -> None:
    """Meta tensors stand in for a GPU's: pieces depend on shapes and on not being on a CPU."""
    for rows, vocabulary in ((8192, 128256), (9000, 50257), (100, 151936)):
        hidden = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
        budget = pieces.default_budget(hidden, vocabulary)
        by_rows, by_columns = planned(hidden, vocabulary, budget)
        sizes = [size for _, size in by_rows]
        assert sum(sizes) == rows and by_columns.count == 1
        assert all(size == whole for size in sizes[:-1]) and sizes[-1] <= whole
        smaller = [size for _, size in planned(hidden, vocabulary, budget // 3)[0]]
        assert all(size % 256 == 0 for size in smaller[:-1]) and max(smaller) <= whole / 3


def test_no_grad_and_inference_mode_give_the_same() -> None:
    case = linear_case(torch.bfloat16).to(torch.bfloat16)
    for chunk_bytes in (None, 5000):
        arguments = {**case.arguments(), "chunk_bytes": chunk_bytes}
        expected = run(case, chunk_bytes=chunk_bytes)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                logps = linear_sequence_logps(case.hidden, case.weight, case.targets, **arguments)
            assert torch.equal(logps, expected) and not logps.requires_grad


def test_retain_graph_yes_second_derivative_no(logits: str) -> None:
    case = linear_case(torch.float32, pairs=60, lora=True).to(torch.float32)
    leaves = list(case.leaves().values())
    logps = linear_sequence_logps(case.hidden, case.weight, case.targets, **case.arguments(), chunk_bytes=9000)
    first = torch.autograd.grad(logps, leaves, case.upstream, retain_graph=True)
    second = torch.autograd.grad(logps, leaves, case.upstream, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for leaf in leaves[:2]:
        with pytest.raises(RuntimeError, match="second derivative is not implemented"):
            torch.autograd.grad(logps, leaf, case.upstream.requires_grad_(), create_graph=True)


def test_autocast() -> None:
    case = linear_case(torch.float32, pairs=60, lora=True)
    mine, halves = case.to(torch.float32), case.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logps = run(mine)
    assert torch.equal(logps, run(halves)) and logps.dtype == torch.float32
    for name, leaf in mine.leaves().items():
        assert leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad, halves.leaves()[name].grad.float())


@pytest.mark.parametrize("column_piece", [None, 8, 20])  # None: nothing is kept
@pytest.mark.parametrize("head", ["plain", "lora", "bias and scale"])
def test_opcheck(head: str, column_piece: int | None) -> None:
    case = linear_case(torch.float32, shape=(6, 8, 20), **(HEADS[head] | {"pairs": 10})).to(torch.float32)
    a, b, scale = case.lora or (None, None, 1.0)
    bias = case.bias.detach() if case.bias is not None and column_piece else case.bias
    torch.library.opcheck(
        torch.ops.napo.linear_sequence_logps,
        (case.hidden, case.weight, bias, a, b, case.targets, case.rows, case.sequence_ids),
        {
            "num_sequences": case.num_sequences,
            "average": case.average,
            "keep_context": True,
            "row_piece": 6,
            "column_piece": column_piece or 20,
            "column_piece_again": 20,
            "keeps": column_piece is not None,
            "budget": 0,
            "logit_scale": case.logit_scale,
            "softcap": 0.0,
            "lora_scale": scale,
            "backend": None,
        },
    )


@pytest.mark.parametrize("dynamic", [None, True])  # True: numbers and sizes are symbols from the start
def test_compile_full_graph(dynamic: bool | None) -> None:
    case = linear_case(torch.bfloat16, pairs=60)
    plain, fused = case.to(torch.bfloat16), case.to(torch.bfloat16)
    expected = run(plain)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def f(hidden: Tensor, weight: Tensor, **arguments: Any) -> Tensor:
        return linear_sequence_logps(hidden, weight, fused.targets, **arguments)

    logps = f(fused.hidden, fused.weight, **fused.arguments())
    logps.backward(case.upstream)
    assert torch.equal(logps, expected)
    assert torch.equal(fused.hidden.grad, plain.hidden.grad)
    assert torch.equal(fused.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("trains", ["nothing", "weight", "bias", "lora"])
@pytest.mark.parametrize("vocabulary", [512, 20_000])
@pytest.mark.parametrize("form", ["rows", "hidden"])
def test_compile_with_rows_selected_by_a_mask_within(form: str, vocabulary: int, trains: str) -> None:
    """How many rows there are is known when the graph runs."""
    torch.compiler.reset()
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: (torch.randn(*shape, generator=g) / 4).bfloat16()  # noqa: E731
    labels = torch.randint(vocabulary, (64,), generator=g).masked_fill(torch.rand(64, generator=g) < 0.3, -100)
    tensors = [draw(64, 16), draw(vocabulary, 16), draw(vocabulary), draw(2, 16), draw(vocabulary, 2)]
    trained = {"nothing": [0], "weight": [0, 1], "bias": [0, 2], "lora": [0, 3, 4]}[trains]

    def f(hidden: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
        found = (labels != -100).nonzero()[:, 0]
        picked = {"rows": found} if form == "rows" else {}
        hidden = hidden if form == "rows" else hidden[found]
        options = {"sequence_ids": found // 8, "num_sequences": 8, "bias": bias, "lora": (a, b, 0.5), **picked}
        return linear_sequence_logps(hidden, weight, labels[found], **options)

    results = []
    for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        for given in (labels, labels.masked_fill(torch.arange(64) < 20, -100)):  # another number of rows
            leaves = [x.clone().requires_grad_(i in trained) for i, x in enumerate(tensors)]
            logps = function(*leaves, given)
            results.append((logps, *torch.autograd.grad(logps.sum(), [leaves[i] for i in trained])))
    for eager, compiled in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


def test_strided_operands() -> None:
    case = linear_case(torch.bfloat16)
    wide = torch.randn(37, 2 * 123).bfloat16()
    wide[:, :123] = case.hidden
    column_major = case.weight.t().contiguous().t()
    plain = linear_sequence_logps(case.hidden, case.weight, case.targets, **case.arguments())
    strided = linear_sequence_logps(wide[:, :123], column_major, case.targets, **case.arguments())
    torch.testing.assert_close(strided, plain, rtol=2e-3, atol=2e-3)


def test_nothing_to_do() -> None:
    weight, none = torch.randn(9, 4), torch.zeros(0, dtype=torch.int64)
    hidden = torch.randn(0, 4, requires_grad=True)
    logps = linear_sequence_logps(hidden, weight, none, sequence_ids=none, num_sequences=3, average=True)
    assert torch.equal(logps, torch.zeros(3))
    logps.sum().backward()
    assert hidden.grad.shape == (0, 4)
    trained = weight.clone().requires_grad_()
    linear_sequence_logps(hidden, trained, none, sequence_ids=none, num_sequences=3).sum().backward()
    assert torch.equal(trained.grad, torch.zeros(9, 4))
    assert linear_sequence_logps(hidden, weight, none, sequence_ids=none, num_sequences=0).shape == (0,)
    rows = linear_sequence_logps(torch.randn(2, 4), weight, none, sequence_ids=none, num_sequences=1, rows=none)
    assert torch.equal(rows, torch.zeros(1))


@pytest.mark.parametrize("chunk_bytes", [None, 5000])
def test_masked_vocabulary_and_nan(chunk_bytes: int | None) -> None:
    """A bias of -inf takes tokens out; a NaN in the hidden states shows."""
    case = linear_case(torch.float32)
    bias = torch.zeros(507)
    bias[400:] = -torch.inf
    targets = case.targets % 400
    options = {"sequence_ids": case.sequence_ids, "num_sequences": case.num_sequences, "chunk_bytes": chunk_bytes}
    full = linear_sequence_logps(case.hidden, case.weight, targets, bias=bias, **options)
    cut = linear_sequence_logps(case.hidden, case.weight[:400], targets, **options)
    torch.testing.assert_close(full, cut)
    hidden = case.hidden.clone()
    hidden[3] = torch.nan
    poisoned = linear_sequence_logps(hidden, case.weight, targets, **options)
    assert bool(poisoned[case.sequence_ids[3]].isnan())


BAD = {
    "hidden": {"hidden": torch.zeros(4, 5, dtype=torch.int64)},
    "hidden: expected shape": {"hidden": torch.zeros(5)},
    r"weight: expected \(V, H\)": {"weight": torch.zeros(7, 6)},
    "weight: expected the dtype of hidden": {"weight": torch.zeros(7, 5, dtype=torch.bfloat16)},
    "weight: expected at least one": {"weight": torch.zeros(0, 5)},
    "targets: expected int64": {"targets": torch.zeros(4)},
    r"targets: expected values in \[0, 7\), got 7 at position 1": {"targets": torch.tensor([0, 7, 0, 0])},
    r"targets: expected values in \[0, 7\), got -1": {"targets": torch.tensor([-1, 6, 0, 0])},
    "rows: needed": {"targets": torch.tensor([1, 2]), "sequence_ids": torch.tensor([0, 0])},
    "rows: expected values": {"rows": torch.tensor([0, 1, 2, 4])},
    "rows: expected int64": {"rows": torch.tensor([0.0, 1.0, 2.0, 3.0])},
    "rows: expected one for each": {"rows": torch.tensor([0, 1])},
    "sequence_ids: expected one for each": {"sequence_ids": torch.tensor([0])},
    "sequence_ids: expected values": {"sequence_ids": torch.tensor([0, 0, 0, 2])},
    "weight: expected device": {"weight": torch.zeros(7, 5, device="meta")},
    "sequence_ids: expected device": {"sequence_ids": torch.zeros(4, dtype=torch.int64, device="meta")},
    "num_sequences": {"num_sequences": -1},
    "bias": {"bias": torch.zeros(6)},
    "logit_scale": {"logit_scale": 0.0},
    "softcap": {"softcap": -1.0},
    "chunk_bytes": {"chunk_bytes": 0},
    "lora: expected A": {"lora": (torch.zeros(2, 4), torch.zeros(7, 2), 1.0)},
    r"lora: expected \(A": {"lora": (torch.zeros(2, 4), torch.zeros(7, 2))},
    "backend: expected None": {"backend": "tpu"},
    "backend: 'cuda' cannot run|backend: 'cuda' does not serve": {"backend": "cuda"},
    "backend: 'cpu' computes in float32": {
        "backend": "cpu",
        "hidden": torch.zeros(4, 5, dtype=torch.float64),
        "weight": torch.zeros(7, 5, dtype=torch.float64),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    good: dict[str, Any] = {
        "hidden": torch.zeros(4, 5),
        "weight": torch.zeros(7, 5),
        "targets": torch.tensor([0, 1, 2, 3]),
        "sequence_ids": torch.tensor([0, 0, 1, 1]),
        "num_sequences": 2,
    }
    linear_sequence_logps(**good)
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_sequence_logps(**(good | BAD[message]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("head", HEADS)
def test_on_a_gpu(head: str, backend: str) -> None:
    for dtype in (*HALF, torch.float32):
        case = linear_case(dtype, **HEADS[head])
        truth, theirs, ours = case.to(torch.float64), case.to(dtype), case.to(dtype)
        expected, peer = eager(truth), eager(theirs)

        def move(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.detach().cuda().requires_grad_(x.requires_grad)
            return tuple(move(y) for y in x) if type(x) is tuple else x

        there = LinearCase(*(move(x) for x in ours))
        got = run(there, backend=backend, chunk_bytes=20000)
        assert torch.equal(got, run(LinearCase(*(move(x) for x in ours)), backend=backend, chunk_bytes=20000))
        assert_rows_close("log-probs", got.cpu(), expected, peer)
        for name, leaf in there.leaves().items():
            assert_rows_close(name, leaf.grad.cpu(), truth.leaves()[name].grad, theirs.leaves()[name].grad)
