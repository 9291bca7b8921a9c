"""Settings of the GPU kernels and of the step that only a measurement can decide, for the next minutes on a GPU.

    python -m benchmarks trials                                    all parts, on CUDA
    python -m benchmarks trials --parts walks builds --builds build/gpu-variants
    python -m benchmarks trials --device cpu --smoke               a dry run of what a CPU can run

    head       both matmuls of several output heads by rows at a time, beside the whole op with such chunks
    walks      Triton's row kernels by block of columns and warps (WALK_BLOCK, WALK_WARPS)
    builds     CUDA C++ row kernels of the module at hand, and of each in --builds (make gpu-variants)
    odd        row kernels with vocabularies that are no multiple of 16 bytes
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
import cProfile
import functools
import importlib.util
import json
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from benchmarks import device, gpu_micro, training_step
from benchmarks.comparison import distance
from benchmarks.gpu_micro import Micro, RowShape, kernels_of, row_kernels
from benchmarks.options import command_line
from benchmarks.report import Report
from benchmarks.timing import of_device, peak_memory
from napo.language_models.fused import lora, mlp, self_attention
from napo.scoring import CandidateScorer, attention, pack
from napo.scoring import scorer as scoring
from napo_kernels import linear_sequence_logps, napo_loss
from napo_kernels.ops import body

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
ODD = (50257, 32003)  # GPT-2's, and one that is odd as well
SECONDS_OF_A_BUILD = 40
STEP = ("Llama-3.2-1B", 8, 200, 8, 7)  # model, users, tokens of a prompt, negatives, tokens of a title
STEP_SMOKE = ("tiny", 2, 12, 3, 7)
LENGTHS = {
    "cuDNN": (SDPBackend.CUDNN_ATTENTION, (320, 328)),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, (320, 328, 384)),
}


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
        """What the rates of kernels are held against."""
        if not self.micro.copy_rate:
            gpu_micro.copy(self.micro)

    @functools.cached_property
    def step(self) -> StepTrials:
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


ONE_BUILD = "one-build"  # what `builds` runs once per module


def builds(t: Trials) -> None:
    """Each module in a process of its own: one process can load only one."""
    found = sorted(t.options.builds.glob("*/_C*.so")) if t.options.builds else []
    if t.options.builds and not found:
        raise ValueError(f"--builds: expected NAME/_C*.so in {t.options.builds}, found none; run make gpu-variants")
    for module in (None, *found):
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


# ---- the step --------------------------------------------------------------------------------------------------------


class StepTrials:
    """One optimiser step, as `training_step` measures it, in other ways; each trial starts from the same weights."""

    def __init__(self, t: Trials) -> None:
        self.t = t
        model, count, prompt, negatives, title = STEP_SMOKE if t.smoke else STEP
        self.case = f"step, {model}, B {count}, P {prompt}, N {negatives}, L {title}"
        self.step = training_step.Step(model, torch.bfloat16, set(), title)
        self.scorer, self.causal_lm = self.step.scorer, self.step.scorer.causal_lm
        vocabulary = training_step.MODELS[model]["v"]
        self.users = training_step.make_users(count, prompt, title, negatives, vocabulary)
        self.batch = pack(*self.users, pad_id=training_step.END)
        self.trained = [p for p in self.step.model.parameters() if p.requires_grad]
        self.truth: dict[str, tuple[Tensor, Tensor]] = {}  # case -> of its first trial
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # zeros would hide errors in the gradients of A
            for name, weight in self.step.model.named_parameters():
                if "lora_B" in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.01)

    def graphed(self) -> CandidateScorer:
        return CandidateScorer(self.step.model, cuda_graphs=True)

    def packed(self, scorer: CandidateScorer | None = None, reference: bool = False) -> Tensor:
        return self.step.packed(self.users, scorer or self.scorer, reference=reference)

    def attempt(
        self,
        part: str,
        variant: str,
        under: Callable[[], AbstractContextManager[object]] = nullcontext,
        *,
        scorer: Callable[[], CandidateScorer] | None = None,
        reference: bool = False,
    ) -> None:
        """One trial of the step, inside the context that `under` gives."""
        case = f"{part}: {self.case}"

        def measure() -> None:
            with under():
                self._measure(case, variant, self.scorer if scorer is None else scorer(), reference)

        self.t.attempt(case, variant, measure)

    def _measure(self, case: str, variant: str, scorer: CandidateScorer, reference: bool) -> None:
        before = [p.detach().clone() for p in self.trained]
        began = time.perf_counter()
        self._values(scorer)
        device.synchronise()
        first = time.perf_counter() - began
        values = [self._values(scorer) for _ in range(2)][-1]  # graphs begin at the second batch of a shape
        truth = self.truth.setdefault(case, values)
        run = functools.partial(self.packed, scorer, reference)
        facts = {"first_s": round(first, 2)}
        seconds = self.t.micro.best(run, 5)
        peak = peak_memory(run)
        device.synchronise()
        wall, process = time.perf_counter(), time.process_time()
        run()
        facts |= {"host_ms": 1e3 * (time.perf_counter() - wall), "host_cpu_ms": 1e3 * (time.process_time() - process)}
        device.synchronise()
        facts = {name: round(value, 2) for name, value in facts.items()} | of_device(run)[0]
        differs = [float(f"{distance(got, right):.1e}") for got, right in zip(values, truth, strict=True)]
        facts |= {"peak_mib": round(peak / 2**20), "logps_differ": differs[0], "gradients_differ": differs[1]}
        self.t.micro.add(case, variant, seconds, **facts)
        with torch.no_grad():
            for weight, value in zip(self.trained, before, strict=True):
                weight.copy_(value)

    def _values(self, scorer: CandidateScorer) -> tuple[Tensor, Tensor]:
        """Log-probabilities, and the gradients of all that is trained in one row."""
        self.step.optimizer.zero_grad()
        logps = scorer(self.batch)
        of_users = logps.view(len(self.users[0]), -1)
        napo_loss(of_users[:, 0], of_users[:, 1:], margin=1.0).backward()
        gradients = torch.cat([p.grad.double().flatten() for p in self.trained if p.grad is not None])
        self.step.optimizer.zero_grad()
        return logps.detach().double().clone(), gradients


def host(t: Trials) -> None:
    """Without waiting for the device: what the host is busy with, by parts of a step and by Python function."""
    s, repeats = t.step, 1 if t.smoke else 5
    parts: dict[str, float] = {}
    for turn in range(repeats + 2):  # the first two warm up
        if turn == 2:
            parts.clear()
        device.synchronise()
        for name, seconds in parts_of_a_step(s):
            parts[name] = parts.get(name, 0.0) + seconds / repeats
    for name, seconds in parts.items():
        t.micro.add(f"host: {s.case}", name, seconds)
    for reference in (False, True):
        profile = cProfile.Profile()
        profile.runcall(s.packed, reference=reference)
        device.synchronise()
        case = f"host, by function: {s.case}{', with reference' if reference else ''}"
        rows = sorted(pstats.Stats(profile).stats.items(), key=lambda row: -row[1][2])  # type: ignore[attr-defined]
        for (file, line, function), (_, calls, own, *_others) in rows[:15]:
            t.micro.add(case, f"{function} ({Path(file).name}:{line})", own, calls=calls)


def parts_of_a_step(s: StepTrials) -> Iterator[tuple[str, float]]:
    """The parts of a step in their order, each with its seconds."""
    began = time.perf_counter()

    def spent() -> float:
        nonlocal began
        now = time.perf_counter()
        seconds, began = now - began, now
        return seconds

    batch = pack(*s.users, pad_id=training_step.END, width_multiple=training_step.width_multiple(device.current))
    yield "pack", spent()
    batch = batch.to(device.current)
    yield "to device", spent()
    masks = scoring.packed_masks(s.causal_lm, batch)
    yield "masks", spent()
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    hidden = scoring.run_body(s.causal_lm, **inputs, attention_mask=masks)
    yield "body, forward", spent()
    rows = hidden.flatten(0, 1).index_select(0, batch.predicting_rows)
    logps = s.scorer._head(rows, batch.pair_rows, batch.targets, batch.sequence_ids, batch.num_sequences)
    yield "head, forward", spent()
    of_users = logps.view(len(s.users[0]), -1)
    loss = napo_loss(of_users[:, 0], of_users[:, 1:], margin=1.0)
    yield "loss, forward", spent()
    s.step.optimizer.zero_grad()
    yield "zero_grad", spent()
    loss.backward()
    yield "backward", spent()
    s.step.optimizer.step()
    yield "optimiser", spent()
    with torch.no_grad(), training_step.without_adapter(s.step.model):
        s.scorer(batch)
    yield "reference pass", spent()


def layers(t: Trials) -> None:
    s = t.step
    s.attempt("layers", "norms, products, rotation and projections in PyTorch", without_kernels)
    s.attempt("layers", "rotation in PyTorch", lambda: patch.object(body, "rotates", lambda _: False))
    s.attempt("layers", "napo")
    s.attempt("layers", "napo, rows not padded", without_padding)
    s.attempt("layers", "napo, CUDA graphs", scorer=s.graphed)
    s.attempt("layers", "napo + reference", reference=True)
    s.attempt("layers", "napo + reference, PEFT's disable_adapter", pefts_switch, reference=True)
    s.attempt("layers", "napo + reference, CUDA graphs", scorer=s.graphed, reference=True)
    if device.on_gpu():
        s.attempt("layers", "make_graphed_callables, layer by layer", lambda: graphed_layers(s))


def without_kernels() -> AbstractContextManager[object]:
    """The layers of the body as they were before they had kernels on a GPU."""
    stack, own = ExitStack(), body.serves
    stack.enter_context(patch.object(body, "serves", lambda *tensors: tensors[0].is_cpu and own(*tensors)))
    stack.enter_context(patch.object(body, "rotates", lambda _: False))
    for module in (lora, mlp, self_attention):
        stack.enter_context(patch.object(module, "linear_together", lambda *_: None))
    return stack


def without_padding() -> AbstractContextManager[object]:
    stack = ExitStack()
    for module in (scoring, training_step):
        stack.enter_context(patch.object(module, "width_multiple", lambda _: 1))
    return stack


def pefts_switch() -> AbstractContextManager[object]:
    return patch.object(training_step, "without_adapter", lambda model: model.disable_adapter())


@contextmanager
def graphed_layers(s: StepTrials) -> Iterator[None]:
    """Each decoder layer by torch's own graphs, for the shape of the one batch."""
    batch = s.batch.to(device.current).widened(training_step.width_multiple(device.current))
    masks = scoring.packed_masks(s.causal_lm, batch)
    inner: Any = s.causal_lm.base_model
    with torch.no_grad():
        x = inner.embed_tokens(batch.input_ids)
        cos, sin = inner.rotary_emb(x, batch.position_ids)
    wrapped = tuple(_Positional(layer) for layer in inner.layers)
    samples = tuple((x.clone().requires_grad_(i > 0), masks, cos, sin) for i in range(len(wrapped)))
    made = torch.cuda.make_graphed_callables(wrapped, samples, allow_unused_input=True)

    def forward_of(graphed: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, attention_mask: Any = None, position_embeddings: Any = None, **_: Any) -> Tensor:
            return graphed(x, attention_mask, *position_embeddings)

        return forward

    with replaced(inner.layers, [forward_of(graphed) for graphed in made]):
        yield


