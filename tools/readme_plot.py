"""Draws docs/step.png, the README's picture, from a file of benchmarks/results/: python tools/readme_plot.py [FILE]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "2026-11-28-amd-epyc-family-26-model-2-2-cores.json"
CASE = "SmolLM2-135M, B 1, P 200, N 4, L 7, bfloat16"  # the one that all variants were measured in
LABELS = {
    "napo": "napo",
    "napo + reference": "napo with a reference model",
    "prefix sharing": "prefix sharing in plain PyTorch",
    "answers only": "logits only at the answers",
    "naive S-DPO": "S-DPO's way (with a reference)",
}


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    step = json.loads(file.read_text())["training_step"]
    rows = [row for row in step["rows"] if row["case"] == CASE and row["variant"] in LABELS]
    rows.sort(key=lambda row: -row["best_ms"])
    names = [LABELS[row["variant"]] for row in rows]
    colours = ["#1f6f4a" if row["variant"].startswith("napo") else "#b9c4c0" for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 2.4), sharey=True, layout="constrained")
    for axes, column, title, unit in ((left, "best_ms", "time", "ms"), (right, "peak_mib", "memory", "MiB")):
        bars = axes.barh(names, [row[column] for row in rows], color=colours, height=0.62)
        axes.bar_label(bars, [f" {row[column]:,.0f} {unit}" for row in rows], fontsize=9)
        axes.set_title(title, loc="left", fontsize=10, weight="bold")
        axes.set_xlim(0, 1.25 * max(row[column] for row in rows))
        axes.xaxis.set_visible(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(left=False, labelsize=9.5)
    figure.savefig(ROOT / "docs" / "step.png", dpi=110, metadata={"Software": None})
    print(f"{CASE}; {step['machine']['cpu']}, {step['date'][:10]}")


if __name__ == "__main__":
    main()
