"""The reference's log-probabilities of a data set, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from napo.files import replacing, text_hash
from napo.trainer.collator import Collator, PreferenceBatch
from napo.trainer.rows import Examples

logger = logging.getLogger(__name__)


def reference_logps(
    model: nn.Module,
    examples: Examples,
    collate: Collator,
    *,
    score: Callable[[PreferenceBatch], Tensor],
    average: bool,
    batch_size: int,
    device: torch.device,
    folder: Path,
) -> list[np.ndarray]:
    """For every example the log-probabilities of its answers under ``model`` as it stands, from the cache in ``folder``
    where that has them for these weights and tokens. Ranks share the work; the first one keeps the cache."""
    collated = f"{collate.max_length} {collate.keep_prefix} {average}"
    key = text_hash(f"{weights_fingerprint(model)} {examples.fingerprint()} {collated}")
    path = folder / f"ref_logps-{key[:16]}.npz"
    counts = [len(example.answers) for example in examples.examples]
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    kept: list[np.ndarray | None] = [None]
    if rank == 0 and path.exists():
        with np.load(path) as stored:
            kept = [stored["logps"]]
        logger.info("reference log-probabilities: read from %s", path)
    if ranks > 1:  # all do the same, on other machines too, which may not see the folder
        dist.broadcast_object_list(kept, src=0)
    if kept[0] is not None:
        return np.split(kept[0], np.cumsum(counts)[:-1])

    # Rows of like length pack with little padding.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    found: dict[int, np.ndarray] = {}
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(rank * batch_size, len(order), ranks * batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([examples[i] for i in chosen])["batch"].to(device)
            logps = score(batch).float().cpu().numpy()
            found.update(zip(chosen, np.split(logps, np.cumsum([counts[i] for i in chosen])[:-1]), strict=True))
    model.train(training)
    if ranks > 1:
        parts: list[dict[int, np.ndarray]] = [{} for _ in range(ranks)]
        dist.all_gather_object(parts, found)
        found = {i: one for part in parts for i, one in part.items()}
    logps_by_row = [found[i] for i in range(len(examples))]
    if rank == 0:
        with replacing(path) as aside, aside.open("wb") as file:
            np.savez(file, logps=np.concatenate(logps_by_row))
    return logps_by_row


def weights_fingerprint(model: nn.Module, samples: int = 64) -> str:
    """Of names, shapes and some values of every parameter: enough to tell a trained model from the one it began as."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        taken = flat[:: max(1, flat.numel() // samples)]
        digest.update(taken.float().cpu().numpy().tobytes())
    return digest.hexdigest()