class _Positional(nn.Module):
    """A decoder layer that takes tensors by position, as graphed callables must."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return self.layer(x, attention_mask=mask, position_embeddings=(cos, sin), use_cache=False)


@contextmanager
def replaced(modules: Iterable[nn.Module], forwards: Iterable[Callable[..., Any]]) -> Iterator[None]:
    """The modules have other forwards for a while."""
    stack = ExitStack()
    with stack:
        for module, forward in zip(modules, forwards, strict=True):
            stack.enter_context(patch.object(module, "forward", forward))
        yield


# ---- attention -------------------------------------------------------------------------------------------------------


def attentions(t: Trials) -> None:
    s = t.step
    s.attempt("attention", "napo")
    s.attempt("attention", "additive mask, made once", lambda: in_attention(additive))
    s.attempt("attention", "additive mask, grouped heads", lambda: in_attention(additive, grouped))
    s.attempt("attention", "the same, CUDA graphs", lambda: in_attention(additive, grouped), scorer=s.graphed)
    if device.on_gpu():
        cudnn, efficient = SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
        s.attempt("attention", "cuDNN, additive mask, grouped heads", lambda: in_attention(additive, grouped, cudnn))
        s.attempt("attention", "cuDNN, boolean mask, grouped heads", lambda: in_attention(None, grouped, cudnn))
        s.attempt("attention", "efficient, additive mask", lambda: in_attention(additive, None, efficient))


@contextmanager
def in_attention(
    mask: Callable[..., Tensor] | None = None,
    function: Callable[..., Any] | None = None,
    backend: SDPBackend | None = None,
) -> Iterator[None]:
    """Another mask, another attention function, one backend of torch's attention only."""
    own: Any = AttentionInterface().get("sdpa")
    with ExitStack() as stack:
        if mask is not None:
            stack.enter_context(patch.object(scoring, "attention_mask", mask))
        if backend is not None:
            stack.enter_context(sdpa_kernel(backend))
        if function is not None:
            AttentionInterface.register("sdpa", function)
            stack.callback(AttentionInterface.register, "sdpa", own)
        yield


