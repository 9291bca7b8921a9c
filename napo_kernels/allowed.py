"""The tokens that each row may predict, laid out for ``catalogue_sequence_logps`` in rectangles of logits.

Rows whose sets have one token take no part: their probability is 1. The other rows lie in blocks:

- a set with many logits in all (its tokens times its rows) is a block of its own, one matmul of the rows with the
  tokens' weights;
- the other rows come by the size of their sets, rounded up to a power of two, and each brings its own tokens. What is
  missing to the block's width repeats the row's first token and does not count.

The kernels of a GPU work on all blocks at once. They find their part in tables: `tiles` of the blocks with a set of
their own, `lanes` of the others, and the pairs by slot and by sequence.

All of it is made on the CPU, where the batch is made, so on a GPU nothing has to be asked of the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napo_kernels.checks import check_integer
from napo_kernels.rows import add_at

Ints = NDArray[np.int64]

# Logits of a set from which on it is a block of its own: a matmul's launch costs as much as gathering so many weights.
SHARED = 2048
# Logits of a block of rows with sets of their own: as many rows of the weight are gathered at a time.
OWN = 16384
# What one program of a GPU computes of the logits: a tile of a block with a set of its own, and so many logits of rows
# with sets of their own.
TILE_ROWS, TILE_COLUMNS, LANES = 64, 128, 16


@dataclasses.dataclass(frozen=True, eq=False)  # == of tensors is a tensor
class AllowedTokens:
    """Made by ``AllowedTokens.of``. A slot is a row that has a choice; a place is one of its logits."""

    used: Tensor  # (U,) int64: the tokens that any row may predict, ascending
    rows: Tensor  # (slots,) int64: the row of each slot
    sizes: Tensor  # (slots,) int64: the tokens it may predict
    columns: Tensor  # (C,) int64: places in `used`, block by block: (w,) for a set of its own, else (n, w)
    blocks: tuple[int, ...]  # n, w and whether each row has columns of its own, block by block
    pair_places: Tensor  # (P,) int64: the logit of each pair that has a choice, among those of all blocks in order
    pair_slots: Tensor  # (P,) int64
    sequence_ids: Tensor  # (P,) int64
    places: Tensor  # (slots + 1,) int64: the first place of each slot, and the end
    slot_start: Tensor  # (slots + 1,) int64: the pairs of slot s are slot_pairs[slot_start[s]:slot_start[s + 1]]
    slot_pairs: Tensor  # (P,) int64
    sequence_start: Tensor  # (S + 1,) int64: likewise of each sequence
    sequence_pairs: Tensor  # (P,) int64
    tiles: Tensor  # (tiles, 7) int64: see `_tiles`
    lanes: Tensor  # (groups, 6) int64: see `_lanes`
    num_sequences: int
    num_rows: int  # of the hidden states
    vocabulary: int  # at least so many tokens

    @classmethod
    def of(
        cls,
        row_sets: Ints | Tensor,  # (R,)
        sets: tuple[Ints | Tensor, Ints | Tensor],  # (sets + 1,), (tokens,)
        targets: Ints | Tensor,  # (Q,)
        *,
        sequence_ids: Ints | Tensor,  # (Q,)
        num_sequences: int,
        rows: Ints | Tensor | None = None,  # (Q,)
    ) -> AllowedTokens:
        """Pairs of a row and a target that its set allows, summed by ``sequence_ids`` into ``num_sequences``.

        ``sets`` are CSR: set s has the tokens ``sets[1][sets[0][s]:sets[0][s + 1]]``, ascending. ``row_sets`` is the
        set of each row of the hidden states; what it says of a row without a pair is not read. ``rows`` tells the row
        of each pair, None: row q for pair q. All integers, on the CPU.
        """
        row_sets, start, tokens, targets, ids = (
            _ints(name, values)
            for name, values in (
                ("row_sets", row_sets),
                ("sets", sets[0]),
                ("sets", sets[1]),
                ("targets", targets),
                ("sequence_ids", sequence_ids),
            )
        )
        if rows is None and len(targets) != len(row_sets):
            raise ValueError(
                f"rows: needed unless targets has one entry a row; got {len(targets)} for {len(row_sets)} rows"
            )
        of_pair = np.arange(len(targets)) if rows is None else _ints("rows", rows)
        for name, values in (("rows", of_pair), ("sequence_ids", ids)):
            if len(values) != len(targets):
                raise ValueError(f"{name}: expected one for each of {len(targets)} targets, got {len(values)}")
        check_integer("num_sequences", num_sequences, "a number of at least 0", 0)
        _check_begins(start, len(tokens))
        _check_range("rows", of_pair, len(row_sets))
        _check_range("sequence_ids", ids, num_sequences)
        scored = np.zeros(len(row_sets), bool)
        scored[of_pair] = True
        _check_range("row_sets", row_sets[scored], len(start) - 1)

        # The sets in use, numbered anew, and their tokens.
        in_use, of_scored = np.unique(row_sets[scored], return_inverse=True)
        local = np.zeros(len(row_sets), np.int64)
        local[scored] = of_scored
        sizes = start[in_use + 1] - start[in_use]
        if (sizes < 1).any():
            raise ValueError(
                f"sets: expected a token in each set that a row has, got none in set {in_use[sizes < 1][0]}"
            )
        first = np.cumsum(sizes) - sizes
        tokens = tokens[np.arange(sizes.sum()) + np.repeat(start[in_use] - first, sizes)]
        owner = np.repeat(np.arange(len(in_use)), sizes)
        if len(tokens) and tokens.min() < 0:
            raise ValueError(f"sets: expected tokens of at least 0, got {tokens.min()}")
        falling = (np.diff(tokens) <= 0) & (np.diff(owner) == 0)
        if falling.any():
            raise ValueError(f"sets: expected ascending tokens, got others in set {in_use[owner[falling.argmax()]]}")
        within = _find(targets, local[of_pair], tokens, owner, first, sizes, of_pair)

        layout = _lay_out(np.flatnonzero(scored), local[scored], sizes, first)
        used, columns = np.unique(tokens[layout.entries], return_inverse=True)
        slot_of_row = np.full(len(row_sets), -1)
        slot_of_row[layout.rows] = np.arange(len(layout.rows))
        slots = slot_of_row[of_pair]
        chooses = slots >= 0
        slots = slots[chooses]
        arrays = {
            "used": used,
            "rows": layout.rows,
            "sizes": sizes[local[layout.rows]],
            "columns": columns,
            "pair_places": layout.places[slots] + within[chooses],
            "pair_slots": slots,
            "sequence_ids": ids[chooses],
            "places": np.append(layout.places, layout.end),
            "tiles": _tiles(layout.blocks),
            "lanes": _lanes(layout.blocks),
        }
        arrays["slot_start"], arrays["slot_pairs"] = _gather(slots, len(layout.rows))
        arrays["sequence_start"], arrays["sequence_pairs"] = _gather(ids[chooses], num_sequences)
        return cls(
            **{name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()},
            blocks=layout.blocks,
            num_sequences=num_sequences,
            num_rows=len(row_sets),
            vocabulary=int(used.max(initial=-1)) + 1,
        )

    @property
    def plan(self) -> Plan:
        return Plan(**{name: getattr(self, name) for name in Plan._fields[:-1]}, shapes=list(self.blocks))

    def to(self, device: torch.device | str) -> AllowedTokens:
        """The same with its tensors on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Any) -> AllowedTokens:
        """The same with ``change`` of each tensor."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return AllowedTokens(**{n: change(value) if torch.is_tensor(value) else value for n, value in fields.items()})


@dataclasses.dataclass(frozen=True)
class _Layout:
    rows: Ints  # (slots,)
    places: Ints  # (slots,) the first place of each
    end: int  # all places
    entries: Ints  # the entries of `tokens` that the columns are
    blocks: tuple[int, ...]


def _lay_out(rows: Ints, sets: Ints, sizes: Ints, first: Ints) -> _Layout:
    """Blocks for ``rows`` (ascending) with the given ``sets``: those with a set of their own, then by size."""
    order = np.argsort(sets, kind="stable")
    rows, sets = rows[order], sets[order]
    counts = np.bincount(sets, minlength=len(sizes))
    shared = (sizes > 1) & (counts * sizes >= SHARED)
    groups: list[tuple[Ints, Ints, int, bool]] = []  # rows, entries, width, own columns
    begin = np.cumsum(counts) - counts
    for s in np.flatnonzero(shared).tolist():
        entries = np.arange(first[s], first[s] + sizes[s])
        groups.append((rows[begin[s] : begin[s] + counts[s]], entries, int(sizes[s]), False))
    rest = ~shared[sets] & (sizes[sets] > 1)
    rows, sets = rows[rest], sets[rest]
    widths = 1 << np.ceil(np.log2(np.maximum(sizes[sets], 2))).astype(np.int64)
    for width in np.unique(widths).tolist():
        same = np.flatnonzero(widths == width)
        step = max(OWN // width, 1)
        for part in (same[at : at + step] for at in range(0, len(same), step)):
            within = np.arange(width)
            within = np.where(within < sizes[sets[part], None], within, 0)
            groups.append((rows[part], (first[sets[part], None] + within).ravel(), width, True))
    places, at = [], 0
    for of_group, _, width, _ in groups:
        places.append(at + width * np.arange(len(of_group)))
        at += width * len(of_group)
    none = np.zeros(0, np.int64)
    return _Layout(
        rows=np.concatenate([none, *(group[0] for group in groups)]),
        places=np.concatenate([none, *places]),
        end=at,
        entries=np.concatenate([none, *(group[1] for group in groups)]),
        blocks=tuple(n for group in groups for n in (len(group[0]), group[2], int(group[3]))),
    )


def _tiles(shapes: Sequence[int]) -> Ints:  # (tiles, 7)
    """Tiles of TILE_ROWS x TILE_COLUMNS logits of the blocks with a set of their own. A tile has its first slot, the
    rows from there to the end of its block, all rows of the block, its first column, the columns from there to the end
    of the block, all columns of the block, and its first place."""
    found = [np.zeros((0, 7), np.int64)]
    for slot, place, column, n, w, own in _starts(shapes):
        if not own:
            i, j = (x.ravel() for x in np.mgrid[0:n:TILE_ROWS, 0:w:TILE_COLUMNS])
            all_rows, all_columns = np.full(len(i), n), np.full(len(i), w)
            found.append(np.stack((slot + i, n - i, all_rows, column + j, w - j, all_columns, place + i * w + j), 1))
    return np.concatenate(found)


def _lanes(shapes: Sequence[int]) -> Ints:  # (groups, 6)
    """LANES logits at a time of the blocks whose rows have sets of their own. Each group has the slot of its first
    logit and which one of that slot it is, the logits of a slot, those from there to the end of the block, its first
    place and its first column."""
    found = [np.zeros((0, 6), np.int64)]
    for slot, place, column, n, w, own in _starts(shapes):
        if own:
            i = np.arange(0, n * w, LANES)
            found.append(np.stack((slot + i // w, i % w, np.full(len(i), w), n * w - i, place + i, column + i), 1))
    return np.concatenate(found)


def _starts(shapes: Sequence[int]) -> Iterator[tuple[int, int, int, int, int, int]]:
    """The first slot, place and column of each block, and its n, w and whether each row has columns of its own."""
    slot = place = column = 0
    for n, w, own in zip(shapes[::3], shapes[1::3], shapes[2::3], strict=True):
        yield slot, place, column, n, w, own
        slot, place, column = slot + n, place + n * w, column + (n * w if own else w)


def _gather(keys: Ints, count: int) -> tuple[Ints, Ints]:
    """The positions of ``keys``, key by key: (count + 1,) where those of each key begin, and (len(keys),)."""
    return np.append(0, np.cumsum(np.bincount(keys, minlength=count))), np.argsort(keys, kind="stable")


def _find(targets: Ints, sets: Ints, tokens: Ints, owner: Ints, first: Ints, sizes: Ints, rows: Ints) -> Ints:
    """(Q,) how many tokens of its set come before each target."""
    if not len(targets):
        return targets
    span = max(int(tokens.max()), int(targets.max())) + 1
    keys = owner * span + tokens
    wanted = sets * span + targets
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    wrong = (keys[at] != wanted) | (targets < 0)
    if wrong.any():
        q = int(wrong.argmax())
        begin, size = first[sets[q]], sizes[sets[q]]
        some = ", ".join([*map(str, tokens[begin : begin + min(size, 5)]), *["..."] * bool(size > 5)])
        raise ValueError(
            f"targets: expected a token that the set of row {rows[q]} allows ({some}), got {targets[q]} at position {q}"
        )
    return at - first[sets]


def _ints(name: str, values: Any) -> Ints:
    array = values.detach().cpu().numpy() if torch.is_tensor(values) else np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(f"{name}: expected integers in one dimension, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64, copy=False)


def _check_begins(start: Ints, end: int) -> None:
    """A begin below 0 would be counted from the end."""
    if not len(start):
        raise ValueError("sets: expected where each set begins and where the last one ends, got nothing")
    wrong = (start < 0) | (start > end)
    if wrong.any():
        raise ValueError(
            f"sets: expected sets that begin in [0, {end}], the number of tokens; got {start[wrong][0]} at position "
            f"{wrong.argmax()}"
        )


def _check_range(name: str, values: Ints, end: int) -> None:
    wrong = (values < 0) | (values >= end)
    if wrong.any():
        raise ValueError(f"{name}: expected values in [0, {end}), got {values[wrong][0]} at position {wrong.argmax()}")


class Block(NamedTuple):
    """n rows with w logits each."""

    rows: Tensor  # (n,)
    columns: Tensor  # (w,) of all rows, or (n, w)
    counts: Tensor | None  # (n,): the logits that count, the first ones; None: all
    slots: slice
    places: slice

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.columns.shape[-1]


def blocks(rows: Tensor, sizes: Tensor, columns: Tensor, shapes: Sequence[int]) -> Iterator[Block]:
    """``shapes``: n, w, and 1 where each row has columns of its own, block by block."""
    for slot, place, column, n, w, own in _starts(shapes):
        slots, width = slice(slot, slot + n), n * w if own else w
        of_block = columns[column : column + width]
        yield Block(
            rows[slots],
            of_block.view(n, w) if own else of_block,
            sizes[slots] if own else None,
            slots,
            slice(place, place + n * w),
        )


class Head(NamedTuple):
    hidden: Tensor  # (R, H)
    weight: Tensor  # (U, H)
    bias: Tensor | None  # (U,) fp32 or fp64

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: fp32, or fp64."""
        return torch.promote_types(torch.promote_types(self.hidden.dtype, self.weight.dtype), torch.float32)

    def wide(self) -> Head:
        """The same in that dtype."""
        return self._replace(hidden=self.hidden.to(self.dtype), weight=self.weight.to(self.dtype))


