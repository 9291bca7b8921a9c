"""catalogue_sequence_logps against the definition: z_y - logsumexp over the row's set, pair by pair, in fp64."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from napo_kernels import AllowedTokens, allowed, backends, catalogue_sequence_logps, dispatch, linear_sequence_logps
from napo_kernels.reference import catalogue_sequence_logps as reference

pytestmark = pytest.mark.usefixtures("chosen")

TINY = torch.finfo(torch.float32).tiny  # below it the kernels' exp is 0
HALF = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}


class Case(NamedTuple):
    hidden: Tensor  # (R, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None
    lora: tuple[Tensor, Tensor, float] | None
    logit_scale: float
    softcap: float | None
    row_sets: list[int]
    sets: list[list[int]]
    rows: list[int]
    targets: list[int]
    sequence_ids: list[int]
    num_sequences: int

    def allowed(self) -> AllowedTokens:
        start = np.cumsum([0, *map(len, self.sets)])
        tokens = np.array([token for tokens in self.sets for token in tokens], np.int64)
        return AllowedTokens.of(
            np.array(self.row_sets, np.int64),
            (start, tokens),
            np.array(self.targets, np.int64),
            rows=np.array(self.rows, np.int64),
            sequence_ids=np.array(self.sequence_ids, np.int64),
            num_sequences=self.num_sequences,
        )

    def to(self, dtype: torch.dtype, trains: bool = True, device: torch.device | str = "cpu") -> Case:
        change = lambda x: x.detach().to(device, dtype, copy=True).requires_grad_(trains)  # noqa: E731
        return self._replace(
            hidden=change(self.hidden),
            weight=change(self.weight),
            bias=None if self.bias is None else change(self.bias),
            lora=None if self.lora is None else (change(self.lora[0]), change(self.lora[1]), self.lora[2]),
        )

    def leaves(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        if self.lora is not None:
            named |= {"lora A": self.lora[0], "lora B": self.lora[1]}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def head(self) -> dict[str, Any]:
        return {"bias": self.bias, "lora": self.lora, "logit_scale": self.logit_scale, "softcap": self.softcap}


def make(
    sizes: tuple[int, ...] = (1, 2, 3, 7, 40, 1, 90, 2),
    rows: int = 37,
    pairs: int = 70,
    width: int = 29,
    vocabulary: int = 301,
    *,
    bias: bool = False,
    lora: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    size: float = 1.0,
    seed: int = 0,
) -> Case:
    """Set s has ``sizes[s]`` tokens; rows draw their sets, pairs their rows and targets. Rows may have no pair."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    draw = lambda n: int(torch.randint(n, (), generator=g))  # noqa: E731
    sets = [torch.randperm(vocabulary, generator=g)[:n].sort().values.tolist() for n in sizes]
    row_sets = [draw(len(sets)) for _ in range(rows)]
    of_pair = [draw(rows) for _ in range(pairs)]
    case = Case(
        hidden=normal(rows, width) * size,
        weight=normal(vocabulary, width) / width**0.5,
        bias=normal(vocabulary) if bias else None,
        lora=(normal(3, width) / width**0.5, normal(vocabulary, 3), 0.7) if lora else None,
        logit_scale=logit_scale,
        softcap=softcap,
        row_sets=row_sets,
        sets=sets,
        rows=of_pair,
        targets=[sets[row_sets[row]][draw(sizes[row_sets[row]])] for row in of_pair],
        sequence_ids=[draw(pairs // 3 + 1) for _ in range(pairs)],
        num_sequences=pairs // 3 + 2,
    )
    return case


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias and scale": {"bias": True, "logit_scale": 0.5},
    "negative scale, softcap, bias": {"bias": True, "logit_scale": -0.7, "softcap": 4.0},
    "lora": {"lora": True},
    "lora, softcap, bias": {"lora": True, "softcap": 5.0, "bias": True},
}
SHAPES: dict[str, dict[str, Any]] = {
    "mixed": {},
    "one row": {"rows": 1, "pairs": 5, "sizes": (7,)},
    "one hidden number": {"width": 1},
    "pairs of two": {"sizes": (2,), "rows": 64, "pairs": 64},
    "all forced": {"sizes": (1, 1, 1)},
    "one set of all tokens": {"sizes": (301,)},
    "no pair": {"pairs": 0},
    "widths around powers of two": {"sizes": (3, 4, 5, 15, 16, 17, 31, 32, 33)},
    "many pairs a row": {"rows": 3, "pairs": 200},
}


@pytest.fixture(params=["as it is", "all shared", "none shared, few at a time"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How rows lie in blocks is a matter of speed."""
    if request.param != "as it is":
        monkeypatch.setattr(allowed, "SHARED", 0 if request.param == "all shared" else 1 << 40)
        monkeypatch.setattr(allowed, "OWN", 64)
    return str(request.param)


def definition(case: Case) -> Tensor:
    """Through autograd, from the logits of the whole vocabulary."""
    head = case.weight if case.lora is None else case.weight + case.lora[2] * case.lora[1] @ case.lora[0]
    logits = case.logit_scale * case.hidden @ head.t()
    if case.bias is not None:
        logits = logits + case.bias
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    sums = [logits.new_zeros(()) for _ in range(case.num_sequences)]
    for row, target, sequence in zip(case.rows, case.targets, case.sequence_ids, strict=True):
        z = logits[row]
        sums[sequence] = sums[sequence] + z[target] - torch.logsumexp(z[case.sets[case.row_sets[row]]], 0)
    return torch.stack(sums)


def gradients(case: Case, logps: Tensor) -> dict[str, Tensor]:
    upstream = torch.linspace(-1, 2, len(logps), dtype=logps.dtype, device=logps.device)
    if not logps.requires_grad:
        return {}
    found = torch.autograd.grad(logps, list(case.leaves().values()), upstream, allow_unused=True)
    return dict(zip(case.leaves(), found, strict=True))


@pytest.fixture(params=[name for name in ("reference", "cpu") if backends()[name]["available"]])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every call that names no backend runs on this one; what it does not compute (fp64) stays the reference's."""
    preferred = () if request.param == "reference" else (request.param,)
    monkeypatch.setattr(dispatch, "_preferred", lambda *_: preferred)
    return str(request.param)


def compare(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Inputs are rounded to ``dtype`` first; what is computed from them in fp32 is nearly exact."""
    truth, mine = case.to(dtype).to(torch.float64), case.to(dtype, device=device)
    expected = definition(truth)
    got = catalogue_sequence_logps(mine.hidden, mine.weight, mine.allowed().to(device), **mine.head())
    assert got.dtype == torch.promote_types(dtype, torch.float32) and got.shape == expected.shape
    assert bool((got <= 0).all())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    exact = gradients(truth, expected)
    for name, grad in gradients(mine, got).items():
        assert grad.dtype == dtype
        grad = grad.cpu()
        true = torch.zeros_like(grad, dtype=torch.float64) if exact.get(name) is None else exact[name]
        rounding = torch.finfo(dtype).eps if dtype in HALF else tolerance
        assert float((grad.double() - true).abs().max()) <= rounding * max(1.0, float(true.abs().max())), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.usefixtures("layout")
def test_every_head(head: str, dtype: torch.dtype) -> None:
    compare(make(**HEADS[head]), dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("layout")
def test_every_shape(shape: str) -> None:
    for seed in range(3):
        compare(make(**SHAPES[shape], bias=True, softcap=6.0, seed=seed), torch.float64)
        compare(make(**SHAPES[shape], seed=seed), torch.float32)


@pytest.mark.usefixtures("layout")
def test_gradients_are_differences() -> None:
    case = make((1, 2, 3, 5), 6, 9, 3, 11, bias=True, lora=True, softcap=3.0).to(torch.float64)
    plan, names = case.allowed(), list(case.leaves())

    def f(*leaves: Tensor) -> Tensor:
        value = dict(zip(names, leaves, strict=True))
        lora = (value["lora A"], value["lora B"], 0.7)
        return catalogue_sequence_logps(
            value["hidden"], value["weight"], plan, bias=value["bias"], lora=lora, softcap=3.0, logit_scale=0.5
        )

    assert torch.autograd.gradcheck(f, tuple(case.leaves().values()))


@pytest.mark.usefixtures("layout")
def test_nearly_certain_and_nearly_impossible() -> None:
    """p from 1 - 1e-13 to 1e-39: log p and its gradient keep their relative precision, in fp32 too."""
    gaps = [0.0, 1e-3, 5.0, 16.0, 30.0, 90.0]
    weight = torch.tensor([[1.0], [0.0], [0.0], [-3.0]])
    hidden = torch.tensor([[gap] for gap in gaps]).requires_grad_()
    for target, own in ((0, True), (1, False)):
        case = Case(
            hidden, weight, None, None, 1.0, None,
            [0] * 6, [[0, 1, 2]], [*range(6)], [target] * 6, [*range(6)], 6,
        )  # fmt: skip
        got = catalogue_sequence_logps(case.hidden, case.weight, case.allowed())
        x = torch.tensor(gaps, dtype=torch.float64)
        expected = -torch.log1p(2 * torch.exp(-x)) - (0 if own else x)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=TINY)
        (grad,) = torch.autograd.grad(got.sum(), hidden)
        others = 2 * torch.exp(-x) / (1 + 2 * torch.exp(-x))  # 1 - p of token 0
        expected = others if own else others - 1
        torch.testing.assert_close(grad[:, 0].double(), expected, rtol=1e-5, atol=TINY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits(dtype: torch.dtype) -> None:
    case = make(size=300.0).to(dtype)
    got = catalogue_sequence_logps(case.hidden, case.weight, case.allowed())
    expected = definition(case.to(torch.float64))
    assert bool((got <= 0).all())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-3)  # logits near 1000: 1e-4 in fp32
    assert all(bool(grad.isfinite().all()) for grad in gradients(case, got).values())


def huge(device: torch.device | str = "cpu") -> None:
    """Logits of +-1e4: finite log-probabilities and gradients, equal to fp64's."""
    case = make((1, 2, 5, 33), 20, 40, 8, 60, size=1.0)
    scale = 1e4 / float((case.hidden @ case.weight.t()).abs().max())
    case = case._replace(hidden=case.hidden * scale).to(torch.float32, device=device)
    logps = catalogue_sequence_logps(case.hidden, case.weight, case.allowed().to(device))
    expected = definition(case.to(torch.float64))
    assert bool((logps.isfinite() & (logps <= 0)).all()) and float(logps.min()) < -1e4
    torch.testing.assert_close(logps.double().cpu(), expected, rtol=1e-5, atol=2e-2)  # 1e4 has steps of 1e-3 in fp32
    assert all(bool(grad.isfinite().all()) for grad in gradients(case, logps).values())


def nan_stays_in_its_row(device: torch.device | str = "cpu") -> None:
    """A NaN reaches what depends on its row, and nothing else."""
    case = make((2, 5, 33), 20, 40, 8, 60).to(torch.float32, trains=False, device=device)
    bad = case.rows[0]
    hidden = case.hidden.index_fill(0, torch.tensor([bad], device=device), torch.nan)
    logps = catalogue_sequence_logps(hidden, case.weight, case.allowed().to(device))
    hit = {s for s, row in zip(case.sequence_ids, case.rows, strict=True) if row == bad}
    assert {s for s, x in enumerate(logps.tolist()) if x != x} == hit and len(hit) < case.num_sequences


@pytest.mark.usefixtures("layout")
def test_huge_logits() -> None:
    huge()


@pytest.mark.usefixtures("layout")
def test_a_nan_stays_in_its_row() -> None:
    nan_stays_in_its_row()


@pytest.mark.usefixtures("layout")
def test_a_masked_token_has_no_probability() -> None:
    case = make((4, 70), 20, 40, bias=True)
    masked = {tokens[0] for tokens in case.sets}
    case.bias[list(masked)] = -torch.inf
    kept = [
        t if t not in masked else case.sets[case.row_sets[r]][1] for t, r in zip(case.targets, case.rows, strict=True)
    ]
    case = case._replace(targets=kept).to(torch.float64)
    got = catalogue_sequence_logps(case.hidden, case.weight, case.allowed(), bias=case.bias)
    torch.testing.assert_close(got, definition(case), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(got.sum(), [case.hidden, case.weight])
    for mine, true in zip(found, torch.autograd.grad(definition(case).sum(), [case.hidden, case.weight]), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_paths_of_a_trie_sum_to_one(dtype: torch.dtype) -> None:
    """Three levels with 5, 4 and 6 children: 120 paths, each a sequence, each node a row."""
    g = torch.Generator().manual_seed(0)
    paths = list(itertools.product(range(5), range(4), range(6)))
    nodes = {
        node: i for i, node in enumerate([(), *itertools.product(range(5)), *itertools.product(range(5), range(4))])
    }
    children = [(5, 4, 6)[len(node)] for node in nodes]
    sets = [sorted(torch.randperm(50, generator=g)[:n].tolist()) for n in children]
    of = [(path, nodes[path[:d]], d) for path in paths for d in range(3)]
    case = Case(
        hidden=torch.randn(len(nodes), 16, generator=g).to(dtype) * 3,
        weight=torch.randn(50, 16, generator=g).to(dtype),
        bias=None, lora=None, logit_scale=1.0, softcap=None,
        row_sets=list(range(len(nodes))),
        sets=sets,
        rows=[row for _, row, _ in of],
        targets=[sets[row][path[d]] for path, row, d in of],
        sequence_ids=[i for i in range(len(paths)) for _ in range(3)],
        num_sequences=len(paths),
    )  # fmt: skip
    logps = catalogue_sequence_logps(case.hidden, case.weight, case.allowed())
    assert float(logps.double().exp().sum()) == pytest.approx(1, abs=1e-6)
    case = case.to(torch.float64)
    logps = catalogue_sequence_logps(case.hidden, case.weight, case.allowed())
    (grad,) = torch.autograd.grad(logps.exp().sum(), case.hidden)
    assert float(grad.abs().max()) < 1e-12


def test_a_set_of_all_tokens_is_the_whole_softmax() -> None:
    case = make((301,), bias=True, lora=True, softcap=8.0).to(torch.float32)
    ids = {"sequence_ids": torch.tensor(case.sequence_ids), "num_sequences": case.num_sequences}
    whole = linear_sequence_logps(
        case.hidden, case.weight, torch.tensor(case.targets), rows=torch.tensor(case.rows), **ids, **case.head()
    )
    small = catalogue_sequence_logps(case.hidden, case.weight, case.allowed(), **case.head())
    torch.testing.assert_close(small, whole, rtol=1e-5, atol=1e-5)


def test_only_the_tokens_of_sets_get_a_gradient() -> None:
    case = make((3, 1, 40), bias=True, lora=True).to(torch.float32)
    grads = gradients(case, catalogue_sequence_logps(case.hidden, case.weight, case.allowed(), **case.head()))
    scored = {case.row_sets[row] for row in case.rows}
    used = sorted({token for s in scored if len(case.sets[s]) > 1 for token in case.sets[s]})
    others = torch.ones(301, dtype=torch.bool).index_fill(0, torch.tensor(used), False)
    for name in ("weight", "bias", "lora B"):
        assert not grads[name][others].any(), name
        assert grads[name][~others].any(), name
    forced = [row for row, s in enumerate(case.row_sets) if len(case.sets[s]) == 1 or row not in case.rows]
    assert len(forced) > 3 and not grads["hidden"][forced].any()


def test_forced_rows_are_not_computed() -> None:
    """Their hidden states are not even read: NaN does not matter."""
    case = make((1, 1, 5)).to(torch.float32)
    forced = [row for row, s in enumerate(case.row_sets) if s < 2]
    plan = case.allowed()
    assert not set(forced) & set(plan.rows.tolist())
    expected = catalogue_sequence_logps(case.hidden, case.weight, plan)
    hidden = case.hidden.detach().index_fill(0, torch.tensor(forced), torch.nan)
    assert torch.equal(catalogue_sequence_logps(hidden, case.weight, plan), expected)


@pytest.mark.usefixtures("layout")
def test_tables_cover_every_logit_once() -> None:
    """What programs of a GPU find in the tables is what the blocks say."""
    for sizes in ((1, 2, 3, 7, 40, 130, 257), (2,), (300,), (1,)):
        plan = make(sizes, rows=200, pairs=400).allowed()
        z = torch.zeros(plan.plan.num_places)
        expected = torch.zeros_like(z)
        names = (plan.rows + 1).tolist()
        for slot, n, all_rows, column, w, all_columns, place in plan.tiles.tolist():
            for i in range(min(n, allowed.TILE_ROWS)):
                at = place + i * all_columns
                width = min(w, allowed.TILE_COLUMNS)
                z[at : at + width] += names[slot + i] + 1e3 * plan.columns[column : column + width]
            assert n <= all_rows and w <= all_columns
        for slot, within, of_slot, left, place, column in plan.lanes.tolist():
            for lane in range(min(left, allowed.LANES)):
                z[place + lane] += names[slot + (within + lane) // of_slot] + 1e3 * plan.columns[column + lane]
        for part in plan.plan.parts:
            columns = part.columns.expand(part.shape)
            expected[part.places] = (1e3 * columns + (part.rows[:, None] + 1)).flatten()
            n, w = part.shape
            assert plan.places[part.slots].tolist() == [part.places.start + i * w for i in range(n)]
        assert torch.equal(z, expected) and int(plan.places[-1]) == len(z)
        for start, pairs, keys in (
            (plan.slot_start, plan.slot_pairs, plan.pair_slots),
            (plan.sequence_start, plan.sequence_pairs, plan.sequence_ids),
        ):
            assert sorted(pairs.tolist()) == list(range(len(keys)))
            for key in range(len(start) - 1):
                mine = pairs[start[key] : start[key + 1]].tolist()
                assert mine == sorted(mine) and set(keys[mine].tolist()) <= {key}


def test_little_is_computed_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of up to 100 tokens, each a size of its own: fewer than two logits for each one that counts."""
    monkeypatch.setattr(allowed, "SHARED", 1 << 40)
    plan = make(tuple(range(2, 100)), rows=300, pairs=600).allowed()
    places = sum(n * w for n, w in zip(plan.blocks[::3], plan.blocks[1::3], strict=True))
    assert int(plan.sizes.sum()) < places < 1.6 * int(plan.sizes.sum())


def test_no_value_is_read_back() -> None:
    """Fake tensors have shapes and no values, as those of a GPU that nobody waits for."""
    case = make((1, 3, 9, 90), 300, 600, bias=True, softcap=4.0).to(torch.float32, trains=False)
    plan = case.allowed()
    assert {0, 1} == set(plan.blocks[2::3]), "both kinds of blocks"
    small, bias = case.weight[plan.used], case.bias[plan.used]
    with FakeTensorMode() as mode:
        *tensors, shapes = plan.plan
        on_gpu = allowed.Plan(*map(mode.from_tensor, tensors), shapes)
        head = allowed.Head(*map(mode.from_tensor, (case.hidden, small, bias)))
        z = torch.empty(on_gpu.num_places)
        logits = allowed.Logits(z, torch.empty_like(z), torch.empty(2, len(plan.rows)))
        numbers = {"logit_scale": 1.0, "softcap": 4.0, "num_sequences": case.num_sequences}
        logps = reference.forward(head, on_gpu, logits, **numbers)
        grads = allowed.Gradients(*map(torch.zeros_like, head))
        reference.backward(logps, head, on_gpu, logits, grads, logit_scale=1.0)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError):  # what it would be if one were
        int(mode.from_tensor(plan.rows)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("layout")
def test_bitwise_the_same_from_run_to_run(dtype: torch.dtype) -> None:
    case = make((1, 2, 9, 40, 200), 300, 900, 64, 400, bias=True, lora=True)
    results = []
    for _ in range(2):
        mine = case.to(dtype)
        logps = catalogue_sequence_logps(mine.hidden, mine.weight, mine.allowed(), **mine.head())
        results.append([logps, *gradients(mine, logps).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("trains", ["nothing", "hidden", "weight", "bias", "lora A, lora B"])
def test_what_is_frozen_does_not_matter(trains: str) -> None:
    case = make(bias=True, lora=True).to(torch.float32)
    expected = catalogue_sequence_logps(case.hidden, case.weight, case.allowed(), **case.head())
    grads = gradients(case, expected)
    for name, leaf in case.leaves().items():
        leaf.requires_grad_(name in trains.split(", "))
    logps = catalogue_sequence_logps(case.hidden, case.weight, case.allowed(), **case.head())
    assert torch.equal(logps, expected) and logps.requires_grad == (trains != "nothing")
    if logps.requires_grad:
        logps.backward(torch.linspace(-1, 2, len(logps)))
    for name, leaf in case.leaves().items():
        assert (leaf.grad is None) if not leaf.requires_grad else torch.equal(leaf.grad, grads[name])


def test_autocast_changes_nothing() -> None:
    case = make(lora=True).to(torch.float32)
    expected = catalogue_sequence_logps(case.hidden, case.weight, case.allowed(), **case.head())
    grads = gradients(case, expected)
    with torch.autocast("cpu", torch.bfloat16):
        logps = catalogue_sequence_logps(case.hidden, case.weight, case.allowed(), **case.head())
    again = gradients(case, logps)  # outside, as torch asks for
    assert torch.equal(logps, expected) and all(torch.equal(again[name], grads[name]) for name in grads)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_opcheck(softcap: float | None) -> None:
    case = make((1, 3, 9), 8, 12, 5, 20).to(torch.float32)
    plan = case.allowed()
    arguments = (*plan.plan, plan.num_sequences, 0.5, softcap or 0.0, None)
    small = case.weight.detach()[plan.used].requires_grad_()
    for bias in (None, torch.randn(len(small), requires_grad=True)):
        torch.library.opcheck(torch.ops.napo.catalogue_sequence_logps.default, (case.hidden, small, bias, *arguments))


def test_compiled_is_the_same() -> None:
    case = make(bias=True).to(torch.float32)
    plan = case.allowed()
    f = lambda hidden: catalogue_sequence_logps(hidden, case.weight, plan, bias=case.bias)  # noqa: E731
    got = torch.compile(f, backend="aot_eager", fullgraph=True)(case.hidden)
    expected = f(case.hidden)
    torch.testing.assert_close(got, expected)
    (mine,) = torch.autograd.grad(got.sum(), case.hidden)
    torch.testing.assert_close(mine, torch.autograd.grad(expected.sum(), case.hidden)[0])


def test_meta_tensors_give_shapes() -> None:
    case = make().to(torch.float32)
    plan = case.allowed()
    hidden, weight = (x.detach().to("meta").requires_grad_() for x in (case.hidden, case.weight))
    logps = catalogue_sequence_logps(hidden, weight, plan.to("meta"))
    logps.sum().backward()
    assert logps.is_meta and logps.shape == (case.num_sequences,)
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def test_second_derivative_is_refused() -> None:
    case = make().to(torch.float32)
    logps = catalogue_sequence_logps(case.hidden, case.weight, case.allowed())
    (grad,) = torch.autograd.grad(logps.sum(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not implemented"):
        grad.sum().backward()


PLAN: dict[str, Any] = {
    "row_sets": np.array([0, 1]),
    "sets": (np.array([0, 3, 4]), np.array([1, 4, 6, 2])),
    "targets": np.array([4, 2]),
    "sequence_ids": np.array([0, 0]),
    "num_sequences": 1,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": np.array([5, 2])}, r"that the set of row 0 allows \(1, 4, 6\), got 5 at position 0"),
        ({"targets": np.array([4, 3])}, r"targets: expected a token that the set of row 1 allows \(2\), got 3"),
        ({"targets": np.array([4, -1])}, r"targets: expected a token that the set of row 1 allows \(2\), got -1"),
        ({"targets": np.array([4.0, 2.0])}, "targets: expected integers in one dimension, got float64"),
        ({"targets": np.array([4])}, "rows: needed unless targets has one entry a row; got 1 for 2"),
        ({"rows": np.array([0, 2])}, r"rows: expected values in \[0, 2\), got 2 at position 1"),
        ({"rows": np.array([0])}, "rows: expected one for each of 2 targets, got 1"),
        ({"sequence_ids": np.array([0, 1])}, r"sequence_ids: expected values in \[0, 1\), got 1 at position 1"),
        ({"row_sets": np.array([0, 2])}, r"row_sets: expected values in \[0, 2\), got 2"),
        ({"sets": (np.array([0, 3, 3]), np.array([1, 4, 6]))}, "sets: expected a token in each .* got none in set 1"),
        ({"sets": (np.array([0, 3, 4]), np.array([1, 4, 4, 2]))}, "sets: expected ascending tokens, .* in set 0"),
        ({"sets": (np.array([0, 3, 4]), np.array([-1, 4, 6, 2]))}, "sets: expected tokens of at least 0, got -1"),
        ({"sets": (np.array([-3, 3, 4]), np.array([1, 4, 6, 2]))}, r"begin in \[0, 4\], .* got -3 at position 0"),
        ({"sets": (np.array([0, 3, 5]), np.array([1, 4, 6, 2]))}, r"begin in \[0, 4\], .* got 5 at position 2"),
        ({"sets": (np.array([], np.int64), np.array([1]))}, "sets: expected where each set begins .* got nothing"),
        ({"num_sequences": 1.5}, "num_sequences: expected a number of at least 0, got 1.5"),
        ({"num_sequences": -1}, "num_sequences: expected a number of at least 0, got -1"),
    ],
)  # fmt: skip
def test_errors_of_the_plan(change: dict[str, Any], message: str) -> None:
    arguments = PLAN | change
    with pytest.raises(ValueError, match=message):
        AllowedTokens.of(arguments.pop("row_sets"), arguments.pop("sets"), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(3, 4)}, "allowed: expected row_sets for each of 3 rows of hidden, got 2"),
        ({"weight": torch.zeros(6, 4)}, "allowed: expected tokens below 6, weight's rows; got 6"),
        ({"weight": torch.zeros(8, 5)}, "weight: expected .* H = 4"),
        ({"allowed": None}, "allowed: expected AllowedTokens, made by AllowedTokens.of, got NoneType"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.int64)}, "hidden: expected bfloat16"),
        ({"logit_scale": 0.0}, "logit_scale: expected a finite number other than 0"),
        ({"logit_scale": None}, "logit_scale: expected a finite number, got NoneType"),
        ({"softcap": -1.0}, "softcap: expected a positive number"),
        ({"softcap": "1"}, "softcap: expected a positive number, got '1'"),
        ({"bias": torch.zeros(8, dtype=torch.complex64)}, "bias: expected bfloat16"),
        ({"lora": (torch.zeros(2, 4), torch.zeros(8, 2, dtype=torch.int64), 1.0)}, "lora B: expected bfloat16"),
        ({"lora": (torch.zeros(2, 4), torch.zeros(8, 2), float("nan"))}, "lora scale: expected a finite number"),
        ({"bias": torch.zeros(7)}, r"bias: expected shape \(8,\)"),
        ({"lora": (torch.zeros(2, 3), torch.zeros(8, 2), 1.0)}, "lora: expected A"),
        ({"hidden": torch.zeros(2, 4, device="meta"), "weight": torch.zeros(8, 4, device="meta")}, "call .to()"),
    ],
)
def test_errors_of_the_call(change: dict[str, Any], message: str) -> None:
    plan = dict(PLAN)
    made = AllowedTokens.of(plan.pop("row_sets"), plan.pop("sets"), plan.pop("targets"), **plan)
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(8, 4), "allowed": made} | change
    with pytest.raises(ValueError, match=message):
        catalogue_sequence_logps(
            arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("allowed"), **arguments
        )


def test_plans_are_compared_as_objects() -> None:
    """Their tensors have no truth value."""
    one, other = make().allowed(), make().allowed()
    assert one == one and one != other and len({one, other}) == 2


def test_a_backend_that_was_asked_for() -> None:
    case = make().to(torch.float32)
    run = lambda backend, dtype: catalogue_sequence_logps(  # noqa: E731
        case.hidden.to(dtype), case.weight.to(dtype), case.allowed(), backend=backend
    )
    torch.testing.assert_close(run("reference", torch.float32), run(None, torch.float32), rtol=1e-5, atol=1e-5)
    for name, dtype, message in (
        ("triton", torch.float32, "'triton' (cannot run catalogue_sequence_logps|does not serve tensors on cpu)"),
        ("cuda", torch.float32, "'cuda' (has no kernels for|cannot run) catalogue_sequence_logps"),
        ("cublas", torch.float32, "expected None or one of reference, cpu, triton, cuda; got 'cublas'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(name, dtype)
    assert not dispatch.serves("cuda", "catalogue_sequence_logps")
    assert all("catalogue_sequence_logps" in backends()[name]["ops"] for name in ("cpu", "triton"))


def test_the_compiled_module_computes_unless_fp64_is_given(chosen: str) -> None:
    case = make().to(torch.float32)
    before = dispatch._calls[chosen, "catalogue_sequence_logps"]
    catalogue_sequence_logps(case.hidden, case.weight, case.allowed()).sum().backward()
    assert dispatch._calls[chosen, "catalogue_sequence_logps"] == before + 2
    case = make().to(torch.float64)
    catalogue_sequence_logps(case.hidden, case.weight, case.allowed())
    assert dispatch._calls[chosen, "catalogue_sequence_logps"] == before + 2 + (chosen == "reference")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.usefixtures("layout")
def test_every_instruction_set(isa: str, head: str) -> None:
    compare(make(width=67, **HEADS[head]), torch.float32)
