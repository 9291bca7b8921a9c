"""Where the time goes on a GPU, in about 40 seconds: the pieces whose sum the other benchmarks measure.

    python -m benchmarks run micro --device cuda [--parts copy heads rows loss widths step]
    python -m benchmarks run micro --smoke      shows that it runs, measures nothing

    copy     bandwidth of a copy, and the rate of a square matmul: what the rest is held against
    heads    both matmuls of an output head by rows of a chunk, with bf16 and with fp32 logits
    rows     each row kernel: GB/s of the bytes that must move, as a share of the copy's
    loss     shared_negatives and napo_loss, forward and backward: wall, and the device alone
    widths   a batch of a row width that was not there before: its first step against the next
    step     a training step: wall, host, device, launches, and the kernels that take longest

Nothing is checked here; the tests and the other benchmarks do that. A part that fails is named, and the rest runs.
Parts with a model import transformers themselves, which takes seconds that the others would pay too.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import device
from benchmarks.options import command_line
from benchmarks.report import Report
from benchmarks.timing import fastest, of_device
from napo_kernels import napo_loss, neighbour_count, shared_negatives
from napo_kernels.dispatch import backends
from napo_kernels.ops.linear_sequence_logps.head import lines
from napo_kernels.ops.linear_sequence_logps.pieces import pitch
from napo_kernels.rows import LogitMap, LowRank, RowsProblem, RowStats, Upstream, plan_targets

HEAD = (4096, 128256, 8192)  # H, V, rows: Llama-3-8B's
CHUNKS = (512, 640, 688, 1024, 1376, 2048, 2736, 4096, 8192)
NATIVE = ("cpu", "cuda")  # backends of the compiled module
TOP = 12  # kernels of a step that are named


def main(arguments: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))

    options = command_line(__doc__, arguments, add)
    report = Report("gpu_micro", options)
    micro = Micro(report, options.smoke)
    for part in PARTS:
        if part not in options.parts or not report.has_time(part):
            continue
        with report.guarded(part, "all"):
            PARTS[part](micro)
        report.write()
    report.finish()


class Micro:
    def __init__(self, report: Report, smoke: bool) -> None:
        self.report, self.smoke = report, smoke
        self.copy_rate = 0.0  # bytes per second
        names = ("triton", "cuda") if device.on_gpu() else ("reference", "cpu")
        self.backends = [name for name in names if backends()[name]["available"]]

    def best(self, run: Callable[[], Any], repeats: int = 7) -> float:
        return fastest(run, 1 if self.smoke else repeats)

    def add(self, case: str, variant: str, seconds: float, **facts: Any) -> None:
        self.report.add(case, variant, best_ms=round(1e3 * seconds, 4), **facts)

    def moved(self, case: str, variant: str, size: int, run: Callable[[], Any]) -> None:
        """`size`: the bytes that must move."""
        with self.report.guarded(case, variant):
            seconds = self.best(run)
            share = {"of_copy_bandwidth": round(size / seconds / self.copy_rate, 3)} if self.copy_rate else {}
            self.add(case, variant, seconds, gb_per_s=round(size / seconds / 1e9), **share)


def copy(m: Micro) -> None:
    size = 1 << (16 if m.smoke else 30)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device.current) for _ in range(2))
    seconds = m.best(lambda: target.copy_(source))
    m.copy_rate = 2 * size / seconds
    m.add("roofline", "copy", seconds, gb_per_s=round(m.copy_rate / 1e9))
    n = 64 if m.smoke else 8192
    x, y = normal(n, n), normal(n, n)
    seconds = m.best(lambda: x @ y)
    m.add("roofline", f"matmul {n}, bf16", seconds, tflops=round(2 * n**3 / seconds / 1e12, 1))


def heads(m: Micro) -> None:
    """The time of all rows: that of one chunk, times the number of chunks."""
    width, vocabulary, rows = (32, 300, 256) if m.smoke else HEAD
    weight, hidden = normal(vocabulary, width) * width**-0.5, normal(rows, width)
    case = f"two matmuls, H {width}, V {vocabulary}, rows {rows}"
    for chunk in (64, 256) if m.smoke else CHUNKS:
        logits, context, few = empty(chunk, vocabulary), empty(chunk, width), hidden[:chunk]
        logits.copy_(torch.rand(chunk, vocabulary, device=device.current))
        times = {"bf16": m.best(lambda: torch.mm(few, weight.t(), out=logits), 5)}  # noqa: B023
        of_weight = m.best(lambda: torch.mm(logits, weight, out=context), 5)  # noqa: B023
        if device.on_gpu():
            wide = empty(chunk, vocabulary, dtype=torch.float32)
            times["fp32"] = m.best(
                lambda: torch.mm(few, weight.t(), out_dtype=torch.float32, out=wide),  # noqa: B023
                5,
            )
        for kind, seconds in times.items():
            total = (seconds + of_weight) * rows / chunk
            facts = {"logits_ms": 1e3 * seconds * rows / chunk, "times_weight_ms": 1e3 * of_weight * rows / chunk}
            facts["tflops"] = 4 * rows * width * vocabulary / total / 1e12
            m.add(case, f"chunks of {chunk}, {kind} logits", total, **{k: round(v, 3) for k, v in facts.items()})


class RowShape(NamedTuple):
    """Shape of the row kernels' input: rows of a chunk, and tokens of sequences."""

    rows: int
    width: int
    vocabulary: int
    sequences: int
    tokens: int


