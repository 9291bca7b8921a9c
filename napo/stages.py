"""The stages of a run folder, which the commands and the demo share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from napo import ranks
from napo.data.prepared import PreparedData
from napo.data.prompts import PromptSettings, PromptStyle
from napo.files import content_hash, remove, write_json
from napo.identity import model_identity
from napo.options import made
from napo.runs import Origin, Run, checked_model_name

TRAINING_OPS = ("shared_negatives", "napo_loss")
"""Ops with compiled kernels that NAPO trains with, whatever its log-probabilities are normalised over."""


def check_titles(data: PreparedData, model: str, style: PromptStyle = "history") -> None:
    """Raise ValueError if the model's tokenizer cannot write the titles, or tell them apart, before anything is trained
    in vain."""
    from napo.data.prompts import PromptEncoder
    from napo.language_models.loading import load_tokenizer

    PromptEncoder(load_tokenizer(model), data.titles, noun=data.noun, style=style)


def sasrec_stage(
    run: Run, data: PreparedData, *, seed: int, options: Mapping[str, Any], overwrite: bool = False
) -> None:
    """``RUN/sasrec``"""
    from napo.recommenders.options import SASRecOptions
    from napo.recommenders.sasrec_training import train_sasrec

    ranks.only_one("napo sasrec")
    chosen = made(SASRecOptions, {"seed": seed, **options})
    defaults = {name: value for name, value in asdict(SASRecOptions()).items() if name != "seed"}
    sha256 = run.check_data(data.path)

    def work(aside: Path) -> None:
        train_sasrec(data, aside, chosen)

    with run.writing():
        run.stage(
            "sasrec",
            work,
            options={"seed": seed, "options": options},
            defaults={"options": defaults},
            inputs={"data": sha256},
            outputs=["sasrec"],
            overwrite=overwrite,
        )
        run.adopt(data.path, sha256)


def sft_stage(
    run: Run,
    data: PreparedData,
    *,
    style: PromptStyle,
    seed: int,
    options: Mapping[str, Any],
    model: str | None = None,
    name: str = "sft",
    init_from: str | None = None,
    overwrite: bool = False,
    report_to: Sequence[str] = (),
) -> None:
    """``RUN/models/NAME`` by supervised fine-tuning, from the plain ``model`` or from another of the run's models."""
    from napo.assets import SMOLLM2
    from napo.finetuning.options import SFTOptions
    from napo.finetuning.sft import train_sft

    checked_model_name(name, own="sft")
    settings = made(SFTOptions, options)
    parent = _parent(run, init_from, name)
    prompt = settings.prompt_settings(style, data.history_length)
    contents = {}
    if settings.distill:
        if not (run.path / "sasrec").is_dir():
            raise ValueError(
                f"distill: {settings.distill:g} needs the run's SASRec, got none in {run.path}; run "
                f"`{run.command('sasrec', data=data.path)}` first, or set distill=0"
            )
        run.check_unchanged("sasrec", "sasrec")
        contents["sasrec"] = content_hash(run.path / "sasrec")
    origin = Origin(
        by="sft",
        parent=init_from,
        seed=seed,
        options=dict(options),
        **_made_from(run, data, prompt, model or (parent.model if parent else SMOLLM2), init_from),
    )

    def work(aside: Path) -> None:
        out = aside / "models" / name
        train_sft(
            data,
            run.path,
            settings,
            name=name,
            model=origin.model,
            style=style,
            init_from=init_from,
            seed=seed,
            out=out,
            resume=True,
            report_to=report_to,
        )
        if ranks.rank() == 0:
            write_json(out / "origin.json", origin)

    defaults = asdict(SFTOptions())
    _model_stage(run, data, name, work, origin, {"style": style}, defaults, contents, overwrite)


def train_stage(
    run: Run,
    data: PreparedData,
    *,
    objective: str,
    name: str,
    init_from: str,
    seed: int,
    options: Mapping[str, Any],
    overwrite: bool = False,
    report_to: Sequence[str] = (),
) -> None:
    """``RUN/models/NAME`` by preference optimisation of another of the run's models.

    Which backends ran the ops is kept beside the adapter, in ``kernels.json``.
    """
    import napo_kernels
    from napo.finetuning.options import PreferenceOptions
    from napo.finetuning.preferences import train_preferences

    checked_model_name(name)
    settings = made(PreferenceOptions, options)
    if not run.model_names():
        raise ValueError(f"run: {run.path} has no model yet; run `{run.command('sft', data=data.path)}` first")
    if not (run.path / "sasrec").is_dir():
        raise ValueError(f"run: {run.path} has no sasrec yet; run `{run.command('sasrec', data=data.path)}` first")
    run.check_unchanged("sasrec", "sasrec")
    parent = _parent(run, init_from, name)
    assert parent is not None
    origin = Origin(
        by="train",
        parent=init_from,
        seed=seed,
        options={"objective": objective, **options},
        **_made_from(run, data, parent.prompt, parent.model, init_from),
    )

    def work(aside: Path) -> None:
        out = aside / "models" / name
        before = _calls(napo_kernels.backends())
        train_preferences(
            data,
            run.path,
            settings,
            objective=objective,
            name=name,
            model=origin.model,
            prompt=parent.prompt,
            init_from=init_from,
            seed=seed,
            out=out,
            resume=True,
            report_to=report_to,
        )
        if ranks.rank() > 0:
            return
        after = _calls(napo_kernels.backends())
        ran = {op: {b: n - before[op].get(b, 0) for b, n in counts.items()} for op, counts in after.items()}
        write_json(out / "kernels.json", {op: {b: n for b, n in counts.items() if n} for op, counts in ran.items()})
        write_json(out / "origin.json", origin)

    contents = {"sasrec": content_hash(run.path / "sasrec")}
    defaults = asdict(PreferenceOptions())
    _model_stage(run, data, name, work, origin, {"objective": objective}, defaults, contents, overwrite)


