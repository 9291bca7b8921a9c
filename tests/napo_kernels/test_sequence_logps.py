from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from logps_cases import assert_rows_close, eager_tokens
from torch import Tensor

from napo_kernels import sequence_logps
from napo_kernels.dispatch import compiled

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make(dtype: torch.dtype, *, size: float = 3.0, peak: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (5, 7, 507), labels with ignored tokens and an ignored sequence, upstream gradient."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(507, (5, 7), generator=g)
    logits = size * torch.randn(5, 7, 507, generator=g)
    logits = logits.scatter_add(-1, labels[..., None], torch.full((5, 7, 1), peak)).to(dtype)
    labels[torch.rand(5, 7, generator=g) < 0.4] = -100
    labels[2] = -100
    return logits, labels, torch.randn(5, generator=g)


def compare(logits: Tensor, labels: Tensor, upstream: Tensor, **options: object) -> None:
    truth, theirs = (logits.detach().to(t).clone().requires_grad_() for t in (torch.float64, logits.dtype))
    expected, peer = eager_tokens(truth, labels), eager_tokens(theirs, labels)
    expected.backward(upstream.double())
    peer.backward(upstream)
    ours = logits.detach().requires_grad_()
    got = sequence_logps(ours, labels, **options)
    got.backward(upstream)
    assert bool((got <= 0).all())
    assert_rows_close("log-probs", got, expected, peer)
    flat = (x.grad.reshape(-1, x.shape[-1]) for x in (ours, truth, theirs))
    assert_rows_close("gradient", *flat)
    assert float(ours.grad[labels == -100].abs().sum()) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "peak"), [(3.0, 0.0), (1e-3, 0.0), (1.0, 23.0), (8e3, 0.0), (3.0, 9.0)])
def test_against_eager(size: float, peak: float, dtype: torch.dtype) -> None:
    compare(*make(dtype, size=size, peak=peak))


@pytest.mark.parametrize("size", [3.0, 300.0])
def test_the_reference_in_fp32(size: float) -> None:
    compare(*make(torch.float32, size=size), backend="reference")


def test_every_instruction_set(isa: str) -> None:
    for dtype in DTYPES:
        compare(*make(dtype, seed=1))


def test_the_instruction_set_can_be_chosen_from_outside() -> None:
    if compiled() is None:
        pytest.skip("the compiled module is missing")
    code = "from napo_kernels import backends; print(backends()['cpu']['config']['cpu_isa'])"
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "NAPO_CPU_ISA": "portable", "PYTHONPATH": root}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "portable"


def test_reference_gradcheck() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 4, -100], [2, 2, 1]])
    for options in ({}, {"average": True}, {"shift": True}):
        assert torch.autograd.gradcheck(lambda x, o=options: sequence_logps(x, labels, **o), (logits,))


def test_shift_and_average() -> None:
    logits, labels, _ = make(torch.float32)
    torch.testing.assert_close(
        sequence_logps(logits, labels, shift=True, average=True),
        eager_tokens(logits[:, :-1], labels[:, 1:], average=True),
    )
    torch.testing.assert_close(sequence_logps(logits, labels, average=True), eager_tokens(logits, labels, average=True))


def test_ignored_rows_are_not_read() -> None:
    logits, labels, upstream = make(torch.bfloat16)
    clean = sequence_logps(logits, labels)
    poisoned = logits.masked_fill((labels == -100)[..., None], torch.nan).requires_grad_()
    got = sequence_logps(poisoned, labels)
    got.backward(upstream)
    assert torch.equal(got, clean)
    assert bool(poisoned.grad.isfinite().all())


@pytest.mark.parametrize("layout", ["sliced", "time first", "vocabulary first"])
def test_strided_logits(layout: str) -> None:
    logits, labels, upstream = make(torch.bfloat16)
    strided = {
        "sliced": lambda: torch.cat([logits, logits], -1)[..., :507],
        "time first": lambda: logits.transpose(0, 1).contiguous().transpose(0, 1),
        "vocabulary first": lambda: logits.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }[layout]()
    assert not strided.is_contiguous()
    compare(strided, labels, upstream)
    scratch = strided.clone(memory_format=torch.preserve_format).requires_grad_()
    plain = logits.clone().requires_grad_()
    (inplace,) = torch.autograd.grad(sequence_logps(scratch * 1, labels, inplace_backward=True), scratch, upstream)
    (expected,) = torch.autograd.grad(sequence_logps(plain, labels), plain, upstream)
    assert torch.equal(inplace, expected)


