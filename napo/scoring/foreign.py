"""Code of other people in a model: classes, forwards and hooks of which our tests know nothing.

It names what a comparison with the model's own forward has found (``napo.scoring.self_check``), and does not decide."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

# Where the classes, forwards and hooks come from of models that our tests cover, or that only move and cast tensors.
KNOWN = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "napo", "napo_kernels")
STANDARD = ("builtins", "abc", "typing", "collections")
# Hooks of these move, gather and cast, and do not change what a layer computes. Those of torch.nn.utils (pruning,
# weight_norm) write a weight just before the layer is called, and transformers' tensor parallelism gathers the logits.
MOVING = ("accelerate", "deepspeed", "torch.distributed")
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def foreign_part(model: nn.Module) -> str | None:
    """The first part of ``model``, its wrappers included, that is from somewhere else; None where none is seen."""
    looked_at: dict[type, str | None] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in looked_at:
            looked_at[kind] = _foreign_class(kind)
        found = looked_at[kind] or _foreign_forward(module) or _strange_hook(hooks_of(module), KNOWN)
        if found is not None:
            return f"{found} at {name}" if name else found
    return None


def hooks_of(module: nn.Module, tables: Iterable[str] = FORWARD_HOOKS + BACKWARD_HOOKS) -> Iterator[Any]:
    """The hooks of ``module``; with those around its forward accelerate's."""
    for table in tables:
        yield from (getattr(module, table, None) or {}).values()
        if table == FORWARD_HOOKS[0]:
            hook = vars(module).get("_hf_hook")
            yield from getattr(hook, "hooks", () if hook is None else (hook,))


def computing_hook(module: nn.Module, tables: Iterable[str] = FORWARD_HOOKS + BACKWARD_HOOKS) -> str | None:
    """A hook of ``module`` that may change what it computes, or when its weight is made."""
    return _strange_hook(hooks_of(module, tables), MOVING)


def _strange_hook(hooks: Iterable[Any], known: tuple[str, ...]) -> str | None:
    parts = (part for hook in hooks for part in _layers(hook))
    return next((f"hook {_called(part)}" for part in parts if not _is_from(_home(part), known)), None)


def _foreign_class(kind: type) -> str | None:
    """A class is known if all that it inherits from is, and nobody has put another forward into it."""
    for base in kind.__mro__:
        if not _is_from(base.__module__, KNOWN + STANDARD):
            return f"{base.__module__}.{base.__qualname__}"
    part = _foreign_layer(getattr(kind, "forward", None))
    return None if part is None else f"{_called(part)} as {kind.__name__}.forward"


def _foreign_forward(module: nn.Module) -> str | None:
    part = _foreign_layer(vars(module).get("forward"))
    return None if part is None else f"{_called(part)} as forward of {type(module).__name__}"


def _foreign_layer(function: Any) -> Any:
    """The outermost layer of a function that is not known."""
    layers = () if function is None else _layers(function)
    return next((layer for layer in layers if not _is_from(_home(layer), KNOWN + STANDARD)), None)


def _layers(function: Any) -> Iterator[Any]:
    """What is called for a function, from the outside: partials and decorators, and what these are put around."""
    if isinstance(function, functools.partial):
        yield from _layers(function.func)
    else:
        yield function
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield from _layers(wrapped)


def _is_from(home: str, packages: tuple[str, ...]) -> bool:
    return any(home == package or home.startswith(f"{package}.") for package in packages)


def _home(function: Any) -> str:
    """The module whose code a function or a callable object runs. ``__module__`` does not tell: ``functools.wraps``
    copies it."""
    written_in: dict[str, Any] | None = getattr(function, "__globals__", None)
    return type(function).__module__ if written_in is None else str(written_in.get("__name__"))


def _called(function: Any) -> str:
    home, name = _home(function), getattr(function, "__qualname__", None)
    if name is None or getattr(function, "__module__", None) != home:
        code = getattr(function, "__code__", None)
        name = type(function).__qualname__ if code is None else code.co_name
    return f"{home}.{name}"
