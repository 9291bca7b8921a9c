"""Whether figures are still those of the model that has their name."""

from __future__ import annotations

from typing import Any

from napo.data.texts import shown
from napo.files import text_hash
from napo.recommenders.registry import available, find
from napo.runs import Run

MARK = "†"
"""Behind the name of a model whose figures need a note."""


def weights_sha256(run: Run, name: str) -> str | None:
    """Of a model that the run trained, to tell records of it from those of the one before it; else None."""
    if name in run.model_names():
        return run.adapter_sha256(name)
    if "+" in name:
        kind = available(run).get(name)
        return None if kind is None else text_hash(kind.fingerprint(run))
    return find(run, name).fingerprint(run) if name == "sasrec" else None


def doubts(run: Run, record: dict[str, Any]) -> list[str]:
    """Why the figures of ``record``, one of ``metrics.json``, are not what its model's name says: a sentence each."""
    name = record["model"]
    why = []
    if (model := name.split("+")[0]) in run.model_names():
        why.append(run.stale(model))
    try:
        if (judged := record.get("weights_sha256")) is not None and weights_sha256(run, name) != judged:
            why.append(f"{name}: trained again, or removed, after it was evaluated")
    except ValueError as error:
        why.append(f"{name}: {error}")
    if (data := record["protocol"].get("data")) is not None:
        why.append(f"{name}: judged on data that is {data}")
    return [shown(sentence, 400) for sentence in why if sentence]
