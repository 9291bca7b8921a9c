"""SASRec, the small auxiliary recommender: user states for similarity, scores for confidence, a teacher, a baseline.

A causal transformer over item ids with tied embeddings and a final norm, after Kang & McAuley (2018).

Sequences are padded on the right, where causal attention makes padding harmless: the state of a history is the one at
its last item, whatever its length.
"""

from __future__ import annotations

import json
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
from napo.files import read_json, replacing
from napo.options import made
from napo.recommenders.options import SASRecOptions
from napo.recommenders.protocol import OWN_SCORE, Histories

MOST_LOGITS = 1 << 26  # that exist at one time outside training: 256 MiB
SCORED_TOGETHER = 16
"""Lines, and then states, in a block of ``all_scores``."""


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
        states = torch.zeros(len(histories), self.options.dim, device=device)
        for begin in range(0, len(lines), SCORED_TOGETHER):
            padded = np.full((SCORED_TOGETHER, self.options.max_length), self.num_items, np.int64)
            for row, items in enumerate(lines[begin : begin + SCORED_TOGETHER]):
                padded[row, : len(items)] = items
            hidden = self(torch.from_numpy(padded).to(device))
            first, end = np.searchsorted(line, [begin, begin + SCORED_TOGETHER])
            rows, places = torch.from_numpy(line[first:end] - begin), torch.from_numpy(last[first:end])
            states[first:end] = hidden[rows, places]
        states[torch.from_numpy(last < 0)] = 0.0  # an empty history: no preference
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
        with replacing(folder / f"{split}.safetensors") as aside:
            save_file({"states": states, "scores": scores}, aside)
