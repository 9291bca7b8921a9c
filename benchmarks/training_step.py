"""One optimiser step with 1 + N titles per user: packed against the ways in which it is usually written.

    python -m benchmarks run step                       what `make bench` measures
    python -m benchmarks run step --device cuda --model Llama-3.2-1B --users 8 --negatives 8
    python -m benchmarks run step --profile             where the time of the packed step goes

Random weights in the shape of a model; LoRA r 16 on q, k, v, o, in the model's dtype, the same in every variant:

    napo             pack() included, body once over prompt and titles, fused head, NAPO's loss, no reference model
    napo + reference the same with S-DPO's loss: the frozen model scores the titles as well
    ..., CUDA graphs on a GPU the same with the body recorded and replayed (cuda_graphs=True)
    naive S-DPO      naive_dpo.py: every title a full sequence, fp32 logits everywhere, reference forward
    naive SimPO      the same without a reference, with averages and N negatives
    answers only     naive S-DPO with logits only at answer positions
    pairs            TRL's layout: N pairs a user, each with its own chosen title, reference forward
    prefix sharing   flash-preference's way: prompts shared in the body, logits and log_softmax eager at the answers
                     (our packing stands in for its attention; the package is not on the index)

Log-probs of two titles are compared with the model in fp64, once for each length of prompts and way of scoring, before
anything is timed. Memory is what a step takes above what was there; weights are there before. What takes long takes
part in only a few sweeps.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import Tensor

from benchmarks import device
from benchmarks.comparison import Comparison, compare, distance, sweep
from benchmarks.machine import absent
from benchmarks.naive_dpo import concatenated, naive_step, sequence_logps
from benchmarks.options import command_line
from benchmarks.report import Report
from benchmarks.timing import Variant
from napo.language_models.fused.fuse import fuse
from napo.language_models.fused.lora import without_adapter
from napo.scoring import CandidateScorer, pack, width_multiple
from napo.scoring.scorer import packed_masks, run_body
from napo_kernels import napo_loss

LLAMA = {"tie_word_embeddings": True, "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, Any]] = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "SmolLM2-135M": LLAMA | dict(zip(("h", "i", "n", "a", "k", "v"), (576, 1536, 30, 9, 3, 49152), strict=True)),
    "SmolLM2-360M": LLAMA | dict(zip(("h", "i", "n", "a", "k", "v"), (960, 2560, 32, 15, 5, 49152), strict=True)),
    "Llama-3.2-1B": LLAMA | dict(zip(("h", "i", "n", "a", "k", "v"), (2048, 8192, 16, 32, 8, 128256), strict=True)),
    "tiny": LLAMA | dict(zip(("h", "i", "n", "a", "k", "v"), (64, 96, 2, 4, 2, 512), strict=True)),
}
END = 0
TOLERANCE = 0.1  # bf16 through tens of layers; a wrong body errs by more than 1
ALL = ("napo", "napo + reference", "naive S-DPO", "naive SimPO", "answers only", "pairs", "prefix sharing")
WAYS = {"naive S-DPO": "naive", "naive SimPO": "naive", "pairs": "naive", "answers only": "answers"}  # of scoring
WAYS |= {"napo": "packed", "napo + reference": "packed", "prefix sharing": "prefix"}
QUICK = ("napo", "naive S-DPO")
FAST = ("napo", "napo + reference", "prefix sharing")
LINE = {False: ("SmolLM2-135M", 4, 200), True: ("tiny", 1, 12)}  # model, B and P whose time is a line over N
Users = tuple[list[list[int]], list[list[list[int]]]]  # prompts, titles of each


def main(arguments: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default=None, choices=list(MODELS), help="only this shape")
        parser.add_argument("--variants", nargs="+", default=ALL, choices=ALL)
        parser.add_argument("--negatives", type=int, default=8)
        parser.add_argument("--users", type=int, default=4)
        parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt")
        parser.add_argument("--title", type=int, default=7, help="tokens of a title, end token included")
        parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
        parser.add_argument("--profile", action="store_true", help="profile the packed step instead of timing it")

    options = command_line(__doc__, arguments, add)
    absent("flash-preference", "not on the package index")
    report = Report("training_step", options)
    on_gpu = device.on_gpu()
    steps: dict[str, Step] = {}
    measured: list[Comparison] = []
    naive_rate: dict[str, float] = {}  # model -> seconds per token, as measured last
    todo = cases(options)
    for model, b, p, n, variants in todo:
        case = f"{model}, B {b}, P {p}, N {n}, L {options.title}, {options.dtype}"
        tokens = b * (1 + n) * (p + options.title)
        slow = sum(name not in FAST for name in variants)
        if not report.has_time(case, needs=slow * tokens * naive_rate.get(model, 0.0)):
            continue
        users = make_users(b, p, options.title, n, MODELS[model]["v"])
        if model not in steps:
            if on_gpu:
                steps.clear()  # its memory is wanted
            lengths = {other[2] for other in todo if other[0] == model}
            steps[model] = Step(model, getattr(torch, options.dtype), lengths, options.title)
        if options.profile:
            print_profile(steps[model].variants(users, ["napo"])["napo"].bind())
            return
        measured.append(run_case(report, case, steps[model], users, variants, options))
        if "naive S-DPO" in measured[-1].once:
            naive_rate[model] = measured[-1].once["naive S-DPO"] / tokens
        report.write()
        if on_gpu:
            measured.clear()
            torch.cuda.empty_cache()
    sweep(report, measured)
    add_line(report, options)
    if report.rows:
        report.finish()


def cases(options: argparse.Namespace) -> list[tuple[str, int, int, int, Sequence[str]]]:
    """(model, B, P, N, variants). On the CPU: every way once with one user; four users, with the naive step where it
    takes less than a minute; then lines over N and P with one user, and another model."""
    if options.model or options.profile:
        model = options.model or "SmolLM2-135M"
        return [(model, options.users, options.prompt, options.negatives, options.variants)]
    if options.smoke:
        return [("tiny", 2, 12, 3, ALL), *(("tiny", 1, 12, n, QUICK) for n in (1, 2, 4))]
    one, small = "Llama-3.2-1B", "SmolLM2-135M"
    if device.on_gpu():
        return [
            (one, 8, 200, 8, ALL),
            *((small, 4, 200, n, (*QUICK, "naive SimPO")) for n in (1, 2, 4, 8, 19, 32)),
            *((small, 4, p, 8, QUICK) for p in (100, 500, 1000)),
            *((one, 4, 200, n, QUICK) for n in (1, 19)),
        ]
    return [
        (small, 1, 200, 4, ALL),
        (small, 4, 200, 8, QUICK),
        (small, 4, 200, 1, QUICK),
        *((small, 4, 200, n, ("napo",)) for n in (19, 32)),
        *((small, 1, 200, n, QUICK) for n in (1, 2, 8)),
        *((small, 1, p, 1, QUICK) for p in (100, 500, 1000)),
        ("SmolLM2-360M", 1, 200, 1, QUICK),
    ]


def make_users(count: int, prompt: int, title: int, negatives: int, vocabulary: int) -> Users:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(1, vocabulary, (length,), generator=generator).tolist()

    prompts = [draw(prompt) for _ in range(count)]
    return prompts, [[[*draw(title - 1), END] for _ in range(1 + negatives)] for _ in range(count)]


def make_base(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    shape = dict(MODELS[name])
    names = {"h": "hidden_size", "i": "intermediate_size", "n": "num_hidden_layers", "a": "num_attention_heads"}
    names |= {"k": "num_key_value_heads", "v": "vocab_size"}
    config = transformers.LlamaConfig(**{names.get(key, key): value for key, value in shape.items()})
    with torch.device(device.current):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


class Step:
    """The variants of one optimiser step over the same users, all on one base model with adapters of their own kind."""

    def __init__(self, name: str, dtype: torch.dtype, prompts: set[int], title: int) -> None:
        """`prompts`: the lengths for which the ways of scoring are compared with fp64, `self.errors`."""
        self.name, self.dtype = name, dtype
        base = make_base(name, dtype)
        adapters = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        # PEFT's own layers for the naive ways, fused ones (same weights) for ours
        self.model = peft.get_peft_model(base, adapters, autocast_adapter_dtype=False)
        before = {m: m.forward for m in self.model.modules()}
        fuse(self.model)
        self.layers = [m for m in before if "forward" in vars(m)]
        self.plain = [before[m] for m in self.layers]
        self.fused = [m.forward for m in self.layers]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # transformers' default
        self.scorer = CandidateScorer(self.model)
        on_gpu = device.on_gpu()
        self.graphed = CandidateScorer(self.model, cuda_graphs=True) if on_gpu else None
        checked = {p: make_users(1, p, title, 1, MODELS[name]["v"]) for p in sorted(prompts)}
        wide = make_base(name, dtype).double()  # gone before anything is measured
        self.errors = {p: self.errors_of(wide, users) for p, users in checked.items()}

    def with_layers(self, forwards: list[Any], run: Callable[[], Any]) -> Any:
        for module, forward in zip(self.layers, forwards, strict=True):
            module.forward = forward
        return run()

    @torch.no_grad()
    def errors_of(self, wide: Any, users: Users) -> dict[str, float | Exception]:
        """How far the log-probs of each way of scoring are from those of `wide`, or what it raised. No step has been
        taken: the adapters change nothing."""
        batch = concatenated(*users, END, device.current)
        truth = sequence_logps(wide, *batch, answers_only=True)
        ways = {
            "packed": (self.fused, lambda: self.scorer(pack(*users, pad_id=END))),
            "naive": (self.plain, lambda: sequence_logps(self.model, *batch)),
            "answers": (self.plain, lambda: sequence_logps(self.model, *batch, answers_only=True)),
            "prefix": (self.plain, lambda: self.shared_prefix(*users)),
        }
        if self.graphed is not None:  # a shape is recorded when it comes again
            graphed, packed = self.graphed, pack(*users, pad_id=END)
            ways["graphs"] = (self.fused, lambda: [graphed(packed) for _ in range(3)][-1])
        tokens, vocabulary = len(users[1][0][0]), self.scorer.causal_lm.config.vocab_size
        errors: dict[str, float | Exception] = {}
        for way, (forwards, run) in ways.items():
            try:
                errors[way] = log_prob_error(self.with_layers(forwards, run), truth, tokens, vocabulary)
            except Exception as error:  # the variants that score in this way are named with it
                errors[way] = error.with_traceback(None)  # which holds its tensors
        return errors

    def variants(self, users: Users, names: Sequence[str]) -> dict[str, Variant]:
        def naive(**how: Any) -> Tensor:
            return naive_step(self.model, self.optimizer, *users, pad_id=END, **how)

        runs: dict[str, tuple[list[Any], Callable[[], Tensor]]] = {
            "napo": (self.fused, lambda: self.packed(users, self.scorer)),
            "napo + reference": (self.fused, lambda: self.packed(users, self.scorer, reference=True)),
            "naive S-DPO": (self.plain, naive),
            "naive SimPO": (self.plain, lambda: naive(reference=False, average=True)),
            "answers only": (self.plain, lambda: naive(answers_only=True)),
            "pairs": (self.plain, lambda: naive(pairs=True)),
            "prefix sharing": (self.plain, lambda: self.optimise(self.shared_prefix(*users), len(users[0]))),
        }
        if self.graphed is not None:
            graphed = self.graphed
            runs["napo, CUDA graphs"] = (self.fused, lambda: self.packed(users, graphed))
            runs["napo + reference, CUDA graphs"] = (self.fused, lambda: self.packed(users, graphed, reference=True))
            # if all users at once do not fit
            runs["naive S-DPO, 2 parts"] = (self.plain, lambda: naive(micro_batches=2))
            runs["pairs, 4 parts"] = (self.plain, lambda: naive(pairs=True, micro_batches=4))
        wanted = [name for name in runs if name.partition(",")[0] in names]
        return {name: self._variant(*runs[name]) for name in wanted}

    def _variant(self, forwards: list[Any], run: Callable[[], Tensor]) -> Variant:
        return Variant(lambda _: run(), lambda: self.with_layers(forwards, lambda: None), required=True)

    def packed(self, users: Users, scorer: Any, reference: bool = False) -> Tensor:
        batch = pack(*users, pad_id=END, width_multiple=width_multiple(device.current))
        logps = scorer(batch)
        if reference:
            with torch.no_grad(), without_adapter(self.model):
                frozen = scorer(batch)
            logps = logps - frozen
        return self.optimise(logps, len(users[0]), margin=0.0 if reference else 1.0)

    def optimise(self, logps: Tensor, users: int, margin: float = 0.0) -> Tensor:
        logps = logps.view(users, -1)
        loss = napo_loss(logps[:, 0], logps[:, 1:], margin=margin)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def shared_prefix(self, prompts: Any, titles: Any) -> Tensor:
        """Prompts shared in the body; eager fp32 logits at every answer position, a position for each title."""
        batch = pack(prompts, titles, pad_id=END, share_prefixes=False).to(device.current)
        causal_lm = self.scorer.causal_lm
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        hidden = run_body(causal_lm, **inputs, attention_mask=packed_masks(causal_lm, batch))
        rows = hidden.flatten(0, 1)[batch.predicting_rows[batch.pair_rows]]  # (Q, H)
        logps = causal_lm.lm_head(rows).float().log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        return logps.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, logps)


def log_prob_error(logps: Tensor, truth: Tensor, tokens: int, vocabulary: int) -> float:
    """Relative error of what differs from the uniform distribution: random weights are close to that, and beside its
    large log-probs no error of the body would show."""
    uniform = tokens * float(np.log(vocabulary))
    return distance(logps.double() + uniform, truth + uniform)


def run_case(
    report: Report, case: str, step: Step, users: Users, names: Sequence[str], options: argparse.Namespace
) -> Comparison:
    errors = step.errors[len(users[0][0])]

    def error(name: str, _: Tensor) -> float:
        found = errors[WAYS[name.partition(",")[0]]]
        if isinstance(found, Exception):
            raise found
        return found

    # A first step, after which the optimiser's state and the libraries' buffers are there; a failure is named below.
    with contextlib.suppress(Exception):
        step.variants(users, ["napo"])["napo"].bind()()

    def more_columns(rows: list[dict[str, Any]]) -> None:
        ours = next(row for row in rows if row["variant"] == "napo")
        for row in rows:
            if row is not ours and row.get("peak_mib") and ours.get("peak_mib"):
                row["times_napo_memory"] = round(row["peak_mib"] / ours["peak_mib"], 2)

    return compare(
        report,
        case,
        dict(step.variants(users, names)),
        error=error,
        tolerance=1e-3 if options.dtype == "float32" else TOLERANCE,
        seconds=3.0,
        repeats=7,
        derive=more_columns,
    )


def add_line(report: Report, options: argparse.Namespace) -> None:
    """The line that fits the time of our step best over the number of negatives."""
    model, b, p = LINE[options.smoke]
    of_line = re.compile(rf"{model}, B {b}, P {p}, N (\d+), ")
    found = [(of_line.match(row["case"]), row) for row in report.rows if row["variant"] == "napo"]
    seconds = {int(match[1]): row["best_ms"] for match, row in found if match and "best_ms" in row}
    if len(seconds) < 3:
        return
    negatives, times = np.array(sorted(seconds.items())).T
    slope, intercept = np.polyfit(negatives, times, 1)
    away = float((np.abs(slope * negatives + intercept - times) / times).max())
    facts = {"ms_without_negatives": intercept, "ms_a_negative": slope, "furthest_percent": 100 * away}
    case = f"{model}, B {b}, P {p}, L {options.title}, {options.dtype}: a line over N"
    report.add(case, "napo", **{key: round(float(value), 2) for key, value in facts.items()}, points=len(times))


def print_profile(step: Callable[[], Tensor]) -> None:
    kinds = {
        "attention": r"[Aa]ttention|::bmm|_softmax",
        "matmul": r"mm_?$|linear$|mkldnn|matmul",
        "head": r"napo|logps",
    }
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"{'operator':48} {'ms':>9} {'share':>7} {'calls':>7}    of {total / 1e6:.2f} s")
    for event in events[:24]:
        own = event.self_cpu_time_total
        print(f"{event.key[:48]:48} {own / 1e3:9.1f} {own / total:7.1%} {event.count:7}")
    shares: dict[str, float] = {}
    for event in events:
        kind = next((kind for kind, names in kinds.items() if re.search(names, event.key)), "the rest")
        shares[kind] = shares.get(kind, 0) + event.self_cpu_time_total / total
    print(", ".join(f"{kind} {share:.1%}" for kind, share in sorted(shares.items(), key=lambda item: -item[1])))
