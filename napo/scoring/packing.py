"""Rows of tokens in which every prompt stands once, followed by its titles as a tree of shared beginnings.

Layout of one user:   prompt | title tokens, depth first, without the tokens that end a title

- An end token predicts nothing, so it is a target and never an input.
- Titles of one prompt that begin alike share the tokens of that beginning: "The " is computed once, a title that is
  drawn twice costs nothing. A token's position counts along its own title, as if the title stood alone.
- Prompts that are beginnings of one another share their tokens too: a user's growing history costs one prompt.
- Who sees whom is one number per token, `ends`: column q attends to column k exactly if k <= q < ends[k]. For a prompt
  token this is the end of its user, for a title token the end of the titles that go on from it. Users in one row,
  titles of one user, branches of the tree and padding are all kept apart by it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

MAX_PADDING = 0.1  # share of the tokens; the automatic row length keeps below it


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Prompts with their titles, ready for one forward pass. Sequence = one title, user by user, title by title."""

    input_ids: torch.Tensor  # (rows, T) int64
    position_ids: torch.Tensor  # (rows, T) int64
    ends: torch.Tensor  # (rows, T) int64: the first column after this one that does not see it any more
    predicting_rows: torch.Tensor  # (R,) int64: indices into the flattened (rows * T) hidden states
    pair_rows: torch.Tensor  # (Q,) int64: the entry of predicting_rows that predicts each title token
    targets: torch.Tensor  # (Q,) int64: the title tokens, end tokens included
    sequence_ids: torch.Tensor  # (Q,) int64: the title of each title token, ascending
    title_counts: tuple[int, ...]  # (B,) titles of each prompt
    prompt_lengths: tuple[int, ...]  # (B,) after truncation
    num_tokens: int  # tokens that are not padding
    longest: int  # tokens of the longest sequence, prompt and title, less the last one, which is no input
    truncated: int  # prompts that lost tokens

    @property
    def num_sequences(self) -> int:
        return sum(self.title_counts)

    @property
    def padding(self) -> float:
        """Share of the tokens that are padding."""
        return 1 - self.num_tokens / max(self.input_ids.numel(), 1)

    @property
    def title_lengths(self) -> torch.Tensor:  # (S,) int64
        """Tokens of every title, end tokens included."""
        counts = torch.zeros(self.num_sequences, dtype=torch.int64, device=self.sequence_ids.device)
        return counts.index_add_(0, self.sequence_ids, torch.ones_like(self.sequence_ids))

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """Called by a DataLoader with `pin_memory=True`."""
        return self._map(torch.Tensor.pin_memory)

    def widened(self, width_multiple: int, pad_id: int = 0) -> PackedBatch:
        """The same batch with padding at the end of its rows, up to a multiple of `width_multiple` columns.

        Token 0 is in every vocabulary."""
        rows, width = self.input_ids.shape
        more = up_to_multiple(width, width_multiple) - width
        if not more:
            return self
        alone = torch.arange(width + 1, width + more + 1, device=self.ends.device).expand(rows, more)
        return dataclasses.replace(
            self,
            input_ids=torch.nn.functional.pad(self.input_ids, (0, more), value=pad_id),
            position_ids=torch.nn.functional.pad(self.position_ids, (0, more)),
            ends=torch.cat((self.ends, alone), 1),  # padding sees only itself
            predicting_rows=self.predicting_rows + self.predicting_rows // width * more,
        )

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: change(value) for name, value in fields.items() if torch.is_tensor(value)}
        return PackedBatch(**{**fields, **tensors})


