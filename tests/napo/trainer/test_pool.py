"""Pools over accumulated micro-batches and over ranks give the loss and the gradient of one big batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from trainer_cases import distance, make_rows, step_gradients, tiny_model, trainer

TOLERANCE = 1e-5
ROWS = make_rows(32, items=40)
EIGHT_TIMES_FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "batch"}, {"objective": "simpo"}, {"shared_gradient": False}],
    ids=lambda options: ",".join(map(str, options.values())) or "napo",
)
def test_accumulated_pool_equals_one_batch(options: dict[str, Any], tmp_path: Path) -> None:
    (whole,) = step_gradients(tmp_path / "whole", ROWS, per_device_train_batch_size=32, **options)
    (parts,) = step_gradients(tmp_path / "parts", ROWS, pool="accumulated", **EIGHT_TIMES_FOUR, **options)
    assert distance(parts, whole) < TOLERANCE


def test_micro_batch_pools_differ_from_one_batch(tmp_path: Path) -> None:
    (whole,) = step_gradients(tmp_path / "whole", ROWS, per_device_train_batch_size=32)
    (parts,) = step_gradients(tmp_path / "parts", ROWS, pool="batch", **EIGHT_TIMES_FOUR)
    assert distance(parts, whole) > 100 * TOLERANCE


def test_the_margin_moves_once_a_step(tmp_path: Path) -> None:
    """Over micro-batches as over one batch that holds them, whichever pool."""
    states = []
    for name, options in (
        ("whole", {"per_device_train_batch_size": 16}),
        ("parts", {"gradient_accumulation_steps": 4}),
    ):
        run = trainer(tmp_path / name, ROWS, rho=0.0, max_steps=2, **options)
        run.train()
        states.append(run.margin.state_dict())
    torch.testing.assert_close(states[0], states[1])
    assert states[0]["initialized"]


def test_second_pass_replays_dropout(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        ROWS,
        pool="accumulated",
        gradient_accumulation_steps=3,
        max_steps=2,
        learning_rate=1e-2,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False),
    )
    passes: list[list[Tensor]] = [[], []]
    states: list[Tensor] = []
    scored = run._scored

    def recording(*arguments: Any) -> Tensor:
        states.append(torch.get_rng_state())
        logps = scored(*arguments)
        passes[torch.is_grad_enabled()].append(logps.detach())
        return logps

    run._scored = recording  # type: ignore[method-assign]
    run.train()
    # Of three micro-batches the first is scored once, with its graph, and the others twice.
    assert len(passes[0]) == 4 and len(passes[1]) == 6
    again_of = [passes[1][place] for place in (1, 2, 4, 5)]
    for first, second in zip(passes[0], again_of, strict=True):
        assert torch.equal(first, second)
    drawn = [*states[:3], *states[5:8]]  # before each first pass
    assert len({state.numpy().tobytes() for state in drawn}) == 6  # no step draws the numbers of the one before it
    torch.manual_seed(0)
    run.model.train()
    last = run.collator([run.train_dataset[number] for number in range(20, 24)])["batch"]
    again = scored(run.model, last)
    assert again.shape == passes[1][-1].shape
    assert not torch.equal(again, passes[1][-1])  # there is dropout to replay


@pytest.mark.parametrize("pool", ["batch", "accumulated"])
def test_checkpointed_activations_leave_the_gradient_alone(pool: str, tmp_path: Path) -> None:
    """Dropout included, which checkpointing and the second pass of an accumulated pool replay each on its own."""
    options = {"pool": pool, "gradient_accumulation_steps": 3, "precompute_ref_log_probs": False, "objective": "sdpo"}
    found = [
        step_gradients(
            tmp_path / str(checkpointing),
            ROWS,
            gradient_checkpointing=checkpointing,
            rho=0.7,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5),
            **options,
        )[0]
        for checkpointing in (False, True)
    ]
    assert distance(*found) < TOLERANCE


@contextmanager
def peak_of_saved_tensors() -> Iterator[list[int]]:
    """The most bytes that autograd held for backward at any one time."""
    held, peak = 0, [0]

    def forget(size: int) -> None:
        nonlocal held
        held -= size

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held
            self.tensor = tensor
            held += tensor.nbytes
            peak[0] = max(peak[0], held)
            weakref.finalize(self, forget, tensor.nbytes)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        yield peak


def test_accumulated_pool_holds_one_micro_batch(tmp_path: Path) -> None:
    peaks = {}
    runs = {
        "four": {"per_device_train_batch_size": 4, "rho": 0.0},
        "thirty-two": {"per_device_train_batch_size": 32},
        "accumulated": {"pool": "accumulated", **EIGHT_TIMES_FOUR},
    }
    rows = make_rows(32, items=40, ragged=False)
    for number, row in enumerate(rows):
        row["prompt"] = (
            f"u{number} {row['prompt']}"  # or they would begin alike and share tokens, more in large batches
        )
    for name, options in runs.items():
        with peak_of_saved_tensors() as peak:
            step_gradients(tmp_path / name, rows, **options)
        peaks[name] = peak[0]
    # Micro-batches pack to slightly different lengths, hence the room.
    assert peaks["accumulated"] < 1.3 * peaks["four"] < 0.3 * peaks["thirty-two"]


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``trainer_ranks.py`` on two processes has left what it found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [*command, str(here / "trainer_ranks.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(ranks_folder: Path) -> dict[str, list[float]]:
    """Losses by step of every way of running."""
    return json.loads((ranks_folder / "losses.json").read_text())


EQUAL_TO_ONE = [
    "ddp",
    "ddp-accumulated",
    "ddp-pair",
    "ddp-resumed",
    "ddp-lora",
    "ddp-kept",
    "ddp-precomputed",
    "filled-12",
    "filled-13",
    "filled-18",
    "filled-19",
    "filled-20",
    "filled-21",
    "filled-resumed-14",
    "fsdp2",
    "fsdp2-accumulated",
    "fsdp2-lora",
]


@pytest.mark.parametrize("name", EQUAL_TO_ONE)
def test_two_ranks_equal_one_process(name: str, ranks: dict[str, list[float]], tmp_path: Path) -> None:
    from trainer_ranks import COMMON, WAYS, rows_of_ranks, vectors

    if name not in WAYS:
        pytest.skip("this version of transformers cannot resume on several CPU ranks")
    options = {**COMMON, **WAYS[name]}
    if options.get("granularity") == "pair":
        options["item_vectors"], options["item_bias"] = vectors()
    options["per_device_train_batch_size"] *= 2
    if "precompute_ref_log_probs" in options:  # by the other way
        options["precompute_ref_log_probs"] = False
    run = trainer(tmp_path, rows_of_ranks(name), tiny_model(), **options)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert max(losses) - min(losses) > 1e-2
    torch.testing.assert_close(ranks[name], losses, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 5, 7, 8])
@pytest.mark.parametrize("name", ["softmax", "napo", "napo-user", "napo-pair"])
def test_rows_that_two_ranks_cannot_share_evenly_count_once(
    name: str, count: int, ranks_folder: Path, tmp_path: Path
) -> None:
    from trainer_ranks import evaluation

    of_two = json.loads((ranks_folder / "evaluated.json").read_text())[name][str(count)]
    assert of_two == pytest.approx(list(evaluation(tmp_path, name, count).values()), abs=1e-5)


@pytest.mark.parametrize("count", [1, 3, 5, 7, 8])
def test_the_authors_pool_is_whole_where_rows_fill_it_up(count: int, ranks_folder: Path) -> None:
    """The filling, the first rows once more, has its part in pool and margin, and none in the figures."""
    from test_authors import ALPHA, GAMMA, logps_table, negatives_of, softmax_loss
    from trainer_ranks import rows_to_evaluate

    rows, ema, losses = rows_to_evaluate("authors", count), 0.0, []
    for start in range(0, count, 4):
        batch = [rows[(start + place) if start + place < count else (start + place) % count] for place in range(4)]
        with torch.no_grad():
            table = logps_table(tiny_model(), batch)
        taken = [negatives_of(batch, table[:, 1:], first, 2, rho=1.0) for first in (0, 2)]
        ema = 0.9 * ema + 0.1 * sum(mean for _, mean in taken) / 2
        for place in range(min(4, count - start)):
            negatives, mean = taken[place // 2]
            gamma = GAMMA - ALPHA * (mean - ema) * GAMMA
            losses.append(float(softmax_loss(table[place : place + 1, 0], [negatives[place % 2]], gamma)))
    of_two = json.loads((ranks_folder / "evaluated.json").read_text())["authors"][str(count)]
    assert of_two[0] == pytest.approx(sum(losses) / count, abs=1e-5)


def test_the_second_rank_reads_the_rows_that_the_first_has_encoded(ranks_folder: Path) -> None:
    """And trains with them what one process trains: "ddp-kept" above."""
    encoded = json.loads((ranks_folder / "encoded.json").read_text())
    assert encoded["ddp-kept"] == [80, 0] and encoded["ddp"] == [80, 80]
    (kept,) = (ranks_folder / "ddp-kept").glob("encoded_rows-*.npz")
    assert not list((ranks_folder / "ddp").glob("encoded_rows-*")) and kept.stat().st_size > 0


def test_authors_quirks_on_two_ranks(ranks: dict[str, list[float]]) -> None:
    """Rank 1 reads rank 0's negatives as its own, each rank has a margin of its own, the average is the ranks'."""
    from test_authors import ALPHA, GAMMA, logps_table, negatives_of, softmax_loss
    from trainer_ranks import rows_of_ranks

    rows, model, ema = rows_of_ranks("authors"), tiny_model(), 0.0
    for step, loss in enumerate(ranks["authors"]):
        batch = rows[8 * step : 8 * step + 8]
        with torch.no_grad():
            table = logps_table(model, batch)
        taken = [negatives_of(batch, table[:, 1:], first, 4) for first in (0, 4)]
        ema = 0.9 * ema + 0.1 * sum(mean for _, mean in taken) / 2
        parts = [
            softmax_loss(table[first : first + 4, 0], negatives, GAMMA - ALPHA * (mean - ema) * GAMMA)
            for first, (negatives, mean) in zip((0, 4), taken, strict=True)
        ]
        assert loss == pytest.approx(float(sum(parts)) / 2, abs=1e-5)


def test_ranks_apart_differ(ranks: dict[str, list[float]]) -> None:
    differences = [abs(a - b) for a, b in zip(ranks["ddp-apart"], ranks["ddp"], strict=True)]
    assert max(differences) > 1e-3