class Pairs(NamedTuple):
    """The pairs that have a choice."""

    places: Tensor  # (P,)
    slots: Tensor  # (P,)
    sequence_ids: Tensor  # (P,)


class Plan(NamedTuple):
    """What AllowedTokens has for the kernels."""

    rows: Tensor  # (slots,)
    sizes: Tensor  # (slots,)
    columns: Tensor  # (C,)
    pair_places: Tensor  # (P,)
    pair_slots: Tensor  # (P,)
    sequence_ids: Tensor  # (P,)
    places: Tensor  # (slots + 1,)
    slot_start: Tensor  # (slots + 1,)
    slot_pairs: Tensor  # (P,)
    sequence_start: Tensor  # (S + 1,)
    sequence_pairs: Tensor  # (P,)
    tiles: Tensor  # (tiles, 7)
    lanes: Tensor  # (groups, 6)
    shapes: list[int]

    @property
    def num_places(self) -> int:
        return sum(n * w for n, w in zip(self.shapes[::3], self.shapes[1::3], strict=True))

    @property
    def parts(self) -> list[Block]:
        return list(blocks(self.rows, self.sizes, self.columns, self.shapes))

    @property
    def pairs(self) -> Pairs:
        return Pairs(self.pair_places, self.pair_slots, self.sequence_ids)


