"""Preference optimisation of any causal language model on rows of one chosen and many rejected answers.

    python examples/train_preferences.py --model my-model --rows preferences.jsonl --output_dir out --objective sdpo

``preferences.jsonl`` has one object a line: {"prompt": "...", "chosen": "...", "rejected": ["...", "..."]}. Every
option of NAPOConfig, hence of transformers' TrainingArguments, can be given. With torchrun in place of python it trains
on several GPUs, and users borrow negatives from the users of all of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from transformers import HfArgumentParser

from napo.trainer import NAPOConfig, NAPOTrainer


@dataclass
class Arguments:
    model: str = field(metadata={"help": "A local folder or a name on the hub."})
    rows: Path = field(metadata={"help": "A file of JSON lines."})
    lora_rank: int = field(default=16, metadata={"help": "Of the adapter; 0 trains the whole model."})
    held_out: float = field(default=0.1, metadata={"help": "Share of the rows, the last ones, to evaluate on."})


def main() -> None:
    arguments, config = HfArgumentParser((Arguments, NAPOConfig)).parse_args_into_dataclasses()  # type: ignore[arg-type]
    rows = [json.loads(line) for line in arguments.rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = len(rows) - int(len(rows) * arguments.held_out)
    trainer = NAPOTrainer(
        arguments.model,
        config,
        train_dataset=rows[:kept],
        eval_dataset=rows[kept:] or None,
        peft_config=LoraConfig(r=arguments.lora_rank, target_modules="all-linear") if arguments.lora_rank else None,
    )
    trainer.train()
    trainer.save_model()
    if rows[kept:]:
        figures = trainer.evaluate()
        print(f"held out: loss {figures['eval_loss']:.3f}, right {figures['eval_rewards/accuracies']:.1%}")


if __name__ == "__main__":
    main()
