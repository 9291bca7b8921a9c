"""Fuzzing of the ops' arguments: shapes, strides, dtypes, offsets, extreme values, devices.

    python tests/fuzz/fuzz_ops.py --seconds 60 --seed 0

Every problem runs in a process that may crash. Where the op takes a problem, the result and the gradients equal the
fp64 reference's; any other is refused with an exception of one line, never with a crash, and each ends within
``SLOWEST`` seconds. What is found is printed with the problem's text, which `--case` runs again alone.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from torch import Tensor

from napo_kernels import PairMargin, linear_sequence_logps, napo_loss, sequence_logps, shared_negatives
from napo_kernels.ops import body, masked_attention

SLOWEST = 20.0
EXTREMES = [0.0, -0.0, 1.0, -1e4, 1e4, 1e20, -1e20, 3e38, -3e38, 1e-40, float("inf"), float("-inf"), float("nan")]
FLOATS = ["float32", "bfloat16", "float16", "float64"]
OTHERS = ["int64", "int32", "uint8", "bool", "complex64", "float8_e4m3fn"]
VIEWS = ["plain", "stepped", "transposed", "offset", "padded rows", "expanded", "negative"]
EXAMPLES = 200  # of one process
REFUSALS = (ValueError, RuntimeError, TypeError, NotImplementedError, MemoryError)


class Wrong(AssertionError):
    """The op gave a wrong result and no error."""


# ---- tensors from a description, so that a problem is a text ----


@st.composite
def tensors(
    draw: Any, shape: tuple[int, ...], kind: str = "float", end: int = 2, usual: str = "float32"
) -> dict[str, Any]:
    """``kind``: float, index in [0, end), or mask. Now and then of another dtype, shape, view or device."""
    odd = draw(st.integers(0, 59))
    dtype = {"float": usual, "index": "int64", "mask": "bool"}[kind]
    if odd == 0:
        dtype = draw(st.sampled_from(FLOATS + OTHERS))
    if odd == 1:
        shape = draw(st.sampled_from([(*shape, 1), shape[1:], tuple(n + 1 for n in shape), (0, *shape[1:])]))
    spikes = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(EXTREMES)), max_size=3)
    return {
        "shape": list(shape),
        "kind": kind,
        "dtype": dtype,
        "end": end,
        "seed": draw(st.integers(0, 2**31)),
        "scale": draw(st.sampled_from([1.0, 1.0, 4.0, 1e-3])),
        "spikes": draw(spikes) if kind == "float" and draw(st.integers(0, 2)) == 0 else [],
        "beyond": draw(st.sampled_from([-1, -100, end, 2**62, -(2**63)])) if kind == "index" and odd == 2 else None,
        "view": draw(st.sampled_from(VIEWS)) if draw(st.booleans()) else "plain",
        "meta": odd == 3,
    }


def build(d: dict[str, Any] | None) -> Tensor | None:
    if d is None:
        return None
    g, shape = torch.Generator().manual_seed(d["seed"]), tuple(d["shape"])
    if d["kind"] == "index":
        values = torch.randint(max(1, d["end"]), shape, generator=g)
        if d["beyond"] is not None and values.numel():
            values.view(-1)[d["seed"] % values.numel()] = d["beyond"]
    elif d["kind"] == "mask":
        values = torch.rand(shape, generator=g) < 0.6
    else:
        values = torch.randn(shape, generator=g) * d["scale"]
        for place, spike in d["spikes"]:
            if values.numel():
                values.view(-1)[place % values.numel()] = spike
    tensor = seen_as(values.to(getattr(torch, d["dtype"])), d["view"])
    return tensor.to("meta") if d["meta"] else tensor


def seen_as(x: Tensor, view: str) -> Tensor:
    """The same values (``expanded``: the first row's) in another place of memory."""
    if view == "plain" or not x.numel() or not x.ndim:
        return x
    if view == "stepped":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if view == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if view == "offset":
        flat = torch.zeros(x.numel() + 7, dtype=x.dtype)
        flat[5 : 5 + x.numel()] = x.reshape(-1)
        return flat[5 : 5 + x.numel()].view(x.shape)
    if view == "padded rows":
        wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if view == "expanded":
        return x[:1].expand(x.shape)
    return torch._neg_view(-x) if x.dtype in (torch.float32, torch.float64) else x


# ---- problems: (name, description) ----

size = st.integers(1, 9)
number = st.one_of(
    st.sampled_from([1.0, 0.1, 2.5]), st.sampled_from([0, -1, None, "1", True, 1e39, float("nan"), 2**70])
)


dtypes = st.sampled_from(["float32", *FLOATS])


def seldom(draw: Any, usual: Any, odd: Any) -> Any:
    return draw(odd) if draw(st.integers(0, 29)) == 0 else usual


@st.composite
def sequence_problem(draw: Any) -> dict[str, Any]:
    usual = draw(dtypes)
    s, t, v = draw(size), draw(size), draw(st.one_of(size, st.integers(1, 700)))
    return {
        "logits": draw(tensors((s, t, v), usual=usual)),
        "labels": draw(tensors((s, t), "index", v)),
        "shift": draw(st.booleans()),
        "average": draw(st.booleans()),
        "ignore_index": seldom(draw, 0, st.sampled_from([-100, 2**63, 1.5, None])),
        "inplace_backward": draw(st.booleans()),
    }


@st.composite
def linear_problem(draw: Any) -> dict[str, Any]:
    usual = draw(dtypes)
    r, h, v, q, s = draw(size), draw(size), draw(st.one_of(size, st.integers(1, 300))), draw(size), draw(size)
    rank = draw(st.integers(1, 3))
    by_rows = draw(st.booleans())
    q = q if by_rows else r
    return {
        "hidden": draw(tensors((r, h), usual=usual)),
        "weight": draw(tensors((v, h), usual=usual)),
        "targets": draw(tensors((q,), "index", v)),
        "sequence_ids": draw(tensors((q,), "index", s)),
        "rows": draw(tensors((q,), "index", r)) if by_rows else None,
        "num_sequences": seldom(draw, s, st.sampled_from([0, -1, True, 1.5, 2**70])),
        "bias": draw(st.one_of(st.none(), tensors((v,), usual=usual))),
        "logit_scale": seldom(draw, 1.0, number),
        "softcap": seldom(draw, None, number),
        "lora": draw(st.one_of(st.none(), st.tuples(tensors((rank, h), usual=usual), tensors((v, rank), usual=usual)))),
        "average": draw(st.booleans()),
        "chunk_bytes": draw(st.sampled_from([None, 1, 64, 4096])),
    }


@st.composite
def loss_problem(draw: Any) -> dict[str, Any]:
    usual = draw(dtypes)
    b, n = draw(size), draw(st.integers(0, 9))
    pooled = draw(st.booleans())
    o = b + draw(st.integers(0, 5)) if pooled else b
    margins = [tensors(shape, usual=usual) for shape in ((b, 1, 1), (o, n), (b, o, n), (), (b, o, 1))]
    vectors = [tensors(shape, usual=usual) for shape in ((b, 3), (o, n, 3), (o, n))]
    pair = st.tuples(vectors[0], vectors[1], st.one_of(st.none(), vectors[2]))
    masks = [tensors(shape, "mask") for shape in ((o, n), (b, o, n), (b, 1, 1))]
    return {
        "chosen": draw(tensors((b,), usual=usual)),
        "rejected": draw(tensors((o, n), usual=usual)),
        "share": draw(tensors((b, o), "mask")) if pooled else None,
        "margin": draw(st.one_of(st.none(), number, *margins)),
        "pair": draw(pair) if pooled and draw(st.booleans()) else None,
        "mask": draw(st.one_of(st.none(), *masks)),
        "exclude": draw(st.one_of(st.none(), tensors((draw(st.integers(0, 4)), 3), "index", max(1, min(b, n))))),
        "beta": seldom(draw, 0.7, number),
        "reduction": seldom(draw, "none", st.sampled_from(["mean", "sum", "Mean", None, 0])),
    }


@st.composite
def negatives_problem(draw: Any) -> dict[str, Any]:
    usual = draw(dtypes)
    b, d, more = draw(size), draw(size), draw(st.integers(0, 5))
    return {
        "states": draw(tensors((b, d), usual=usual)),
        "pool": draw(st.one_of(st.none(), tensors((b + more, d), usual=usual))),
        "k": seldom(draw, draw(st.integers(0, b)), st.sampled_from([-1, 1.5, None, True, 2**70])),
        "offset": seldom(draw, 0, st.sampled_from([1, -1, 2**62, None])),
        "metric": seldom(draw, "dot", st.sampled_from(["cosine", "dots", None])),
    }


@st.composite
def attention_problem(draw: Any) -> dict[str, Any]:
    usual = draw(dtypes)
    rows, heads, t, d = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 70)), draw(size)
    keys = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    return {
        "query": draw(tensors((rows, heads, t, d), usual=usual)),
        "key": draw(tensors((rows, keys, t, d), usual=usual)),
        "value": draw(tensors((rows, keys, t, d), usual=usual)),
        "mask": draw(tensors((rows, t, t), "mask")),
        "padded meta": seldom(draw, False, st.just(True)),
        "scale": seldom(draw, 0.5, number),
    }


