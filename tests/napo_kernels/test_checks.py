"""Every argument of every op is refused in one line where its device, dtype or shape is wrong: no kernel reads through
a pointer that is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from napo_kernels import (
    PairMargin,
    false_negative_triples,
    linear_sequence_logps,
    napo_loss,
    sequence_logps,
    shared_negatives,
)
from napo_kernels.dispatch import why_not
from napo_kernels.ops import body, masked_attention

compiled_only = pytest.mark.skipif(why_not("cpu") is not None, reason="the compiled module is missing")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def arguments_of(op: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The op and arguments that it takes."""
    if op == "napo_loss":
        pair = PairMargin(draw(4, 2), draw(4, 5, 2), draw(4, 5), torch.tensor(0.1), torch.tensor(1.0))
        margins = {"user": draw(4, 1, 1), "owner": draw(4, 5), "full": draw(4, 4, 5)}

        def loss(chosen_logps: Tensor, rejected_logps: Tensor, **rest: Any) -> Tensor:
            fields = {f.name: rest.pop(f"margin.{f.name}") for f in dataclasses.fields(PairMargin)}
            parts = tuple(rest.pop(f"margin {name}") for name in margins)
            return napo_loss(chosen_logps, rejected_logps, margin=(*parts, PairMargin(**fields)), **rest)

        given = {
            "chosen_logps": draw(4),
            "rejected_logps": draw(4, 5),
            "share": torch.ones(4, 4, dtype=torch.bool),
            "mask": torch.ones(4, 5, dtype=torch.bool),
            "exclude": torch.zeros(1, 3, dtype=torch.int64),
        }
        given |= {f"margin {name}": part for name, part in margins.items()}
        return loss, given | {f"margin.{f.name}": getattr(pair, f.name) for f in dataclasses.fields(PairMargin)}
    if op == "shared_negatives":
        groups = torch.arange(3)
        given = {
            "states": draw(3, 4),
            "pool_states": draw(5, 4),
            "group_ids": groups,
            "pool_group_ids": torch.arange(5),
        }
        return lambda states, **rest: shared_negatives(states, 1, **rest), given
    if op == "sequence_logps":
        return sequence_logps, {"logits": draw(2, 3, 7), "labels": torch.zeros(2, 3, dtype=torch.int64)}
    index = torch.zeros(5, dtype=torch.int64)
    given = {"hidden": draw(5, 8), "weight": draw(11, 8), "targets": index, "sequence_ids": index, "rows": index}
    given |= {"bias": draw(11), "lora A": draw(2, 8), "lora B": draw(11, 2)}

    def linear(hidden: Tensor, weight: Tensor, targets: Tensor, **rest: Any) -> Tensor:
        lora = (rest.pop("lora A"), rest.pop("lora B"), 1.0)
        return linear_sequence_logps(hidden, weight, targets, num_sequences=1, lora=lora, **rest)

    return linear, given


CASES = [
    (op, name)
    for op in ("napo_loss", "shared_negatives", "sequence_logps", "linear_sequence_logps")
    for name in arguments_of(op)[1]
]


def spoilt(tensor: Tensor, how: str) -> Any:
    if how == "meta":
        return tensor.to("meta")
    if how == "complex":
        return torch.complex(tensor.float(), torch.ones_like(tensor.float()))
    if how == "dtype":  # numbers for indices and masks, and the other way round
        return tensor.float() if not tensor.is_floating_point() else tensor.long()
    if how == "shape":
        return tensor[None, None, None]
    if how == "size":
        return torch.cat((tensor, tensor, tensor)) if tensor.ndim else tensor[None]
    if how == "sparse":
        return tensor.to_sparse()
    if how == "numpy":
        return tensor.numpy()
    return {"list": tensor.tolist(), "text": "1"}[how]


HOWS = ("meta", "complex", "dtype", "shape", "size", "sparse", "numpy", "list", "text")
# A list of triples and rows of hidden states may have any length; a tensor without dimensions makes a number.
TAKEN = {("exclude", "size"), ("hidden", "size"), ("margin.slope", "list"), ("margin.offset", "list")}


@pytest.mark.parametrize(("op", "name", "how"), [(*c, how) for c in CASES for how in HOWS if (c[1], how) not in TAKEN])
def test_refuses(op: str, name: str, how: str) -> None:
    function, given = arguments_of(op)
    function(**given)
    with pytest.raises(ValueError) as error:
        function(**{**given, name: spoilt(given[name], how)})
    text = str(error.value)
    assert "\n" not in text and len(text) < 200, text
    # The first argument is what the others are measured by.
    if how not in ("meta", "size"):
        assert text.startswith((name.removesuffix("s"), name.partition(" ")[0])), text


