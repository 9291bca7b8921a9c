"""The recommenders of a run by name: those that every run has, SASRec, the untuned language model, the tuned ones, and
the combinations that were fitted.

A new kind of recommender is one entry of ``KINDS``; evaluation, reports and the command line go by this list.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from napo import ranks
from napo.assets import resolve_model
from napo.data.texts import shown
from napo.files import content_hash
from napo.identity import model_identity
from napo.recommenders.combination import CONTROL, FOLDER, FORMER_CONTROL, Combination, Fitted, combined_name
from napo.runs import POPULARITY, SEQUENCES, Origin, Run

if TYPE_CHECKING:
    from napo.data.prepared import PreparedData
    from napo.recommenders.baselines import Popularity, SequentialRules
    from napo.recommenders.protocol import Recommender, ScoringOptions
    from napo.recommenders.sasrec import SASRec

logger = logging.getLogger(__name__)

Counted = TypeVar("Counted", "Popularity", "SequentialRules")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How to get at a recommender, known before it is loaded."""

    load: Callable[[Run, PreparedData, ScoringOptions], Recommender]
    fingerprint: Callable[[Run], str]
    """Changes where the recommender does. The training data, which it may learn from when it is loaded, is not part
    of it."""
    exists: Callable[[Run], bool] = lambda run: True
    by_default: bool = True
    """Evaluated where no names are given."""
    is_baseline: bool = True
    """Others are compared with it; it is compared with nobody."""
    recommends: bool = True
    """Offered by ``napo recommend`` and ``napo serve``; the others are there to be compared with."""


def _counted(run: Run, data: PreparedData, name: str, kind: type[Counted]) -> Counted:
    """From the file ``name`` that the run keeps of the data that it was trained on, which may be out of reach; without
    it, from ``data``."""
    kept = run.kept(name)
    if kept.is_file():
        return kind.read(kept, data.num_items)
    if data.path == run.path:  # what is kept of the data, which has no rows
        raise ValueError(
            f"run: {run.path} is of an older napo and keeps no training sequences; {_fit_again(run, CONTROL)}"
        )
    return kind.of(data)


def popularity_of(run: Run, data: PreparedData) -> Popularity:
    """The counts that the run keeps; without them, those of ``data``."""
    from napo.recommenders.baselines import Popularity

    return _counted(run, data, POPULARITY, Popularity)


def _popularity(run: Run, data: PreparedData, options: ScoringOptions) -> Recommender:
    return popularity_of(run, data)


def _item_knn(run: Run, data: PreparedData, options: ScoringOptions) -> Recommender:
    from napo.recommenders.baselines import ItemKNN

    return ItemKNN(data)


def _rules(run: Run, data: PreparedData, options: ScoringOptions) -> Recommender:
    from napo.recommenders.baselines import SequentialRules

    return _counted(run, data, SEQUENCES, SequentialRules)


def sasrec_of(run: Run, data: PreparedData) -> SASRec:
    from napo.recommenders.sasrec import SASRec

    _sasrec_sha256(run)
    return SASRec.load(run.path / "sasrec", num_items=data.num_items)


def _sasrec_sha256(run: Run) -> str:
    """Of the run's SASRec, which must be the one that the run trained: one of other data would be as sure of its
    items."""
    return run.check_unchanged("sasrec", "sasrec").get("sasrec") or content_hash(run.path / "sasrec")


def _sasrec(run: Run, data: PreparedData, options: ScoringOptions) -> Recommender:
    return sasrec_of(run, data)


def _untuned(run: Run, data: PreparedData, options: ScoringOptions) -> Recommender:
    from napo.recommenders.language_model import LanguageModel

    return LanguageModel.load(run, data, None, options)


def _untuned_origin(run: Run) -> Origin:
    """The untuned language model of a run is the base of its first adapter."""
    return run.origin(run.model_names()[0])


KINDS = {
    "popularity": Kind(load=_popularity, fingerprint=lambda run: "popularity", recommends=False),
    "itemknn": Kind(load=_item_knn, fingerprint=lambda run: "itemknn", recommends=False),
    "rules": Kind(load=_rules, fingerprint=lambda run: "rules", recommends=False),
    "sasrec": Kind(
        load=_sasrec,
        fingerprint=_sasrec_sha256,
        exists=lambda run: (run.path / "sasrec").is_dir(),
    ),
    "base": Kind(  # the language model before any tuning
        load=_untuned,
        fingerprint=lambda run: model_identity(resolve_model(_untuned_origin(run).base)),
        exists=lambda run: bool(run.model_names()),
        by_default=False,
        is_baseline=False,
    ),
}
BASELINES = tuple(name for name, kind in KINDS.items() if kind.is_baseline)


def available(run: Run) -> dict[str, Kind]:
    """The recommenders that the run has, in the order of reports."""
    named = {name: kind for name, kind in KINDS.items() if kind.exists(run)}
    tuned = {name: _tuned(name) for name in run.model_names()}
    if both := KINDS.keys() & tuned.keys():
        name = min(both)
        raise ValueError(
            f"run: {run.path / 'models' / name} has the name of a recommender that every run has; train it again under "
            "another --name in another run, or use it with the napo that trained it"
        )
    combined = [combined_name(name) for name in ("sasrec", *tuned) if "sasrec" in named]
    fitted = [name for name in combined if os.path.lexists(run.path / FOLDER / f"{name}.json")]
    return named | tuned | {name: _combined(name) for name in fitted}