def test_inplace_backward() -> None:
    logits, labels, upstream = make(torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    made = leaf * 1
    logps = sequence_logps(made, labels, inplace_backward=True)
    (gradient,) = torch.autograd.grad(logps, made, upstream, retain_graph=True)
    assert gradient.data_ptr() == made.data_ptr()
    with pytest.raises(RuntimeError, match="second backward after inplace_backward"):
        torch.autograd.grad(logps, made, upstream)
    with pytest.raises(ValueError, match=r"^inplace_backward: expected logits with memory of their own"):
        sequence_logps(logits[:1].expand(5, 7, 507), labels, inplace_backward=True)


@pytest.mark.parametrize("valid", ["few", "most"])
def test_large_gradient(valid: str) -> None:
    """Above 32 MiB the gradient's memory is not torch's, and comes zeroed where few labels are valid."""
    logits = torch.randn(8, 48, 49152, dtype=torch.bfloat16, requires_grad=True)
    counted = torch.zeros(8, 48, dtype=torch.bool)
    if valid == "few":
        counted[1, 5] = counted[7, 47] = True
    else:
        counted[:] = True
        counted[3, 2:20] = False
    labels = torch.randint(49152, (8, 48)).masked_fill(~counted, -100)
    sequence_logps(logits, labels).sum().backward()
    assert logits.grad.is_contiguous() and logits.grad.data_ptr() % 64 == 0
    assert not bool(logits.grad[~counted].view(torch.int64).any())
    some = counted.nonzero()[::29]
    at = tuple(some.T)
    expected = -torch.softmax(logits.detach()[at].double(), -1)
    expected[torch.arange(len(some)), labels[at]] += 1
    torch.testing.assert_close(logits.grad[at].double(), expected, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_of_all_sizes(dtype: torch.dtype, isa: str) -> None:
    """Rows of two logits whose difference goes from 0 to where exp is 0, so that one exponential decides the result."""
    difference = torch.arange(0, 0x7F80, dtype=torch.int16).view(dtype)
    difference = difference[difference.isfinite()]
    logits = torch.stack((torch.zeros_like(difference), -difference), 1)[:, None].requires_grad_()
    logps = sequence_logps(logits, torch.zeros(len(difference), 1, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    x = difference.double()
    expected = -torch.nn.functional.softplus(-x)
    error = (logps.detach().double() - expected).abs() / expected.abs()
    assert float(error[x < 20].max()) < 2e-6
    assert float(error[x < 80].max()) < 2e-5
    expected = -torch.sigmoid(-x)
    smallest = max(1e-35, float(torch.finfo(dtype).tiny))  # below e^-87 there is 0
    error = (gradient[:, 0, 1].double() - expected).abs() / expected.abs().clamp(min=smallest)
    assert float(error.max()) < 0.51 * torch.finfo(dtype).eps + 2e-5


def test_retain_graph_yes_second_derivative_no() -> None:
    logits, labels, upstream = make(torch.float32)
    logits.requires_grad_()
    logps = sequence_logps(logits, labels)
    (first,) = torch.autograd.grad(logps, logits, upstream, retain_graph=True)
    (second,) = torch.autograd.grad(logps, logits, upstream.requires_grad_(), create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second derivative is not implemented"):
        second.sum().backward()


def test_runs_modes_and_autocast_give_the_same() -> None:
    logits, labels, upstream = make(torch.bfloat16)
    results = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        logps = sequence_logps(leaf, labels)
        logps.backward(upstream)
        results.append((logps.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.float16)):
        with mode:
            logps = sequence_logps(logits, labels)
        assert torch.equal(logps, results[0][0]) and logps.dtype == torch.float32


def test_opcheck_and_compile() -> None:
    logits, labels, upstream = make(torch.float32)
    logits = logits[..., :20].contiguous().requires_grad_()
    labels = labels.clamp(max=19)
    torch.library.opcheck(torch.ops.napo.sequence_logps, (logits, labels, True, -100, False, None))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x: Tensor) -> Tensor:
        return sequence_logps(x, labels, shift=True, inplace_backward=True)

    (got,) = torch.autograd.grad(f(logits), logits, upstream)
    (expected,) = torch.autograd.grad(sequence_logps(logits, labels, shift=True), logits, upstream)
    assert torch.equal(got, expected)


def test_nothing_to_do() -> None:
    for sequences, tokens in ((0, 4), (3, 0)):
        logits = torch.randn(sequences, tokens, 9, requires_grad=True)
        labels = torch.zeros(sequences, tokens, dtype=torch.int64)
        logps = sequence_logps(logits, labels, average=True, shift=tokens > 0)
        assert torch.equal(logps, torch.zeros(sequences))
        logps.sum().backward()
        assert logits.grad.shape == logits.shape


BAD = {
    "logits: expected shape": (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)),
    "logits: expected bfloat16": (torch.zeros(2, 3, 4, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int64)),
    "logits: expected at least one column": (torch.zeros(2, 3, 0), torch.zeros(2, 3, dtype=torch.int64)),
    "labels: expected int64": (torch.zeros(2, 3, 4), torch.zeros(2, 3)),
    "labels: expected shape": (torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)),
    r"labels: expected values in \[0, 4\), got 4 at position 3": (
        torch.zeros(1, 4, 4),
        torch.tensor([[0, -100, 3, 4]]),
    ),
    r"labels: expected values in \[0, 4\), got -1": (torch.zeros(1, 1, 4), torch.tensor([[-1]])),
    "labels: expected device": (torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64, device="meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        sequence_logps(*BAD[message])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: torch.dtype, backend: str) -> None:
    logits, labels, upstream = make(dtype)
    results = []
    for device, chosen in (("cpu", None), ("cuda", backend), ("cuda", backend)):
        x = logits.to(device).clone().requires_grad_()
        logps = sequence_logps(x, labels.to(device), average=True, backend=chosen)
        logps.backward(upstream.to(device))
        results.append((logps.cpu(), x.grad.cpu()))
    for a, b in zip(results[1], results[2], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
