"""Registration of the ops with ``torch.library``: schema, fake, autograd.

``torch.library.custom_op`` looks in every call whether outputs alias inputs, keeps Dynamo out of the body, and fills in
default arguments: some 40 microseconds a call, more than a pool of 64 users costs to compute. The ops have no defaults
and write fresh outputs, which opcheck verifies in the tests once and for all, so here they go straight to the
dispatcher. An op that writes into its arguments wants custom_op, which counts their versions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("napo", "FRAGMENT")


def define(name: str, schema: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Makes a function the op ``napo::name`` on every device. ``schema`` has neither defaults nor mutated arguments."""

    def decorate(function: Callable[..., Any]) -> OpOverload:
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        op: OpOverload = getattr(torch.ops.napo, name).default
        return op

    return decorate


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
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return function.apply(*arguments)
        return below_autograd(*arguments)

    _LIBRARY.impl(op._schema.name, implementation, "Autograd")


def refuse_double_backward(op: OpOverload) -> None:
    """Makes the second derivative of ``op``, a backward op, an error that says so."""

    differentiate(op, no_second_derivative(op._schema.name), lambda *_: None)


def no_second_derivative(name: str) -> Callable[..., None]:
    """The backward of the backward op ``name``."""

    def refuse(*_: object) -> None:
        raise RuntimeError(f"{name.removeprefix('napo::')}: the second derivative is not implemented")

    return refuse


def as_given(tensor: Tensor) -> AbstractContextManager[Any]:
    """In it torch computes in the dtypes that it is given, autocast or not, and kernels are launched on the tensor's
    device, which need not be the current one."""
    if tensor.is_cpu and not torch.is_autocast_enabled("cpu"):
        return nullcontext()
    contexts = ExitStack()
    contexts.enter_context(torch.autocast(tensor.device.type, enabled=False))
    contexts.enter_context(torch.cuda.device_of(tensor))
    return contexts
