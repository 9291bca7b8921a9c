"""Costs of our kernels and programs, beside those of bare matmuls or traffic, PyTorch and other libraries.

`python -m benchmarks` is the one command (`__main__.py`), from the repository's root. Files, from the bottom up:

    machine, device      hardware and versions of a result; the device that is measured
    memory, timing       peaks of memory, and fair clocks
    report               rows as a table and as JSON, the budget, failures
    comparison           the variants of one case: checked against fp64, then measured in turn
    options              the command line of a benchmark
    peers, naive_dpo     what ours is compared with
    one file for each op or path; `BENCHMARKS` names them
    render, compare_runs, gpu_code    tables and plots; two runs side by side; machine code of the GPU kernels
"""

from __future__ import annotations

# name on the command line -> module, and what it measures
BENCHMARKS: dict[str, tuple[str, str]] = {
    "head": ("linear_sequence_logps", "log-probabilities from hidden states, forward and backward, against every peer"),
    "catalogue": ("catalogue_sequence_logps", "the head over a catalogue's titles, and the tokens that passes cost"),
    "rows": ("sequence_logps", "log-probabilities from logits, forward and backward"),
    "loss": ("napo_loss", "shared negatives and the loss, forward and backward, by size of the pool"),
    "step": ("training_step", "one optimiser step of a language model with 1 + N titles per user"),
    "sharing": ("sharing", "one step of NAPOTrainer with shared negatives, against the same without sharing"),
    "evaluation": ("evaluation", "scoring 20 candidates per user without gradients"),
    "prepare": ("prepare", "`napo prepare goodreads` on a generated file of millions of lines (CPU)"),
    "lists": ("lists", "ranking the test lists of a prepared data set, packed against one candidate at a time"),
    "serve": ("serve", "`napo serve` under 32 concurrent clients, against one"),
    "micro": ("gpu_micro", "the pieces of a GPU's time, without checks, in about 40 seconds"),
}
