"""Code of other people in a model: classes, forwards and hooks of which our tests know nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

# Where the classes, forwards and hooks come from of models that our tests cover, or that only move and cast tensors.
KNOWN = frozenset({"torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "napo", "napo_kernels"})
STANDARD = frozenset({"builtins", "abc", "typing", "collections"})
# Hooks of these move, gather and cast, and do not change what a layer computes. Those of torch.nn.utils (pruning,
# weight_norm) write a weight just before the layer is called, and transformers' tensor parallelism gathers the logits.
MOVING = ("accelerate", "deepspeed", "torch.distributed")
_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def foreign_part(model: nn.Module) -> str | None:
    """The first part of ``model``, its wrappers included, that nobody has compared; None where there is none."""
    looked_at: dict[type, str | None] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in looked_at:
            looked_at[kind] = _foreign_class(kind)
        found = looked_at[kind] or _foreign_forward(module) or next(_strange(hooks_of(module), KNOWN), None)
        if found is not None:
            return f"{found} at {name}" if name else found
    return None


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """The hooks of ``module``, accelerate's among them, which stands around its forward."""
    for table in _TABLES:
        yield from (getattr(module, table, None) or {}).values()
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def computing_hook(module: nn.Module) -> str | None:
    """A hook of ``module`` that may change what it computes, or when its weight is made."""
    return next(_strange(hooks_of(module), MOVING), None)


def _strange(hooks: Iterable[Any], known: Iterable[str]) -> Iterator[str]:
    for hook in hooks:
        if not any(_home(hook) == package or _home(hook).startswith(f"{package}.") for package in known):
            yield f"hook {_called(hook)}"


def _foreign_class(kind: type) -> str | None:
    """A class is known if all that it inherits from is, and nobody has put another forward into it."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] not in KNOWN | STANDARD:
            return f"{base.__module__}.{base.__qualname__}"
    forward = getattr(kind, "forward", None)
    if forward is not None and _home(forward).partition(".")[0] not in KNOWN:
        return f"{_called(forward)} as {kind.__name__}.forward"
    return None


def _foreign_forward(module: nn.Module) -> str | None:
    forward = vars(module).get("forward")
    if forward is None or _home(forward).partition(".")[0] in KNOWN:
        return None
    return f"{_called(forward)} as forward of {type(module).__name__}"


def _home(function: Any) -> str:
    """The module that a function, a method, a partial or a callable object is from."""
    function = _innermost(function)
    return getattr(function, "__module__", None) or type(function).__module__


def _called(function: Any) -> str:
    function = _innermost(function)
    return f"{_home(function)}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function
