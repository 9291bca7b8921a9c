"""Examples that fill up an epoch's last step on several ranks, its first ones once more: they count in no loss."""

from __future__ import annotations

from transformers import Trainer


def own_counts(left: int, size: int, ranks: int) -> tuple[int, ...]:
    """How many of the ``size`` examples of each rank are of the data set, where ``left`` are for the step."""
    return tuple(min(max(left - size * rank, 0), size) for rank in range(ranks))


def filled_up(trainer: Trainer, examples: int) -> tuple[int, ...] | None:
    """``own_counts`` of the batch that the Trainer has just fetched of a training with so many ``examples``; None where
    nothing fills it up. Of accelerate's own figures the remainder is lost where a training goes on in an epoch."""
    ranks, size = trainer.args.world_size, trainer._train_batch_size
    if trainer.accelerator.split_batches:
        size //= ranks
    left = examples % (size * ranks)
    state = trainer.accelerator.gradient_state
    if ranks == 1 or not state.end_of_dataloader or not left or trainer.args.dataloader_drop_last:
        return None
    return own_counts(left, size, ranks)