def pack(
    prompts: Sequence[Sequence[int]],
    titles: Sequence[Sequence[Sequence[int]]],
    *,
    pad_id: int,
    max_length: int | None = None,
    keep_prefix: int = 0,
    row_tokens: int | None = None,
    width_multiple: int = 1,
    share_prefixes: bool = True,
) -> PackedBatch:
    """Lay prompts and their titles out in rows.

    Args:
        prompts: token ids of each prompt, with the beginning-of-text token where the model wants one.
        titles: for each prompt its titles; each title is token ids and ends with the end token.
        pad_id: fills rows up; any id of the vocabulary will do.
        max_length: most tokens of a prompt and its longest title together. Longer prompts lose their oldest tokens:
            those right after the first `keep_prefix`; `PackedBatch.truncated` counts them.
        keep_prefix: tokens at the beginning of a prompt (a header, an instruction) that truncation spares.
        row_tokens: rows hold several users up to this many tokens (one longer user still gets its row). None takes
            the shortest rows that keep padding under 10%: attention on a row costs its length squared.
        width_multiple: rows are as long as a multiple of it. A GPU prepares itself for every new length (seconds for
            some attention kernels): 64 leaves it few. The automatic row length takes the padding into account.
        share_prefixes: let titles of one prompt that begin with the same tokens share them, and prompts that follow
            one another here, one the beginning of the other (a user's history growing title by title), theirs.
    """
    if len(prompts) != len(titles):
        raise ValueError(f"titles: expected one list of titles for each of {len(prompts)} prompts, got {len(titles)}")
    if not prompts:
        raise ValueError("prompts: expected at least one prompt, got none")
    title_counts = np.fromiter(map(len, titles), np.int64, len(titles))  # (B,)
    if not title_counts.all():
        raise ValueError(f"titles: expected at least one for each prompt, got none for prompt {title_counts.argmin()}")
    flat_titles = list(itertools.chain.from_iterable(titles))
    title_lengths = np.fromiter(map(len, flat_titles), np.int64, len(flat_titles))  # (S,)
    owners = np.repeat(np.arange(len(prompts)), title_counts)  # (S,)
    if not title_lengths.all():
        owner = owners[title_lengths.argmin()]
        raise ValueError(f"titles: expected an end token in every title, got an empty title for prompt {owner}")
    if width_multiple < 1:
        raise ValueError(f"width_multiple: expected at least 1, got {width_multiple}")
    longest = np.maximum.reduceat(title_lengths, np.cumsum(title_counts) - title_counts)  # (B,)
    prompts, truncated = _truncate(prompts, longest, max_length, keep_prefix)
    prompt_lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))  # (B,)
    if not prompt_lengths.all():
        raise ValueError(f"prompts: expected at least one token in each, got none in prompt {prompt_lengths.argmin()}")

    # One user's prompts that continue one another stand once: what lies behind their stem joins the tree of titles.
    chains, stems = _chain(prompts, share_prefixes)  # (B,), (C,) lengths
    skips = (prompt_lengths - stems[chains])[owners]  # (S,) prompt tokens of each path, which are no targets
    paths = [
        [*prompts[owner][len(prompts[owner]) - skip :], *title] if skip else title
        for owner, skip, title in zip(owners.tolist(), skips.tolist(), flat_titles, strict=True)
    ]
    path_lengths = skips + title_lengths  # (S,)
    tree = _grow_tree(paths, path_lengths, chains[owners], share_prefixes)
    node_counts = np.bincount(tree.owners, minlength=len(stems))  # (C,)
    row, column, num_rows, width = _place(stems + node_counts, row_tokens, width_multiple)
    starts = row * width + column  # (C,) flat index of each chain's first token

    # Stem tokens, then the tree's; both in the order of chains, so running counts give the places.
    stem_offsets = np.cumsum(stems) - stems
    within = np.arange(stems.sum()) - np.repeat(stem_offsets, stems)
    stem_at = np.repeat(starts, stems) + within
    node_at = (starts + stems - (np.cumsum(node_counts) - node_counts))[tree.owners] + np.arange(len(tree.ids))
    heads = np.unique(chains, return_index=True)[1].tolist()  # (C,) a prompt of each chain
    stem_ids = itertools.chain.from_iterable(
        prompts[head][:stem] for head, stem in zip(heads, stems.tolist(), strict=True)
    )

    ids = np.full(num_rows * width, pad_id, np.int64)
    positions = np.zeros(num_rows * width, np.int64)
    ends = np.tile(np.arange(1, width + 1), num_rows)  # padding sees only itself, which keeps its softmax finite
    ids[stem_at] = np.fromiter(stem_ids, np.int64, len(stem_at))
    positions[stem_at] = within
    ends[stem_at] = np.repeat(column + stems + node_counts, stems)
    ids[node_at] = tree.ids
    positions[node_at] = stems[tree.owners] + tree.depths
    ends[node_at] = node_at % max(width, 1) + tree.sizes

    # A path's first token is predicted by the stem's last one, the others by the path's token before them.
    pairs = np.full(path_lengths.sum(), -1, np.int64)
    first = np.cumsum(path_lengths) - path_lengths
    pairs[first] = (starts + stems - 1)[chains[owners]]
    inner = np.ones(len(pairs), bool)
    inner[first] = False
    pairs[inner] = node_at[tree.path]
    pairs = pairs[np.arange(len(pairs)) - np.repeat(first, path_lengths) >= np.repeat(skips, path_lengths)]
    predicting_rows, pair_rows = np.unique(pairs, return_inverse=True)

    shape = (num_rows, width)
    return PackedBatch(
        input_ids=torch.from_numpy(ids).view(shape),
        position_ids=torch.from_numpy(positions).view(shape),
        ends=torch.from_numpy(ends).view(shape),
        predicting_rows=torch.from_numpy(predicting_rows),
        pair_rows=torch.from_numpy(pair_rows),
        targets=torch.from_numpy(np.fromiter(itertools.chain.from_iterable(flat_titles), np.int64, len(pairs))),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(flat_titles)), title_lengths)),
        title_counts=tuple(title_counts.tolist()),
        prompt_lengths=tuple(prompt_lengths.tolist()),
        num_tokens=len(stem_at) + len(node_at),
        longest=int(positions.max()) + 1,
        truncated=truncated,
    )