class Logits(NamedTuple):
    """What forward computes and backward needs."""

    z: Tensor  # (places,) softcap * tanh((scale * h W^T + bias) / softcap), -inf where no logit counts
    slope: Tensor | None  # (places,) dz/d(scale * h W^T + bias); None without a softcap
    stats: Tensor  # (2, slots) m and log(1 + rest)


class Gradients(NamedTuple):
    """Zeros, which a backward fills; None where none is wanted."""

    hidden: Tensor | None  # (R, H)
    weight: Tensor | None  # (U, H)
    bias: Tensor | None  # (U,)


def sequence_sums(logits: Logits, pairs: Pairs, num_sequences: int) -> Tensor:  # (S,)
    """Of log p = (z - m) - log(1 + rest)."""
    m, log_sum = logits.stats
    return add_at(num_sequences, pairs.sequence_ids, (logits.z[pairs.places] - m[pairs.slots]) - log_sum[pairs.slots])


def sums_of_pairs(grad: Tensor, pairs: Pairs, logits: Logits) -> tuple[Tensor, Tensor]:  # (S,) -> (places,), (slots,)
    """The gradients of the pairs, summed by place and by slot."""
    of_pair = grad[pairs.sequence_ids]
    return add_at(len(logits.z), pairs.places, of_pair), add_at(logits.stats.shape[1], pairs.slots, of_pair)


def add_weight_gradient(
    part: Block,
    dz: Tensor,  # (n, w)
    hidden: Tensor,  # (R, H)
    weight_grad: Tensor,  # (U, H)
) -> None:
    h = hidden[part.rows]
    if part.counts is None:
        weight_grad[part.columns] += dz.t() @ h  # a set's tokens are distinct
    else:
        products = (dz.unsqueeze(2) * h.unsqueeze(1)).flatten(0, 1)
        weight_grad += add_at(len(weight_grad), part.columns.flatten(), products)
