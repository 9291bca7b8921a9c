"""Log-probabilities over a catalogue's titles: the small head beside the full one, and passes of a model with them.

    python -m benchmarks run catalogue [--data PREPARED]

head, 2016 rows of whole titles, H 576, V 49152, frozen, forward and backward:
    napo        catalogue_sequence_logps: fp32, only the tokens that continue some title
    reference   the same in plain PyTorch
    full        linear_sequence_logps: a softmax over the vocabulary, in bfloat16
    floor       the matmuls of rows at nodes with many children alone: 2 R C H flops forward, as many backward

passes of a model (a step of windows with 8 negatives a target, forward and backward of an adapter; lists of 20 and the
whole catalogue behind a history of 20 titles, forward):
    napo        titles as far as their last choice, over the catalogue
    whole       whole titles, shared beginnings counted once, over the vocabulary: what was computed before

`tokens` is what the model's body computes, `title_tokens` those without prompts and history. With --data the catalogue
is that of a prepared folder in the tokens of SmolLM2, else one that is drawn: its counts are its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor

from benchmarks import device
from benchmarks.comparison import Comparison, compare, distance, sweep
from benchmarks.options import command_line
from benchmarks.report import Report
from benchmarks.timing import Variant
from benchmarks.training_step import END, make_base
from napo.catalogue import CatalogueScorer, Trie, pack_items, pack_nodes, pack_windows
from napo.language_models.fused.fuse import fuse
from napo.scoring import CandidateScorer, pack
from napo_kernels import AllowedTokens, catalogue_sequence_logps, linear_sequence_logps

NEGATIVES, CANDIDATES, SHOWN, WINDOW = 8, 20, 20, 20
TOLERANCE = 0.1  # of log-probabilities in bf16, as in `step`


def main(arguments: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", default=None, help="a folder of `napo prepare`")
        parser.add_argument("--titles", type=int, default=1349, help="of the drawn catalogue")

    options = command_line(__doc__, arguments, add)
    report = Report("catalogue_sequence_logps", options)
    trie = Trie.of(prepared(options.data) if options.data else drawn(40 if options.smoke else options.titles))
    cases = [head_case(report, trie, options.smoke)]
    passes = Passes(trie, "tiny" if options.smoke else "SmolLM2-135M")
    for case, build in passes.cases().items():
        if report.has_time(case):
            cases.append(passes.run(report, case, *build))
            report.write()
    sweep(report, cases)
    report.finish()


def drawn(count: int) -> list[list[int]]:
    """Titles of three to seven tokens, few of which are frequent."""
    rng = np.random.default_rng(0)
    tokens = lambda n: (1 + (rng.zipf(1.3, n) - 1) % 400).tolist()  # noqa: E731
    return [[*tokens(rng.integers(3, 7)), END] for _ in range(count)]


def prepared(folder: str) -> list[list[int]]:
    from napo.assets import SMOLLM2
    from napo.data.prepared import PreparedData
    from napo.data.prompts import PromptEncoder
    from napo.language_models.loading import load_tokenizer

    data = PreparedData.load(folder)
    return PromptEncoder(load_tokenizer(SMOLLM2), data.titles, noun=data.noun, style="history").answers


def head_case(report: Report, trie: Trie, smoke: bool) -> Comparison:
    rows, width, vocabulary = (60, 32, 512) if smoke else (2016, 576, 49152)
    items = np.random.default_rng(0).integers(trie.num_items, size=rows)
    paths = [trie.path[trie.path_start[item] : trie.path_start[item + 1]] for item in items]
    path = np.concatenate(paths)[:rows]
    ids = np.repeat(np.arange(rows), [len(p) for p in paths])[:rows]
    common: dict[str, Any] = {"sequence_ids": torch.from_numpy(ids), "num_sequences": int(ids[-1]) + 1}
    nodes, targets = trie.parents[path], trie.tokens[path]
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16().to(device.current)  # noqa: E731
    hidden, weight = draw(rows, width), draw(vocabulary, width) / width**0.5
    allowed = AllowedTokens.of(nodes, trie.sets, targets, **common).to(device.current)
    column = torch.from_numpy(targets).to(device.current)
    on_device = {**common, "sequence_ids": common["sequence_ids"].to(device.current)}

    def both(head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = hidden.clone().requires_grad_()
        logps = head(leaf)
        return logps.detach(), torch.autograd.grad(logps.sum(), leaf)[0]

    truth = both(lambda h: catalogue_oracle(h.double(), weight.double(), trie, nodes, targets, **on_device))
    full_truth = both(lambda h: full_oracle(h, weight, column, **on_device))

    def floor() -> None:
        at = 0
        for n, w, own in zip(allowed.blocks[::3], allowed.blocks[1::3], allowed.blocks[2::3], strict=True):
            if not own:
                columns = weight[allowed.used[allowed.columns[at : at + w]]].float()
                z = hidden[:n].float() @ columns.t()
                z @ columns
            at += n * w if own else w

    return compare(
        report,
        f"head: R {rows}, {len(allowed.rows)} with a choice, H {width}, V {vocabulary}, frozen, forward and backward",
        {
            "napo": Variant(lambda: both(lambda h: catalogue_sequence_logps(h, weight, allowed)), required=True),
            "reference": lambda: both(lambda h: catalogue_sequence_logps(h, weight, allowed, backend="reference")),
            "full": Variant(
                lambda: both(lambda h: linear_sequence_logps(h, weight, column, **on_device)), required=True
            ),
            "floor": floor,
        },
        error=lambda name, found: max(map(distance, found, full_truth if name == "full" else truth)),
        tolerance=2e-2,  # the gradients come back in bfloat16
    )


def catalogue_oracle(
    hidden: Tensor, weight: Tensor, trie: Trie, nodes: Any, targets: Any, *, sequence_ids: Tensor, num_sequences: int
) -> Tensor:
    """The definition, row by row: z_y - logsumexp over the node's children."""
    total = hidden.new_zeros(num_sequences)
    logps = []
    for row, (node, target) in enumerate(zip(nodes.tolist(), targets.tolist(), strict=True)):
        tokens = torch.from_numpy(trie.tokens[np.asarray(trie.children(node))]).to(hidden.device)
        z = weight[tokens] @ hidden[row]
        logps.append(z[(tokens == target).nonzero()[0, 0]] - torch.logsumexp(z, 0))
    return total.index_add(0, sequence_ids, torch.stack(logps))


