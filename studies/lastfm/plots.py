"""The plots of results.json."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib import rcParams
from matplotlib.axes import Axes

from napo.evaluation.metrics import BUCKETS
from napo.files import read_json, replacing
from napo.recommenders.registry import BASELINES
from studies.lastfm.config import CONTROL, SFT

rcParams["svg.hashsalt"] = "napo"  # the same figures give the same bytes

CURVES = {
    "logps/chosen": "log-probability of the chosen title",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "share above all own negatives",
    "gamma": "mean margin gamma",
}
SHOWN = ("napo", "napo-alone", "napo-marginless", "softmax", "sdpo", "simpo", "napo-authors")


def draw(results: Path, out: Path) -> list[Path]:
    """Writes the plots for which ``results`` has figures; returns them."""
    plt.switch_backend("Agg")  # no screen is needed
    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    found = read_json(results)
    figures = {"contrasts": _contrasts(found.get("contrasts", {}))}  # older results have none
    for seed, of_seed in found["seeds"].items():
        for name, plot in (("sft", _sft), ("training", _training), ("hit_rates", _hit_rates), ("popularity", _bias)):
            figures[f"{name}-seed{seed}"] = plot(of_seed)
    for name, figure in figures.items():
        if figure is None:
            continue
        path = out / f"{name}.svg"
        with replacing(path) as aside:
            figure.savefig(aside, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        drawn.append(path)
    return drawn


def _contrasts(found: dict[str, Any]) -> Any:
    """The differences in HR@1 that the study asks for: the interval, the mean, and a small dot for each training."""
    splits = {split: records for split, records in found.items() if records}
    if not splits:
        return None
    most = max(map(len, splits.values()))
    figure, axes = plt.subplots(
        1, len(splits), figsize=(5.5 * len(splits), 0.8 + 0.3 * most), squeeze=False, layout="constrained"
    )
    for ax, (split, records) in zip(axes[0], splits.items(), strict=True):
        for place, record in enumerate(reversed(records)):
            ax.plot(record["hr@1"]["ci"], [place, place], color="tab:gray", linewidth=1)
            ax.plot(record["hr@1"]["each"], [place] * record["seeds"], ".", markersize=3, color="tab:blue")
            ax.plot(record["hr@1"]["difference"], place, "o", markersize=5, color="tab:red")
        ax.set_yticks(range(len(records)), [f"{r['name']} ({r['seeds']})" for r in reversed(records)], fontsize=7)
        ax.axvline(0, color="tab:green", linewidth=0.6)
        _label(ax, f"difference in HR@1, {split} lists, 95% interval", "")
    return figure


def _sft(found: dict[str, Any]) -> Any:
    """Validation during SFT, by tokens."""
    model = found["models"].get(SFT)
    log = [] if model is None else model["log"]
    curves = {key: [(entry["step"], entry[key]) for entry in log if key in entry] for key in ("eval_loss", "eval_hr@1")}
    if not any(curves.values()):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    last = max(entry["step"] for entry in log)
    for ax, (key, label) in zip(axes, (("eval_loss", "validation NLL a token"), ("eval_hr@1", "HR@1")), strict=True):
        ax.plot([step / last * model["tokens"] for step, _ in curves[key]], [y for _, y in curves[key]], marker="o")
        _label(ax, "tokens of SFT", label)
    return figure


def _training(found: dict[str, Any]) -> Any:
    """What the preference trainings log, by step."""
    models = {name: found["models"][name] for name in SHOWN if name in found["models"]}
    if not models:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    for ax, (key, label) in zip(axes.flat, CURVES.items(), strict=True):
        for name, model in models.items():
            points = [(entry["step"], entry[key]) for entry in model["log"] if key in entry and "loss" in entry]
            ax.plot([step for step, _ in points], [y for _, y in points], label=name, linewidth=1)
        _label(ax, "step", label)
    axes[0, 0].legend(fontsize=7)
    return figure


def _hit_rates(found: dict[str, Any]) -> Any:
    """HR@1 with its interval, on validation and test lists."""
    splits = {split: found[split]["models"] for split in ("validation", "test") if found[split]["models"]}
    if not splits:
        return None
    most = max(map(len, splits.values()))
    figure, axes = plt.subplots(
        1, len(splits), figsize=(5.5 * len(splits), 0.6 + 0.24 * most), squeeze=False, layout="constrained"
    )
    for ax, (split, models) in zip(axes[0], splits.items(), strict=True):
        names = sorted(models, key=lambda name: models[name]["hr@1"])
        for place, name in enumerate(names):
            low, high = models[name]["hr@1_ci"]
            ax.plot([low, high], [place, place], color="tab:gray", linewidth=1)
            ax.plot(models[name]["hr@1"], place, "o", markersize=4, color="tab:red" if name == "napo" else "tab:blue")
        ax.set_yticks(range(len(names)), names, fontsize=7)
        _label(ax, f"HR@1, {split} lists, 95% interval", "")
        for known in (SFT, CONTROL):
            if known in models:
                ax.axvline(models[known]["hr@1"], color="tab:green", linewidth=0.6)
    return figure


def _bias(found: dict[str, Any]) -> Any:
    """Popularity of what is recommended first, and HR@1 by the popularity of the right item."""
    models = found["validation"]["models"]
    if not models:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, record in models.items():
        left.plot(record["hr@1"], record["arp"], "o", markersize=4)
        if name in (*SHOWN, *BASELINES, SFT):
            left.annotate(name, (record["hr@1"], record["arp"]), fontsize=6, xytext=(3, 2), textcoords="offset points")
    _label(left, "HR@1, validation lists", "mean popularity of the first item (ARP)")
    for name in _present(models, (*BASELINES, SFT, CONTROL, *SHOWN)):
        rates = [models[name]["hr@1_by_popularity"].get(bucket, {}).get("hr@1") for bucket in BUCKETS]
        if None not in rates:
            right.plot(range(len(BUCKETS)), rates, marker="o", markersize=3, linewidth=1, label=name)
    right.set_xticks(range(len(BUCKETS)), BUCKETS)
    _label(right, "popularity of the right item", "HR@1")
    right.legend(fontsize=6)
    return figure


def _present(models: dict[str, Any], names: Iterable[str]) -> list[str]:
    return [name for name in names if name in models]


def _label(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    for path in draw(given.results, given.out):
        print(path)


if __name__ == "__main__":
    main()
