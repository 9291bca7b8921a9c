"""The body of a causal LM as CUDA graphs: one launch for its forward and one for its backward, instead of thousands.

A training step of a small model is bound by the host that launches its kernels. A graph is recorded once for a shape
of packed rows and then replayed on other numbers, which are copied to where the graph reads. Before each replay,
everything that a recording takes for granted is checked: the weights' places, which of them are trained, adapters,
autocast, modes."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from napo.language_models.fused.attention import PACKED
from napo.scoring.packing import PackedBatch

MOST = 32  # graphs of a model; each keeps its shape's hidden states and the gradients of what is trained
Body = Callable[[PackedBatch], Tensor]


class Recorder:
    """Records the launches of functions, on a stream of its own, into memory that its recordings share."""

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def rehearse(self, compute: Callable[[], None]) -> None:
        """A first run: libraries set things up at their first call on a stream, which cannot be recorded."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            compute()
        current.wait_stream(self.stream)

    def record(self, compute: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """The function that replays the launches, and the result of `compute`: tensors that each replay writes anew."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: a data loader's thread that pins memory meanwhile is none of the recording's business
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = compute()
        finally:
            torch.cuda.set_stream(current)  # where the recording failed, torch leaves its stream in place
        return graph.replay, result


class BodyGraphs:
    """The body of `model`, replayed where it has been recorded. Its hidden states stand until the next call.

    Graphs with a backward share their memory, as no two of them are under way at once: a forward while another one's
    backward is still to come runs without a graph.
    """

    def __init__(self, model: PreTrainedModel, body: Body) -> None:
        """`body` gives the hidden states (rows, T, H) of a batch and reads only its `input_ids`, `position_ids` and
        `ends`."""
        self.model, self.body = model, body
        self._seen: Counter[Any] = Counter()
        self._graphs: dict[Any, _Graph] = {}
        self._granted: _Granted | None = None
        self._recorders: dict[bool, Recorder] = {}  # with a backward, and without
        self._gradients: _Gradients | None = None
        self._under_way: Callable[[], _Pass | None] = lambda: None
        self._broken: str | None = None
        self._said: set[str] = set()

    def __call__(self, batch: PackedBatch) -> Tensor:  # (rows, T, H)
        """The first batch of a shape runs without a graph: many shapes occur only once."""
        if self._granted is None or not self._granted.holds():
            if self._graphs and batch.input_ids.is_cuda:
                torch.cuda.synchronize(batch.input_ids.device)  # the last replay may still use the memory
            self._graphs.clear()
            self._seen.clear()
            self._granted = _Granted(self.model)
            self._recorders.clear()
            self._gradients = None
        granted = self._granted
        reason = self._broken or why_not(self.model, batch) or granted.why_not()
        if reason is not None:
            return self._without(batch, reason)
        trained = granted.trained if torch.is_grad_enabled() else []
        if trained and self._under_way() is not None:
            return self.body(batch)
        key = (tuple(batch.input_ids.shape), bool(trained), _autocast(), granted.modes())
        if key not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] == 1:
                return self.body(batch)
            if len(self._graphs) == MOST:
                return self._without(batch, f"{MOST} shapes of packed rows have a graph; others run without one")
            try:
                self._graphs[key] = self._recorded(batch, trained)
            except RuntimeError as error:  # out of memory, or an operation that waits for the device
                self._broken = f"the model cannot be recorded ({str(error).strip().splitlines()[0]}); it runs without"
                return self._without(batch, self._broken)
        graph = self._graphs[key]
        graph.load(batch)
        if not trained:
            graph.forward()
            return graph.out
        under_way = _Pass()
        self._under_way = weakref.ref(under_way)
        hidden: Tensor = _Replay.apply(graph, under_way, *trained)
        return hidden

    def _recorded(self, batch: PackedBatch, trained: Sequence[Tensor]) -> _Graph:
        if bool(trained) not in self._recorders:
            self._recorders[bool(trained)] = Recorder()
        if trained and self._gradients is None:
            self._gradients = _Gradients(trained)
        gradients = self._gradients if trained else None
        return _Graph(self.body, batch, gradients, self._recorders[bool(trained)])

    def _without(self, batch: PackedBatch, reason: str) -> Tensor:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"cuda_graphs: {reason}", RuntimeWarning, stacklevel=2)
        return self.body(batch)


def why_not(model: PreTrainedModel, batch: PackedBatch) -> str | None:
    """None where this model's body may be recorded, else why it runs without graphs."""
    implementation = model.config.get_text_config()._attn_implementation
    if not batch.input_ids.is_cuda:
        return f"expected a model on a CUDA device, got {batch.input_ids.device}; it runs without graphs"
    if dist.is_initialized() and dist.get_world_size() > 1:
        return f"expected one process, got {dist.get_world_size()} ranks; they run without graphs"
    if implementation not in ("sdpa", PACKED, "eager"):
        return f"expected attention 'sdpa' or 'eager', got {implementation!r}; it runs without graphs"
    return None


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


class _Granted:
    """The state of a model that its recordings depend on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modules: list[Any] = list(model.base_model.modules())
        self.places = [
            (module._parameters, name, parameter, parameter.data_ptr(), parameter.requires_grad)
            for module in self.modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        found: dict[int, Tensor] = {id(place[2]): place[2] for place in self.places if place[2].requires_grad}
        self.trained = list(found.values())  # each once, however often it is tied
        self.adapted = [module for module in self.modules if hasattr(module, "_disable_adapters")]
        self.random = [
            module
            for module in self.modules
            if (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "attention_dropout", False)
        ]
        self.checkpointed = [module for module in self.modules if hasattr(module, "gradient_checkpointing")]

    def holds(self) -> bool:
        """Without gradient it does not matter which weights are trained: PEFT's `disable_adapter` switches that off and
        on again."""
        graded = torch.is_grad_enabled()
        return all(
            table.get(name) is parameter
            and parameter.data_ptr() == address
            and (parameter.requires_grad == trained or not graded)
            for table, name, parameter, address, trained in self.places
        )

    def why_not(self) -> str | None:
        if any(module.training for module in self.random):
            return "expected no dropout, which draws anew at each step; with it the model runs without graphs"
        if torch.is_grad_enabled() and any(m.gradient_checkpointing and m.training for m in self.checkpointed):
            return "expected no gradient checkpointing, with which the model runs without graphs"
        if any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in self.modules):
            return "expected no hooks inside the model, which a replay does not call; it runs without graphs"
        return None

    def modes(self) -> tuple[Any, ...]:
        """Values that a recording has fixed, although they may change from call to call."""
        return (
            self.model.training,
            torch.is_inference_mode_enabled(),
            self.model.config.get_text_config()._attn_implementation,
            *((layer.disable_adapters, *layer.active_adapters, *_scaling_and_merged(layer)) for layer in self.adapted),
        )


def _scaling_and_merged(layer: Any) -> Sequence[Any]:
    return (layer.merged, *layer.scaling.values()) if hasattr(layer, "scaling") else ()


class _Pass:
    """Lives from a forward to its backward, or until that backward can no longer be called."""


class _Graph:
    """Forward and backward of the body for one shape, with the tensors that they read and write."""

    def __init__(self, body: Body, batch: PackedBatch, gradients: _Gradients | None, recorder: Recorder) -> None:
        self.gradients = gradients
        read = {name: getattr(batch, name).clone() for name in ("input_ids", "position_ids", "ends")}
        self.batch = dataclasses.replace(batch, **read)
        self.live: Any = None
        dtype = _autocast()

        def forward() -> Tensor:
            if dtype is None:
                self.live = body(self.batch)
            else:
                with torch.autocast("cuda", dtype=dtype, cache_enabled=False):  # casts are the recording's own
                    self.live = body(self.batch)
            return self.live.detach()

        def backward() -> list[int]:
            assert gradients is not None
            return gradients.keep(torch.autograd.grad(self.live, gradients.trained, self.grad, allow_unused=True))

        def both() -> None:
            self.grad = torch.zeros_like(forward())
            if gradients is not None:
                backward()

        recorder.rehearse(both)
        self.forward, self.out = recorder.record(forward)
        if gradients is not None:
            self.backward, self.reached = recorder.record(backward)
        self.live = None  # its memory is the next graph's

    def load(self, batch: PackedBatch) -> None:
        for name in ("input_ids", "position_ids", "ends"):
            getattr(self.batch, name).copy_(getattr(batch, name))


class _Gradients:
    """Where every graph leaves the gradients, those of one dtype side by side, so that one copy takes them out: what a
    backward hands to a parameter, it keeps as its `.grad`."""

    def __init__(self, trained: Sequence[Tensor]) -> None:
        self.trained = trained
        members: dict[Any, list[int]] = {}
        for i, parameter in enumerate(trained):
            members.setdefault((parameter.device, parameter.dtype), []).append(i)
        self.groups = [(group, torch.cat([trained[i].detach().flatten() for i in group])) for group in members.values()]
        self.places = self._by_parameter([flat for _, flat in self.groups])

    def keep(self, gradients: Sequence[Tensor | None]) -> list[int]:
        """Returns which parameters the backward reached."""
        reached = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
        torch._foreach_copy_([self.places[i] for i in reached], list(reached.values()))
        return list(reached)

    def copies(self, reached: list[int]) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * len(self.trained)
        copied = self._by_parameter([flat.clone() for _, flat in self.groups])
        for i in reached:
            found[i] = copied[i]
        return found

    def _by_parameter(self, flats: list[Tensor]) -> list[Tensor]:
        views: dict[int, Tensor] = {}
        for (group, _), flat in zip(self.groups, flats, strict=True):
            shapes = [self.trained[i] for i in group]
            views.update(zip(group, torch._utils._unflatten_dense_tensors(flat, shapes), strict=True))
        return [views[i] for i in range(len(self.trained))]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, under_way: _Pass, *trained: Tensor) -> Tensor:
        ctx.graph, ctx.under_way = graph, under_way
        graph.forward()
        return graph.out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.under_way is None:
            raise RuntimeError("cuda_graphs: expected one backward a forward, got a second; switch cuda_graphs off")
        graph, ctx.under_way = ctx.graph, None
        graph.grad.copy_(grad)
        graph.backward()
        assert graph.gradients is not None
        return None, None, *graph.gradients.copies(graph.reached)
