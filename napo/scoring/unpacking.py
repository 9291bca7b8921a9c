"""The slow exact way: every title is a sequence of its own behind a copy of its prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from napo.scoring.packing import PackedBatch


@dataclasses.dataclass(frozen=True)
class Alone:
    """The titles of one user, n of them, right-padded. The last token of a title is a target and no input."""

    input_ids: Tensor  # (n, T)
    attention_mask: Tensor  # (n, T) 1 where there is a token
    columns: Tensor  # (Q,) the column that predicts each title token
    targets: Tensor  # (Q,)
    sequence_ids: Tensor  # (Q,) row of each title token
    kept: int  # columns from the one that predicts the first title token to the last one

    @property
    def labels(self) -> Tensor:  # (n, kept)
        """What the last `kept` columns of each row predict, -100 where that is nothing."""
        labels = self.targets.new_full((len(self.input_ids), self.kept), -100)
        labels[self.sequence_ids, self.columns - (self.input_ids.shape[1] - self.kept)] = self.targets
        return labels

    def one_by_one(self) -> Iterator[Alone]:
        """Each title with nothing beside it, and so without padding."""
        lengths = self.attention_mask.sum(1).tolist()
        spare = self.input_ids.shape[1] - self.kept
        for row, length in enumerate(lengths):
            mine = self.sequence_ids == row
            here = (slice(row, row + 1), slice(length))
            yield Alone(
                input_ids=self.input_ids[here],
                attention_mask=self.attention_mask[here],
                columns=self.columns[mine],
                targets=self.targets[mine],
                sequence_ids=torch.zeros_like(self.sequence_ids[mine]),
                kept=length - spare,
            )


def unpack(batch: PackedBatch) -> Iterator[Alone]:
    """User by user, which bounds the memory."""
    device = batch.input_ids.device
    ids, ends = batch.input_ids.flatten().cpu(), batch.ends.flatten().cpu()
    columns = batch.input_ids.shape[1]
    at = batch.predicting_rows.cpu()[batch.pair_rows.cpu()]
    targets, sequence_ids = batch.targets.cpu(), batch.sequence_ids.cpu()
    lengths = torch.bincount(sequence_ids, minlength=batch.num_sequences)  # (S,)
    first = lengths.cumsum(0) - lengths
    title = 0
    for prompt_length, count in zip(batch.prompt_lengths, batch.title_counts, strict=True):
        mine = slice(title, title + count)
        pairs = slice(int(first[title]), int(first[title]) + int(lengths[mine].sum()))
        # A prompt consists of what its last token sees: the tokens of its row that end behind it.
        last = int(at[pairs.start])
        begin = last // columns * columns
        prompt = ids[begin : last + 1][ends[begin : last + 1] > last - begin]
        row = sequence_ids[pairs] - title
        depth = torch.arange(pairs.start, pairs.stop) - first[mine][row]
        width = prompt_length + int(lengths[mine].max()) - 1
        input_ids = ids.new_zeros(count, width)
        input_ids[:, :prompt_length] = prompt
        inner = depth < lengths[mine][row] - 1
        input_ids[row[inner], prompt_length + depth[inner]] = targets[pairs][inner]
        attention_mask = (torch.arange(width) < (prompt_length + lengths[mine] - 1)[:, None]).long()
        yield Alone(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            columns=(prompt_length - 1 + depth).to(device),
            targets=targets[pairs].to(device),
            sequence_ids=row.to(device),
            kept=width - prompt_length + 1,
        )
        title += count
