"""Registration of the ops with ``torch.library``: schema, fake, autograd. All ops are made here.

``torch.library.custom_op`` checks in every call whether outputs alias inputs, keeps Dynamo out of the body, and fills
in default arguments. This takes some 40 microseconds per call, more than the computation for a pool of 64 users. The
ops have no defaults and write fresh outputs, which opcheck verifies in the tests once and for all, so here they go
straight to the dispatcher.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Annotated, Any, get_type_hints

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("napo", "FRAGMENT")


Size = Annotated[int, "SymInt"]  # of an argument that depends on shapes

_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    Size: "SymInt",
    bool: "bool",
    float: "float",
    str | None: "str?",
    list[int]: "int[]",
}


def fields(*groups: type) -> str:
    """NamedTuples of arguments as a part of a schema; `split` is the way back."""
    named = (pair for group in groups for pair in get_type_hints(group, include_extras=True).items())
    return ", ".join(f"{_SCHEMA[kind]} {name}" for name, kind in named)


def split(arguments: Sequence[Any], *groups: Any) -> list[Any]:
    """The arguments of an op as the NamedTuples that its schema was made of."""
    found, first = [], 0
    for group in groups:
        last = first + len(group._fields)
        found.append(group(*arguments[first:last]))
        first = last
    assert first == len(arguments), f"{len(arguments)} arguments for {first} fields"
    return found


def define(name: str, schema: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Makes a function the op ``napo::name`` on every device. ``schema`` has no defaults; an argument ``Tensor(a!)`` is
    one that the function writes into, and its version is counted."""
    written = [i for i, argument in enumerate(schema.split(",")) if "(a!)" in argument]

    def decorate(function: Callable[..., Any]) -> OpOverload:
        if written:
            function = _counting(function, written)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        op: OpOverload = getattr(torch.ops.napo, name).default
        return op

    return decorate


def _counting(function: Callable[..., Any], written: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        result = function(*arguments)
        for i in written:
            torch.autograd.graph.increment_version(arguments[i])
        return result

    return counted


def fake(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function tell the shapes of what ``op`` returns."""
    register: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.library.register_fake(
        op._schema.name, lib=_LIBRARY
    )
    return register


def differentiate(
    op: OpOverload, backward: Callable[..., Any], setup_context: Callable[[Any, tuple[Any, ...], Any], None]
) -> None:
    """Gives ``op`` a gradient; the functions are those of ``torch.library.register_autograd``."""

    def below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = below_autograd(*arguments)
        setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"{op._schema.name.removeprefix('napo::')}_autograd", (torch.autograd.Function,), methods)

    def implementation(*arguments: Any) -> Any:
        _refuse_tangents(op, arguments)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return function.apply(*arguments)
        return below_autograd(*arguments)

    _LIBRARY.impl(op._schema.name, implementation, "Autograd")


def _refuse_tangents(op: OpOverload, arguments: tuple[Any, ...]) -> None:
    """Without this a forward-mode derivative would be lost in silence."""
    if forward_ad._current_level < 0:
        return
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            name = op._schema.name.removeprefix("napo::")
            raise NotImplementedError(f"{name}: forward-mode derivatives are not implemented; use backward()")


def shapes_of(tensors: Sequence[Tensor | None]) -> list[torch.Size | None]:
    return [None if tensor is None else tensor.shape for tensor in tensors]


def refuse_reshaped(name: str, before: list[torch.Size | None], saved: Sequence[Tensor | None]) -> None:
    """``tensor.data = other`` changes nothing in a saved tensor but its shape, which a kernel relies on."""
    if shapes_of(saved) != before:
        raise RuntimeError(f"{name}: an argument got another shape between forward and backward; leave its .data alone")


def refuse_graph(name: str) -> None:
    """For the backward of an op whose gradients have no graph to everything they depend on: an error if a second
    derivative may follow."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name}: the second derivative is not implemented; call backward without create_graph")


def refuse_double_backward(op: OpOverload) -> None:
    """Makes the second derivative of ``op``, a backward op, an error that says so."""

    def refuse(*_: object) -> None:
        raise RuntimeError(f"{op._schema.name.removeprefix('napo::')}: the second derivative is not implemented")

    differentiate(op, refuse, lambda *_: None)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast. Some devices have none, such as meta."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class _FullPrecision:
    """A context in which CUDA multiplies fp32 numbers as they are. The setting is the process's: the first thread to
    enter changes it, the last one to leave puts back what was there."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, ""

    def __enter__(self) -> None:
        setting = torch.backends.cuda.matmul
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before = setting.fp32_precision
                if self._before == "tf32":
                    setting.fp32_precision = "none"  # what torch.backends.fp32_precision says
                    if setting.fp32_precision == "tf32":
                        self._before = "none"
                    setting.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and torch.backends.cuda.matmul.fp32_precision != self._before:
                torch.backends.cuda.matmul.fp32_precision = self._before


_FULL_PRECISION = _FullPrecision()


def as_given(tensor: Tensor, *, full_precision: bool = False) -> AbstractContextManager[Any]:
    """A context in which torch computes in the given dtypes, autocast or not, and launches kernels on the tensor's
    device, which need not be the current one. With ``full_precision`` its matmuls of fp32 do not round what they
    multiply to the 10 bits of TF32, whatever torch.set_float32_matmul_precision says."""
    if tensor.is_cpu and not torch.is_autocast_enabled("cpu"):
        return nullcontext()
    contexts = ExitStack()
    contexts.enter_context(without_autocast(tensor.device))
    if full_precision and not tensor.is_cpu:
        contexts.enter_context(_FULL_PRECISION)
    contexts.enter_context(torch.cuda.device_of(tensor))
    return contexts
