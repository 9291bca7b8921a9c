"""One optimiser step of `NAPOTrainer` with negatives that users share, beside the same step without sharing.

    python -m benchmarks run sharing                    what `make bench` measures
    python -m benchmarks run sharing --model FOLDER     another model than SmolLM2-135M

Users are the places of windows of titles, as `napo train` makes them: their prompts are beginnings of one another. The
catalogue is drawn, log-probabilities are normalised over it. All variants have the same rows, and so the same tokens,
and one model with an adapter on all linear layers. The rate is 0, so that every run computes the same.

    napo                  rho .7: each user's negatives and those of 70% of the pool
    alone                 rho 0: the user's own negatives; never accumulated, since nothing is shared
    floor: passes         log-probabilities of the same titles, forward and backward, without a loss
    floor: rehearsal and passes     where the pool is that of several micro-batches: all but one are scored once without
                          gradient before the loss is known, which is the least that a loss over all of them needs
                          in the memory of one

A step has all of the trainer's work: rows into a batch, the passes, pool, margin and loss, the figures of the log,
clipping, AdamW. `of_alone` is napo's time over alone's, `memory_of_alone` the same of the peaks: what sharing costs.
Issue 20 allows 1.1 in the batch, 1.3 accumulated, and 1.05 of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks import device
from benchmarks.catalogue_sequence_logps import drawn
from benchmarks.comparison import Comparison, compare, sweep
from benchmarks.options import command_line
from benchmarks.report import Report
from benchmarks.timing import Variant
from benchmarks.training_step import END, MODELS, make_base
from napo.assets import SMOLLM2
from napo.catalogue import CatalogueScorer, Trie
from napo.language_models.fused.fuse import fuse
from napo.language_models.loading import autocast, load_model
from napo.language_models.options import LoraOptions
from napo.trainer.config import NAPOConfig
from napo.trainer.napo_trainer import NAPOTrainer

RHO = 0.7
STATE = 64  # of SASRec
MOST_TOKENS = 512


class Case(NamedTuple):
    """``parts`` micro-batches of ``windows`` windows; each title but a window's first one is a user's next one."""

    windows: int
    titles: int
    parts: int = 1

    @property
    def pool(self) -> int:
        return self.parts * self.windows * (self.titles - 1)

    def __str__(self) -> str:
        where = "in the batch" if self.parts == 1 else f"over {self.parts} micro-batches"
        return f"pool {self.pool} {where}"


CASES = (Case(2, 40), Case(8, 33), Case(2, 33, 4))
SMALL = (Case(2, 5), Case(1, 5, 4))


def main(arguments: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default=SMOLLM2, help="an asset, a folder, or a name on the hub (%(default)s)")
        parser.add_argument("--negatives", type=int, default=4)
        parser.add_argument("--titles", type=int, default=1349, help="of the drawn catalogue")

    options = command_line(__doc__, arguments, add)
    report, measured = Report("sharing", options), []
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(options, folder)
        for case in SMALL if options.smoke else CASES:
            if report.has_time(str(case)):
                measured.append(steps.run(report, case))
                report.write()
        sweep(report, measured)
        report.finish()


class Steps:
    """The variants of every case, all on one model."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.folder, self.negatives = folder, options.negatives
        self.trie = Trie.of(drawn(40 if options.smoke else options.titles))
        self.tokenizer: Any
        if options.smoke:
            base = make_base("tiny", torch.bfloat16)
            adapters = peft.LoraConfig(r=4, target_modules="all-linear")
            self.model: Any = peft.get_peft_model(base, adapters, autocast_adapter_dtype=False)
            fuse(self.model)
            self.tokenizer = numbers(MODELS["tiny"]["v"])
        else:
            self.model, self.tokenizer = load_model(
                options.model, device=device.current, lora=LoraOptions(), trainable=True
            )
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, fused=True)  # transformers' default
        self.scorer = CatalogueScorer(self.model)

    def run(self, report: Report, case: Case) -> Comparison:
        rows = self.rows(case)
        shared, alone = (self.trainer(case, rows, rho) for rho in (RHO, 0.0))
        size = case.windows * (case.titles - 1)
        examples = [[shared.train_dataset[i] for i in range(at, at + size)] for at in range(0, len(rows), size)]
        batches = [shared.data_collator(part)["batch"].to(device.current) for part in examples]
        tokens = sum(batch.packed.num_tokens for batch in batches)
        floor = "floor: passes" if case.parts == 1 else "floor: rehearsal and passes"
        runs: dict[str, Callable[[], Any]] = {
            "napo": lambda: self.step(shared, examples),
            "alone": lambda: self.step(alone, examples),
            floor: lambda: self.passes(batches, rehearsal=case.parts > 1),
        }
        for (
            run
        ) in runs.values():  # the optimiser's state and the libraries' buffers are there; a failure is named below
            with contextlib.suppress(Exception):
                run()

        def more_columns(found: list[dict[str, Any]]) -> None:
            ours, other = (next(row for row in found if row["variant"] == name) for name in ("napo", "alone"))
            for key, column in (("best_ms", "of_alone"), ("peak_mib", "memory_of_alone")):
                if ours.get(key) and other.get(key):
                    ours[column] = round(ours[key] / other[key], 3)
            for row in found:
                row["tokens"] = tokens

        variants = {name: Variant(run, required=True) for name, run in runs.items()}
        return compare(report, str(case), dict(variants), seconds=3.0, repeats=7, derive=more_columns)

    def rows(self, case: Case) -> list[dict[str, Any]]:
        """Preference rows: behind each beginning of a window its next title against some that are drawn."""
        rng = np.random.default_rng(0)
        rows = []
        for user in range(case.parts * case.windows):
            window = rng.choice(self.trie.num_items, case.titles, replace=False)
            prompt = [END]
            for before, item in pairwise(window):
                prompt = [*prompt, *self.trie.title(before)]
                negatives = rng.choice(
                    np.setdiff1d(np.arange(self.trie.num_items), window), self.negatives, replace=False
                )
                rows.append(
                    {
                        "prompt": prompt,
                        "chosen": self.trie.title(item),
                        "rejected": [self.trie.title(other) for other in negatives],
                        "chosen_id": int(item),
                        "rejected_ids": negatives.tolist(),
                        "user_id": str(user),
                        "user_state": rng.standard_normal(STATE).tolist(),
                        "rejected_scores": rng.standard_normal(self.negatives).tolist(),
                    }
                )
        return rows

    def trainer(self, case: Case, rows: list[dict[str, Any]], rho: float) -> NAPOTrainer:
        config = NAPOConfig(
            output_dir=self.folder,
            objective="napo",
            rho=rho,
            pool="accumulated" if case.parts > 1 and rho else "batch",
            per_device_train_batch_size=case.windows * (case.titles - 1),
            gradient_accumulation_steps=case.parts,
            max_length=MOST_TOKENS,
            bf16=next(self.model.parameters()).dtype == torch.bfloat16,
            use_cpu=not device.on_gpu(),
            report_to=[],
            cache_rows=False,
        )
        return NAPOTrainer(self.model, config, train_dataset=rows, processing_class=self.tokenizer, trie=self.trie)

    def step(self, trainer: NAPOTrainer, examples: list[list[Any]]) -> Tensor:
        collated = (trainer.data_collator(part) for part in examples)
        batches, users = trainer.get_batch_samples(collated, len(examples), trainer.args.device)
        loss = torch.stack([trainer.training_step(self.model, batch, users) for batch in batches]).sum()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        figures = trainer._step_metrics["train"].drain()
        users = sum(map(len, examples)) if trainer.args.pool == "accumulated" else len(examples[0])
        if figures["loss"] != figures["loss"] or figures["pool_size"] != users:
            raise ValueError(f"step: expected a loss over a pool of {users} users, got {figures}")
        return loss

    def passes(self, batches: list[Any], *, rehearsal: bool) -> None:
        with autocast(self.model):
            if rehearsal:
                with torch.no_grad():
                    for batch in batches[1:]:
                        self.scorer(batch.packed)
            for batch in batches:
                self.scorer(batch.packed).sum().backward()
        self.optimizer.zero_grad()


def numbers(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers of its tokens: rows come as ids, so nothing is read with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({str(token): token for token in range(vocabulary)}, unk_token=str(END)))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token=str(END), eos_token=str(END))