@st.composite
def body_problem(draw: Any) -> dict[str, Any]:
    usual = draw(dtypes)
    rows, width = draw(size), draw(st.integers(1, 70))
    return {
        "x": draw(tensors((rows, width), usual=usual)),
        "y": draw(tensors((width,), usual=usual)),
        "z": draw(tensors((rows, width), usual=usual)),
    }


# ---- the op, and the same in fp64 by the reference or by torch ----

Outcome = tuple[list[Tensor], list[Tensor | None]]  # results, gradients


def outcome(function: Callable[..., Tensor], leaves: list[Any]) -> Outcome:
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in leaves]
    out = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(out.sum(), wanted, allow_unused=True) if out.requires_grad and wanted else ()
    return [out.detach()], list(grads)


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else x


def run_sequence(p: dict[str, Any]) -> Iterator[Outcome]:
    logits, labels = build(p["logits"]), build(p["labels"])
    rest = {name: p[name] for name in ("shift", "average", "ignore_index")}
    inplace = p["inplace_backward"]
    yield outcome(lambda x: sequence_logps(x * 1 if inplace else x, labels, inplace_backward=inplace, **rest), [logits])
    yield outcome(lambda x: sequence_logps(x, labels, backend="reference", **rest), [double(logits)])


def run_linear(p: dict[str, Any]) -> Iterator[Outcome]:
    hidden, weight, bias = build(p["hidden"]), build(p["weight"]), build(p["bias"])
    lora = [] if p["lora"] is None else [build(part) for part in p["lora"]]
    rest = {name: p[name] for name in ("num_sequences", "logit_scale", "softcap", "average")}
    rest |= {name: build(p[name]) for name in ("targets", "sequence_ids", "rows")}
    leaves = [hidden, weight, *([] if bias is None else [bias]), *lora]

    def call(hidden: Tensor, weight: Tensor, *more: Tensor, **options: Any) -> Tensor:
        *of_bias, a, b = (*more, None, None) if not lora else more
        return linear_sequence_logps(
            hidden, weight, bias=of_bias[0] if of_bias else None, lora=(a, b, 0.5) if lora else None, **rest, **options
        )

    yield outcome(lambda *x: call(*x, chunk_bytes=p["chunk_bytes"]), leaves)
    yield outcome(lambda *x: call(*x, backend="reference"), [double(x) for x in leaves])


