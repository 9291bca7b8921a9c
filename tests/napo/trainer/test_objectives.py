"""One step of every objective against plain PyTorch: each answer alone behind its prompt, losses from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from trainer_cases import distance, make_rows, step_gradients, tiny_model, tiny_tokenizer, trainer

from napo.objectives import OBJECTIVES
from napo.trainer.boundary import near_boundary

TOLERANCE = 1e-5
ROWS = make_rows(12)  # three batches of four


def answer_logps(model: torch.nn.Module, row: dict[str, Any], average: bool) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of the chosen and of each rejected answer, every one a sequence of its own."""
    tokenizer = tiny_tokenizer()
    prompt = tokenizer(row["prompt"])["input_ids"]
    logps = []
    for answer in (row["chosen"], *row["rejected"]):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        logits = model(torch.tensor([prompt + ids])).logits[0].double()
        tokens = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)[range(len(ids)), ids]
        logps.append(tokens.mean() if average else tokens.sum())
    return logps[0], logps[1:]


def neighbours(rows: list[dict[str, Any]], user: int, k: int) -> list[int]:
    """The k other users of the batch with the most similar states, rows of the same user left out."""
    state = torch.tensor(rows[user]["user_state"])
    others = [v for v in range(len(rows)) if rows[v]["user_id"] != rows[user]["user_id"]]
    return sorted(others, key=lambda v: -float(state @ torch.tensor(rows[v]["user_state"])))[:k]


def oracle_loss(
    name: str,
    model: torch.nn.Module,
    rows: list[dict[str, Any]],
    reference: torch.nn.Module,
    *,
    average: bool,
    beta: float,
    gamma: float,
    alpha: float = 0.0,
    rho: float = 0.0,
    ema: float = 0.0,
    scores: Callable[[int, int, int], float] | None = None,
) -> Tensor:
    """The mean loss of a batch, user by user and negative by negative; ``scores`` gives m of negative n of owner v for
    user u, by default the row's own score."""
    scores = scores or (lambda u, v, n: rows[v]["rejected_scores"][n])
    scored = [answer_logps(model, row, average) for row in rows]
    if OBJECTIVES[name].reference:
        with torch.no_grad():
            base = [answer_logps(reference, row, average) for row in rows]
        scored = [
            (plus - plus0, [s - s0 for s, s0 in zip(minus, minus0, strict=True)])
            for (plus, minus), (plus0, minus0) in zip(scored, base, strict=True)
        ]
    losses = []
    k = math.floor(round((len(rows) - 1) * rho, 9))
    for u, (plus, own) in enumerate(scored):
        known = {rows[u]["chosen_id"], *rows[u]["history_ids"]}
        if name in ("dpo", "simpo"):
            pairs = [s for s, item in zip(own, rows[u]["rejected_ids"], strict=True) if item not in known]
            terms = [-logsigmoid(beta * (plus - s) - gamma) for s in pairs]
            losses.append(sum(terms) / max(len(terms), 1) + 0.0 * plus)
            continue
        total, kept = plus.new_zeros(()), []
        for v in [u, *neighbours(rows, u, k)]:
            for n, s in enumerate(scored[v][1]):
                if rows[v]["rejected_ids"][n] in known:
                    continue
                margin = max(0.0, gamma * (1.0 - alpha * (scores(u, v, n) - ema))) if alpha else gamma
                total = total + torch.exp(beta * (s - plus) + margin)
                kept.append(s)
        if not kept:
            losses.append(0.0 * plus)
        elif name == "dynamicpo":
            items = [n for n, item in enumerate(rows[u]["rejected_ids"]) if item not in known]
            losses.append(dynamicpo(plus, kept, *answer_values(model, rows[u], items, average), beta))
        elif name == "dmpo":
            losses.append(-logsigmoid(beta * plus - beta * torch.stack(kept).mean()))
        else:
            losses.append(-logsigmoid(-torch.log(total)))
    return torch.stack([torch.as_tensor(loss) for loss in losses]).mean()


def answer_values(
    model: torch.nn.Module, row: dict[str, Any], items: list[int], average: bool
) -> tuple[float, list[float]]:
    """The model's own log-probabilities as numbers."""
    with torch.no_grad():
        plus, minus = answer_logps(model, row, average)
    return float(plus), [float(minus[n]) for n in items]


def dynamicpo(plus: Tensor, minus: list[Tensor], value: float, values: list[float], beta: float) -> Tensor:
    """The formulas of arXiv 2605.00327 on DMPO, negative by negative."""
    near = [j for j, s in enumerate(values) if s >= value] or upper_of_three(values)
    others = [s for j, s in enumerate(values) if j not in near] or [values[j] for j in near]
    low = sum(others) / len(others)
    terms = []
    for j in near:
        up, down = value - values[j], values[j] - low
        own = beta * (1.0 + 0.5 * math.tanh((up - down - 2.0) / (abs(up) + abs(down))))
        terms.append(own / len(near) * (plus - minus[j]))
    return -logsigmoid(sum(terms, plus.new_zeros(())))


