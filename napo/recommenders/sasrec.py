"""SASRec, the small auxiliary recommender: user states for similarity, scores for confidence, a teacher, a baseline.

A causal transformer over item ids with tied embeddings. Kang & McAuley (2018), trained as later practice found better:
cross-entropy over the catalogue at every position, final norm, early stopping on full-rank NDCG.

Sequences are padded on the right, where causal attention makes padding harmless: the state of a history is the one at
its last item, whatever its length.
"""

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
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from napo.data.candidates import checked_ids, known_history
from napo.data.prepared import SPLITS, PreparedData
from napo.data.texts import shown
from napo.files import put_in_place, read_json, remove, replacing, use_umask
from napo.options import made
from napo.progress import Bar, duration, progress
from napo.recommenders.options import SASRecOptions
from napo.recommenders.protocol import OWN_SCORE, Histories
from napo.signals import saving_first, stop_asked, stop_if_asked

WARMUP_STEPS = 100
CHECKPOINT_SECONDS = 10.0
MOST_LOGITS = 1 << 26  # that exist at one time outside training: 256 MiB
SCORED_TOGETHER = 16
"""Histories in a block of ``all_scores``."""


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.mix = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_attention(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.mix(attended))
        return x + self.dropout(self.feed(self.norm_feed(x)))