def run_loss(p: dict[str, Any]) -> Iterator[Outcome]:
    chosen, rejected = build(p["chosen"]), build(p["rejected"])
    margin = build(p["margin"]) if isinstance(p["margin"], dict) else p["margin"]
    pair = None if p["pair"] is None else [build(part) for part in p["pair"]]
    rest = {name: build(p[name]) for name in ("share", "mask", "exclude")}
    rest |= {"beta": p["beta"], "reduction": p["reduction"]}

    def call(chosen: Tensor, rejected: Tensor, cast: Callable[[Any], Any] = lambda x: x, **options: Any) -> Tensor:
        parts = (cast(margin), *(() if pair is None else (PairMargin(*map(cast, pair), 0.3, 0.9),)))
        return napo_loss(chosen, rejected, margin=parts, **rest, **options)

    yield outcome(call, [chosen, rejected])
    yield outcome(lambda c, r: call(c, r, double, backend="reference"), [double(chosen), double(rejected)])


def run_negatives(p: dict[str, Any]) -> Iterator[Outcome]:
    share = shared_negatives(
        build(p["states"]), p["k"], pool_states=build(p["pool"]), pool_offset=p["offset"], metric=p["metric"]
    )
    yield [], []
    if not share.is_meta:
        if (share.sum(1) != p["k"] + 1).any():
            raise Wrong(f"{share.sum(1).tolist()} owners a user, expected {p['k'] + 1}")
        if not share.diagonal(p["offset"]).all():
            raise Wrong("a user does not have its own negatives")
    yield [], []