def upper_of_three(values: list[float]) -> list[int]:
    order = sorted(range(len(values)), key=lambda j: -values[j])
    if len(values) <= 3:
        return order[:1]

    def spread(part: list[int]) -> float:
        mean = sum(values[j] for j in part) / len(part)
        return sum((values[j] - mean) ** 2 for j in part)

    cuts = [(i, j) for i in range(1, len(values) - 1) for j in range(i + 1, len(values))]
    i, _ = min(cuts, key=lambda cut: spread(order[: cut[0]]) + spread(order[cut[0] : cut[1]]) + spread(order[cut[1] :]))
    return order[:i]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 19])
def test_negatives_near_the_boundary(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    logps = 4 * torch.randn(40, 1 + count, generator=generator) - 9
    logps[20:, 0] = 0.0  # above all negatives
    mask = torch.rand(40, count, generator=generator) < 0.8
    share = near_boundary(logps, mask)
    for u in range(40):
        there = mask[u].nonzero()[:, 0].tolist()
        assert not share[u][~mask[u]].any()
        if not there:
            continue
        values = [float(logps[u, 1 + j]) for j in there]
        near = [j for j, s in enumerate(values) if s >= float(logps[u, 0])] or upper_of_three(values)
        assert share[u].nonzero()[:, 0].tolist() == sorted(there[j] for j in near)
        plus, minus = torch.tensor(1.3).double(), [torch.tensor(0.1 * j).double() for j in there]
        expected = dynamicpo(plus, minus, float(logps[u, 0]), values, 1.0)
        found = -logsigmoid((share[u] * (plus - 0.1 * torch.arange(count))).sum())
        assert float(found) == pytest.approx(float(expected), rel=1e-6)


def negative_sets(rows: list[dict[str, Any]], rho: float) -> list[list[tuple[int, int]]]:
    """Each user's negatives (owner, number), false ones included."""
    k = math.floor(round((len(rows) - 1) * rho, 9))
    return [
        [(v, n) for v in [u, *neighbours(rows, u, k)] for n in range(len(rows[v]["rejected_ids"]))]
        for u in range(len(rows))
    ]


def mean_score(rows: list[dict[str, Any]], rho: float) -> float:
    """The mean score of all negative sets of a batch, false negatives included: they are the recommender's too."""
    scores = [rows[v]["rejected_scores"][n] for own in negative_sets(rows, rho) for v, n in own]
    return sum(scores) / len(scores)


def oracle_gradient(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_gradient_of_a_step_equals_the_formulas(name: str, average: bool, tmp_path: Path) -> None:
    objective = OBJECTIVES[name]
    options: dict[str, Any] = {"objective": name, "average": average, "max_steps": 2}
    torch.manual_seed(1)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), adapter)  # trained: unlike what switching it off gives
    start = {key: value.clone() for key, value in model.state_dict().items()}
    options |= {"model": model, "learning_rate": 0.3, "optim": "sgd", "lr_scheduler_type": "constant"}
    first, second = step_gradients(tmp_path, ROWS, **options)

    numbers = {"average": average, "beta": objective.beta, "gamma": objective.gamma}
    numbers |= {"alpha": objective.alpha, "rho": objective.rho}
    model, reference = get_peft_model(tiny_model(), adapter), get_peft_model(tiny_model(), adapter)
    reference.load_state_dict(start)
    model.load_state_dict(start)
    before = mean_score(
        ROWS[:4], objective.rho
    )  # the first batch starts the moving average, the second is measured by it
    expected = oracle_gradient(model, oracle_loss(name, model, ROWS[:4], reference, ema=before, **numbers))
    assert distance(first, expected) < TOLERANCE
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in first:
                parameter -= 0.3 * first[key]
    expected = oracle_gradient(model, oracle_loss(name, model, ROWS[4:8], reference, ema=before, **numbers))
    assert distance(second, expected) < TOLERANCE


@pytest.mark.parametrize(
    "switched",
    [
        {"rho": 0.0},
        {"gamma": 0.0, "alpha": 0.0},
        {"alpha": 0.0},
        {"shared_gradient": False},
        {"exclude_false_negatives": False},
    ],
    ids=lambda options: ",".join(options),
)
def test_each_part_of_napo_matters_to_the_oracle(switched: dict[str, Any], tmp_path: Path) -> None:
    """The tests above would fail without sharing, margin, its scores, the borrowed gradient or the exclusion."""
    napo = OBJECTIVES["napo"]
    model = tiny_model()
    loss = oracle_loss(
        "napo", model, ROWS[:4], model, average=False, beta=napo.beta, gamma=napo.gamma, alpha=napo.alpha, rho=napo.rho,
        ema=mean_score(ROWS[:4], napo.rho),
    )  # fmt: skip
    expected = oracle_gradient(model, loss)
    (same,) = step_gradients(tmp_path / "same", ROWS)
    (other,) = step_gradients(tmp_path / "other", ROWS, **switched)
    assert distance(same, expected) < TOLERANCE
    assert distance(other, expected) > 100 * TOLERANCE