class SASRec(nn.Module):
    """``scores = user_states @ item_vectors.T + item_bias``, standardised: over the catalogue every user's scores have
    mean 0, and over users and items deviation 1."""

    mean_vector: Tensor
    mean_bias: Tensor
    deviation: Tensor
    protocol = OWN_SCORE
    most_items = None

    def __init__(self, num_items: int, options: SASRecOptions | None = None) -> None:
        super().__init__()
        self.num_items = num_items
        self.options = options = options or SASRecOptions()
        self.items = nn.Embedding(num_items + 1, options.dim, padding_idx=num_items)
        self.positions = nn.Embedding(options.max_length, options.dim)
        self.bias = nn.Parameter(torch.zeros(num_items))
        self.blocks = nn.ModuleList(Block(options.dim, options.heads, options.dropout) for _ in range(options.blocks))
        self.norm = nn.LayerNorm(options.dim)
        self.dropout = nn.Dropout(options.dropout)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Linear) else options.dim**-0.5)
        with torch.no_grad():
            self.items.weight[num_items] = 0.0
        # Set by standardize() once trained.
        self.register_buffer("mean_vector", torch.zeros(options.dim))
        self.register_buffer("mean_bias", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    def forward(self, items: Tensor) -> Tensor:
        """(B, L) ids, padded on the right with num_items -> (B, L, D) states."""
        x = self.items(items) + self.positions.weight[: items.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    @property
    def item_vectors(self) -> Tensor:
        """(num_items, D)."""
        return (self.items.weight[:-1].detach() - self.mean_vector) / self.deviation

    @property
    def item_bias(self) -> Tensor:
        """(num_items,)."""
        return (self.bias.detach() - self.mean_bias) / self.deviation

    @torch.no_grad()
    def user_states(self, histories: Histories, *, batch_size: int = 512) -> Tensor:
        """Item ids by user, oldest first -> (B, D). An empty history has the state 0: no preference.

        Padding (the id ``num_items``) changes nothing, on either side.
        """
        was_training = self.training
        self.eval()
        states = self.positions.weight.new_zeros(len(histories), self.options.dim)
        kept = [known_history(history, self.num_items)[-self.options.max_length :] for history in histories]
        lengths = np.array([len(history) for history in kept], np.int64)
        # Rows of like length share a batch, so that little is padded.
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            padded = np.full((len(rows), lengths[rows[-1]]), self.num_items, np.int64)
            for place, row in enumerate(rows):
                padded[place, : lengths[row]] = kept[row]
            hidden = self(torch.from_numpy(padded).to(states.device))
            last = torch.from_numpy(lengths[rows] - 1).to(states.device)
            states[torch.from_numpy(rows).to(states.device)] = hidden[torch.arange(len(rows), device=last.device), last]
        self.train(was_training)
        return states

    @torch.no_grad()
    def scores(self, histories: Histories, item_ids: Any) -> NDArray[np.float64]:
        """n histories and (n, C) item ids -> (n, C) standardised scores."""
        states = self.user_states(histories)
        ids = torch.from_numpy(checked_ids(item_ids, len(states), self.num_items)).to(states.device)
        scores = torch.einsum("bd,bnd->bn", states, self.item_vectors[ids]) + self.item_bias[ids]
        return scores.double().cpu().numpy()

    @torch.no_grad()
    def all_scores(self, histories: Histories) -> NDArray[np.float64]:
        """n histories -> (n, num_items) standardised scores of the whole catalogue.

        Every block has one shape, filled up with padding: matmuls of other shapes round differently, and so a
        history's scores are the same to the last bit whatever it is scored beside.
        """
        was_training = self.training
        self.eval()
        device = self.positions.weight.device
        lines, line, last = self._lines(histories)
        states = torch.zeros(len(histories), self.options.dim, device=device)  # of an empty history: no preference
        for begin in range(0, len(lines), SCORED_TOGETHER):
            padded = np.full((SCORED_TOGETHER, self.options.max_length), self.num_items, np.int64)
            for row, items in enumerate(lines[begin : begin + SCORED_TOGETHER]):
                padded[row, : len(items)] = items
            hidden = self(torch.from_numpy(padded).to(device))
            here = np.flatnonzero((line >= begin) & (line < begin + SCORED_TOGETHER) & (last >= 0))
            states[torch.from_numpy(here)] = hidden[torch.from_numpy(line[here] - begin), torch.from_numpy(last[here])]
        vectors, bias = self.item_vectors.T, self.item_bias
        result = np.empty((len(histories), self.num_items))
        block = torch.zeros(SCORED_TOGETHER, self.options.dim, device=device)
        for begin in range(0, len(histories), SCORED_TOGETHER):
            part = states[begin : begin + SCORED_TOGETHER]
            block[: len(part)] = part
            result[begin : begin + len(part)] = (block @ vectors + bias)[: len(part)].double().cpu().numpy()
        self.train(was_training)
        return result

    def _lines(self, histories: Histories) -> tuple[list[NDArray[np.int64]], NDArray[np.int64], NDArray[np.int64]]:
        """The items of histories, once where one history is the beginning of the next one, as a user's are title by
        title; and for each history its line and the place of its last item there, -1 where it is empty."""
        lines: list[NDArray[np.int64]] = []
        line, last = np.empty(len(histories), np.int64), np.empty(len(histories), np.int64)
        for number, history in enumerate(histories):
            items = known_history(history, self.num_items)[-self.options.max_length :]
            common = min(len(items), len(lines[-1])) if lines else 0
            if lines and np.array_equal(items[:common], lines[-1][:common]):
                lines[-1] = max(lines[-1], items, key=len)
            else:
                lines.append(items)
            line[number], last[number] = len(lines) - 1, len(items) - 1
        return lines, line, last

    def probabilities(self, histories: Histories) -> NDArray[np.float64]:
        """n histories -> (n, num_items): of the item that follows, among those that the history does not have. Zeros
        for a history that is empty, since nothing is known of it, and for one that has all items."""
        known = [known_history(history, self.num_items) for history in histories]
        lengths = np.array(list(map(len, known)), np.int64)
        result = self.all_scores(known)
        result *= float(self.deviation)
        result[np.repeat(np.arange(len(known)), lengths), np.concatenate([*known, np.zeros(0, np.int64)])] = -np.inf
        best = result.max(axis=1, initial=-np.inf)
        silent = (lengths == 0) | np.isneginf(best)
        result -= np.where(silent, 0.0, best)[:, None]
        np.exp(result, out=result)
        result[silent] = 0.0
        result /= np.where(silent, 1.0, result.sum(axis=1))[:, None]
        return result

    @torch.no_grad()
    def standardize(self, states: Tensor) -> None:
        """Fit the standardisation to states (B, D) of training users.

        To subtract one vector from all items shifts each user's scores by a constant of that user, which a softmax
        does not see: so every user's mean is 0 and the scores stay bilinear.
        """
        vectors, bias = self.items.weight[:-1], self.bias
        self.mean_vector.copy_(vectors.mean(0))
        self.mean_bias.copy_(bias.mean())
        centred, shift = vectors - self.mean_vector, bias - self.mean_bias
        parts = states.split(max(1, MOST_LOGITS // self.num_items))
        total = torch.stack([(part @ centred.T + shift).square().sum(dtype=torch.float64) for part in parts]).sum()
        self.deviation.copy_((total / (len(states) * self.num_items)).sqrt().clamp_min(1e-6))

    def save(self, folder: str | Path) -> None:
        """``sasrec.json`` and ``sasrec.safetensors`` into ``folder``, which is made where missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"num_items": self.num_items, "options": asdict(self.options)}
        (folder / "sasrec.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / "sasrec.safetensors"
        )

    @classmethod
    def load(cls, folder: str | Path, *, num_items: int | None = None) -> SASRec:
        """``num_items``: of the data that it is to be used with, if they are known; ValueError for a SASRec of
        others."""
        folder = Path(folder)
        for name in ("sasrec.json", "sasrec.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: no SASRec there ({name} is missing); train one with: napo sasrec")
        again = "delete it and run napo sasrec again"
        config = read_json(folder / "sasrec.json")
        try:
            options = made(SASRecOptions, config["options"])
            tensors = load_file(folder / "sasrec.safetensors")
            # What the weights say, before memory is taken for what the JSON says.
            shape, wanted = tuple(tensors["items.weight"].shape), (config["num_items"] + 1, options.dim)
            if shape != wanted or tensors["positions.weight"].shape[0] != options.max_length:
                raise ValueError(f"sasrec.json and sasrec.safetensors differ: {wanted} and {shape} item vectors")
            if options.blocks > len(tensors):
                raise ValueError(f"sasrec.json and sasrec.safetensors differ: {options.blocks} blocks")
            kinds = {str(tensor.dtype) for tensor in tensors.values()} - {"torch.float32"}
            if kinds:
                raise ValueError(f"expected weights of torch.float32, got {', '.join(sorted(kinds))}")
            model = cls(config["num_items"], options)
            model.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError, AttributeError) as error:
            reason = shown(str(error).strip().replace("\n", " ") or type(error).__name__)
            raise ValueError(f"{folder}: the SASRec there cannot be loaded ({reason}); {again}") from None
        for name, tensor in model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{folder / 'sasrec.safetensors'}: {name} holds numbers that are not finite; {again}")
        if num_items is not None and model.num_items != num_items:
            raise ValueError(f"{folder}: knows {model.num_items} items, expected {num_items}; {again}")
        if model.deviation <= 0:
            raise ValueError(f"{folder / 'sasrec.safetensors'}: deviation is not above 0; {again}")
        if not np.isfinite(model.all_scores([[0]])).all():
            raise ValueError(f"{folder / 'sasrec.safetensors'}: its scores are not finite; {again}")
        return model.eval()


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

    The same data and seed give the same model. A training that was interrupted
    goes on at its last checkpoint; an epoch draws its numbers from the seed and its own number, so the end is the same.
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

    with (
        saving_first(),
        torch.random.fork_rng(devices=[]),
        progress("sasrec", settings.max_epochs, unit="epochs", may_end_earlier=True) as bar,
    ):
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
            bar.advance(state["epoch"])
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
        ends = (
            "--max-minutes bounds it" if settings.max_minutes is None else f"ended by {settings.max_minutes:g} minutes"
        )
        bar.say(f"an epoch takes {duration(seconds)}, {settings.max_epochs} at most {duration(most)}; {ends}")


def export_rows(model: SASRec, data: PreparedData, folder: str | Path) -> None:
    """For use elsewhere: ``train``, ``val`` and ``test.safetensors`` with ``states`` (n, D) and standardised ``scores``
    (n, candidates) of the rows, in their order."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vectors, bias = model.item_vectors, model.item_bias
    for split in SPLITS:
        rows = getattr(data, split)
        states = model.user_states(list(rows["full_history"]))
        width = len(rows["candidates"].iloc[0]) if len(rows) else 0
        scores = states.new_empty(len(rows), width)
        for begin in range(0, len(rows), 4096):
            part = slice(begin, begin + 4096)
            ids = torch.from_numpy(np.stack(rows["candidates"].iloc[part]))
            scores[part] = torch.einsum("bd,bnd->bn", states[part], vectors[ids]) + bias[ids]
        save_file({"states": states, "scores": scores}, folder / f"{split}.safetensors")
        use_umask(folder / f"{split}.safetensors")


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