def rows(m: Micro) -> None:
    width, vocabulary, _ = HEAD
    shape = RowShape(64, 32, 300, 2, 5) if m.smoke else RowShape(1024, width, vocabulary, 32, 128)
    for backend in m.backends:
        row_kernels(m, backend, shape)
        row_gathers(m, backend, shape)


def row_kernels(m: Micro, backend: str, shape: RowShape, label: str = "") -> None:
    """The kernels that read or write whole rows; `label` stands before their names."""
    kernel = kernels_of(backend)
    case, label = case_of(shape), label or backend
    plan, stats, zeros = row_arguments(shape)
    for kind in (torch.float32, torch.bfloat16):
        logits = lines_of(shape, kind).copy_(3 * torch.randn(shape.rows, shape.vocabulary, device=device.current))
        out = lines_of(shape, torch.bfloat16 if device.on_gpu() else kind)
        size, name = logits.nbytes + out.nbytes, str(kind).removeprefix("torch.")
        problem = RowsProblem(plan, LogitMap(), zeros, stats, 1.0, shape.vocabulary)
        forward = (logits, out, 0, problem)
        m.moved(case, f"{label}: rows_forward, {name}", size, lambda f=forward: kernel.rows_forward(*f))
        back = (logits, out, 0, LogitMap(), Upstream(plan, stats, zeros))
        m.moved(case, f"{label}: rows_gradient, {name}", size, lambda b=back: kernel.rows_gradient(*b))
    logits = normal(shape.sequences, shape.tokens, shape.vocabulary)
    labels = torch.randint(shape.vocabulary, (shape.sequences, shape.tokens), device=device.current)
    upstream = torch.randn(shape.sequences, device=device.current)
    start = (logits, labels, -100)
    tokens = kernels_of(backend, "sequence_logps")
    before = tokens.token_forward(*start)
    m.moved(case, f"{label}: token_forward", logits.nbytes, lambda: tokens.token_forward(*start))
    back = (*start, before, upstream, torch.empty_like(logits))
    token_backward = functools.partial(tokens.token_backward, *back, out_is_zero=False)
    m.moved(case, f"{label}: token_backward", 2 * logits.nbytes, token_backward)


def lines_of(shape: RowShape, dtype: torch.dtype) -> Tensor:  # (rows, V)
    """As far apart as the op puts the rows of logits."""
    step = pitch(empty(0), shape.vocabulary)
    return lines(empty(shape.rows * step, dtype=dtype), 0, shape.rows, shape.vocabulary, step)


def row_gathers(m: Micro, backend: str, shape: RowShape) -> None:
    """The kernels that read the head's rows of the targets only."""
    kernel, case = kernels_of(backend), case_of(shape)
    weight, hidden = normal(shape.vocabulary, shape.width), normal(shape.rows, shape.width)
    plan, stats, zeros = row_arguments(shape)
    ends = (hidden, weight, LowRank(), plan, LogitMap())
    size = 2 * hidden.nbytes  # a row of hidden and one of weight for each target
    m.moved(case, f"{backend}: target_logits", size, lambda: kernel.target_logits(*ends))
    back = (empty(shape.rows, shape.width), weight, hidden, Upstream(plan, stats, zeros), 1.0)
    m.moved(case, f"{backend}: hidden_gradient", 3 * hidden.nbytes, lambda: kernel.hidden_gradient(*back))


