"""Forward and backward of linear_sequence_logps against bare matmuls, PyTorch and every peer, from hidden states.

    python -m benchmarks run head                          on the CPU: fewer rows the wider the head
    python -m benchmarks run head --device cuda            8192 rows
    python -m benchmarks run head --cases Llama-3-8B       those whose name contains it

Heads: frozen; trainable (also the weight's gradient); LoRA of rank 16 on a frozen weight (no peer has it; for them
stands eager). Every result is compared with fp64: log-probs and gradients of the first 63 rows, and of a trainable
head a sample of its weight's rows.

Work: 2 R H V flops per matmul. Frozen, or LoRA, two matmuls: logits, and what they become times the weight. Trainable,
three: what they become times the hidden states as well (four where what they become is larger than a chunk and than the
weight's gradient: the logits are then computed again). The floor is that many bare matmuls of the operands' dtype into
memory that exists, at the fastest of several chunkings. Bytes: weight (2 V H) once a chunk and matmul, hidden states
and context (2 R H each).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import device
from benchmarks.comparison import Comparison, compare, distance, sweep
from benchmarks.options import command_line
from benchmarks.peers import ONE_UPSTREAM, compile_for, eager, head_peers
from benchmarks.report import Report
from benchmarks.timing import Variant, Variants
from napo_kernels import linear_sequence_logps
from napo_kernels.dispatch import backends

TOKENS = 7  # of a sequence
CHECKED = 9 * TOKENS  # rows that are compared with fp64
RANK, LORA_SCALE = 16, 2.0
TOLERANCE = 3e-2  # bf16: eager's own error is about 1e-2


@dataclass(frozen=True)
class Shape:
    model: str
    h: int
    v: int
    rows_cpu: int
    softcap: float | None = None
    head: str = "frozen"

    def name(self, rows: int) -> str:
        cap = f", softcap {self.softcap:g}" if self.softcap else ""
        return f"{self.model}, {self.head} head{cap}, R {rows}, H {self.h}, V {self.v}"


# Rows on the CPU: 0.1 to 0.2 Tflop per pair of matmuls, a third to two thirds of a second on 2 cores with bf16 units.
# One of each kind of head and the sweep come before the other models; the widest, whose weights take seconds to make,
# come last.
SHAPES = [
    Shape("SmolLM2-135M", 576, 49152, 2016),
    Shape("SmolLM2-135M", 576, 49152, 252, head="trainable"),
    Shape("SmolLM2-135M", 576, 49152, 252, head="LoRA"),
    Shape("sweep", 576, 16384, 252),
    Shape("sweep", 576, 32768, 252),
    Shape("sweep", 576, 65536, 252),
    Shape("sweep", 576, 131072, 252),
    Shape("Llama-3.2-1B", 2048, 128256, 126),
    Shape("Qwen3-0.6B", 1024, 151936, 126),
    Shape("Llama-3-8B", 4096, 128256, 63),
    Shape("Gemma-2-2B", 2304, 256000, 63, softcap=30.0),
]
SHAPES_GPU = [
    Shape("Llama-3-8B", 4096, 128256, 0),
    Shape("SmolLM2-135M", 576, 49152, 0),
    Shape("Llama-3.2-1B", 2048, 128256, 0),
    Shape("Qwen3-0.6B", 1024, 151936, 0),
    Shape("Gemma-2-2B", 2304, 256000, 0, softcap=30.0),
    Shape("Llama-3.2-1B", 2048, 128256, 0, head="trainable"),
    Shape("Llama-3.2-1B", 2048, 128256, 0, head="LoRA"),
    Shape("Llama-3-8B", 4096, 128256, 0, head="trainable"),
]
SHAPES_GPU += [Shape("sweep", 576, v, 252) for v in (16384, 32768, 65536, 131072)]
SMOKE = [
    Shape("tiny", 32, 300, CHECKED + 7, softcap=cap, head=head)
    for head in ("frozen", "trainable", "LoRA")
    for cap in (None, 5.0)
]
SMOKE += [Shape("sweep", 32, v, 252) for v in (300, 400, 500)]
# On a CPU F.linear_cross_entropy takes fewer rows at a time the wider the vocabulary: 35 s for Llama-3.2-1B's head and
# 252 rows, 10 s for a trainable one of 49152 words (2 cores of an AMD EPYC, torch 2.13). Measured where it is best.
NARROW_ALONE = ("F.linear_cross_entropy",)


def main(arguments: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--cases", default="", help="only those whose name contains this")
        parser.add_argument("--rows", type=int, default=None, help="R, instead of what suits the device")

    options = command_line(__doc__, arguments, add)
    report = Report("linear_sequence_logps", options)
    if device.on_gpu():
        measure_on_gpu(report, options)
    else:  # what is compiled for the shape of one case is kept for its next sweep
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
            measure_on_cpu(report, options)
    report.finish()


def measure_on_cpu(report: Report, options: argparse.Namespace) -> None:
    cases = []
    for shape in SMOKE if options.smoke else SHAPES:
        rows = options.rows or shape.rows_cpu
        case = shape.name(rows)
        if options.cases in case and report.has_time(case):
            cases.append(run_case(report, case, shape, rows, options))
            report.write()
    sweep(report, cases)


def measure_on_gpu(report: Report, options: argparse.Namespace) -> None:
    """One case after the other: each needs the memory of the one before."""
    for shape in SMOKE if options.smoke else SHAPES_GPU:
        rows = options.rows or shape.rows_cpu or 8192
        case = shape.name(rows)
        if options.cases in case and report.has_time(case):
            run_case(report, case, shape, rows, options)
            report.write()
        torch.cuda.empty_cache()
        torch._dynamo.reset()


@dataclass
class Problem:
    hidden: Tensor  # (R, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (R,)
    ids: Tensor  # (R,) the sequence of each row
    upstream: Tensor  # (S,)
    lora: tuple[Tensor, Tensor] | None  # (r, H), (V, r)
    softcap: float | None
    head: str

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are wanted."""
        more = [self.weight] if self.head == "trainable" else list(self.lora or ())
        return [self.hidden, *more]