def full_oracle(hidden: Tensor, weight: Tensor, column: Tensor, *, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    return linear_sequence_logps(
        hidden.double(), weight.double(), column, sequence_ids=sequence_ids, num_sequences=num_sequences
    )


class Passes:
    """Batches of both kinds, and a model with an adapter that computes them."""

    def __init__(self, trie: Trie, name: str) -> None:
        self.trie, self.name, self.rng = trie, name, np.random.default_rng(0)
        base = make_base(name, torch.bfloat16)
        self.model = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
        fuse(self.model)
        self.over = {"napo": CatalogueScorer(self.model), "whole": CandidateScorer(self.model)}

    def cases(self) -> dict[str, tuple[dict[str, Any], int, bool]]:
        """What to compute in both ways, the tokens of prompts and history, and whether there is a backward."""
        few = self.name == "tiny"
        windows, users = (1, 1) if few else (2, 2)
        size = 4 if few else WINDOW
        step = [self.items(size) for _ in range(windows)]
        rivals = [[self.items(NEGATIVES) for _ in window[1:]] for window in step]
        history = [self.line(self.items(size)) for _ in range(users)]
        lists = [self.items(CANDIDATES) for _ in history]
        titles = self.trie.title
        one, catalogue = history[:1], list(range(self.trie.num_items))
        begin = [[self.line(window[:place]) for place in range(1, len(window))] for window in step]
        return {
            f"step: {windows} windows of {size} titles, {NEGATIVES} negatives a target": (
                {
                    "napo": pack_windows(step, self.trie, header=[END], first=1, negatives=rivals, pad_id=END),
                    "whole": pack(
                        [prompt for prompts in begin for prompt in prompts],
                        [
                            [titles(item) for item in (target, *others)]
                            for window, group in zip(step, rivals, strict=True)
                            for target, others in zip(window[1:], group, strict=True)
                        ],
                        pad_id=END,
                    ),
                },
                0,
                True,
            ),
            f"evaluation: {users} lists of {CANDIDATES} behind {size} titles": (
                {
                    "napo": pack_items(history, lists, self.trie, pad_id=END),
                    "whole": pack(history, [[titles(item) for item in group] for group in lists], pad_id=END),
                },
                sum(map(len, history)),
                False,
            ),
            f"catalogue: all {len(catalogue)} titles behind {size}": (
                {
                    "napo": pack_nodes(one, [self.trie.branching.tolist()], self.trie, pad_id=END),
                    "whole": pack(one, [[titles(item) for item in catalogue]], pad_id=END),
                },
                len(one[0]),
                False,
            ),
        }

    def items(self, count: int) -> list[int]:
        return self.rng.integers(self.trie.num_items, size=count).tolist()

    def line(self, items: list[int]) -> list[int]:
        return [END, *(token for item in items for token in self.trie.title(item))]

    def run(self, report: Report, case: str, batches: dict[str, Any], prompts: int, backward: bool) -> Comparison:
        truth = {name: self.truth(name, batch) for name, batch in batches.items()}

        def counted(rows: list[dict[str, Any]]) -> None:
            for row in rows:
                tokens = batches[row["variant"]].num_tokens
                row |= {"tokens": tokens, "title_tokens": tokens - prompts}

        return compare(
            report,
            case,
            {
                name: Variant(lambda name=name: self.compute(name, batches[name], backward), required=True)
                for name in batches
            },
            error=lambda name, logps: distance(logps, truth[name]),
            tolerance=TOLERANCE,
            derive=counted,
        )

    def compute(self, name: str, batch: Any, backward: bool) -> Tensor:
        with torch.set_grad_enabled(backward), torch.autocast(device.current.type, torch.bfloat16):
            logps = self.over[name](batch)
        if backward:
            logps.sum().backward()
            self.model.zero_grad()
        return logps.detach()

    @torch.no_grad()
    def truth(self, name: str, batch: Any) -> Tensor:
        """The batch under the same weights in fp32; in fp64 the larger ones take minutes."""
        model = make_base(self.name, torch.bfloat16).float().eval()
        return (CatalogueScorer if name == "napo" else CandidateScorer)(model)(batch)