def combinations_of(run: Run) -> tuple[dict[str, Fitted], dict[str, str]]:
    """The combinations whose parts are what their weights were fitted to, and of each other one why it is not taken."""
    intact: dict[str, Fitted] = {}
    others: dict[str, str] = {}
    have = available(run)
    there = [path.stem for path in sorted((run.path / FOLDER).glob("[!.]*.json")) if "+" in path.stem]
    gone = [Path(output).stem for output in run.gone(FOLDER)]
    for name in dict.fromkeys([*(name for name in have if "+" in name), *there, *gone]):
        try:
            if name in gone:
                raise ValueError(f"{run.path / FOLDER / name}.json is gone; {_fit_again(run, name)}")
            if name not in have:
                files = f"{FOLDER}/{name}.json and stages/combine-{_lead(name)}.json"
                raise ValueError(f"a part of it is gone; put it back, or delete {files} in {run.path}")
            intact[name] = _intact(run, name)
        except ValueError as error:
            others[name] = str(error)
    if FORMER_CONTROL in others:
        others[FORMER_CONTROL] = f"of an older napo; {_fit_again(run, CONTROL)}, which makes {CONTROL} in its place"
    return intact, others


def by_default(run: Run) -> list[str]:
    """What is judged where nothing is named. A warning names the combinations that are left out, and why."""
    _, unfit = combinations_of(run)
    for name, why in unfit.items() if ranks.rank() == 0 else ():
        logger.warning("models: %s is left out (%s)", name, shown(why, 1500))
    return [name for name, kind in available(run).items() if kind.by_default and name not in unfit]


def check_fits(run: Run, name: str) -> None:
    """ValueError for a combination whose parts are not what its weights were fitted to."""
    if "+" in name:
        _intact(run, name)


def find(run: Run, name: str) -> Kind:
    """ValueError where the run has no recommender of that name."""
    have = available(run)
    if name not in have:
        raise ValueError(f"models: {run.path} has no {name!r}{lost(run, name)}; it has {', '.join(have)}")
    return have[name]


def lost(run: Run, name: str) -> str:
    """Of a model that the run made and that is there no more: the file or folder that is gone, in words."""
    if name == FORMER_CONTROL:
        return f", which is {CONTROL} in this napo (napo combine)"
    outputs = [output for folder in ("sasrec", "models", FOLDER) for output in run.gone(folder)]
    return next((f", as {run.path / o} is gone" for o in outputs if Path(o).name.removesuffix(".json") == name), "")


def _tuned(name: str) -> Kind:
    """The language model with the adapter ``RUN/models/NAME``."""

    def load(run: Run, data: PreparedData, options: ScoringOptions) -> Recommender:
        from napo.recommenders.language_model import LanguageModel

        return LanguageModel.load(run, data, name, options)

    def fingerprint(run: Run) -> str:
        origin = run.origin(name)
        origin.check_base(name)
        return f"{origin.model_identity} {run.adapter_sha256(name)}"

    return Kind(load=load, fingerprint=fingerprint, is_baseline=False)


def _combined(name: str) -> Kind:
    """A combination with the weights in ``RUN/combinations/NAME.json``."""

    def load(run: Run, data: PreparedData, options: ScoringOptions) -> Recommender:
        fitted = _intact(run, name)
        sums = replace(options, average=False)  # which the weights were fitted to
        return Combination(fitted, {part: find(run, part).load(run, data, sums) for part in fitted.parts})

    def fingerprint(run: Run) -> str:
        parts = " ".join(find(run, part).fingerprint(run) for part in _fitted(run, name).parts)
        return f"{content_hash(run.path / FOLDER / f'{name}.json')} {parts}"

    return Kind(load=load, fingerprint=fingerprint, is_baseline=False)


def _fitted(run: Run, name: str) -> Fitted:
    """The combination's weights, which must be those that the run fitted."""
    run.check_unchanged(f"combine-{_lead(name)}", f"{FOLDER}/{name}.json")
    try:
        return Fitted.read(run.path, name)
    except ValueError as error:
        raise ValueError(f"{error}; {_fit_again(run, name)}") from None


def _intact(run: Run, name: str) -> Fitted:
    """ValueError where a part is not what the weights were fitted to."""
    fitted, have = _fitted(run, name), available(run)
    for part, of in fitted.parts.items():
        if part not in have or have[part].fingerprint(run) != of["fingerprint"]:
            raise ValueError(
                f"models: {part} is not what the weights of {name} were fitted to; {_fit_again(run, name)}"
            )
    return fitted


def _fit_again(run: Run, name: str) -> str:
    return f"run {run.command('combine', '--model', _lead(name))}"


def _lead(name: str) -> str:
    """What a combination is of: a language model, or sasrec for the control."""
    return name.split("+")[0]
