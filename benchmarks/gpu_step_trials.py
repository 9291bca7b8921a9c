"""The trials of `gpu_trials` that run a whole training step or its attention."""

from __future__ import annotations

import cProfile
import functools
import pstats
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from benchmarks import device, gpu_micro, training_step
from benchmarks.comparison import distance
from benchmarks.timing import of_device, peak_memory
from napo.language_models.fused import lora, mlp, self_attention
from napo.scoring import CandidateScorer, attention, pack
from napo.scoring import scorer as scoring
from napo_kernels import napo_loss
from napo_kernels.ops import body

if TYPE_CHECKING:
    from benchmarks.gpu_trials import Trials

STEP = ("Llama-3.2-1B", 8, 200, 8, 7)  # model, users, tokens of a prompt, negatives, tokens of a title
STEP_SMOKE = ("tiny", 2, 12, 3, 7)
LENGTHS = {
    "cuDNN": (SDPBackend.CUDNN_ATTENTION, (320, 328)),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, (320, 328, 384)),
}


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
        """Log-probabilities, and the gradients of all trained weights in one row."""
        self.step.optimizer.zero_grad()
        logps = scorer(self.batch)
        of_users = logps.view(len(self.users[0]), -1)
        napo_loss(of_users[:, 0], of_users[:, 1:], margin=1.0).backward()
        gradients = torch.cat([p.grad.double().flatten() for p in self.trained if p.grad is not None])
        self.step.optimizer.zero_grad()
        return logps.detach().double().clone(), gradients


def host(t: Trials) -> None:
    """The host's time by parts of a step and by Python function, without waiting for the device."""
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
    """Inside, the modules have other forwards."""
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
    """The mask is made once per step; a boolean mask is made additive once per layer."""
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