def run_attention(p: dict[str, Any]) -> Iterator[Outcome]:
    query, key, value, mask = (build(p[name]) for name in ("query", "key", "value", "mask"))
    padded = masked_attention.pad_mask(mask)
    if p["padded meta"] and padded is not None:
        padded = padded.to("meta")
    yield outcome(lambda q, k, v: masked_attention.masked_attention(q, k, v, padded, p["scale"]), [query, key, value])

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        sees = mask[:, None]
        scores = (p["scale"] * q @ k.transpose(2, 3)).masked_fill(~sees, -torch.inf)
        weights = torch.where(sees.any(3, keepdim=True), scores, 0.0).softmax(3)
        return torch.where(sees, weights, 0.0) @ v

    yield outcome(plain, [double(x) for x in (query, key, value)])


def run_norm(p: dict[str, Any]) -> Iterator[Outcome]:
    x, weight = build(p["x"]), build(p["y"])
    yield outcome(lambda x: body.rms_norm(x, weight, 1e-5), [x])
    yield outcome(lambda x: torch.nn.functional.rms_norm(x, weight.shape, weight.double(), 1e-5), [double(x)])


def run_product(p: dict[str, Any]) -> Iterator[Outcome]:
    gate, up = build(p["x"]), build(p["z"])
    yield outcome(body.silu_product, [gate, up])
    yield outcome(lambda x, z: torch.nn.functional.silu(x) * z, [double(gate), double(up)])


PROBLEMS: dict[str, tuple[Any, Callable[[dict[str, Any]], Iterator[Outcome]]]] = {
    "sequence_logps": (sequence_problem(), run_sequence),
    "linear_sequence_logps": (linear_problem(), run_linear),
    "napo_loss": (loss_problem(), run_loss),
    "shared_negatives": (negatives_problem(), run_negatives),
    "masked_attention": (attention_problem(), run_attention),
    "rms_norm": (body_problem(), run_norm),
    "silu_product": (body_problem(), run_product),
}


def check(name: str, p: dict[str, Any]) -> str:
    """right or refused; raises `Wrong`."""
    started = time.monotonic()
    outcomes = PROBLEMS[name][1](p)
    try:
        got = next(outcomes)
    except REFUSALS as error:
        if not str(error):
            raise Wrong(f"{type(error).__name__} without a message") from error
        return "refused"
    finally:
        if time.monotonic() - started > SLOWEST:
            raise Wrong(f"took {time.monotonic() - started:.0f} s")
    if any(part.is_meta for part in got[0]):
        return "meta"
    want = next(outcomes)
    extremes = list(extreme(p))
    for one, other in zip(got[0], want[0], strict=True):
        if one.shape != other.shape:
            raise Wrong(f"result of shape {tuple(one.shape)} for {tuple(other.shape)}")
        if all(math.isnan(x) for x in extremes) and (one.isnan() != other.isnan()).any():
            raise Wrong(f"NaN at {one.isnan().nonzero().tolist()} for {other.isnan().nonzero().tolist()}")
    if extremes:  # finite numbers of 1e20 cancel to anything in fp32
        return "extreme"
    precision = coarsest(p)
    compare("result", got[0], want[0], precision)
    if precision < 2.0**-12 or largest(p) <= 1.0:  # an error of a logit is one of the factor exp(error) in a gradient
        compare("gradient", got[1], want[1], precision)
    return "right"


