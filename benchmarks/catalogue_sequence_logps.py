"""Log-probabilities over a catalogue's titles: the small head beside the full one, and passes of a model with them.

    python -m benchmarks run catalogue [--data PREPARED]

head, 2016 rows of whole titles, H 576, V 49152, frozen, forward and backward (on a GPU also trained, and 8192 rows at
H 4096, V 128256):
    napo        catalogue_sequence_logps: only the tokens that continue some title, in fp32 from bfloat16
    reference   the same in plain PyTorch
    full        linear_sequence_logps: a softmax over the vocabulary, in bfloat16
    floor       the matmuls of rows at nodes with many children alone: 2 R C H flops forward, as many backward, twice
                as many if the head is trained

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
from typing import Any, NamedTuple

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
    shapes = [HeadShape(60, 32, 512)] if options.smoke else [HeadShape(2016, 576, 49152)]
    if device.on_gpu() or options.smoke:
        shapes.append(shapes[0]._replace(trains=True))
    if device.on_gpu() and not options.smoke:
        shapes.append(HeadShape(8192, 4096, 128256))
    cases = [head_case(report, trie, shape) for shape in shapes if report.has_time(f"head, {shape}")]
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


class HeadShape(NamedTuple):
    rows: int
    width: int
    vocabulary: int
    trains: bool = False


class HeadProblem:
    """Rows of random titles of a catalogue, and a head in bfloat16."""

    def __init__(self, trie: Trie, shape: HeadShape) -> None:
        rows, width, vocabulary, trains = shape
        items = np.random.default_rng(0).integers(trie.num_items, size=rows)
        paths = [trie.path[trie.path_start[item] : trie.path_start[item + 1]] for item in items]
        path = np.concatenate(paths)[:rows]
        ids = np.repeat(np.arange(rows), [len(p) for p in paths])[:rows]
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16().to(device.current)  # noqa: E731
        self.trie, self.trains = trie, trains
        self.nodes, self.targets, count = trie.parents[path], trie.tokens[path], int(ids[-1]) + 1
        self.hidden, self.weight = draw(rows, width), draw(vocabulary, width) / width**0.5
        ids = torch.from_numpy(ids)
        allowed = AllowedTokens.of(self.nodes, trie.sets, self.targets, sequence_ids=ids, num_sequences=count)
        self.allowed = allowed.to(device.current)
        self.column = torch.from_numpy(self.targets).to(device.current)
        self.sequences: dict[str, Any] = {"sequence_ids": ids.to(device.current), "num_sequences": count}

    def both(self, head: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Log-probabilities and the gradients of their sum."""
        hidden = self.hidden.clone().requires_grad_()
        weight = self.weight.detach().requires_grad_(self.trains)
        logps = head(hidden, weight)
        leaves = (hidden, weight) if self.trains else (hidden,)
        return logps.detach(), *torch.autograd.grad(logps.sum(), leaves)

    def small(self, backend: str | None = None) -> tuple[Tensor, ...]:
        return self.both(lambda h, w: catalogue_sequence_logps(h, w, self.allowed, backend=backend))

    def full(self) -> tuple[Tensor, ...]:
        return self.both(lambda h, w: linear_sequence_logps(h, w, self.column, **self.sequences))

    def floor(self) -> None:
        allowed, at, slot = self.allowed, 0, 0
        for n, w, own in zip(allowed.blocks[::3], allowed.blocks[1::3], allowed.blocks[2::3], strict=True):
            if not own:
                columns = self.weight[allowed.used[allowed.columns[at : at + w]]]
                rows = self.hidden[allowed.rows[slot : slot + n]]
                if not device.on_gpu():
                    columns, rows = columns.float(), rows.float()
                z = rows @ columns.t()
                z @ columns
                if self.trains:
                    z.t() @ rows
            at, slot = at + (n * w if own else w), slot + n


def head_case(report: Report, trie: Trie, shape: HeadShape) -> Comparison:
    problem = HeadProblem(trie, shape)
    truth = problem.both(
        lambda h, w: catalogue_oracle(h.double(), w.double(), trie, problem.nodes, problem.targets, **problem.sequences)
    )
    full_truth = problem.both(
        lambda h, w: linear_sequence_logps(h.double(), w.double(), problem.column, **problem.sequences)
    )
    choices, kind = len(problem.allowed.rows), "trained" if shape.trains else "frozen"
    return compare(
        report,
        f"head: R {shape.rows}, {choices} with a choice, H {shape.width}, V {shape.vocabulary}, {kind}, forward and "
        "backward",
        {
            "napo": Variant(problem.small, required=True),
            "reference": lambda: problem.small("reference"),
            "full": Variant(problem.full, required=True),
            "floor": problem.floor,
        },
        error=lambda name, found: max(map(distance, found, full_truth if name == "full" else truth)),
        tolerance=2e-2,  # the gradients come back in bfloat16
    )


def catalogue_oracle(
    hidden: Tensor, weight: Tensor, trie: Trie, nodes: Any, targets: Any, *, sequence_ids: Tensor, num_sequences: int
) -> Tensor:
    """The definition, node by node: z_y - logsumexp over the node's children."""
    total = hidden.new_zeros(num_sequences)
    on_device = lambda values: torch.from_numpy(values).to(hidden.device)  # noqa: E731
    in_use = np.unique(nodes)
    children = [np.asarray(trie.children(node)) for node in in_use.tolist()]
    used = np.unique(np.concatenate([trie.tokens[of_node] for of_node in children]))
    small = weight[on_device(used)]
    for node, of_node in zip(in_use, children, strict=True):
        rows, tokens = np.flatnonzero(nodes == node), trie.tokens[of_node]
        z = hidden[on_device(rows)] @ small[on_device(np.searchsorted(used, tokens))].t()
        place = (on_device(targets[rows])[:, None] == on_device(tokens)).to(z.dtype)
        logps = (z * place).sum(1) - torch.logsumexp(z, 1)
        total = total.index_add(0, sequence_ids[on_device(rows)], logps)
    return total


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
