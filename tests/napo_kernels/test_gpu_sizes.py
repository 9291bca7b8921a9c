"""The ops on a GPU at the sizes that they are made for, against fp64 on the same GPU."""

from __future__ import annotations

import pytest
import torch
from logps_cases import LinearCase, assert_rows_close, eager_linear, eager_tokens, linear_case
from torch import Tensor

from napo_kernels import linear_sequence_logps, napo_loss, neighbour_count, sequence_logps, shared_negatives

pytestmark = pytest.mark.gpu
HEADS = {"Llama-3": (128256, 512), "GPT-2, odd": (50257, 256), "Qwen": (151936, 256)}  # V, H


def size(device: torch.device, real: int, dry: int) -> int:
    return real if device.type == "cuda" else dry


@pytest.mark.parametrize("head", HEADS)
def test_heads_of_real_vocabularies(head: str, gpu_backend: str, device: torch.device) -> None:
    """Frozen, bf16; several targets a row. No row is further from fp64 than eager's bf16 is, and runs agree."""
    vocabulary, width = HEADS[head]
    shape = (size(device, 440, 44), size(device, width, 32), size(device, vocabulary, 1009))
    case = linear_case(torch.bfloat16, shape=shape, pairs=shape[0] * 8 // 7)
    case = case._replace(**{name: x.to(device) for name, x in case._asdict().items() if isinstance(x, Tensor)})
    truth = case.to(torch.float64, frozen=("weight",))
    theirs, ours = (case.to(torch.bfloat16, frozen=("weight",)) for _ in range(2))
    exact, peer = eager_linear(truth), eager_linear(theirs)
    exact.backward(case.upstream.double())
    peer.backward(case.upstream)

    def run(of: LinearCase) -> Tensor:
        return linear_sequence_logps(of.hidden, of.weight, of.targets, backend=gpu_backend, **of.arguments())

    got = run(ours)
    got.backward(ours.upstream)
    assert torch.equal(got, run(ours)), "two runs differ"
    assert_rows_close("log-probs", got, exact, peer)
    assert_rows_close("hidden", ours.hidden.grad, truth.hidden.grad, theirs.hidden.grad)


@pytest.mark.parametrize("shape", [(8, 64, 128256), (4, 33, 50257)], ids=["Llama-3", "GPT-2, odd"])
def test_logits_of_real_vocabularies(shape: tuple[int, int, int], gpu_backend: str, device: torch.device) -> None:
    sequences, tokens, vocabulary = shape if device.type == "cuda" else (3, 5, 83)
    torch.manual_seed(0)
    logits = torch.randn(sequences, tokens, vocabulary, device=device).bfloat16()
    labels = torch.randint(vocabulary, (sequences, tokens), device=device)
    labels[:, ::3] = -100
    upstream = torch.randn(sequences, device=device)
    results = []
    for dtype, op in (
        (torch.bfloat16, lambda x: sequence_logps(x, labels, backend=gpu_backend)),
        (torch.float64, lambda x: eager_tokens(x, labels)),
        (torch.bfloat16, lambda x: eager_tokens(x, labels)),
    ):
        x = logits.to(dtype, copy=True).requires_grad_()
        logps = op(x)
        logps.backward(upstream.to(logps.dtype))
        results.append((logps, x.grad))
    for name, *values in zip(("log-probs", "gradient"), *results, strict=True):
        assert_rows_close(name, *values)


def test_pool_of_4096_users(gpu_backend: str, device: torch.device) -> None:
    """Selection is the reference's, ties included; the loss and its gradients are fp64's."""
    users = size(device, 4096, 64)
    torch.manual_seed(0)
    states = torch.randint(-3, 4, (users, 16), device=device).float()
    k = neighbour_count(users, 0.7)
    share = shared_negatives(states, k, backend=gpu_backend)
    assert torch.equal(share, shared_negatives(states, k, backend="reference"))
    leaves = torch.randn(users, device=device) - 20, 3 * torch.randn(users, 8, device=device) - 25
    chosen, rejected = (x.double().requires_grad_() for x in leaves)
    of_owners = torch.where(share, rejected.logsumexp(1), -torch.inf)
    truth = torch.nn.functional.softplus(of_owners.logsumexp(1) - chosen).mean()
    expected = truth, *torch.autograd.grad(truth, (chosen, rejected))
    mine = [x.clone().requires_grad_() for x in leaves]
    loss = napo_loss(*mine, share=share, backend=gpu_backend)
    for got, right in zip((loss, *torch.autograd.grad(loss, mine)), expected, strict=True):
        assert (got.double() - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("op", ["linear_sequence_logps", "sequence_logps"])
def test_tensors_on_a_device_that_is_not_the_current_one(op: str, gpu_backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device: this wants two")
    results = []
    for at in (0, 1):  # the current device is 0 throughout
        if op == "linear_sequence_logps":
            case = linear_case(torch.bfloat16)
            where = {name: x.cuda(at) for name, x in case._asdict().items() if isinstance(x, Tensor)}
            case = case._replace(**where).to(torch.bfloat16)
            x = case.hidden
            logps = linear_sequence_logps(x, case.weight, case.targets, backend=gpu_backend, **case.arguments())
        else:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(4, 9, 507, generator=generator).bfloat16().cuda(at).requires_grad_()
            labels = torch.randint(507, (4, 9), generator=generator).cuda(at)
            logps = sequence_logps(x, labels, backend=gpu_backend)
        logps.sum().backward()
        results.append((logps.detach().cpu(), x.grad.cpu()))
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-5)
