"""The body of a causal LM as CUDA graphs: one launch for the forward and one for the backward, instead of thousands.

A training step of a small model is bound by the host that launches its kernels. A graph is recorded once for a shape
of packed rows and then replayed on other numbers, which are copied to where the graph reads. What it has baked in is
looked at before each replay: addresses of the weights, which of them are trained, the adapters' state, autocast.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from napo.scoring.packing import PackedBatch

MOST = 8  # graphs of a model; each holds its shape's hidden states and gradients


class BodyGraphs:
    """Replays the body of `model` where it may; `None` tells that this batch is to be computed without a graph."""

    def __init__(self, model: PreTrainedModel, run: Any) -> None:
        """`run(batch)`: the body's hidden states, masks included."""
        self.model, self.run = model, run
        self._seen: Counter[Any] = Counter()
        self._graphs: dict[Any, _Graph] = {}
        self._baked: _Baked | None = None
        self._pools: dict[bool, Any] = {}
        self._pending: Any = None  # of the training graph whose backward is still to come
        self._said: set[str] = set()

    def __call__(self, batch: PackedBatch) -> Tensor | None:  # (rows, T, H)
        """The first batch of a shape is computed without a graph, which also makes the libraries ready."""
        if self._baked is None or not self._baked.holds(torch.is_grad_enabled()):
            self._graphs.clear()
            self._seen.clear()
            self._baked = _Baked(self.model)
        training = torch.is_grad_enabled() and bool(self._baked.trained)
        reason = why_not(self.model, batch) or self._baked.why_not(training)
        if reason is not None:
            return self._without(reason)
        if training and self._pending is not None and self._pending() is not None:
            return None  # its activations lie where this forward would write
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (tuple(batch.input_ids.shape), training, self.model.training, dtype, self._baked.adapters())
        graph = self._graphs.get(key)
        if graph is None:
            self._seen[key] += 1
            if self._seen[key] == 1:
                return None
            if len(self._graphs) == MOST:
                return self._without(f"{MOST} shapes of packed rows have a graph, others run without one")
            if training not in self._pools:
                self._pools[training] = torch.cuda.graph_pool_handle()
            trained = self._baked.trained if training else []
            graph = self._graphs[key] = _Graph(self.run, batch, trained, dtype, self._pools[training])
        graph.load(batch)
        if not training:
            graph.forward.replay()
            return graph.out.clone()
        token = _Token()
        self._pending = weakref.ref(token)
        return _Replay.apply(graph, token, *graph.trained)

    def _without(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"cuda_graphs: {reason}", RuntimeWarning, stacklevel=2)


def why_not(model: PreTrainedModel, batch: PackedBatch) -> str | None:
    """None where the body may be recorded, else why it runs without a graph."""
    config = model.config.get_text_config()
    if not batch.input_ids.is_cuda:
        return f"expected the model on a CUDA device, got {batch.input_ids.device}; it runs without graphs"
    if dist.is_initialized() and dist.get_world_size() > 1:
        return f"expected one process, got {dist.get_world_size()} ranks; they run without graphs"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"expected attention 'sdpa' or 'eager', got {config._attn_implementation!r}; it runs without graphs"
    return None


class _Token:
    """Lives as long as a forward whose backward may come."""


class _Baked:
    """What a recorded graph takes for granted."""

    def __init__(self, model: PreTrainedModel) -> None:
        modules = list(model.base_model.modules())
        self.places = [
            (module._parameters, name, parameter, parameter.data_ptr(), parameter.requires_grad)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        unique = {id(parameter): parameter for _, _, parameter, _, trained in self.places if trained}
        self.trained = list(unique.values())
        self.layers: list[Any] = [module for module in modules if hasattr(module, "disable_adapters")]
        self.dropouts = [module for module in modules if isinstance(module, nn.Dropout) and module.p > 0]
        self.dropouts += [module for module in modules if getattr(module, "attention_dropout", 0.0)]
        self.checkpointed: list[Any] = [module for module in modules if hasattr(module, "gradient_checkpointing")]

    def holds(self, training: bool) -> bool:
        """PEFT's reference pass switches `requires_grad` off, which matters to nobody there."""
        return all(
            table.get(name) is parameter
            and parameter.data_ptr() == address
            and (parameter.requires_grad == trained or not training)
            for table, name, parameter, address, trained in self.places
        )

    def why_not(self, training: bool) -> str | None:
        if any(module.training for module in self.dropouts):
            return "dropout draws anew at each step; it runs without graphs (set it to 0 to have them)"
        if training and any(module.training and module.gradient_checkpointing for module in self.checkpointed):
            return "gradient checkpointing computes layers again; it runs without graphs"
        return None

    def adapters(self) -> int:
        return hash(
            tuple(
                (layer.disable_adapters, layer.merged, *layer.active_adapters, *layer.scaling.values())
                if hasattr(layer, "scaling")
                else (layer.disable_adapters, *layer.active_adapters)
                for layer in self.layers
            )
        )


class _Graph:
    def __init__(
        self, run: Any, batch: PackedBatch, trained: list[Tensor], dtype: torch.dtype | None, pool: Any
    ) -> None:
        self.batch = dataclasses.replace(
            batch,
            input_ids=batch.input_ids.clone(),
            position_ids=batch.position_ids.clone(),
            ends=batch.ends.clone(),
        )
        self.trained = trained

        def compute() -> Tensor:
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
                return run(self.batch)

        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # what libraries set up for a stream cannot be recorded
            out = compute()
            self.grad = torch.zeros_like(out)
            if trained:
                torch.autograd.grad(out, trained, self.grad, allow_unused=True)
            del out
        current.wait_stream(stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        how: dict[str, Any] = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward, **how):
            out = compute()
        if trained:
            with torch.cuda.graph(self.backward, **how):
                self.grads = _Grads(torch.autograd.grad(out, trained, self.grad, allow_unused=True))
        self.out = out.detach()

    def load(self, batch: PackedBatch) -> None:
        torch._foreach_copy_(
            [self.batch.input_ids, self.batch.position_ids, self.batch.ends],
            [batch.input_ids, batch.position_ids, batch.ends],
        )


class _Grads:
    """Gradients side by side in one tensor for each dtype, so that one copy frees them from the graph's memory."""

    def __init__(self, grads: Any) -> None:
        self.count = len(grads)
        groups: dict[torch.dtype, list[int]] = {}
        for i, grad in enumerate(grads):
            if grad is not None:
                groups.setdefault(grad.dtype, []).append(i)
        self.groups = [
            (members, torch._utils._flatten_dense_tensors([grads[i] for i in members]), [grads[i] for i in members])
            for members in groups.values()
        ]

    def copies(self) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * self.count
        for members, flat, shapes in self.groups:
            for i, grad in zip(
                members, torch._utils._unflatten_dense_tensors(flat.clone(), shapes), strict=True
            ):
                found[i] = grad
        return found


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, token: _Token, *trained: Tensor) -> Tensor:
        ctx.graph, ctx.token = graph, token
        graph.forward.replay()
        return graph.out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graph, ctx.token = ctx.graph, None
        graph.grad.copy_(grad)
        graph.backward.replay()
        return None, None, *graph.grads.copies()
