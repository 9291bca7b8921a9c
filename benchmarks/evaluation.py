"""Scoring 20 candidates per user without gradients: packed, against each title behind its own copy of the prompt.

    python -m benchmarks run evaluation [--device cuda]

    napo        pack() included; the prompt once, then its 20 titles as a tree
    unpacked    CandidateScorer(packed=False): 20 sequences a user, the fused head at title positions
    cached      transformers' own way: the prompt once into a key-value cache, repeated for the 20 titles
    naive       20 sequences a user, fp32 logits of every position

Log-probs of one user's candidates are compared with the model in fp64. Unpacked and naive score a user at a time, which
bounds their memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import device
from benchmarks.comparison import Comparison, compare, sweep
from benchmarks.naive_dpo import concatenated, sequence_logps, wide
from benchmarks.options import command_line
from benchmarks.report import Report
from benchmarks.timing import Variant
from benchmarks.training_step import END, MODELS, TOLERANCE, log_prob_error, make_base, make_users
from napo.scoring import CandidateScorer, pack


def main(arguments: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default=None, choices=list(MODELS))
        parser.add_argument("--candidates", type=int, default=20)
        parser.add_argument("--users", type=int, default=None, help="default: 4, and 1 on a CPU")

    options = command_line(__doc__, arguments, add)
    report = Report("evaluation", options)
    on_gpu = device.on_gpu()
    options.users = options.users or (4 if on_gpu else 1)
    name = options.model or ("tiny" if options.smoke else "Llama-3.2-1B" if on_gpu else "SmolLM2-135M")
    scoring = Scoring(name)
    cases = []
    for p in (12, 16, 20) if options.smoke else (100, 200, 500, 1000) if on_gpu else (50, 100, 200):
        case = f"{name}, {options.candidates} candidates, B {options.users}, P {p}, L 7, bfloat16"
        if report.has_time(case):
            cases.append(run_case(report, case, scoring, p, options))
            report.write()
    sweep(report, cases)
    report.finish()


class Scoring:
    def __init__(self, name: str) -> None:
        self.name = name
        self.model = make_base(name, torch.bfloat16).eval()
        self.packed = CandidateScorer(self.model)
        self.alone = CandidateScorer(self.model, packed=False)

    @torch.no_grad()
    def truth(self, prompts: Any, titles: Any) -> Tensor:
        model = make_base(self.name, torch.bfloat16).double().eval()
        return sequence_logps(model, *concatenated(prompts, titles, END, device.current), answers_only=True)

    @torch.no_grad()
    def napo(self, prompts: Any, titles: Any) -> Tensor:
        return self.packed(pack(prompts, titles, pad_id=END))

    @torch.no_grad()
    def unpacked(self, prompts: Any, titles: Any) -> Tensor:
        return self.alone(pack(prompts, titles, pad_id=END))

    @torch.no_grad()
    def naive(self, prompts: Any, titles: Any) -> Tensor:
        users = ([[prompt], [group]] for prompt, group in zip(prompts, titles, strict=True))
        return torch.cat([sequence_logps(self.model, *concatenated(*user, END, device.current)) for user in users])

    @torch.no_grad()
    def cached(self, prompts: Any, titles: Any) -> Tensor:
        """Titles of one length, as here; others would be padded."""
        logps = []
        for prompt, group in zip(prompts, titles, strict=True):
            first = self.model(torch.tensor([prompt], device=device.current), use_cache=True, logits_to_keep=1)
            cache = first.past_key_values
            cache.batch_repeat_interleave(len(group))
            ids = torch.tensor(group, device=device.current)
            rest = self.model(ids[:, :-1], past_key_values=cache, use_cache=True).logits
            logits = torch.cat((first.logits.expand(len(group), -1, -1), rest), 1)
            logps.append(wide(logits).log_softmax(-1).gather(2, ids[..., None])[..., 0].sum(1))
        return torch.cat(logps)


def run_case(report: Report, case: str, scoring: Scoring, p: int, options: argparse.Namespace) -> Comparison:
    users = make_users(options.users, p, 7, options.candidates - 1, MODELS[scoring.name]["v"])
    few = 2  # candidates of the first user
    expected = scoring.truth(users[0][:1], [users[1][0][:few]])
    ways = ("napo", "unpacked", "cached", "naive")

    def users_per_second(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if "best_ms" in row:
                row["users_per_s"] = round(1e3 * options.users / row["best_ms"], 2)

    return compare(
        report,
        case,
        {way: Variant(lambda way=way: getattr(scoring, way)(*users), required=True) for way in ways},
        error=lambda _, logps: log_prob_error(logps[:few], expected, 7, MODELS[scoring.name]["v"]),
        tolerance=TOLERANCE,
        repeats=7,
        derive=users_per_second,
    )
