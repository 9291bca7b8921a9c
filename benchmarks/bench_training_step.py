"""One optimiser step with 1 + N titles a user: packed against the naive way, on the CPU.

    python benchmarks/bench_training_step.py                                             packed and naive, N 8
    python benchmarks/bench_training_step.py --variants packed --negatives 1 2 4 8 12 19       a line through the times
    python benchmarks/bench_training_step.py --variants packed --prompts 100 200 500 1000      the same over prompts
    python benchmarks/bench_training_step.py --variants packed --profile                       where the time goes

Shape of SmolLM2-135M with random weights; LoRA r 16 on q, k, v, o, in the model's dtype, the same in every variant:

    packed    napo: pack() included, body once over prompt and titles, fused head, NAPO's loss (no reference model)
    naive     naive_dpo.py: every title a full sequence, fp32 logits everywhere, reference forward
    answers   the same with logits at answer positions alone

Log-probs are compared before anything is timed. Memory is the peak resident size of a step above what was there.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
import transformers
from harness import Report, Timing, interleave, peak_memory, require_close
from naive_dpo import concatenated, naive_step, sequence_logps
from torch import Tensor

from napo.lora import fuse_lora
from napo.norms import fuse_norms
from napo.scoring import CandidateScorer, pack
from napo_kernels import napo_loss

SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
END = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["packed", "naive"], choices=["packed", "naive", "answers"])
    parser.add_argument("--negatives", nargs="+", type=int, default=[8])
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--prompts", nargs="+", type=int, default=[200], help="tokens of a prompt")
    parser.add_argument("--title", type=int, default=7, help="tokens of a title, end token included")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, to try the benchmark out")
    parser.add_argument("--repeats", type=int, default=3, help="timed packed steps; the naive ones run once")
    parser.add_argument("--name", default="bench_training_step", help="of the file in results/")
    parser.add_argument("--profile", action="store_true", help="profile the packed step instead of timing it")
    args = parser.parse_args()

    report = Report(args.name)
    packed_seconds: dict[int, float] = {}
    for prompt, negatives in itertools.product(args.prompts, args.negatives):
        users = make_users(args.users, prompt, args.title, negatives)
        steps = {variant: make_step(variant, users, args) for variant in args.variants}
        if args.profile:
            print_profile(steps["packed"])
            continue
        timings: dict[str, Timing] = {}
        peaks: dict[str, int] = {}
        for variant, step in steps.items():
            timings[variant], peaks[variant] = measure(step, args.repeats if variant == "packed" else 0)
        case = f"B {args.users}, P {prompt}, N {negatives}, L {args.title}, {args.dtype}"
        for variant, timing in timings.items():
            facts: dict[str, Any] = {"peak_gb": round(peaks[variant] / 1e9, 3)}
            if variant != "packed" and "packed" in timings:
                facts["times_slower"] = round(timing.median / timings["packed"].median, 2)
                facts["times_memory"] = round(peaks[variant] / peaks["packed"], 2)
            report.add(case, variant, timing, **facts)
        if "packed" in timings:
            packed_seconds[negatives] = timings["packed"].median
    if len(packed_seconds) > 2:
        print_line(packed_seconds)
    if report.rows:
        report.write()


def make_users(count: int, prompt: int, title: int, negatives: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(1, SMOLLM2_135M["vocab_size"], (length,), generator=generator).tolist()

    prompts = [draw(prompt) for _ in range(count)]
    return prompts, [[[*draw(title - 1), END] for _ in range(1 + negatives)] for _ in range(count)]


def make_model(dtype: torch.dtype, layers: int | None) -> Any:
    torch.manual_seed(0)
    shape = {**SMOLLM2_135M, **({"num_hidden_layers": layers} if layers else {})}
    base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape), dtype=dtype)
    options = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return peft.get_peft_model(base, options, autocast_adapter_dtype=False)


def make_step(variant: str, users: tuple[Any, Any], args: argparse.Namespace) -> Callable[[], Tensor]:
    """One optimiser step on a model of its own."""
    model = make_model(getattr(torch, args.dtype), args.layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    prompts, titles = users
    if variant != "packed":
        return lambda: naive_step(model, optimizer, prompts, titles, pad_id=END, answers_only=variant == "answers")
    with torch.no_grad():
        truth = sequence_logps(model, *concatenated(prompts[:1], titles[:1], END))
        fuse_lora(model)
        fuse_norms(model)
        scores = CandidateScorer(model)(pack(prompts[:1], titles[:1], pad_id=END))
    require_close("packed log-probs", scores, truth, relative=1e-4 if args.dtype == "float32" else 1e-2)

    def step() -> Tensor:
        logps = CandidateScorer(model)(pack(prompts, titles, pad_id=END)).view(len(prompts), -1)
        loss = napo_loss(logps[:, 0], logps[:, 1:], margin=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def measure(step: Callable[[], Tensor], repeats: int) -> tuple[Timing, int]:
    """Time and peak memory. The first step gives the peak and warms up; it is timed where nothing else is: a naive step
    takes most of a minute."""
    seconds: list[float] = []

    def first() -> None:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)

    peak = peak_memory(first)
    if repeats:
        return interleave({"packed": step}, repeats=repeats, warmup=0)["packed"], peak
    return Timing(seconds), peak


def print_line(seconds: dict[int, float]) -> None:
    negatives, times = np.array(list(seconds.items())).T
    slope, intercept = np.polyfit(negatives, times, 1)
    away = np.abs(slope * negatives + intercept - times) / times
    print(f"packed: {intercept:.3f} s + {slope:.4f} s a negative; at most {away.max():.1%} away from this line")


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


if __name__ == "__main__":
    main()