def _chain(prompts: Sequence[Sequence[int]], share: bool) -> tuple[np.ndarray, np.ndarray]:
    """The chain of each prompt (B,), and each chain's stem (C,), the length of its shortest prompt.

    Prompts are chained that follow one another in the batch and of which one is the beginning of the other.
    """
    chains: list[int] = []
    stems: list[int] = []
    longest: Sequence[int] = ()
    for prompt in prompts:
        common = min(len(prompt), len(longest))
        if share and common and list(prompt[:common]) == list(longest[:common]):
            stems[-1] = min(stems[-1], len(prompt))
            longest = max(longest, prompt, key=len)
        else:
            stems.append(len(prompt))
            longest = prompt
        chains.append(len(stems) - 1)
    return np.asarray(chains), np.asarray(stems)


def _truncate(
    prompts: Sequence[Sequence[int]], longest: np.ndarray, max_length: int | None, keep_prefix: int
) -> tuple[Sequence[Sequence[int]], int]:
    if max_length is None:
        return prompts, 0
    kept, truncated = [], 0
    for index, (prompt, title) in enumerate(zip(prompts, longest.tolist(), strict=True)):
        room = max_length - title
        if len(prompt) <= room:
            kept.append(prompt)
            continue
        if room <= keep_prefix:
            raise ValueError(
                f"max_length: expected more than {keep_prefix + title} for prompt {index} (keep_prefix {keep_prefix} "
                f"and a title of {title} tokens), got {max_length}; raise it or keep less"
            )
        kept.append([*prompt[:keep_prefix], *prompt[len(prompt) - room + keep_prefix :]])
        truncated += 1
    return kept, truncated


