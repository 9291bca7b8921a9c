"""What a catalogue's trie saves: input tokens, and the time of the small head.

    python studies/catalogue.py PREPARED [--model smollm2-135m] [--threads 1]     # napo prepare ... --out PREPARED
    python studies/catalogue.py PREPARED --run RUN [--name sft]   # only: do a trained model's probabilities sum to 1?

Only the tokenizer of the model is read. The head is timed on random hidden states and weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from napo.assets import resolve_model
from napo.catalogue import Trie, pack_items, pack_nodes, pack_windows
from napo.data.prepared import PreparedData
from napo.data.prompts import PromptEncoder
from napo.data.splits import tile
from napo.recommenders.language_model import LanguageModel
from napo.runs import Run
from napo.scoring import pack
from napo_kernels import AllowedTokens, catalogue_sequence_logps, linear_sequence_logps

ROWS, WIDTH, VOCABULARY = 2016, 576, 49152
RUNS = 15


def count_trie(trie: Trie) -> None:
    lengths = np.diff(trie.path_start)
    inner = trie.num_nodes - len(np.unique(trie.leaves))
    children = np.diff(trie.start)[trie.branching]
    print(f"{trie.num_items} titles, {len(np.unique(trie.tokens)) - 1} distinct tokens, {lengths.mean():.2f} a title")
    print(f"{inner} inner nodes, {len(trie.branching)} branch; most children: {np.sort(children)[::-1][:5].tolist()}")
    print(f"input tokens a title: {(lengths - 1).mean():.2f} whole, {trie.inputs.mean():.2f} as far as its last choice")
    print(f"decided at the root: {(trie.inputs == 0).mean():.1%}")
    print(f"whole catalogue: {inner - 1} input tokens, {count_nodes(trie)} of them as far as the last choices")


def count_nodes(trie: Trie) -> int:
    return pack_nodes([[0]], [trie.branching.tolist()], trie, pad_id=0).packed.num_tokens - 1


def count_lists(data: PreparedData, trie: Trie) -> None:
    lists = [list(map(int, row)) for row in data.val["candidates"]]
    whole = [pack([[0]], [[trie.title(i) for i in group]], pad_id=0).num_tokens - 1 for group in lists]
    pruned = [pack_items([[0]], [group], trie, pad_id=0).packed.num_tokens - 1 for group in lists]
    print(
        f"{len(lists)} lists of {len(lists[0])}: {np.mean(whole):.1f} title tokens whole, {np.mean(pruned):.1f} pruned"
    )


def count_windows(data: PreparedData, encoder: PromptEncoder, trie: Trie, count: int = 200) -> None:
    rng = np.random.default_rng(0)
    rows = data.train.iloc[rng.permutation(tile(data.train))[:count]]
    windows = [[*map(int, row.history), int(row.next)] for row in rows.itertuples()]
    targets = sum(len(window) - 1 for window in windows)
    for negatives in (0, 8, 100):
        before = after = 0
        for window in windows:
            others = rng.integers(trie.num_items, size=(len(window) - 1, negatives)).tolist()
            batch = pack_windows([window], trie, header=encoder.header, first=1, negatives=[others], pad_id=0)
            after += batch.packed.num_tokens
            prompts = [encoder.prompt(window[:place]) for place in range(1, len(window))]
            titles = [[window[p + 1], *rest] for p, rest in enumerate(others)]
            before += pack(prompts, [[trie.title(i) for i in group] for group in titles], pad_id=0).num_tokens
        print(
            f"windows of {len(windows[0])}, {negatives} negatives a target: {before / targets:.1f} tokens a target with"
            f" whole titles, {after / targets:.1f} pruned, {before / after:.1f} times fewer"
        )


def clock_head(trie: Trie) -> None:
    """All rows of whole titles, as in a window: each row predicts one token."""
    rng = np.random.default_rng(0)
    items = rng.integers(trie.num_items, size=ROWS).tolist()
    nodes = np.concatenate([trie.parents[trie.path[trie.path_start[i] : trie.path_start[i + 1]]] for i in items])[:ROWS]
    targets = np.concatenate([trie.title(i) for i in items])[:ROWS]
    ids = np.repeat(np.arange(ROWS), [len(trie.title(i)) for i in items])[:ROWS]
    common: dict[str, Any] = {"sequence_ids": torch.from_numpy(ids), "num_sequences": int(ids[-1]) + 1}
    began = time.perf_counter()
    allowed = AllowedTokens.of(nodes, trie.sets, targets, **common)
    print(f"layout {1e3 * (time.perf_counter() - began):.1f} ms; {len(allowed.rows)} of {ROWS} rows have a choice")
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    hidden, weight = draw(ROWS, WIDTH).requires_grad_(), draw(VOCABULARY, WIDTH) / WIDTH**0.5
    column = torch.from_numpy(targets)
    heads: dict[str, Callable[[], torch.Tensor]] = {
        "small": lambda: catalogue_sequence_logps(hidden, weight, allowed),
        "full": lambda: linear_sequence_logps(hidden, weight, column, **common),
    }
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(RUNS):  # by turns
        for name, head in heads.items():
            began = time.perf_counter()
            head().sum().backward()
            seconds[name].append(time.perf_counter() - began)
    for name, runs in seconds.items():
        print(f"{name} head: fastest {1e3 * min(runs):.1f} ms, median {1e3 * np.median(runs):.1f} ms of {RUNS} runs")
    print(f"ratio of the fastest: {min(seconds['full']) / min(seconds['small']):.1f}")


def sum_up(data: PreparedData, run: str, name: str, count: int = 20) -> None:
    """The probabilities of all items behind validation histories."""
    ranker = LanguageModel.load(Run(run), data, name)
    sums = np.exp(ranker.all_scores(list(data.val["full_history"][:count]))).sum(1)
    print(
        f"{name}: sums over {len(data.titles)} items behind {len(sums)} histories: off 1 by {abs(sums - 1).max():.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", default=None)
    parser.add_argument("--name", default="sft")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = PreparedData.load(arguments.data)
    if arguments.run is not None:
        return sum_up(data, arguments.run, arguments.name)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(arguments.model))
    encoder = PromptEncoder(tokenizer, data.titles, noun=data.noun, style="history")
    trie = Trie.of(encoder.answers)
    count_trie(trie)
    count_lists(data, trie)
    count_windows(data, encoder, trie)
    clock_head(trie)


if __name__ == "__main__":
    main()
