"""`napo export`: a model of a run as a plain transformers folder, adapter merged into its base, with a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

import napo
from napo.assets import SMOLLM2_WHEEL, resolve_model
from napo.data.prepared import PreparedData
from napo.data.prompts import build_prompt
from napo.data.styles import shows_candidates
from napo.data.texts import shown
from napo.evaluation.doubts import MARK, doubts, weights_sha256
from napo.evaluation.records import read_records
from napo.files import read_json, replacing, why_kept
from napo.language_models.loading import DTYPES, load_model
from napo.runs import Origin, Run

EXAMPLE = 3  # titles of the card's prompt
TAGS = "tags: [recommendation, napo]"
"""In the card of every export: a folder without it is no export that could be replaced."""
WRITTEN = (
    *("README.md", "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken"),
)
"""The files of an export, whatever its tokenizer."""
FIGURES = {"hr@1": "HR@1", "mrr": "MRR", "ndcg@5": "NDCG@5", "ndcg@10": "NDCG@10"}


def export(run: Run, name: str, out: str | Path, *, dtype: str = "auto", overwrite: bool = False) -> Path:
    """Write ``out``: weights, tokenizer and README.md, for ``AutoModelForCausalLM.from_pretrained``.

    ``overwrite``: replace an earlier export. A folder with anything else in it is never replaced. The adapter is merged
    in fp32 and the sum rounded once, to ``dtype``: bf16, fp16, fp32, or for auto that of the base model's weights.
    """
    out = Path(out).resolve()  # a link stays, and what it leads to is replaced
    if "+" in name:
        raise ValueError(f"model: {name} is a combination; export its language model, {name.split('+')[0]}")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}; got {dtype!r}")
    if name not in run.model_names():
        raise ValueError(f"model: {run.path} has no {name!r}; it has {', '.join(run.model_names()) or 'none yet'}")
    origin = run.origin(name)
    origin.check_base(name)
    base = resolve_model(origin.base)
    _check_free(out, overwrite, needed=(run.path, Path(base)))
    config = AutoConfig.from_pretrained(base)
    kind = DTYPES[dtype] if dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    adapted, tokenizer = load_model(base, dtype="fp32", device="cpu", adapter=run.adapter(name))
    model: Any = adapted.merge_and_unload()  # type: ignore[operator, union-attr]
    for parameter in model.parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"model: {name} merged into {origin.model} holds numbers that are not finite")
    model.to(kind)
    model.config.use_cache = getattr(config, "use_cache", True)  # which training switches off
    with replacing(out) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(model_card(run, name, origin, base, kind), encoding="utf-8")
    return out


def _check_free(out: Path, overwrite: bool, *, needed: Sequence[Path]) -> None:
    """Raise ValueError unless ``out`` is free, or is an earlier export that nothing ``needed`` is part of."""
    for path in needed:
        if path.resolve().is_relative_to(out):
            raise ValueError(f"out: {out} holds {path}, which the export is made from; give another folder")
    why = why_kept(out, WRITTEN, "README.md", line=TAGS)
    if why is not None:
        raise ValueError(f"out: {out} {shown(why, 80)}, so it is no export to be replaced; give another folder")
    if not overwrite and out.exists() and any(out.iterdir()):
        raise ValueError(f"out: {out} holds an export; give another folder, or pass --overwrite to replace it")


def model_card(run: Run, name: str, origin: Origin, base: str, dtype: torch.dtype) -> str:
    """The model card, README.md of its folder. It says nothing that the run does not say."""
    data = run.catalogue()
    licence = _licence(Path(base))
    parts = [
        _front_matter(origin, licence),
        f"# {name}: a recommender of {data.noun.lower()}",
        f"{Path(origin.model).name}, tuned to name the next title of a history with napo {napo.__version__}. The "
        "adapter is merged into the base model: this is a plain causal language model "
        f"({str(dtype).removeprefix('torch.')}) for transformers.",
        "## How to use it",
        _usage(data, origin),
        "## Data",
        _data_section(run, data, origin),
        "## Settings",
        _settings(run, name, origin),
        "## Figures",
        _figures(run, name),
        "## Base model and licence",
        f"- base model: `{Path(origin.model).name}`, identity `{origin.model_identity[:16]}`\n"
        f"- licence of the base model: {licence or 'not stated in its folder; look it up before you share this model'}"
        "\n- the licence of the training data may limit what the model may be used for; it is not known here",
        "## Limits",
        "It names titles of the catalogue that it was trained on and knows no others. It repeats what the log of "
        "interactions favours, popular items above all. It is not an assistant any more.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(origin: Origin, licence: str | None) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", TAGS]
    lines.append(f"base_model: {json.dumps(Path(origin.model).name)}")
    if licence:
        lines.append(f"license: {json.dumps(licence)}")
    return "\n".join([*lines, "---"])


def _usage(data: PreparedData, origin: Origin) -> str:
    titles = data.titles[: EXAMPLE + 20]
    listed = titles[EXAMPLE:] if shows_candidates(origin.prompt.style) else None
    prompt = build_prompt(origin.prompt.style, titles[:EXAMPLE], listed, noun=data.noun)
    ends = "end-of-text token" if origin.prompt.style == "candidates" else "newline"
    scored = (
        "log-probabilities are normalised over the titles of the catalogue: at each token only those count that go on "
        "with one of its titles (`napo.catalogue`)"
        if origin.normalise == "catalogue"
        else "a title's score is the sum of its tokens' log-probabilities, end token included"
    )
    tokenised = '`tokenizer(title + "\\n", add_special_tokens=False, split_special_tokens=True)`'
    return (
        f"A prompt shows the last {origin.history} titles, oldest first; the answer is the next title and ends with "
        f"the {ends}:\n\n````\n{prompt}````\n\nTitles are tokenised alone, each with its newline, and what reads like "
        f"a special token is text: {tokenised}. To rank, {scored}. Greedy answers need not be titles of the catalogue."
    )


def _data_section(run: Run, data: PreparedData, origin: Origin) -> str:
    counts, meta = data.meta["counts"], data.meta
    lines = [f"- source: {run.dataset or meta.get('source', 'unknown')}"]
    for key, label in (("users", "users"), ("items", "items"), ("interactions", "interactions")):
        if counts.get(key):
            lines.append(f"- {label}: {counts[key]}")
    lines.append("- rows: " + ", ".join(f"{number} {split}" for split, number in counts["rows"].items()))
    lines.append(f"- sha256 of the prepared data: `{origin.data_sha256}`")
    return "\n".join(lines)


def _settings(run: Run, name: str, origin: Origin) -> str:
    lines = []
    while True:
        options = json.dumps(origin.options, ensure_ascii=False, default=str)
        lines.append(f"- {name}: `napo {origin.by}`, seed {origin.seed}, options `{options}`")
        if origin.parent is None or origin.parent not in run.model_names() or len(lines) > 20:
            break
        name, origin = origin.parent, run.origin(origin.parent)
    lines = [f"{line}{', from the model below' if line is not lines[-1] else ''}" for line in lines]
    lines.append(f"- prompt style {origin.style}, last {origin.history} titles, normalised over the {origin.normalise}")
    return "\n".join(lines) + "\n\nOptions that are not named have napo's defaults."


def _figures(run: Run, name: str) -> str:
    path = run.kept("metrics.json")
    records = read_records(path) if path.is_file() else []
    own = [r for r in records if r["model"] == name and r.get("weights_sha256") == weights_sha256(run, name)]
    if not own:
        return "Not evaluated since it was trained (`napo evaluate`)."
    record, protocol = own[0], own[0]["protocol"]
    others = [r for r in records if r["lists_sha256"] == record["lists_sha256"]]
    low, high = record["hr@1_ci"]
    rows = ["| model | n | " + " | ".join(FIGURES.values()) + " |", "|---|---|" + "---|" * len(FIGURES)]
    notes = {r["model"]: doubts(run, r) for r in others}
    rows += [
        f"| {r['model']}{f' {MARK}' if notes[r['model']] else ''} | {r['n']} | "
        + " | ".join(f"{r[key]:.3f}" for key in FIGURES)
        + " |"
        for r in others
    ]
    said = dict.fromkeys(note for of_model in notes.values() for note in of_model)
    return (
        f"{protocol['split']} rows, lists of {protocol['candidates']} candidates, the right one among them; one seed. "
        f"HR@1 of {name}: {low:.3f} to {high:.3f} (interval: {protocol.get('ci', '95%, over users')}).\n\n"
        + "\n".join([*rows, *(f"\n{MARK} {note}" for note in said)])
    )


def _licence(base: Path) -> str | None:
    """As the base model's folder states it; SmolLM2's from the package index is Apache-2.0."""
    card = base / "README.md"
    if card.is_file():
        found = re.search(r"^---\n(?:.*\n)*?license:\s*[\"']?([\w.\-]+)", card.read_text("utf-8", errors="replace"))
        if found:
            return found[1]
    origin = base / "origin.json"
    if origin.is_file() and read_json(origin).get("requirement") == SMOLLM2_WHEEL.requirement:
        return "apache-2.0"
    return None
