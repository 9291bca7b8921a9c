from __future__ import annotations

from typing import Any

import pytest
import torch
from logps_cases import LinearCase, assert_rows_close, eager_linear, linear_case
from torch import Tensor

from napo_kernels import linear_sequence_logps
from napo_kernels.ops import output_head

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


def run(case: LinearCase, **options: Any) -> Tensor:
    logps = linear_sequence_logps(case.hidden, case.weight, case.targets, **case.arguments(), **options)
    logps.backward(case.upstream.to(logps.dtype))
    return logps


def eager(case: LinearCase) -> Tensor:
    logps = eager_linear(case)
    logps.backward(case.upstream.to(logps.dtype))
    return logps


def compare(case: LinearCase, dtype: torch.dtype, **options: Any) -> None:
    truth, theirs, ours = case.to(torch.float64), case.to(dtype), case.to(dtype)
    expected, peer, got = eager(truth), eager(theirs), run(ours, **options)
    assert bool((got <= 0).all())
    assert_rows_close("log-probs", got, expected, peer)
    for name, leaf in ours.leaves().items():
        assert_rows_close(name, leaf.grad, truth.leaves()[name].grad, theirs.leaves()[name].grad)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("head", HEADS)
def test_every_head(head: str, dtype: torch.dtype) -> None:
    compare(linear_case(dtype, **HEADS[head]), dtype, chunk_bytes=9000)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_logits(size: str, dtype: torch.dtype) -> None:
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
def test_pieces_of_the_vocabulary(bias: str, dtype: torch.dtype, backend: str | None) -> None:
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
    compare(case, dtype, backend=backend, chunk_bytes=4 * rows * dtype.itemsize)


@pytest.mark.parametrize("head", HEADS)
def test_the_reference_in_fp64(head: str) -> None:
    """The equations themselves: equal to autograd through log_softmax, and to differences (gradcheck)."""
    options = HEADS[head]
    case = linear_case(torch.float64, **options).to(torch.float64)
    same = case.to(torch.float64)
    torch.testing.assert_close(run(case, chunk_bytes=9000), eager(same), rtol=1e-11, atol=1e-11)
    for name, leaf in case.leaves().items():
        torch.testing.assert_close(leaf.grad, same.leaves()[name].grad, rtol=1e-9, atol=1e-11)
    small = linear_case(torch.float64, shape=(4, 3, 6), **(options | ({"pairs": 9} if "pairs" in options else {})))
    small = small.to(torch.float64)
    names = list(small.leaves())

    def f(*leaves: Tensor) -> Tensor:
        values = dict(zip(names, leaves, strict=True))
        lora = (values["lora A"], values["lora B"], small.lora[2]) if small.lora else None
        changed = small._replace(bias=values.get("bias"), lora=lora)
        return linear_sequence_logps(values["hidden"], values["weight"], small.targets, **changed.arguments())

    assert torch.autograd.gradcheck(f, tuple(small.leaves().values()))


@pytest.mark.parametrize("size", SIZES)
def test_the_reference_in_bf16(size: str) -> None:
    compare(linear_case(torch.bfloat16, pairs=60, **SIZES[size]), torch.bfloat16, backend="reference")


@pytest.mark.parametrize("trains", ["nothing", "head", "body"])
def test_what_is_frozen_does_not_matter(trains: str) -> None:
    case = linear_case(torch.float32, pairs=60, bias=True, lora=True)
    everything, some = case.to(torch.float32), case.to(torch.float32)
    expected = run(everything)
    for name, leaf in some.leaves().items():
        leaf.requires_grad_(trains == ("body" if name == "hidden" else "head"))
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
def test_chunks_and_runs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise equal from run to run; equal within rounding for any chunk size."""
    case = linear_case(dtype, pairs=90, bias=True)
    results = []
    for chunk_bytes, rows in ((None, 37), (None, 37), (5000, 37), (5000, 37), (1, 37), (40000, 37), (5000, 16)):
        monkeypatch.setattr(output_head, "ROWS", rows)
        mine = case.to(dtype)
        results.append([run(mine, chunk_bytes=chunk_bytes), *(x.grad for x in mine.leaves().values())])
    for first, again in (results[:2], results[2:4]):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in results[2:]:
        for a, b in zip(results[0], other, strict=True):
            assert float((a - b).detach().norm() / b.detach().norm()) <= 2 * torch.finfo(dtype).eps


def test_no_grad_and_inference_mode_give_the_same() -> None:
    case = linear_case(torch.bfloat16).to(torch.bfloat16)
    for chunk_bytes in (None, 5000):
        arguments = {**case.arguments(), "chunk_bytes": chunk_bytes}
        expected = run(case, chunk_bytes=chunk_bytes)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                logps = linear_sequence_logps(case.hidden, case.weight, case.targets, **arguments)
            assert torch.equal(logps, expected) and not logps.requires_grad


def test_retain_graph_yes_second_derivative_no() -> None:
    case = linear_case(torch.float32).to(torch.float32)
    logps = linear_sequence_logps(case.hidden, case.weight, case.targets, **case.arguments())
    first = torch.autograd.grad(logps, case.hidden, case.upstream, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(logps, case.hidden, case.upstream, retain_graph=True)[0])
    again = torch.autograd.grad(logps, case.hidden, case.upstream.requires_grad_(), create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative is not implemented"):
        again.sum().backward()


def test_autocast() -> None:
    case = linear_case(torch.float32, pairs=60, lora=True)
    mine, halves = case.to(torch.float32), case.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logps = run(mine)
    assert torch.equal(logps, run(halves)) and logps.dtype == torch.float32
    for name, leaf in mine.leaves().items():
        assert leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad, halves.leaves()[name].grad.float())


@pytest.mark.parametrize("head", ["plain", "lora", "bias and scale"])
def test_opcheck(head: str) -> None:
    case = linear_case(torch.float32, shape=(6, 8, 20), **(HEADS[head] | {"pairs": 10})).to(torch.float32)
    a, b, scale = case.lora or (None, None, 1.0)
    torch.library.opcheck(
        torch.ops.napo.linear_sequence_logps,
        (case.hidden, case.weight, case.bias, a, b, case.targets, case.rows, case.sequence_ids, case.num_sequences),
        {
            "average": case.average,
            "keep_context": True,
            "logit_scale": case.logit_scale,
            "softcap": 0.0,
            "lora_scale": scale,
            "chunk_bytes": 0,
            "backend": None,
        },
    )


def test_compile_full_graph() -> None:
    case = linear_case(torch.bfloat16, pairs=60)
    plain, fused = case.to(torch.bfloat16), case.to(torch.bfloat16)
    expected = run(plain)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_sequence_logps(hidden, weight, fused.targets, **fused.arguments())

    logps = f(fused.hidden, fused.weight)
    logps.backward(case.upstream)
    assert torch.equal(logps, expected)
    assert torch.equal(fused.hidden.grad, plain.hidden.grad)
    assert torch.equal(fused.weight.grad, plain.weight.grad)


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
    "backend: 'cpu' has no float64": {
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