def combine_stage(run: Run, data: PreparedData, *, model: str) -> None:
    """``RUN/combinations/MODEL+sasrec.json``, and sasrec+rules.json, the control: weights fitted on
    validation rows."""
    from napo.evaluation.combine import fit_combination
    from napo.recommenders.combination import FOLDER, FORMER_CONTROL, combined_name, parts_of
    from napo.recommenders.registry import BASELINES, find

    ranks.only_one("napo combine")
    if model in BASELINES and model != "sasrec":
        raise ValueError(
            f"model: {model!r} is a part of every combination or of none; expected a language model or sasrec"
        )
    find(run, model)  # before the control is made
    if model != "sasrec":  # what the language model has to beat
        combine_stage(run, data, model="sasrec")
    inputs = {name: find(run, name).fingerprint(run) for name in parts_of(model)}
    inputs["data"] = run.check_data(data.path)
    run.adopt(data.path, inputs["data"])  # a run of an older napo keeps no sequences yet
    output = f"{FOLDER}/{combined_name(model)}.json"

    def work(aside: Path) -> None:
        (aside / FOLDER).mkdir(exist_ok=True)
        write_json(aside / output, fit_combination(run, data, model))

    run.stage(f"combine-{model}", work, inputs=inputs, outputs=[output], ask=False)
    if model == "sasrec":  # it has taken the other's place
        with run.writing():
            remove(run.path / FOLDER / f"{FORMER_CONTROL}.json")


def _model_stage(
    run: Run,
    data: PreparedData,
    name: str,
    work: Callable[[Path], None],
    origin: Origin,
    choices: Mapping[str, Any],
    defaults: Mapping[str, Any],
    contents: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """The stage of a model of the run: what was chosen, the defaults of the other options, and the content of what it
    is made from."""
    with run.writing():
        run.stage(
            name,
            work,
            options={
                "by": origin.by,
                "model": origin.model,
                "init_from": origin.parent,
                "seed": origin.seed,
                **choices,
                "options": {key: value for key, value in origin.options.items() if key not in choices},
            },
            defaults={"options": defaults},
            inputs={
                "data": origin.data_sha256,
                "model": origin.model_identity,
                "init_from": origin.parent_sha256,
                **contents,
            },
            outputs=[f"models/{name}"],
            overwrite=overwrite,
        )
        run.adopt(data.path, origin.data_sha256)


def _parent(run: Run, init_from: str | None, name: str) -> Origin | None:
    """How the model to start from was made. It must not be, nor come from, the one that is to be made."""
    if init_from is None:
        return None
    parent = run.origin(init_from)
    line = [init_from]
    while (above := run.origin(line[-1]).parent) and above not in line:
        if above not in run.model_names():
            break
        line.append(above)
    if name in line:
        raise ValueError(f"name: {name!r} is what {init_from} is trained from, or is it; give another --name")
    return parent


def _made_from(
    run: Run, data: PreparedData, prompt: PromptSettings, model: str, init_from: str | None
) -> dict[str, Any]:
    """The fields of an Origin that tell by content from what a model is made: prompts, data, parent and base."""
    parent = run.origin(init_from) if init_from else None
    return {
        "style": prompt.style,
        "history": prompt.history,
        "normalise": prompt.normalise,
        "data_sha256": run.check_data(data.path),
        "parent_sha256": run.adapter_sha256(init_from) if init_from else None,
        **_base(model, parent),
    }


def _base(model: str, parent: Origin | None) -> dict[str, str]:
    """The base model as ``from_pretrained`` takes it, and its identity, which must be that of the parent's base."""
    from napo.assets import resolve_model

    path = resolve_model(model)
    if Path(path).is_dir():
        path = str(Path(path).resolve())
    identity = model_identity(path)
    if parent is not None and identity != parent.model_identity:
        raise ValueError(
            f"model: {model} is not, or no longer, the model that the adapter to start from was trained on "
            f"({parent.model}, as it was then); train that adapter again"
        )
    return {"model": path, "model_identity": identity}


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

        run.check_unchanged(name, f"models/{name}/kernels.json")
        ran = read_json(run.path / "models" / name / "kernels.json")
        wrong = {op: ", ".join(b for b, n in ran.get(op, {}).items() if n) or "nothing" for op in ops}
    for op, backend in wrong.items():
        if backend != "cpu":
            raise ValueError(f"{op}: expected the C++ kernel (backend cpu) in training; it ran on {backend}")


def _calls(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """{op: {backend: calls}}"""
    ops = {op for row in table.values() for op in row["ops"]}
    return {op: {b: row["calls"][op] for b, row in table.items() if op in row["calls"]} for op in sorted(ops)}
