"""The study as pieces, each a stage of a run or written aside and renamed: what is finished is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from napo.assets import movielens_100k
from napo.data.prepare import prepare, split_options
from napo.data.prepared import PreparedData
from napo.data.prompts import PromptEncoder
from napo.evaluation.catalogue import CatalogueOptions, evaluate_catalogue
from napo.evaluation.evaluate import EvaluateOptions, evaluate
from napo.evaluation.records import read_records
from napo.files import content_hash, write_json
from napo.finetuning.sft import answer_examples
from napo.language_models.loading import load_tokenizer
from napo.recommenders.combination import CONTROL as WITHOUT_MODEL
from napo.recommenders.combination import combined_name
from napo.recommenders.registry import BASELINES
from napo.runs import Run
from napo.stages import check_titles, combine_stage, sasrec_stage, sft_stage, train_stage
from studies.lastfm import inside, results
from studies.lastfm.config import CANDIDATES, CONTINUED, CONTROL, DATASETS, SFT, Size, Trial, repeated
from studies.lastfm.measured import measured

VALIDATION = "validation"
"""The folder of a run with the figures on validation lists; those on test lists are in the run itself."""
Piece = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A data set and what is trained on it; ``out`` gets the prepared data, a run a seed, and results.json."""

    out: Path
    dataset: str
    size: Size
    trials: Sequence[Trial]
    files: Path | None = None
    """The files of the data set; None where the package index has it."""

    def data(self) -> PreparedData:
        return PreparedData.load(self.out / "prepared" / "data")

    def run(self, seed: int) -> Run:
        return Run(self.out / f"seed-{seed}")

    def go(self, seeds: Sequence[int], has_time: Callable[[], bool] = lambda: True) -> list[str]:
        """Do what is not done yet; results.json is brought up to date behind every piece. Returns the pieces that are
        left."""
        left = [("prepare", self._prepare), *(piece for seed in seeds for piece in self._pieces(seed))]
        while left and has_time():
            name, piece = left.pop(0)
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            piece()
            results.write(self, seeds)
        return [name for name, _ in left]

    def _prepare(self) -> None:
        kind = DATASETS[self.dataset]
        files = self.files if self.files is not None else movielens_100k()
        Run(self.out / "prepared").stage(
            "prepare",
            lambda aside: prepare(kind.source, files, aside / "data", *split_options(kind.prepare)),
            options=kind.prepare,
            inputs={"files": content_hash(files)},
            outputs=["data"],
        )
        check_titles(self.data(), self.size.model)

    def _pieces(self, seed: int) -> list[tuple[str, Piece]]:
        main, repeats, more = ([t for t in self.trials if t.part == part] for part in ("main", "repeat", "more"))
        repeats = [trial for trial in repeats if trial.seed != seed]  # which the main part is
        pieces: list[tuple[str, Piece]] = [("sasrec", lambda: self._sasrec(seed))]
        pieces += [(f"judge {name}", lambda name=name: self._judge(seed, name)) for name in BASELINES]
        pieces += [("sft", lambda: self._sft(seed)), (f"judge {SFT}", lambda: self._judge(seed, SFT))]
        pieces += self._trained(seed, [CONTINUED, *main])
        pieces.append(("false negatives", lambda: inside.false_negatives_stage(self, seed)))
        for name in (SFT, *(trial.name for trial in main if trial.name == "napo")):
            pieces.append((f"combine {name}", lambda name=name: combine_stage(self.run(seed), self.data(), model=name)))
            pieces.append((f"gradients {name}", lambda name=name: inside.gradients_stage(self, seed, name)))
        pieces += self._trained(seed, repeats)
        pieces.append(("test", lambda: self._test(seed, [trial.name for trial in (*main, *repeats)])))
        if self.size.protocol_a:
            pieces.append((CANDIDATES, lambda: self._sft_candidates(seed)))
            pieces.append((f"judge {CANDIDATES}", lambda: self._judge(seed, CANDIDATES, greedy=True)))
            pieces.append((f"test {CANDIDATES}", lambda: self._test_candidates(seed)))
        pieces += self._trained(seed, more)
        if more:
            pieces.append(("test best", lambda: self._test_best(seed)))
        if self.size.catalogue_rows:
            pieces.append(("catalogue", lambda: self._catalogue(seed, [trial.name for trial in main])))
        return [(f"seed {seed}: {name}", piece) for name, piece in pieces]

    def _trained(self, seed: int, trials: Sequence[Trial]) -> list[tuple[str, Piece]]:
        pieces: list[tuple[str, Piece]] = []
        for trial in trials:
            pieces.append((trial.name, lambda trial=trial: self._train(seed, trial)))
            pieces.append((f"judge {trial.name}", lambda trial=trial: self._judge(seed, trial.name)))
        return pieces

    def _sasrec(self, seed: int) -> None:
        run = self.run(seed)
        with measured(run, "sasrec"):
            sasrec_stage(run, self.data(), seed=seed, options=self.size.sasrec)

    def _sft(self, seed: int) -> None:
        run = self.run(seed)
        with measured(run, SFT):
            sft_stage(
                run, self.data(), model=self.size.model, style="history", seed=seed, options=self.size.sft_options()
            )

    def _train(self, seed: int, trial: Trial) -> None:
        run = self.run(seed)
        own = seed if trial.seed is None else trial.seed
        with measured(run, trial.name):
            if trial.objective == "sft":
                self._continue(run, trial, own)
                return
            train_stage(
                run,
                self.data(),
                objective=trial.objective,
                name=trial.name,
                init_from=SFT,
                seed=own,
                options=self.size.preference_options(trial),
            )

    def _continue(self, run: Run, trial: Trial, seed: int) -> None:
        """SFT continued for the tokens of a trial, at the trials' rate."""
        rate = {"learning_rate": self.size.preferences["learning_rate"], **trial.options}
        options = self.size.sft_options(tokens=self.size.trial_tokens, evaluations=1, **rate)
        sft_stage(
            run,
            self.data(),
            model=self.size.model,
            style="history",
            seed=seed,
            options=options,
            name=trial.name,
            init_from=SFT,
        )

    def _sft_candidates(self, seed: int) -> None:
        """SFT with the candidates in the prompt, on the first rows of the training's order that the budget has room
        for; a budget above all rows has more epochs of them."""
        data, run = self.data(), self.run(seed)
        encoder = PromptEncoder(load_tokenizer(self.size.model), data.titles, noun=data.noun, style="candidates")
        order = answer_examples(data.train, encoder, None, np.random.default_rng(seed))
        tokens = np.cumsum([len(prompt) + len(answer) for prompt, answer in order])
        examples = int(np.searchsorted(tokens, self.size.budget)) + 1
        options: dict[str, Any] = {**self.size.sft, "examples": examples}
        spent = int(tokens[min(examples, len(order)) - 1])
        if examples > len(order):
            options |= {"examples": None, "epochs": self.size.budget / spent}
            spent = self.size.budget
        write_json(run.path / "inside" / f"{CANDIDATES}.json", {"rows": min(examples, len(order)), "tokens": spent})
        with measured(run, CANDIDATES):
            sft_stage(
                run,
                data,
                model=self.size.model,
                style="candidates",
                seed=seed,
                options=options,
                name=CANDIDATES,
            )

    def _test_candidates(self, seed: int) -> None:
        """Greedy answers on test lists, once."""
        data = self.data()
        if len(data.test):
            evaluate(data, self.run(seed), [CANDIDATES], EvaluateOptions(limit=self.size.test_lists))

    def _judge(self, seed: int, name: str, greedy: bool = False) -> None:
        """On validation lists, which choose."""
        options = EvaluateOptions(split="val", limit=self.size.val_lists, greedy=greedy)
        run = self.run(seed)
        with measured(run, f"judge-{name}", f"evaluate-{name}@{VALIDATION}"):
            evaluate(self.data(), run, [name], options, folder=VALIDATION)

    def _test(self, seed: int, names: Sequence[str]) -> None:
        """On test lists, once, with settings that were chosen before. Some parts of data sets have none."""
        data, run = self.data(), self.run(seed)
        if not len(data.test):
            return
        combined = [combined_name(name) for name in (SFT, "napo") if name in (SFT, *names)]
        models = [*BASELINES, SFT, CONTROL, *names, WITHOUT_MODEL, *combined]
        evaluate(data, run, models, EvaluateOptions(limit=self.size.test_lists, greedy=False))

    def _test_best(self, seed: int) -> None:
        """What was best on validation lists, where that is no model of the main part, alone and with SASRec."""
        best = self.best(seed)
        data, run = self.data(), self.run(seed)
        if not len(data.test):
            return
        combine_stage(run, data, model=best)
        evaluate(data, run, [best, combined_name(best)], EvaluateOptions(limit=self.size.test_lists, greedy=False))

    def best(self, seed: int) -> str:
        """The language model with the highest HR@1 on validation lists, of equal ones that with the higher MRR.
        Repeats do not take part: the highest of more draws would be no better a model; nor does a model whose prompt
        lists the candidates, which ranks nothing else."""
        run = self.run(seed)
        records = {record["model"]: record for record in read_records(run.path / VALIDATION / "metrics.json")}
        judged = [name for name in run.model_names() if name in records and repeated(name) == name != CANDIDATES]
        return max(judged, key=lambda name: (records[name]["hr@1"], records[name]["mrr"]))

    def _catalogue(self, seed: int, names: Sequence[str]) -> None:
        data, run = self.data(), self.run(seed)
        if len(data.test):
            options = CatalogueOptions(limit=self.size.catalogue_rows)
            evaluate_catalogue(data, run, [*BASELINES, SFT, CONTROL, *names], options)
