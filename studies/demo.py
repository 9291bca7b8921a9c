"""The table of studies/demo.md from finished demos.

for seed in 0 1 2; do make demo SEED=$seed; done
python studies/demo.py runs/demo-0 runs/demo-1 runs/demo-2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

MODELS = ("popularity", "itemknn", "sasrec", "sft", "sft-longer", "napo")
PAIRS = (("napo", "sft"), ("napo", "sft-longer"), ("sft-longer", "sft"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    metrics = [{record["model"]: record for record in json.loads((run / "metrics.json").read_text())} for run in runs]
    names = " | ".join(run.name for run in runs)
    print(f"| HR@1 (MRR) | {names} |\n|---{'|---' * len(runs)}|")
    for model in MODELS:
        print(f"| {model} | " + " | ".join(f"{m[model]['hr@1']:.3f} ({m[model]['mrr']:.3f})" for m in metrics) + " |")
    print(f"\n| difference in HR@1 (95% interval) | {names} |\n|---{'|---' * len(runs)}|")
    for first, second in PAIRS:
        cells = []
        for run in runs:
            for pair in json.loads((run / "comparisons.json").read_text()):
                if (pair["model"], pair["other"]) == (first, second):
                    low, high = pair["hr@1_difference_ci"]
                    cells.append(f"{pair['hr@1_difference']:+.3f} ({low:+.3f}, {high:+.3f})")
        print(f"| {first} - {second} | " + " | ".join(cells) + " |")
    print(f"\n| greedy HR@1, share of valid answers | {names} |\n|---{'|---' * len(runs)}|")
    for model in MODELS[3:]:
        cells = [f"{m[model]['hr@1_greedy']:.2f}, {m[model]['valid_ratio']:.2f}" for m in metrics]
        print(f"| {model} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