def additive(batch: Any, window: int | None, _: str, dtype: torch.dtype) -> Tensor:
    """Made once per step, where a boolean mask is made additive once per layer."""
    seen = attention.visible(batch, window).unsqueeze(1)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def grouped(
    _: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """Keys and values are not repeated for the heads of their group."""
    out = scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def lengths(t: Trials) -> None:
    """The first forward and backward of a length, and a later one."""
    backends = {"math": (SDPBackend.MATH, (16, 24))} if t.smoke or not device.on_gpu() else LENGTHS
    for name, (backend, widths) in backends.items():
        for width in widths:
            t.attempt("a new row length", f"{name}, {width}", functools.partial(length, t, name, backend, width))


def length(t: Trials, name: str, backend: SDPBackend, width: int) -> None:
    rows, heads = (2, 2) if t.smoke else (8, 32)
    q, k, v = (gpu_micro.normal(rows, heads, width, 64).requires_grad_() for _ in range(3))
    mask = gpu_micro.normal(rows, 1, width, width).zero_()

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    device.synchronise()
    began = time.perf_counter()
    out = forward()
    device.synchronise()
    between = time.perf_counter()
    out.sum().backward()
    device.synchronise()
    ended = time.perf_counter()
    again = t.micro.best(lambda: torch.autograd.grad(forward().sum(), (q, k, v)), 3)
    facts = {"first_forward_ms": 1e3 * (between - began), "first_backward_ms": 1e3 * (ended - between)}
    rounded = {key: round(value, 1) for key, value in facts.items()}
    t.micro.add("a new row length", f"{name}, {width} columns", again, **rounded)


def compile_layers(t: Trials) -> None:
    """The attention is transformers' own, so that the compiler sees its rotation. Compiling takes most of the time."""
    s = t.step
    s.attempt("compile", "napo")
    s.attempt("compile", "compiled layers", lambda: compiled(s))
    s.attempt("compile", "compiled layers, CUDA graphs", lambda: compiled(s), scorer=s.graphed)


@contextmanager
def compiled(s: StepTrials) -> Iterator[None]:
    engine = "eager" if s.t.smoke else "inductor"
    decoder: Any = s.causal_lm.base_model.layers
    fused = [m for m in s.step.model.modules() if type(m).__name__ in self_attention.ATTENTIONS]
    own = [type(m).forward.__get__(m) for m in fused]
    forwards = [torch.compile(type(m).forward.__get__(m), dynamic=False, backend=engine) for m in decoder]
    with torch._dynamo.config.patch(recompile_limit=64), replaced(fused, own), replaced(decoder, forwards):
        try:
            yield
        finally:
            breaks = torch._dynamo.utils.counters["graph_break"]
            s.t.report.say(f"compile: {sum(breaks.values())} graph breaks")
            for reason, count in breaks.items():
                s.t.report.say(f"compile: {count} x {reason.splitlines()[0]}")


PARTS: dict[str, Callable[[Trials], None]] = {
    "head": head,
    "walks": walks,
    "builds": builds,
    "odd": odd,
    "host": host,
    "layers": layers,
    "attention": attentions,
    "lengths": lengths,
    "compile": compile_layers,
}
