"""How much of a request to a language model is matmuls, alone and in batches, and how near these are to the machine's
rate. What came out stands in `serving.md`.

    OMP_NUM_THREADS=1 python studies/serving.py --run runs/demo-0 --model napo+sasrec

CPU seconds of one thread, the least of some rounds in which the variants take turns: so it can be told on a machine
that does other things too. Then how far scores are from those in fp32, with the adapter merged and apart.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from napo.recommend import Query, Recommender
from napo.recommenders.language_model import LanguageModel
from napo.recommenders.protocol import ScoringOptions
from napo.recommenders.registry import find

SIZES = (1, 8, 32)
ROUNDS = 4
USERS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", default="napo+sasrec", help="a combination of a language model with SASRec")
    parser.add_argument("--requests", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    merged = Recommender.from_run(options.run, model=options.model)
    apart = Recommender.from_run(options.run, model=options.model)
    apart.ranker = find(apart.run, apart.model).load(apart.run, apart.data, ScoringOptions(equal_widths=True))
    apart.retriever = apart._retriever()
    queries = random_queries(merged, options.requests)
    widths, tokens = layouts(merged, queries)
    ways: dict[str, Callable[[], Any]] = {}
    for size in SIZES:
        ways[f"merged, {size} together"] = lambda size=size: in_batches(merged, queries, size)  # type: ignore[misc]
        ways[f"apart, {size} together"] = lambda size=size: in_batches(apart, queries, size)  # type: ignore[misc]
        ways[f"bare matmuls, {size} together"] = bare_matmuls(language_model(merged), passes(widths, size))
    milliseconds = {name: 1e3 * seconds / len(queries) for name, seconds in least(ways).items()}
    flops = 2 * sum(weight.numel() for weight in matrices(language_model(merged)))
    facts = {
        "columns": float(np.mean(widths)),
        "tokens": float(np.mean(tokens)),
        "gflop": flops * float(np.mean(widths)) / 1e9,
        "gflop_per_s": {
            size: flops * float(np.mean(widths)) / 1e6 / milliseconds[f"bare matmuls, {size} together"]
            for size in SIZES
        },
        "milliseconds": milliseconds,
        "from_fp32": from_fp32(merged, apart),
    }
    print(json.dumps(facts, indent=1))


def random_queries(recommender: Recommender, count: int) -> list[Query]:
    """As ``benchmarks/serve.py`` asks: 5 to 20 random items."""
    ids, random = recommender.catalogue.source_ids, np.random.default_rng(0)
    chosen = (random.choice(len(ids), int(random.integers(5, 21)), replace=False) for _ in range(count))
    return [Query(history=[{"id": ids[item]} for item in items]) for items in chosen]


def language_model(recommender: Recommender) -> LanguageModel:
    parts: Any = recommender.ranker
    return next(part for part in parts.parts.values() if isinstance(part, LanguageModel))


def layouts(recommender: Recommender, queries: Sequence[Query]) -> tuple[list[int], list[int]]:
    """Columns and tokens of each request."""
    seen: list[Any] = []
    ranker: Any = language_model(recommender)
    pack = ranker._pack

    def watched(*arguments: Any) -> Any:
        seen.append(pack(*arguments))
        return seen[-1]

    ranker._pack = watched
    recommender.recommend_many(queries)
    del ranker._pack
    return [batch.packed.input_ids.shape[1] for batch in seen], [batch.num_tokens for batch in seen]


def in_batches(recommender: Recommender, queries: Sequence[Query], size: int) -> None:
    for begin in range(0, len(queries), size):
        recommender.recommend_many(queries[begin : begin + size])


def passes(widths: Sequence[int], size: int) -> list[int]:
    """Columns of each pass: those of one width of one batch go together."""
    found: list[int] = []
    for begin in range(0, len(widths), size):
        of_width = Counter(widths[begin : begin + size])
        found += [width * count for width, count in of_width.items()]
    return found


def matrices(ranker: LanguageModel) -> list[torch.Tensor]:
    """The weights of the linear layers in the body."""
    return [
        module.weight
        for name, module in ranker.model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]


def bare_matmuls(ranker: LanguageModel, columns: Sequence[int]) -> Callable[[], None]:
    weights = matrices(ranker)
    inputs = {(rows, w.shape[1]): torch.randn(rows, w.shape[1]).to(w.dtype) for rows in set(columns) for w in weights}

    def work() -> None:
        for rows in columns:
            for weight in weights:
                inputs[rows, weight.shape[1]] @ weight.t()

    return work


def from_fp32(merged: Recommender, apart: Recommender) -> dict[str, dict[str, float]]:
    """Of the language model's scores of SASRec's first 100 for the log's first users, each user's mean taken off."""
    name, retriever = next(iter(merged.ranker.parts)), merged.retriever  # type: ignore[attr-defined]
    assert retriever is not None
    histories = [merged._log[begin:end].tolist() for begin, end in pairwise(merged._starts[: USERS + 1])]
    ids = np.argsort(-retriever.all_scores(histories), axis=1, kind="stable")[:, :100]
    os.environ["NAPO_DTYPE"] = "fp32"
    exact = find(apart.run, name).load(apart.run, apart.data, ScoringOptions()).scores(histories, ids)
    del os.environ["NAPO_DTYPE"]
    found = {}
    for which, recommender in (("merged", merged), ("apart", apart)):
        scores = language_model(recommender).scores(histories, ids)
        away = (scores - exact) - (scores - exact).mean(1, keepdims=True)
        tops = zip(np.argsort(-scores, 1)[:, :10], np.argsort(-exact, 1)[:, :10], strict=True)
        found[which] = {
            "rms": float(np.sqrt((away**2).mean())),
            "most": float(abs(away).max()),
            "same_first": float((scores.argmax(1) == exact.argmax(1)).mean()),
            "shared_of_first_10": float(np.mean([len(set(one) & set(other)) / 10 for one, other in tops])),
        }
    return found


def least(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    best = dict.fromkeys(ways, float("inf"))
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, work in ways.items():
                began = time.process_time()
                work()
                best[name] = min(best[name], time.process_time() - began)
    return best


if __name__ == "__main__":
    main()
