"""Ranking the candidate lists of a real data set: all lists packed, against one candidate at a time.

    napo prepare llara lastfm/ --out data/lastfm
    python -m benchmarks run lists --data data/lastfm                 # the 2,495 test lists of LastFM, SmolLM2-135M
    python -m benchmarks run lists --data data/lastfm --limit 40      # a look

    packed       as `napo evaluate` ranks: a prompt once, its titles as a tree behind it
    catalogue    the same with log-probabilities normalised over the catalogue: tokens that decide nothing are left out
    alone        one candidate at a time: a forward of prompt and title each, on --alone lists

Scores of `packed` and `alone` are compared on these lists. The model is untuned: the time does not depend on it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.options import command_line
from benchmarks.report import Report
from napo.assets import SMOLLM2
from napo.data.prepared import PreparedData
from napo.data.prompts import PromptEncoder, PromptSettings
from napo.data.styles import STYLES
from napo.evaluation.evaluate import EvaluateOptions, Lists
from napo.language_models.loading import load_model
from napo.recommenders.language_model import LanguageModel
from napo.recommenders.protocol import ScoringOptions
from napo.scoring import CandidateScorer, pack

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.0}  # of a title's log-probability, a sum over its tokens


def main(arguments: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", type=Path, required=True, help="prepared data set, from `napo prepare`")
        parser.add_argument("--model", default=SMOLLM2)
        parser.add_argument("--style", default="candidates", choices=list(STYLES))
        parser.add_argument("--limit", type=int, default=None, help="lists; default: all test lists")
        parser.add_argument("--alone", type=int, default=16, help="lists that are ranked one candidate at a time")

    options = command_line(__doc__, arguments, add)
    report = Report("lists", options)
    data = PreparedData.load(options.data)
    lists = Lists.of(data, EvaluateOptions(limit=options.limit))
    model, tokenizer = load_model(options.model)
    encoder = PromptEncoder(tokenizer, data.titles, noun=data.noun, style=options.style)
    case = f"{Path(options.data).name}, {lists.candidates.shape[1]} candidates, style {options.style}"
    rates: dict[str, float] = {}
    few = slice(0, min(options.alone, len(lists.rows)))
    scores = {}
    for variant in ("alone", "packed", "catalogue"):
        report.say(variant)
        over = "catalogue" if variant == "catalogue" else "vocabulary"
        settings = PromptSettings(style=options.style, history=data.history_length, normalise=over)  # type: ignore[arg-type]
        ranker = LanguageModel(model, tokenizer, encoder, data.titles, settings, ScoringOptions())
        part = few if variant == "alone" else slice(None)
        histories, candidates = lists.histories[part], lists.candidates[part]
        rank = one_at_a_time if variant == "alone" else LanguageModel.scores
        rank(ranker, histories[:2], candidates[:2])  # the first call chooses the kernels
        began = time.perf_counter()
        scores[variant] = rank(ranker, histories, candidates)
        seconds = time.perf_counter() - began
        rates[variant] = len(histories) / seconds
        facts = {"lists": len(histories), "seconds": round(seconds, 1), "lists_per_s": round(rates[variant], 2)}
        report.add(case, variant, **facts, times_alone=round(rates[variant] / rates["alone"], 1))
        report.write()
    error = float(np.abs(scores["packed"][few] - scores["alone"]).max())
    report.say(f"packed and alone differ by up to {error:.2g}")
    if not error <= TOLERANCE[next(model.parameters()).dtype]:
        report.failed.append(f"{case}: packed and alone differ by {error}")
    report.finish()


@torch.no_grad()
def one_at_a_time(ranker: LanguageModel, histories: Sequence[Sequence[int]], candidates: np.ndarray) -> np.ndarray:
    score = CandidateScorer(ranker.model, packed=False)
    scores = np.empty(candidates.shape)
    for row, history in enumerate(histories):
        prompt = ranker.prompt(history, candidates[row])
        for column, item in enumerate(candidates[row]):
            batch = pack([prompt], [[ranker.encoder.title(int(item))]], pad_id=ranker.pad_id)
            scores[row, column] = float(score(batch))
    return scores