@pytest.mark.parametrize("granularity", ["batch", "user", "pair"])
def test_margins_of_every_granularity(granularity: str, tmp_path: Path) -> None:
    """The second batch's, as the first one starts the moving average; the learning rate is 0."""
    napo, generator = OBJECTIVES["napo"], torch.Generator().manual_seed(4)
    vectors, bias = torch.randn(30, 4, generator=generator), torch.randn(30, generator=generator)

    def score(rows: list[dict[str, Any]], u: int, v: int, n: int) -> float:
        if granularity != "pair":
            return rows[v]["rejected_scores"][n]
        item = rows[v]["rejected_ids"][n]
        return float(torch.tensor(rows[u]["user_state"]) @ vectors[item] + bias[item])

    def means(rows: list[dict[str, Any]]) -> tuple[list[float], float]:
        """Of each user's negatives, and of all."""
        found = [[score(rows, u, v, n) for v, n in own] for u, own in enumerate(negative_sets(rows, napo.rho))]
        return [sum(own) / len(own) for own in found], sum(map(sum, found)) / sum(map(len, found))

    first, rows = ROWS[:4], ROWS[4:8]
    of_user, of_batch = means(rows)
    by: dict[str, Callable[[int, int, int], float]] = {
        "batch": lambda u, v, n: of_batch,
        "user": lambda u, v, n: of_user[u],
        "pair": lambda u, v, n: score(rows, u, v, n),
    }
    model = tiny_model()
    loss = oracle_loss(
        "napo", model, rows, model, average=False, beta=napo.beta, gamma=napo.gamma, alpha=napo.alpha, rho=napo.rho,
        ema=means(first)[1], scores=by[granularity],
    )  # fmt: skip
    expected = oracle_gradient(model, loss)
    given = {"item_vectors": vectors, "item_bias": bias} if granularity == "pair" else {}
    _, found = step_gradients(tmp_path / "found", ROWS, granularity=granularity, max_steps=2, **given)
    _, other = step_gradients(tmp_path / "other", ROWS, max_steps=2)
    assert distance(found, expected) < TOLERANCE
    assert distance(other, expected) > 100 * TOLERANCE


@pytest.mark.parametrize("average", [False, True])
def test_likelihood_of_the_chosen_answer_beside_the_loss(average: bool, tmp_path: Path) -> None:
    napo, model, weight = OBJECTIVES["napo"], tiny_model(), 0.7
    loss = oracle_loss(
        "napo", model, ROWS[:4], model, average=average, beta=napo.beta, gamma=napo.gamma, alpha=napo.alpha,
        rho=napo.rho, ema=mean_score(ROWS[:4], napo.rho),
    )  # fmt: skip
    per_token = torch.stack([answer_logps(model, row, average=True)[0] for row in ROWS[:4]])
    expected = oracle_gradient(model, loss - weight * per_token.mean())
    (without,) = step_gradients(tmp_path / "without", ROWS, average=average)
    (found,) = step_gradients(tmp_path / "with", ROWS, average=average, sft_weight=weight)
    assert distance(found, expected) < TOLERANCE
    assert distance(without, expected) > 100 * TOLERANCE


def test_exact_sharing_scores_borrowed_answers_under_the_own_prompt(tmp_path: Path) -> None:
    rows, napo = ROWS[:4], OBJECTIVES["napo"]
    model, losses = tiny_model(), []
    for u, row in enumerate(rows):
        known = {row["chosen_id"], *row["history_ids"]}
        borrowed = [
            answer
            for v in [u, *neighbours(rows, u, math.floor(3 * napo.rho))]
            for answer, item in zip(rows[v]["rejected"], rows[v]["rejected_ids"], strict=True)
            if item not in known
        ]
        plus, minus = answer_logps(model, {**row, "rejected": borrowed}, average=False)
        losses.append(-logsigmoid(-torch.logsumexp(torch.stack(minus) - plus + napo.gamma, dim=0)))
    expected = oracle_gradient(model, torch.stack(losses).mean())
    (exact,) = step_gradients(tmp_path / "exact", rows, exact=True, alpha=0.0)
    (borrowed_as_is,) = step_gradients(tmp_path / "borrowed", rows, alpha=0.0)
    assert distance(exact, expected) < TOLERANCE
    assert distance(borrowed_as_is, expected) > 100 * TOLERANCE


def test_false_negatives_count_in_the_margins_mean_with_and_without_sharing(tmp_path: Path) -> None:
    """How many users the pool has decides whether anything is shared, and must not decide what the mean is of."""
    rows = [{**row, "user_state": [1.0, 0.0]} for row in make_rows(2, ragged=False)]
    rows[0] |= {"history_ids": rows[0]["rejected_ids"][:1], "rejected_scores": [10.0, 0.0, 0.0]}
    rows[1] |= {"user_id": "another"}
    means = []
    for rho in (0.0, 1.0):
        run = trainer(tmp_path / str(rho), rows, per_device_train_batch_size=2, rho=rho)
        run.train()
        means.append(float(run.margin.mean))
    expected = sum(sum(row["rejected_scores"]) for row in rows) / 6
    assert means == pytest.approx([expected, expected])