def parts_of(p: Any) -> Iterator[Any]:
    """All descriptions of tensors, and all numbers."""
    if isinstance(p, dict) and "dtype" in p:
        yield p
    elif isinstance(p, (dict, list, tuple)):
        for part in p.values() if isinstance(p, dict) else p:
            yield from parts_of(part)
    elif isinstance(p, (int, float)) and not isinstance(p, bool):
        yield p


def extreme(p: dict[str, Any]) -> Iterator[float]:
    for part in parts_of(p):
        numbers = [spike for _, spike in part["spikes"]] if isinstance(part, dict) else [float(part)]
        yield from (x for x in numbers if not abs(x) < 5e3)


def coarsest(p: dict[str, Any]) -> float:
    precisions = {"bfloat16": 2.0**-8, "float16": 2.0**-10}
    return max(precisions.get(part["dtype"], 2.0**-20) for part in parts_of(p) if isinstance(part, dict))


def largest(p: dict[str, Any]) -> float:
    return max(part["scale"] for part in parts_of(p) if isinstance(part, dict))


def compare(what: str, got: list[Any], want: list[Any], precision: float) -> None:
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        if (one is None) != (other is None):
            raise Wrong(f"{what} {i}: {one} for {other}")
        if one is None or not one.numel():
            continue
        one, other = one.double(), other.double()
        least = 64 * precision * (1.0 + other.abs() + other.abs().nan_to_num(0.0, 0.0, 0.0).amax())
        far = ~((one - other).abs() <= least) & (one != other) & ~(one.isnan() & other.isnan())
        if far.any():
            place = int(far.reshape(-1).nonzero()[0])
            raise Wrong(f"{what} {i}: {one.reshape(-1)[place]} for {other.reshape(-1)[place]} at {place}")


# ---- processes ----


def work(name: str, seed: int, log: Path) -> None:
    """``EXAMPLES`` problems, each in the log before it is tried and its outcome behind it."""
    with open(log, "w") as file:

        @seeded(seed)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(PROBLEMS[name][0])
        def one(p: dict[str, Any]) -> None:
            print(json.dumps(p), file=file, flush=True)
            print(check(name, p), file=file, flush=True)

        one()


def run_one(name: str, seed: int, log: Path) -> tuple[Counter[str], str | None]:
    """Outcomes, and what was found."""
    command = [sys.executable, __file__, "--worker", name, "--seed", str(seed), "--log", str(log)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLOWEST * 30)
        code, errors = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        code, errors = -1, "no end"
    lines = log.read_text().splitlines() if log.exists() else []
    counts = Counter(lines[1::2])
    if code == 0:
        return counts, None
    said = next((line for line in reversed(errors.splitlines()) if "Wrong" in line or "rror" in line), errors[-300:])
    return counts, f"{name}: exit {code}: {said}\n    --case '{lines[-1] if lines else ''}' --worker {name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="no process is begun after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--log", type=Path, default=Path("build/fuzz-ops.log"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", help="a problem that was found, with --worker OP: run it again, here")
    options = parser.parse_args()
    if options.case:
        print(check(options.worker, json.loads(options.case)))
        return 0
    if options.worker:
        work(options.worker, options.seed, options.log)
        return 0
    options.log.parent.mkdir(parents=True, exist_ok=True)
    until, seed, found = time.monotonic() + options.seconds, options.seed, []
    totals: dict[str, Counter[str]] = {name: Counter() for name in options.ops}
    while time.monotonic() < until:
        for name in options.ops:
            if time.monotonic() < until:
                counts, problem = run_one(name, seed, options.log)
                totals[name] += counts
                found += [problem] if problem else []
        seed += 1
    for name, counts in totals.items():
        print(f"{name}: {counts.total()} problems, " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    print("\n".join(found) or "nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