@pytest.mark.parametrize("op", dict.fromkeys(op for op, _ in CASES))
def test_meta_tensors_give_shapes(op: str) -> None:
    """Of the result, and of the gradients of what may have one. Meta tensors know no autocast."""
    function, given = arguments_of(op)
    on_meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in given.items()}
    for name in ("chosen_logps", "rejected_logps", "logits", "hidden", "weight", "bias"):
        if name in on_meta:
            on_meta[name].requires_grad_()
    got, expected = function(**on_meta), function(**given)
    assert got.is_meta and got.shape == expected.shape and got.dtype == expected.dtype
    if got.requires_grad:
        got.sum().backward()
    for x in on_meta.values():
        assert not x.requires_grad or x.grad.shape == x.shape


@pytest.mark.parametrize(
    "value", [True, None, "1", 1j, torch.tensor(1.0), float("nan"), float("inf"), 1e39, 1e-50, 0, -1]
)
def test_beta_is_a_positive_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^beta: expected a positive number"):
        napo_loss(draw(2), draw(2, 3), beta=value)


def test_numbers_of_numpy_are_taken() -> None:
    loss = napo_loss(draw(2), draw(2, 3), beta=np.float32(0.5), margin=np.float64(0.1))
    assert torch.equal(loss, napo_loss(draw(2), draw(2, 3), beta=0.5, margin=0.1))
    assert shared_negatives(draw(3, 4), np.int64(1)).sum() == 6


