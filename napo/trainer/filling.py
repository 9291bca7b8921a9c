"""Examples that fill up the last batches of several ranks, the first ones once more: they count in no loss."""

from __future__ import annotations

from transformers import Trainer


def own_counts(trainer: Trainer, left: int, size: int) -> tuple[int, ...] | None:
    """How many of each rank's ``size`` examples of the batch just fetched are of the data set, of which ``left`` are
    over in the last round; None where nothing fills it up."""
    ranks = trainer.args.world_size
    if ranks == 1 or not trainer.accelerator.gradient_state.end_of_dataloader or left <= 0:
        return None
    return tuple(min(max(left - size * rank, 0), size) for rank in range(ranks))


def own_in_training(trainer: Trainer, examples: int) -> tuple[int, ...] | None:
    """``own_counts`` of a training with so many ``examples``. What is over is counted here: accelerate's own figure is
    lost where a training goes on in the midst of an epoch."""
    if trainer.args.dataloader_drop_last:
        return None
    ranks, size = trainer.args.world_size, trainer._train_batch_size
    if trainer.accelerator.split_batches:
        size //= ranks
    return own_counts(trainer, examples % (size * ranks), size)
