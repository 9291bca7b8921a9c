"""What the commands and the demo share: each step of the work as a stage of a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from napo.data.prepared import PreparedData
from napo.data.prompts import PromptSettings, PromptStyle
from napo.files import content_hash, write_json
from napo.runs import Run, model_identity

TRAINING_OPS = ("linear_sequence_logps", "shared_negatives", "napo_loss")


def sasrec_stage(run: Run, data: PreparedData, *, seed: int, options: Mapping[str, Any]) -> None:
    """``RUN/sasrec``"""
    run.adopt(data.path)

    def work() -> None:
        from napo.recommenders.sasrec import SASRecOptions, train_sasrec

        train_sasrec(data, run.path, SASRecOptions(**_fields(SASRecOptions, {"seed": seed, **options})))

    inputs = {"data": content_hash(data.path), "seed": seed, "options": options}
    run.stage("sasrec", work, inputs=inputs, outputs=["sasrec"])


def sft_stage(
    run: Run,
    data: PreparedData,
    *,
    model: str,
    style: PromptStyle,
    seed: int,
    options: Mapping[str, Any],
    name: str = "sft",
    init_from: str | None = None,
) -> None:
    """``RUN/models/NAME`` by supervised fine-tuning, from the plain model or from another of the run's models."""
    from napo.assets import resolve_model

    run.adopt(data.path)
    prompt = PromptSettings(style=style, history=data.history_length)
    run.configure(model=model, seed=seed, **asdict(prompt))
    path = resolve_model(model)

    def work() -> None:
        from napo.finetuning.sft import SFTOptions, train_sft
        from napo.language_models.loading import LoraOptions

        chosen = _fields(SFTOptions, options)
        if isinstance(chosen.get("lora"), dict):
            chosen["lora"] = LoraOptions(**_fields(LoraOptions, chosen["lora"]))
        train_sft(
            data,
            run.path,
            SFTOptions(**chosen),
            name=name,
            model=path,
            style=style,
            init_from=init_from,
            seed=seed,
        )

    inputs = {
        "data": content_hash(data.path),
        "model": model_identity(path),
        "style": style,
        "init_from": _model_hash(run, init_from),
        "seed": seed,
        "options": options,
    }
    run.stage(name, work, inputs=inputs, outputs=[f"models/{name}"])


def train_stage(
    run: Run,
    data: PreparedData,
    *,
    objective: str,
    name: str,
    init_from: str,
    seed: int,
    options: Mapping[str, Any],
) -> None:
    """``RUN/models/NAME`` by preference optimisation of another of the run's models.

    Which backends ran the ops is kept beside the adapter, in ``kernels.json``.
    """
    from napo.assets import resolve_model

    config = run.config
    if "model" not in config:
        raise ValueError(f"run: {run.path} has no model yet; run `napo sft` first")
    if not (run.path / "sasrec").is_dir():
        raise ValueError(f"run: {run.path} has no sasrec yet; run `napo sasrec` first")

    prompt = PromptSettings.of(config)
    if data.history_length != prompt.history:
        raise ValueError(
            f"data: the prompts of {run.path} show {prompt.history} items of a history, {data.path} was prepared with "
            f"{data.history_length}; prepare it with --set history={prompt.history}, or begin another run"
        )
    path = resolve_model(config["model"])

    def work() -> None:
        import napo_kernels
        from napo.finetuning.preferences import PreferenceOptions, train_preferences

        chosen = _fields(PreferenceOptions, options)
        before = _calls(napo_kernels.backends())
        train_preferences(
            data,
            run.path,
            PreferenceOptions(**chosen),
            objective=objective,
            name=name,
            model=path,
            style=prompt.style,
            init_from=init_from,
            seed=seed,
        )
        after = _calls(napo_kernels.backends())
        ran = {op: {b: n - before[op].get(b, 0) for b, n in counts.items()} for op, counts in after.items()}
        ran = {op: {b: n for b, n in counts.items() if n} for op, counts in ran.items()}
        write_json(run.path / "models" / name / "kernels.json", ran)

    inputs = {
        "data": content_hash(data.path),
        "model": model_identity(path),
        "style": prompt.style,
        "init_from": _model_hash(run, init_from),
        "sasrec": content_hash(run.path / "sasrec"),
        "objective": objective,
        "seed": seed,
        "options": options,
    }
    run.stage(name, work, inputs=inputs, outputs=[f"models/{name}"])


def require_compiled(run: Run | None = None, name: str = "napo", ops: Sequence[str] = TRAINING_OPS) -> None:
    """Stop where the C++ kernels are not what trains: they must be available and chosen, and, once ``name`` is
    trained, be what each op ran on."""
    import torch

    import napo_kernels
    from napo_kernels.dispatch import resolve

    table = napo_kernels.backends()
    if not table["cpu"]["available"]:
        raise ValueError(f"the C++ kernels are not available: {table['cpu']['why_not']}")
    wrong = {op: resolve(op, torch.device("cpu")) for op in ops}
    if run is not None:
        from napo.files import read_json

        ran = read_json(run.path / "models" / name / "kernels.json")
        wrong = {op: ", ".join(b for b, n in ran.get(op, {}).items() if n) or "nothing" for op in ops}
    for op, backend in wrong.items():
        if backend != "cpu":
            raise ValueError(f"{op}: expected the C++ kernel (backend cpu) in training; it ran on {backend}")


def _fields(options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, whose names are all fields of the dataclass ``options``."""
    names = [field.name for field in fields(options)]
    for name in given:
        if name not in names:
            raise ValueError(f"{name}: no such option; expected one of {', '.join(names)}")
    return dict(given)


def _calls(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """{op: {backend: calls}}"""
    ops = {op for row in table.values() for op in row["ops"]}
    return {op: {b: row["calls"][op] for b, row in table.items() if op in row["calls"]} for op in sorted(ops)}


def _model_hash(run: Run, name: str | None) -> str | None:
    if name is None:
        return None
    folder: Path = run.path / "models" / name
    if not folder.is_dir():
        have = ", ".join(run.model_names()) or "none yet"
        raise ValueError(f"init-from: {run.path} has no model {name!r}; it has {have}; run `napo sft` first")
    return content_hash(folder)