@pytest.mark.parametrize("value", [None, "1", [1.0], np.ones(3), 1j, True])
def test_a_margin_is_a_number_or_a_tensor(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^margin: expected a number, a tensor or a PairMargin, got"):
        napo_loss(draw(2), draw(2, 3), margin=value)


@pytest.mark.parametrize("value", [-1, 3, 1.5, True, None, 2**70, torch.tensor(2), "1"])
def test_k_is_a_count(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^k: expected 0 to B' - 1 = 2 neighbours, got"):
        shared_negatives(draw(3, 4), value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("logit_scale", [0.0, "1", None, True, 1e39, float("nan"), torch.tensor(1.0)]),
        ("softcap", [0.0, "1", True, 1e39, 1e-45, float("nan"), torch.tensor(1.0)]),
        ("chunk_bytes", [0, 1.5, 2**70, "1", True]),
        ("num_sequences", [-1, 1.0, 2**70, "1", None, True, torch.tensor(1)]),
        ("lora", [(draw(2, 8), draw(11, 2), value) for value in (float("nan"), float("inf"), 1e39, "1", None)]),
    ],
)
def test_numbers_of_linear_sequence_logps(name: str, values: list[Any]) -> None:
    index = torch.zeros(5, dtype=torch.int64)
    for value in values:
        options = {"sequence_ids": index, "num_sequences": 1, name: value}
        with pytest.raises(ValueError, match=f"^{name}"):
            linear_sequence_logps(draw(5, 8), draw(11, 8), index, **options)


@pytest.mark.parametrize("value", [1.5, 2**64, None, "1", True])
def test_ignore_index_is_an_integer(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^ignore_index: expected an integer"):
        sequence_logps(draw(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64), ignore_index=value)


@compiled_only
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 4, 4), "mask: expected bool, got torch.float32"),
        (torch.ones(1, 4, 4, dtype=torch.uint8), "mask: expected bool"),
        (torch.ones(4, 4, dtype=torch.bool), r"mask: expected shape \(rows, T, T\)"),
        (torch.ones(1, 4, 2, dtype=torch.bool), r"mask: expected shape \(1, 4, 4\), got \(1, 4, 2\)"),
        ([1], "mask: expected a tensor"),
    ],
)
def test_a_mask_of_attention_is_square_and_bool(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_attention.pad_mask(mask)


NEGATIVE = {"query": 0, "key": 1, "value": 2}


@compiled_only
@pytest.mark.parametrize("name", NEGATIVE)
def test_attention_refuses_what_lies_otherwise_in_memory(name: str) -> None:
    """A lazy negative has its sign nowhere in memory, a meta mask no memory at all."""
    heads = draw(1, 2, 4, 8)
    padded = masked_attention.pad_mask(torch.ones(1, 4, 4, dtype=torch.bool))
    assert padded is not None
    given = [heads, heads, heads]
    given[NEGATIVE[name]] = torch._neg_view(heads)
    with pytest.raises(ValueError, match="query, key, value: expected"):
        masked_attention.masked_attention(*given, padded, 1.0)
    with pytest.raises(ValueError, match="padded: expected device cpu"):
        masked_attention.masked_attention(heads, heads, heads, padded.to("meta"), 1.0)
    for scale in (None, "1", float("nan"), 1e39, True):
        with pytest.raises(ValueError, match="scale: expected a finite number"):
            masked_attention.masked_attention(heads, heads, heads, padded, scale)  # type: ignore[arg-type]


@compiled_only
def test_the_body_refuses_lazy_negatives_and_takes_them_as_gradients() -> None:
    x, weight = draw(3, 8), draw(8)
    with pytest.raises(ValueError, match="x, weight: expected"):
        body.rms_norm(torch._neg_view(x), weight, 1e-6)
    with pytest.raises(ValueError, match="gate, up: expected"):
        body.silu_product(x, torch._neg_view(x))
    with pytest.raises(ValueError, match=r"x, weight: expected .*, got list"):
        body.rms_norm([1.0], weight, 1e-6)  # type: ignore[arg-type]
    heads, mask = draw(1, 2, 4, 8), masked_attention.pad_mask(torch.ones(1, 4, 4, dtype=torch.bool))
    assert mask is not None
    for op, given in (
        (lambda x: body.rms_norm(x, weight, 1e-6), x),
        (lambda x: body.silu_product(x, draw(3, 8)), x),
        (lambda x: masked_attention.masked_attention(x, heads, heads, mask, 1.0), heads),
    ):
        leaf = given.clone().requires_grad_()
        lazy, plain = (torch.autograd.grad(op(leaf), leaf, g)[0] for g in (torch._neg_view(given), -given))
        torch.testing.assert_close(lazy, plain, rtol=0, atol=0)


@compiled_only
def test_the_module_refuses_a_tensor_without_memory() -> None:
    """Whose address, null, a kernel would take for None."""
    from napo_kernels import _C

    x = torch.ones(2, 8)
    norm: Any = {"dtype": x.dtype, "rows": 2, "width": 8, "x": x.to("meta"), "weight": torch.ones(8)}
    with pytest.raises(ValueError, match="rms_norm_forward: x: expected a tensor with memory"):
        _C.rms_norm_forward({"norm": norm, "eps": 1e-5, "out": x.clone(), "r": torch.zeros(2)}, False, 1)


@pytest.mark.parametrize("backend", [0, "gpu", "", ["cpu"], torch.ones(2)])
def test_a_backend_is_one_of_the_names(backend: Any) -> None:
    for op in ("napo_loss", "shared_negatives", "sequence_logps"):
        function, given = arguments_of(op)
        with pytest.raises(ValueError, match="backend: expected None or one of"):
            function(*given.values(), backend=backend) if op == "sequence_logps" else function(**given, backend=backend)


@pytest.mark.parametrize("flag", ["average", "shift", "inplace_backward"])
def test_a_flag_is_true_or_false(flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag}: expected True or False, got 'no'"):
        sequence_logps(draw(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64), **{flag: "no"})


@pytest.mark.parametrize(
    ("name", "histories", "chosen", "negatives"),
    [
        (r"histories\[0\]", [[1.5]], [1], [[1]]),
        (r"histories\[1\]", [[1], [2**63]], [1, 2], [[1], [2]]),
        (r"histories\[0\]", [None], [1], [[1]]),
        (r"histories\[0\]", [[2**70]], [1], [[1]]),
        ("chosen", [[1]], [1.0], [[1]]),
        ("negatives", [[1]], [1], [[0.5]]),
        ("negatives", [[1], [1]], [1, 1], [[1], [1, 2]]),
        ("chosen", [[1]], torch.tensor([True]), [[1]]),
    ],
)
def test_item_ids_are_integers(name: str, histories: Any, chosen: Any, negatives: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        false_negative_triples(histories, chosen, negatives)


@compiled_only
def test_ops_of_the_body_do_not_read_past_an_argument() -> None:
    q = draw(2, 4, 16, 8)
    whole = torch.ones(2, 16, 16, dtype=torch.bool)
    padded = masked_attention.pad_mask(whole)
    assert padded is not None
    masked_attention.masked_attention(q, q, q, padded, 1.0)
    small = masked_attention.pad_mask(torch.ones(1, 4, 4, dtype=torch.bool))
    for mask in (small, whole, padded.bool(), padded[:, ::2], padded.mT):
        with pytest.raises(ValueError, match=r"^padded: expected"):
            masked_attention.masked_attention(q, q, q, mask, 1.0)  # type: ignore[arg-type]
    for key in (q[:1], q[:, :, :8], q[:, :0], q[0], q.to("meta"), q.double()):
        with pytest.raises(ValueError, match=r"^query, key, value: expected"):
            masked_attention.masked_attention(q, key, key, padded, 1.0)
    for weight in (draw(8), draw(64)[::2], draw(1, 64), draw(64).double(), draw(64).to("meta")):
        with pytest.raises(ValueError, match=r"^x, weight: expected"):
            body.rms_norm(draw(3, 64), weight, 1e-6)
    with pytest.raises(ValueError, match=r"^x, weight: expected"):
        body.rms_norm(torch.zeros(3, 0), torch.zeros(0), 1e-6)
    for up in (draw(3), draw(300, 1), draw(300).half(), draw(300).to("meta")):
        with pytest.raises(ValueError, match=r"^gate, up: expected"):
            body.silu_product(draw(300), up)