@dataclasses.dataclass(frozen=True)
class _Tree:
    """The title tokens that are inputs, depth first, user by user. C of them."""

    ids: np.ndarray  # (C,)
    owners: np.ndarray  # (C,) user
    depths: np.ndarray  # (C,) 0 for a title's first token
    sizes: np.ndarray  # (C,) tokens in the subtree, this one included
    path: np.ndarray  # (sum of L - 1,) for title by title and token by token the node that is this token


def _grow_tree(titles: list[Sequence[int]], lengths: np.ndarray, owners: np.ndarray, share: bool) -> _Tree:
    """Titles in sorted order differ from the title before them from some depth on: these are the new nodes."""
    inner = lengths - 1  # (S,) the end token is no input
    depth_max = int(inner.max(initial=0))
    table = np.full((len(titles), depth_max), -1, np.int64)  # (S, L - 1)
    here = np.arange(depth_max) < inner[:, None]
    table[here] = np.fromiter(itertools.chain.from_iterable(title[:-1] for title in titles), np.int64, int(inner.sum()))
    if share:
        order = np.lexsort((*table.T[::-1], owners))
        table, here = table[order], here[order]
        same = (table[1:] == table[:-1]) & (owners[order][1:] == owners[order][:-1])[:, None]
        shared = np.zeros_like(here)  # token is the same node as in the title before
        shared[1:] = np.logical_and.accumulate(same, axis=1) & here[1:]
    else:
        order, shared = np.arange(len(titles)), np.zeros_like(here)
    new = here & ~shared  # (S, L - 1), row by row this is depth first
    count = int(new.sum())
    node = np.where(new, np.cumsum(new).reshape(new.shape) - 1, -1)
    if share:
        node = np.maximum.accumulate(node, axis=0)  # a shared token is the last node made at its depth
    # The subtree of a node ends where the next title begins that does not share the node.
    after = np.cumsum(new.sum(1))  # nodes up to and with each title
    sizes = np.zeros(count, np.int64)
    rows, depths = np.nonzero(here)
    np.maximum.at(sizes, node[rows, depths], after[rows] - node[rows, depths])
    path = np.empty((len(titles), depth_max), np.int64)
    path[order] = node
    new_rows, new_depths = np.nonzero(new)
    return _Tree(
        ids=table[new],
        owners=owners[order][new_rows],
        depths=new_depths,
        sizes=sizes,
        path=path[np.arange(depth_max) < inner[:, None]],
    )


def _place(sizes: np.ndarray, row_tokens: int | None, multiple: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Row and first column of each user, number and length of rows. Longest first, into the first row with room."""
    longest, total = int(sizes.max()), int(sizes.sum())
    capacities = [max(row_tokens, longest)] if row_tokens is not None else []
    if row_tokens is None:
        capacities = [*range(longest, min(8 * longest, total), max(longest // 32, 1)), total]
    capacities = sorted({up_to_multiple(capacity, multiple) for capacity in capacities})
    best: tuple[np.ndarray, np.ndarray, int, int] | None = None
    for capacity in capacities:
        row, column = np.empty_like(sizes), np.empty_like(sizes)
        free: list[int] = []
        for user in np.argsort(-sizes, kind="stable").tolist():
            size = int(sizes[user])
            at = next((r for r, room in enumerate(free) if room >= size), len(free))
            if at == len(free):
                free.append(capacity)
            row[user], column[user] = at, capacity - free[at]
            free[at] -= size
        placed = (row, column, len(free), up_to_multiple(capacity - min(free), multiple))
        if best is None or placed[2] * placed[3] < best[2] * best[3]:
            best = placed
        if placed[2] * placed[3] * (1 - MAX_PADDING) < total:
            break
    assert best is not None
    return best


def width_multiple(device: torch.device) -> int:
    """The best `width_multiple` of `pack` for `device`; `CandidateScorer` widens batches that were made with less."""
    return 64 if device.type == "cuda" else 1


def up_to_multiple(number: int, multiple: int) -> int:
    """The smallest multiple that is not less."""
    return -(-number // multiple) * multiple