def kernels_of(backend: str, op: str = "linear_sequence_logps") -> ModuleType:
    return importlib.import_module(f"napo_kernels.{'native' if backend in NATIVE else backend}.{op}")


def case_of(shape: RowShape) -> str:
    return f"row kernels, rows {shape.rows}, H {shape.width}, V {shape.vocabulary}"


def row_arguments(shape: RowShape) -> tuple[Any, RowStats, Tensor]:
    """The plan of random targets, statistics of the rows, and zeros."""
    targets = torch.randint(shape.vocabulary, (shape.rows,), device=device.current)
    plan, _ = plan_targets(targets, None, shape.rows, shape.vocabulary)
    zeros = torch.zeros(5, shape.rows, device=device.current)
    return plan, RowStats(*zeros.clone()), zeros[0]


def loss(m: Micro) -> None:
    for users in (16,) if m.smoke else (64, 1024, 4096):
        states = torch.randn(users, 64, device=device.current)
        chosen = (torch.randn(users, device=device.current) - 20).requires_grad_()
        rejected = (torch.randn(users, 8, device=device.current) - 25).requires_grad_()
        k = neighbour_count(users, 0.7)
        for backend in m.backends:

            def run(backend: str = backend) -> Any:
                share = shared_negatives(states, k, backend=backend)  # noqa: B023
                total = napo_loss(chosen, rejected, share=share, backend=backend)  # noqa: B023
                return torch.autograd.grad(total, (chosen, rejected))  # noqa: B023

            case = f"share and loss, B' {users}, N 8"
            with m.report.guarded(case, backend):
                m.add(case, backend, m.best(run, 15), **of_device(run)[0])


def widths(m: Micro) -> None:
    """The cost of a new row width, which is paid once: attention libraries plan and compilers compile for a shape."""
    from benchmarks.training_step import MODELS, Step, make_users
    from napo.scoring import CandidateScorer, pack

    model, titles = ("tiny", 3) if m.smoke else ("SmolLM2-135M", 9)
    step = Step(model, torch.bfloat16, set(), 7)
    scorer = CandidateScorer(step.model)

    def run(prompt: int) -> tuple[float, int]:
        users = make_users(2 if m.smoke else 8, prompt, 7, titles - 1, MODELS[model]["v"])
        batch = pack(*users, pad_id=0)
        device.synchronise()
        began = time.perf_counter()
        scorer(batch).sum().backward()
        device.synchronise()
        return time.perf_counter() - began, batch.input_ids.shape[1]

    run(12)
    for prompt in (20, 21) if m.smoke else (200, 201, 230, 333, 334):
        first, width = run(prompt)
        again = min(run(prompt)[0] for _ in range(3))
        m.add(f"a new row width, {model}", f"{width} columns", again, first_ms=round(1e3 * first, 3))


def step(m: Micro) -> None:
    from benchmarks.training_step import MODELS, Step, make_users

    model, users, prompt, negatives = ("tiny", 2, 12, 3) if m.smoke else ("Llama-3.2-1B", 8, 200, 8)
    made = Step(model, torch.bfloat16, {prompt}, 7)
    batch = make_users(users, prompt, 7, negatives, MODELS[model]["v"])
    case = f"step, {model}, B {users}, P {prompt}, N {negatives}"
    names = ("napo", "napo + reference", "naive S-DPO", "prefix sharing")
    for name, variant in made.variants(batch, names).items():
        with m.report.guarded(case, name):
            wall = m.best(lambda variant=variant: variant.bind()(), 5)
            began = time.process_time()
            variant.bind()()
            host = time.process_time() - began
            facts, kernels = of_device(variant.bind())
            m.add(case, name, wall, host_ms=round(1e3 * host, 1), **facts)
            for kernel, milliseconds in kernels.most_common(TOP if name == "napo" else 0):
                m.report.add(f"{case}: kernels of napo", kernel, best_ms=round(milliseconds, 3))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=device.current).bfloat16()


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=device.current)


PARTS: dict[str, Callable[[Micro], None]] = {
    "copy": copy,
    "heads": heads,
    "rows": rows,
    "loss": loss,
    "widths": widths,
    "step": step,
}
