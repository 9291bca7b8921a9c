"""Settings of the GPU kernels and of the step that only a measurement can decide, for the next minutes on a GPU.

    python -m benchmarks trials                                    all parts, on CUDA
    python -m benchmarks trials --parts walks builds --builds build/gpu-variants
    python -m benchmarks trials --device cpu --smoke               a dry run of what a CPU can run

    head       both matmuls of several output heads by rows at a time, beside the whole op with such chunks
    walks      Triton's row kernels by block of columns and warps (WALK_BLOCK, WALK_WARPS)
    catalogue  Triton's kernels of catalogue_sequence_logps by tiles, warps, precision and width of what is gathered
    odd        row kernels with vocabularies that are no multiple of 16 bytes
    builds     CUDA C++ row kernels of the module at hand, and of each in --builds (make gpu-variants)
    host       where the host time of a step goes
    layers     the step with and without our layers, with CUDA graphs, with a reference
    attention  forms of the mask, grouped heads and attention backends inside the step
    lengths    what an attention backend takes for a new row length
    compile    torch.compile of the decoder layers, and CUDA graphs over it

**Nothing in this file has run on a GPU yet**; only the dry run has been seen. Each trial is guarded: one that fails is
named, and the others go on. Beside the time of a step stands how far its log-probabilities and gradients are from those
of the first trial of its part.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import device, gpu_micro
from benchmarks.gpu_micro import Micro, RowShape, case_of, kernels_of, lines_of, normal, row_kernels
from benchmarks.options import command_line
from benchmarks.report import Report
from napo_kernels import linear_sequence_logps

if TYPE_CHECKING:
    from benchmarks.gpu_step_trials import StepTrials

HEADS = {  # model -> H, V
    "Llama-3-8B": (4096, 128256),
    "Llama-3.2-1B": (2048, 128256),
    "Qwen3-0.6B": (1024, 151936),
    "SmolLM2-135M": (576, 49152),
    "Gemma-2-2B": (2304, 256000),
}
ROWS = 8192
CHUNKS = (512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
MOST_LOGITS = 16e9  # bytes
BYTES_A_LOGIT = 6  # fp32, and bf16 of what the row kernel makes of it
# Columns of a block, warps; the default first.
WALKS = ((2048, 8), (1024, 4), (2048, 16), (2048, 4), (4096, 16), (4096, 8), (1024, 8))
# Constants of napo_kernels/triton/catalogue_sequence_logps.py, the defaults first. Tiles are the plan's as well.
CATALOGUE: tuple[dict[str, Any], ...] = (
    {},
    {"TILE_ROWS": 64, "TILE_COLUMNS": 64},
    {"TILE_ROWS": 128, "TILE_COLUMNS": 128, "TILE_WARPS": 8},
    {"TILE_WARPS": 8},
    {"WIDTH": 64},
    {"GATHERED": 32},
    {"GATHERED_WIDTH": 512},
    {"PRECISION": "ieee"},
)
ODD = (50257, 32003)  # GPT-2's, and one that is odd as well
SECONDS_OF_A_BUILD = 40


def main(arguments: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=[*PARTS, ONE_BUILD], help="in order")
        parser.add_argument("--builds", type=Path, default=None, help="folder with one folder per module: NAME/_C*.so")
        parser.add_argument("--module", type=Path, default=None, help="this compiled module in place of the usual one")

    use_module(arguments)
    options = command_line(__doc__, arguments, add, default_device="cuda")
    report = Report("gpu_trials", options)
    trials = Trials(report, options)
    for part in options.parts:
        if report.has_time(part):
            with report.guarded(part, "all"):
                {**PARTS, ONE_BUILD: one_build}[part](trials)
            report.write()
            if device.on_gpu():
                torch.cuda.empty_cache()
    report.finish()


class Trials:
    def __init__(self, report: Report, options: argparse.Namespace) -> None:
        self.report, self.options, self.smoke = report, options, options.smoke
        self.micro = Micro(report, options.smoke)

    def attempt(self, case: str, variant: str, measure: Callable[[], object]) -> None:
        """One trial, if the budget still has time for it; a failure is named."""
        if self.report.has_time(f"{case}, {variant}"):
            with self.report.guarded(case, variant):
                measure()
            self.report.write()

    @functools.cached_property
    def row_shape(self) -> RowShape:
        return RowShape(64, 32, 300, 2, 5) if self.smoke else RowShape(1024, 4096, 128256, 32, 128)

    def copy_rate(self) -> None:
        """Measures the rate of a copy, with which the rates of kernels are compared."""
        if not self.micro.copy_rate:
            gpu_micro.copy(self.micro)

    @functools.cached_property
    def step(self) -> StepTrials:
        from benchmarks.gpu_step_trials import StepTrials

        return StepTrials(self)


# ---- heads and row kernels -------------------------------------------------------------------------------------------


def head(t: Trials) -> None:
    heads = {"tiny": (32, 300)} if t.smoke else HEADS
    for model, (width, vocabulary) in heads.items():
        with t.report.guarded(f"head, {model}", "all"):
            head_of(t, model, width, vocabulary)
        if device.on_gpu():
            torch.cuda.empty_cache()


def head_of(t: Trials, model: str, width: int, vocabulary: int) -> None:
    rows, chunks = (256, (64, 256)) if t.smoke else (ROWS, CHUNKS)
    weight = gpu_micro.normal(vocabulary, width) * width**-0.5
    hidden = gpu_micro.normal(rows, width).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device.current)
    ids = torch.arange(rows, device=device.current) // 8
    upstream = torch.randn(rows // 8, device=device.current)
    case = f"head, {model}, H {width}, V {vocabulary}, rows {rows}"

    def op(chunk: int | None) -> Callable[[], object]:
        size = None if chunk is None else chunk * vocabulary * BYTES_A_LOGIT

        def run() -> object:
            logps = linear_sequence_logps(
                hidden, weight, targets, sequence_ids=ids, num_sequences=len(upstream), chunk_bytes=size
            )
            return torch.autograd.grad(logps, hidden, upstream)

        return run

    def matmuls(chunk: int) -> tuple[float, float]:
        """Seconds of both for all rows."""
        few, context = hidden.detach()[:chunk], gpu_micro.empty(chunk, width)
        logits = torch.rand(chunk, vocabulary, device=device.current)
        stored = logits.bfloat16()
        wide = {"out_dtype": torch.float32, "out": logits} if device.on_gpu() else {"out": stored}
        of_logits = t.micro.best(lambda: torch.mm(few, weight.t(), **wide), 5)
        of_weight = t.micro.best(lambda: torch.mm(stored, weight, out=context), 5)
        return of_logits * rows / chunk, of_weight * rows / chunk

    def by_chunk(chunk: int) -> None:
        of_logits, of_weight = matmuls(chunk)
        whole, bare = t.micro.best(op(chunk), 4), of_logits + of_weight
        facts = {"logits_ms": of_logits, "times_weight_ms": of_weight, "matmuls_ms": bare}
        rounded = {name: round(1e3 * seconds, 3) for name, seconds in facts.items()}
        t.micro.add(case, f"{chunk} rows at a time", whole, **rounded, of_matmuls=round(whole / bare, 3))

    for chunk in chunks:
        if chunk * vocabulary * BYTES_A_LOGIT <= MOST_LOGITS:
            t.attempt(case, f"{chunk} rows at a time", functools.partial(by_chunk, chunk))
    default = op(None)
    t.attempt(case, "the op's own choice", lambda: t.micro.add(case, "the op's own choice", t.micro.best(default, 4)))


def walks(t: Trials) -> None:
    if "triton" not in t.micro.backends:
        t.report.say("walks: left out, Triton has no GPU here")
        return
    rows, tokens = (kernels_of("triton", op) for op in ("linear_sequence_logps", "sequence_logps"))
    t.copy_rate()
    for block, warps in WALKS:
        setting = {"WALK_BLOCK": block, "WALK_WARPS": warps}
        with patch.multiple(rows, **setting), patch.multiple(tokens, **setting):
            label = f"triton, blocks of {block}, {warps} warps"
            t.attempt("walks", label, functools.partial(row_kernels, t.micro, "triton", t.row_shape, label))


def _patched(module: ModuleType, settings: dict[str, Any]) -> AbstractContextManager[Any]:
    """``patch.multiple``, which refuses to change nothing."""
    return patch.multiple(module, **settings) if settings else nullcontext()


def catalogue(t: Trials) -> None:
    """Forward and backward of heads in bf16, frozen and trained, and of one in fp32, where PRECISION decides."""
    from benchmarks.catalogue_sequence_logps import HeadProblem, HeadShape, drawn
    from napo.catalogue import Trie
    from napo_kernels import allowed

    kernels = kernels_of("triton", "catalogue_sequence_logps")
    trie = Trie.of(drawn(40 if t.smoke else 1349))
    small = HeadShape(60, 32, 512) if t.smoke else HeadShape(2016, 576, 49152)
    shapes = {"frozen": small, "trained": small._replace(trains=True), "fp32": small}
    if device.on_gpu() and not t.smoke:
        shapes["wide"] = HeadShape(8192, 4096, 128256)
    for name, shape in shapes.items():
        for setting in CATALOGUE:
            plan = {key: size for key, size in setting.items() if hasattr(allowed, key)}
            with _patched(kernels, setting), _patched(allowed, plan):
                problem = HeadProblem(trie, shape)
                if name == "fp32":
                    problem.hidden, problem.weight = problem.hidden.float(), problem.weight.float()
                label = ", ".join(f"{key} {size}" for key, size in setting.items()) or "as it is"
                measure = functools.partial(timed_catalogue, t, f"catalogue, {name}", label, problem.small)
                t.attempt(f"catalogue, {name}", label, measure)


def timed_catalogue(t: Trials, case: str, label: str, run: Callable[[], object]) -> None:
    t.micro.add(case, label, t.micro.best(run, 7))


ONE_BUILD = "one-build"  # what `builds` runs once per module


def builds(t: Trials) -> None:
    """Each module in a process of its own: one process can load only one."""
    found = sorted(t.options.builds.glob("*/_C*.so")) if t.options.builds else []
    if t.options.builds and not found:
        raise ValueError(f"--builds: expected NAME/_C*.so in {t.options.builds}, found none; run make gpu-variants")
    ours = [module for module in found if module.name.endswith(EXTENSION_SUFFIXES[0])]
    if len(ours) < len(found):
        print(f"gpu_trials: builds: {len(found) - len(ours)} of {len(found)} modules are for another Python, not tried")
    for module in (None, *ours):
        name = "default" if module is None else module.parent.name
        t.attempt("builds", name, functools.partial(build_in_process, t, name, module))


def build_in_process(t: Trials, name: str, module: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", "trials", "--parts", ONE_BUILD, "--results", folder]
        command += ["--device", t.options.device, *(["--smoke"] if t.smoke else [])]
        command += ["--module", str(module)] if module else []
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_OF_A_BUILD, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            raise RuntimeError(f"exit status {done.returncode}: {last}")
        (path,) = Path(folder).glob("*.json")
        for row in json.loads(path.read_text())["gpu_trials"]["rows"]:
            row["variant"] = f"{name}, {row['variant']}"
            t.report.rows.append(row)


def one_build(t: Trials) -> None:
    backend = "cuda" if device.on_gpu() else "cpu"
    t.copy_rate()
    row_kernels(t.micro, backend, t.row_shape)


def odd(t: Trials) -> None:
    t.copy_rate()
    for vocabulary in (301,) if t.smoke else ODD:
        shape = t.row_shape._replace(vocabulary=vocabulary, sequences=2 if t.smoke else 8)
        for backend in t.micro.backends:
            if backend != "reference":
                t.attempt(f"odd, V {vocabulary}", backend, functools.partial(row_kernels, t.micro, backend, shape))
        t.attempt(f"odd, V {vocabulary}", "matmuls", functools.partial(matmuls_by_pitch, t, shape))


def matmuls_by_pitch(t: Trials, shape: RowShape) -> None:
    """The head's two matmuls with rows of logits one behind the other, and as far apart as the op puts them."""
    hidden, weight = normal(shape.rows, shape.width), normal(shape.vocabulary, shape.width)
    context, packed = torch.empty_like(hidden), normal(shape.rows, shape.vocabulary)
    for name, logits in (("packed", packed), ("padded", lines_of(shape, packed.dtype).copy_(packed))):

        def run(logits: Tensor = logits) -> None:
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits, weight, out=context)

        t.micro.add(case_of(shape), f"two matmuls, {name} rows", t.micro.best(run, 7))


def use_module(arguments: Sequence[str]) -> None:
    """Loads the module of --module before anything else asks for the usual one, as `command_line` does."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--module", type=Path, default=None)
    path = parser.parse_known_args(arguments)[0].module
    if path is not None:
        name = "napo_kernels._C"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module


def of_a_step(name: str) -> Callable[[Trials], None]:
    """A part of gpu_step_trials. That imports transformers, which takes seconds that the other parts, and each process
    of `builds`, would pay too."""

    def run(t: Trials) -> None:
        getattr(importlib.import_module("benchmarks.gpu_step_trials"), name)(t)

    return run


PARTS: dict[str, Callable[[Trials], None]] = {
    "head": head,
    "walks": walks,
    "catalogue": catalogue,
    "odd": odd,
    "builds": builds,
    "host": of_a_step("host"),
    "layers": of_a_step("layers"),
    "attention": of_a_step("attentions"),
    "lengths": of_a_step("lengths"),
    "compile": of_a_step("compile_layers"),
}
