"""Training of SASRec: cross-entropy over the catalogue at every position, as later practice than Kang & McAuley (2018)
found better, and early stopping on full-rank NDCG."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from napo.data.prepared import PreparedData
from napo.files import named_errors, put_in_place, remove, replacing
from napo.progress import Bar, duration, if_long, progress
from napo.recommenders.options import SASRecOptions
from napo.recommenders.sasrec import MOST_LOGITS, SASRec
from napo.signals import saving_first, stop_asked, stop_if_asked

WARMUP_STEPS = 100
CHECKPOINT_SECONDS = 10.0


class Subsequences:
    """All targets of some sequences as subsequences of at most ``length`` inputs.

    Each target is predicted once an epoch. A subsequence predicts at most ``stride`` targets, its last ones, so that a
    target far enough into its sequence has at least ``length - stride`` items of context.
    """

    def __init__(self, sequences: Sequence[np.ndarray], first_target: Sequence[int], length: int, pad: int) -> None:
        self.flat = np.concatenate([*sequences, np.full(length + 1, pad)]) if len(sequences) else np.empty(0, np.int64)
        self.sizes = np.array([len(sequence) for sequence in sequences], np.int64)
        self.begins = np.cumsum(self.sizes) - self.sizes
        self.first_target = np.maximum(np.asarray(first_target, np.int64), 1)
        self.length, self.pad = length, pad
        self.stride = max(1, length // 2)

    def batches(
        self, size: int, generator: np.random.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """inputs (B, length), targets (B, length) and which targets count (B, length).

        With a generator shuffled and with edges drawn anew, without in order and with fixed edges.
        """
        shift = (
            generator.integers(0, self.stride, len(self.sizes)) if generator else np.zeros(len(self.sizes), np.int64)
        )
        counts = np.maximum(-(-(self.sizes - self.first_target + shift) // self.stride), 0)
        counts[self.sizes <= self.first_target] = 0
        owner = np.repeat(np.arange(len(self.sizes)), counts)
        index = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        # Targets low..high - 1 of the owner's sequence; inputs end one before.
        low = self.first_target[owner] - shift[owner] + index * self.stride
        high = np.minimum(low + self.stride, self.sizes[owner])
        low = np.maximum(low, self.first_target[owner])
        begin = np.maximum(high - 1 - self.length, 0)
        order = generator.permutation(len(owner)) if generator else np.arange(len(owner))
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            place = begin[rows, None] + np.arange(self.length)
            absolute = self.begins[owner[rows], None] + place
            inside = place < high[rows, None] - 1
            inputs = np.where(inside, self.flat[absolute], self.pad)
            counted = inside & (place + 1 >= low[rows, None])
            targets = np.where(counted, self.flat[absolute + 1], self.pad)
            yield torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(counted)


def sequence_loss(model: SASRec, states: Tensor, targets: Tensor, loss: str, generator: torch.Generator) -> Tensor:
    """states (R, D), targets (R,) -> (). ``loss``: ce, sampled, bce or gbce."""
    weight, bias, options = model.items.weight, model.bias, model.options
    if loss == "ce":
        return F.cross_entropy(states @ weight[:-1].T + bias, targets)
    count = min(options.negatives, model.num_items - 1)
    drawn = torch.randint(model.num_items, (count,), generator=generator)
    positive = (states * weight[targets]).sum(-1) + bias[targets]  # (R,)
    negative = states @ weight[drawn].T + bias[drawn]  # (R, n)
    hit = drawn == targets[:, None]
    if loss == "sampled":
        # A uniform draw stands for (V - 1) / n items, which keeps the loss an estimate of the full one.
        negative = negative + np.log((model.num_items - 1) / count)
        return F.cross_entropy(
            torch.cat([positive[:, None], negative.masked_fill(hit, -torch.inf)], 1), torch.zeros_like(targets)
        )
    power = 1.0
    if loss == "gbce":
        alpha = count / (model.num_items - 1)
        power = alpha * (options.gbce_t * (1 - 1 / alpha) + 1 / alpha)
    away = F.softplus(negative).masked_fill(hit, 0.0).sum(1)
    return (power * F.softplus(-positive) + away).mean() / (1 + count)


@torch.no_grad()
def full_rank_ndcg(model: SASRec, subsequences: Subsequences, k: int = 10) -> float:
    """NDCG@k over the catalogue at every counted position. Items of the subsequence's inputs are not ranked."""
    model.eval()
    most = max(1, MOST_LOGITS // model.num_items)
    total = count = 0.0
    for inputs, targets, counted in subsequences.batches(256):
        parts = [part.split(most) for part in (model(inputs)[counted], targets[counted][:, None], counted.nonzero())]
        for states, target, place in zip(*parts, strict=True):
            logits = states @ model.items.weight[:-1].T + model.bias  # (R, V)
            row, last = place[:, 0], place[:, 1:]
            seen = torch.where(torch.arange(inputs.shape[1]) <= last, inputs[row], target)
            seen = torch.where(seen == model.num_items, target, seen)
            wanted = logits.gather(1, target)
            logits.scatter_(1, seen, -torch.inf).scatter_(1, target, -torch.inf)
            rank = (~(logits < wanted)).sum(1)  # so that NaN is worst, not best
            total += float((1 / torch.log2(rank.double() + 2)).masked_fill(rank >= k, 0.0).sum())
            count += len(rank)
    return total / max(count, 1)


def train_sasrec(data: PreparedData, run_dir: str | Path, options: SASRecOptions | None = None) -> SASRec:
    """Train on the training users, stop when validation NDCG@10 no longer improves, write ``run_dir/sasrec``.

    The same data and seed give the same model. A training that was interrupted goes on at its last checkpoint; an epoch
    draws its numbers from the seed and its own number, so the end is the same.
    """
    settings = options or SASRecOptions()
    run_dir = Path(run_dir)
    sequences = data.training_sequences()
    if sum(len(sequence) > 1 for sequence in sequences) == 0:
        raise ValueError(f"{data.path}: no training sequence of two items; SASRec cannot be trained")
    loss = settings.loss if settings.loss != "auto" else ("ce" if data.num_items <= 20_000 else "sampled")
    training = Subsequences(sequences, [1] * len(sequences), settings.max_length, data.num_items)
    held_out, first_targets = data.validation_sequences()
    validation = Subsequences(held_out, first_targets, settings.max_length, data.num_items)

    aside = run_dir / "sasrec.tmp"
    aside.mkdir(parents=True, exist_ok=True)
    checkpoint = aside / "checkpoint.pt"
    identity = json.dumps([asdict(settings), data.meta, data.num_items], sort_keys=True)

    with saving_first(lambda: "sasrec: stopping: saves after this epoch"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = SASRec(data.num_items, settings)
        if loss in ("ce", "sampled"):
            counts = np.bincount(np.concatenate(sequences), minlength=data.num_items)
            model.bias.data = torch.from_numpy(np.log((counts + 1) / (counts + 1).sum())).float()
        optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
        state: dict[str, Any] = {"epoch": 0, "best": -1.0, "best_epoch": -1, "weights": {}, "history": []}
        state["seconds"] = 0.0
        if (found := _resume(checkpoint, identity, model, optimizer, state)) is not None:
            state = found
        rest = None if settings.max_minutes is None else 60 * settings.max_minutes - state["seconds"]
        with progress(
            "sasrec",
            settings.max_epochs,
            unit="epochs",
            done=state["epoch"],
            may_end_earlier=True,
            most_seconds=rest,
        ) as bar:
            if state["epoch"]:
                bar.say(f"goes on after epoch {state['epoch']}, as it was saved")
            saved = began = time.monotonic()
            seconds_before, first = state["seconds"], state["epoch"]
            while state["epoch"] < settings.max_epochs and state["epoch"] - state["best_epoch"] <= settings.patience:
                if settings.max_minutes is not None and state["seconds"] >= 60 * settings.max_minutes:
                    break
                mean_loss = _train_epoch(model, optimizer, training, loss, bar, state["epoch"])
                if not np.isfinite(mean_loss):
                    raise ValueError(
                        f"learning_rate: with {settings.learning_rate} the loss became {mean_loss} in epoch "
                        f"{state['epoch'] + 1}; expected a finite one; lower it"
                    )
                # Without validation rows there is nothing to stop on: all epochs run and the last weights stay.
                ndcg = full_rank_ndcg(model, validation) if len(held_out) else float(state["epoch"])
                if ndcg > state["best"]:
                    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                    state |= {"best": ndcg, "best_epoch": state["epoch"], "weights": weights}
                state["history"].append({"epoch": state["epoch"], "loss": mean_loss, "val_ndcg@10": ndcg})
                state["epoch"] += 1
                state["seconds"] = seconds_before + time.monotonic() - began
                if len(held_out):
                    bar.note(f"ndcg@10 {state['best']:.3f}")  # more would not fit into 80 columns
                if state["epoch"] == first + 1:
                    _say_how_long(bar, settings, state["epoch"], state["seconds"] - seconds_before)
                if stop_asked() or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    _checkpoint(checkpoint, identity, model, optimizer, state)
                    saved = time.monotonic()
                stop_if_asked()
        if len(held_out):
            print(
                f"sasrec: validation NDCG@10 over all items {state['best']:.4f}, best in epoch "
                f"{state['best_epoch'] + 1} of {state['epoch']}"
            )
        model.load_state_dict(state["weights"])
        sample = np.random.default_rng(settings.seed).permutation(len(sequences))[:1024]
        model.standardize(model.user_states([sequences[row] for row in sample]))
        tensors = model.state_dict().values()
        if not all(tensor.isfinite().all() for tensor in tensors) or not np.isfinite(model.all_scores([[0]])).all():
            raise ValueError(
                f"learning_rate: with {settings.learning_rate} the weights of epoch {state['best_epoch'] + 1} give "
                "numbers that are not finite; expected finite ones; lower it"
            )

    with named_errors(aside):
        model.save(aside)
    record = {"loss": loss, "best_epoch": state["best_epoch"], "val_ndcg@10": state["best"], "epochs": state["history"]}
    (aside / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    remove(checkpoint)
    put_in_place(aside, run_dir / "sasrec")
    return model.eval()


def _say_how_long(bar: Bar, settings: SASRecOptions, epoch: int, seconds: float) -> None:
    """After the first epoch, where all would take long."""
    most = (settings.max_epochs - epoch) * seconds
    if most > 60:
        ends = if_long() if settings.max_minutes is None else f"ended by {settings.max_minutes:g} minutes"
        bar.say(f"an epoch takes {duration(seconds)}, {settings.max_epochs} at most {duration(most)}; {ends}")


def _train_epoch(
    model: SASRec, optimizer: torch.optim.Optimizer, subsequences: Subsequences, loss: str, bar: Bar, epoch: int
) -> float:
    settings = model.options
    model.train()
    all_rows = int(np.maximum(subsequences.sizes - subsequences.first_target, 0).sum())
    torch.manual_seed(settings.seed * 100_003 + epoch + 1)
    negatives = torch.Generator().manual_seed(settings.seed * 100_003 + epoch + 1)
    total, count, shown = torch.zeros((), dtype=torch.float64), 0, 0
    for step, (inputs, targets, counted) in enumerate(
        subsequences.batches(settings.batch_size, np.random.default_rng([settings.seed, epoch]))
    ):
        warm = min(1.0, (step + 1) / WARMUP_STEPS) if epoch == 0 else 1.0
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm
        value = sequence_loss(model, model(inputs)[counted], targets[counted], loss, negatives)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        rows = int(counted.sum())
        total += value.detach().double() * rows
        count += rows
        # Parts of a power of two, which add up to whole epochs without rounding.
        parts = 1024 * count // all_rows
        bar.advance((parts - shown) / 1024)
        shown = parts
    return float(total) / count


def _resume(
    checkpoint: Path, identity: str, model: SASRec, optimizer: torch.optim.Optimizer, fresh: dict[str, Any]
) -> dict[str, Any] | None:
    """Load what was saved of the same training and return its state; None, and everything as it was, where there is
    none. A file that is cut short, changed or of something else counts as none: it only saves time."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    untouched = copy.deepcopy(optimizer.state_dict())
    try:
        found = torch.load(checkpoint, weights_only=True)
        if found["identity"] != identity:
            return None
        state = found["state"]
        if {name: type(value) for name, value in state.items()} != {name: type(value) for name, value in fresh.items()}:
            return None
        model.load_state_dict(state["weights"])
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        moments = [entry[name] for entry in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        shapes = [p.shape for p in optimizer.state]
        if [moment.shape for moment in moments[::2]] == shapes and all(
            torch.isfinite(tensor).all() for tensor in [*found["model"].values(), *state["weights"].values(), *moments]
        ):
            return state
    except Exception:  # whatever bytes make torch.load and the loaders raise
        pass
    model.load_state_dict(weights)
    optimizer.load_state_dict(untouched)
    return None


def _checkpoint(
    path: Path, identity: str, model: SASRec, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    if path.is_dir():
        remove(path)
    kept = {"identity": identity, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
    with replacing(path) as aside:
        torch.save(kept, aside)