def make_problem(shape: Shape, rows: int) -> Problem:
    torch.manual_seed(0)
    at, dtype = device.current, torch.bfloat16
    hidden = torch.randn(rows, shape.h, device=at, dtype=dtype)
    weight = torch.empty(shape.v, shape.h, device=at, dtype=dtype)
    for part in weight.split(16384):  # drawn in fp32: faster on a CPU
        part.copy_(torch.randn(part.shape, device=at).mul_(shape.h**-0.5))
    lora = None
    if shape.head == "LoRA":
        a, b = torch.randn(RANK, shape.h, device=at), torch.randn(shape.v, RANK, device=at)
        lora = (a.mul(shape.h**-0.5).to(dtype).requires_grad_(), b.mul(0.1).to(dtype).requires_grad_())
    targets = torch.randint(shape.v, (rows,), device=at)
    ids = torch.arange(rows, device=at) // TOKENS
    upstream = torch.randn(-(-rows // TOKENS), device=at)
    hidden.requires_grad_()
    weight.requires_grad_(shape.head == "trainable")
    return Problem(hidden, weight, targets, ids, upstream, lora, shape.softcap, shape.head)


Result = tuple[Tensor, ...]  # log-probs (S,), and the gradients of Problem.leaves


def ours(p: Problem, **how: Any) -> Result:
    lora = None if p.lora is None else (*p.lora, LORA_SCALE)
    logps = linear_sequence_logps(
        p.hidden,
        p.weight,
        p.targets,
        sequence_ids=p.ids,
        num_sequences=len(p.upstream),
        softcap=p.softcap,
        lora=lora,
        **how,
    )
    return logps, *torch.autograd.grad(logps, p.leaves, p.upstream)


def theirs(p: Problem, function: Callable[..., Tensor]) -> Result:
    if p.lora is None:
        logp = function(p.hidden, p.weight, p.targets, p.softcap)
    else:
        logp = function(p.hidden, p.weight, p.targets, p.softcap, *p.lora)
    if logp.ndim == 0:  # one upstream for all rows
        return logp, *torch.autograd.grad(logp, p.leaves)
    logps = torch.zeros_like(p.upstream).index_add(0, p.ids, logp.float())
    return logps, *torch.autograd.grad(logps, p.leaves, p.upstream)


def eager_lora(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, a: Tensor, b: Tensor) -> Tensor:
    logits = (torch.nn.functional.linear(hidden, weight) + (hidden @ a.t()) @ b.t() * LORA_SCALE).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


def run_case(report: Report, case: str, shape: Shape, rows: int, options: argparse.Namespace) -> Comparison:
    p = make_problem(shape, rows)
    with_peers = shape.model != "sweep"
    truth = Truth(p)
    variants: Variants = {"napo": lambda: ours(p)}
    if device.on_gpu() and with_peers:
        for name in ("triton", "cuda"):
            if backends()[name]["available"]:
                variants[f"napo, {name}"] = Variant(lambda name=name: ours(p, backend=name), required=True)
        for mib in (128, 1024, 2048):
            variants[f"napo, chunks of {mib} MiB"] = lambda mib=mib: ours(p, chunk_bytes=mib << 20)
    for chunk in matmul_chunks(rows, shape):
        variants[f"floor: matmuls, {chunk} rows"] = bare_matmuls(p, chunk)
    function = eager if p.lora is None else eager_lora
    variants["eager"] = Variant(lambda: theirs(p, function), required=True)
    left_out = {}
    if with_peers:
        compiled = compile_for(device.current, function, smoke=options.smoke)
        variants["torch.compile of eager"] = lambda: theirs(p, compiled)
        peers = head_peers(device.current, p.softcap) if p.lora is None else {}
        if not device.on_gpu() and not options.smoke and (shape.v > 100_000 or shape.head != "frozen"):
            left_out = {name: "not measured here: too slow on a CPU" for name in NARROW_ALONE if name in peers}
        for name, of_peer in peers.items():
            if name not in left_out:
                variants[name] = lambda of_peer=of_peer: theirs(p, of_peer)
    derive = lambda found: found.extend({"variant": name, "note": note} for name, note in left_out.items())  # noqa: E731
    return compare(
        report,
        case,
        variants,
        error=truth.error,
        tolerance=TOLERANCE,
        seconds=4.0,
        derive=derive,
    )


def matmul_chunks(rows: int, shape: Shape) -> list[int]:
    """Chunkings to try: of the size that stays in a CPU's cache to all rows at once."""
    sizes = (1024, 2048, 4096, rows) if device.on_gpu() else ((24 << 20) // (2 * shape.v), rows)
    return sorted({size if size <= rows / 2 else rows for size in sizes})


def bare_matmuls(p: Problem, chunk: int) -> Callable[[], object]:
    """Logits and their product with weight (and with hidden, for a trainable head), nothing between, `chunk` rows at a
    time into memory that exists."""
    hidden, weight = p.hidden.detach(), p.weight.detach()
    logits = torch.empty(chunk, len(weight), dtype=hidden.dtype, device=hidden.device)
    context = torch.empty_like(hidden)
    d_weight = torch.empty_like(weight) if p.head == "trainable" else None

    def run() -> None:
        for first in range(0, len(hidden), chunk):
            rows = hidden[first : first + chunk]
            out = logits[: len(rows)]
            torch.mm(rows, weight.t(), out=out)
            torch.mm(out, weight, out=context[first : first + chunk])
            if d_weight is not None:
                torch.mm(out.t(), rows, out=d_weight)

    return run


class Truth:
    """fp64 log-probs and gradients, of the rows and the part of the head that are checked."""

    def __init__(self, p: Problem) -> None:
        self.head, self.rows = p.head, CHECKED
        every = len(p.hidden) if p.head != "frozen" else CHECKED
        hidden, weight = p.hidden.detach().double(), p.weight.detach()
        low = None if p.lora is None else [x.detach().double() for x in p.lora]
        self.columns = torch.cat((p.targets[:CHECKED], torch.arange(64, device=p.targets.device))).unique()
        self.parts: list[Tensor] = []
        for first in range(0, every, 256):
            chunk = slice(first, min(first + 256, every))
            x = hidden[chunk]
            z = torch.cat([x @ w.double().t() for w in weight.split(16384)], 1)  # (c, V)
            if low is not None:
                z += LORA_SCALE * (x @ low[0].t()) @ low[1].t()
            slope = torch.ones_like(z)
            if p.softcap is not None:
                z = p.softcap * torch.tanh(z / p.softcap)
                slope = 1 - (z / p.softcap) ** 2
            logp = z.log_softmax(1)
            at = p.targets[chunk, None]
            g = -logp.exp()
            g.scatter_add_(1, at, torch.ones_like(at, dtype=g.dtype))
            g *= slope * p.upstream[p.ids[chunk], None].double()  # d loss / d logits
            if first == 0:
                taken = logp.gather(1, at)[:CHECKED, 0]
                self.logps = taken.view(-1, TOKENS).sum(1)
                few = g[:CHECKED]
                parts = zip(few.split(16384, 1), weight.split(16384), strict=True)
                self.parts.append(sum(a @ w.double() for a, w in parts))  # type: ignore[arg-type]
                if low is not None:
                    self.parts[0] = self.parts[0] + LORA_SCALE * (few @ low[1]) @ low[0]
                    self.parts += [torch.zeros_like(low[0]), torch.zeros_like(low[1][self.columns])]
                elif p.head == "trainable":
                    self.parts.append(hidden.new_zeros(len(self.columns), hidden.shape[1]))
            if low is not None:
                self.parts[1] += LORA_SCALE * (g @ low[1]).t() @ x
                self.parts[2] += LORA_SCALE * g[:, self.columns].t() @ (x @ low[0].t())
            elif p.head == "trainable":
                self.parts[1] += g[:, self.columns].t() @ x
        self.row_upstream = p.upstream[p.ids[:CHECKED], None].double()

    def error(self, name: str, result: Result) -> float:
        """The largest relative error of log-probs and of each gradient."""
        logps, d_hidden, *rest = result
        if name.endswith(ONE_UPSTREAM):
            return distance(d_hidden[: self.rows], self.parts[0] / self.row_upstream)
        errors = [distance(logps[: len(self.logps)], self.logps), distance(d_hidden[: self.rows], self.parts[0])]
        if self.head == "trainable":
            errors.append(distance(rest[0][self.columns], self.parts[1]))
        elif self.head == "LoRA":
            errors += [distance(rest[0], self.parts[1]), distance(rest[1][self.columns], self.parts[2])]
        return max(errors)
