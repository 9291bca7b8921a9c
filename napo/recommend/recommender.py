"""Recommendations from a run, for a history or a user: SASRec retrieves, and the language model ranks, by itself or
combined with SASRec, rules and popularity. Without a history, popular items are recommended.

    from napo import Recommender

    recommender = Recommender.from_run("runs/ml")
    print(recommender.recommend(history=["Toy Story", "Aladdin"], k=5).as_dict())
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from napo.data.interactions import key
from napo.data.missing import is_missing
from napo.data.prepared import PreparedData, user_starts
from napo.data.texts import shown
from napo.files import text_hash
from napo.recommend.catalogue import LONGEST_TITLE, Catalogue, Item, Searches, UnknownItem
from napo.recommenders.combination import Combination
from napo.recommenders.protocol import ScoringOptions, Shortening
from napo.recommenders.ranking import best
from napo.recommenders.registry import available, combinations_of, find, lost, popularity_of, sasrec_of
from napo.recommenders.sasrec import SASRec
from napo.runs import POPULARITY, Run

logger = logging.getLogger(__name__)

PREFERRED = ("napo", "sft")
RETRIEVER = "sasrec"
"""Proposes the items to rank: it scores the whole catalogue at once."""
RETRIEVE = 100
Unknown = Literal["error", "skip"]
"""What becomes of items of a history that are not known: an error, or they are left out with a note."""
UNKNOWN = " or ".join(get_args(Unknown))
"""For messages."""
TOLD = 5
"""Unknown items that a note names."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A request. It has ``history`` or ``user``; with neither, or with an empty history, the answer is what is
    popular."""

    history: Sequence[Item] | None = None  # oldest first
    user: str | int | float | None = None  # as the source of the data names users
    k: int = 10
    exclude: Sequence[Item] = ()  # not to be recommended; items of the history never are
    exact: bool = False  # titles letter by letter, as programs know them: nothing is guessed
    unknown: Unknown = "error"  # items of the history that are not known; those of ``exclude`` only cause a note


@dataclass(frozen=True)
class Recommendation:
    item: str
    """The item's id in the source of the data."""
    title: str
    score: float
    """Log-probability of the title, SASRec's score, or a combination's weighted sum; training interactions where what
    is popular is recommended. Behind the items that the model ranked, SASRec's score."""


@dataclass(frozen=True, kw_only=True)
class Recommendations:
    """The answer to a query, best first."""

    items: list[Recommendation]
    model: str
    notes: list[str] = field(default_factory=list)
    """Which titles were taken for which, why a list is shorter than asked for, and what of the history was not read."""

    def as_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A query with items as numbers."""

    history: list[int]
    k: int
    barred: set[int]
    notes: list[str]


class Recommender:
    """A run's model, loaded once, for any number of queries. ``resolve`` may run in several threads at once, and while
    ``answer`` runs in another one; ``answer``, ``recommend`` and ``recommend_many`` in one thread at a time."""

    def __init__(self, run: Run, *, model: str | None = None, retrieve: int = RETRIEVE) -> None:
        if retrieve < 1:
            raise ValueError(f"retrieve: expected at least 1; got {retrieve}")
        self.run, self.retrieve = run, retrieve
        offered = models_offered(run)
        self.model = model or best_model(run)
        if self.model not in offered:
            has = ", ".join(offered) or "none yet"
            raise ValueError(f"model: {run.path} has no {self.model!r}{lost(run, self.model)}; it has {has}")
        self.data = run.catalogue()  # what the run keeps
        items = self.data.items.sort_values("item_id")
        self.catalogue = Catalogue(items["title"].tolist(), items["source_id"].tolist())
        self.ranker = find(run, self.model).load(run, self.data, ScoringOptions(equal_widths=True, merged=True))
        self.retriever = self._retriever()
        if self.retriever is None and self.ranker.most_items is not None:
            raise ValueError(
                f"run: {run.path} has no sasrec, and the prompts of {self.model} have room for "
                f"only {self.ranker.most_items} candidates; run `{run.command('sasrec')}` first"
            )
        self._pool = self.ranker.most_items or retrieve
        kept = self.data if run.kept(POPULARITY).is_file() else _prepared(run)
        self.popularity = None if kept is None else popularity_of(run, kept).counts
        self._users, self._log, self._starts = _histories(kept)

    @classmethod
    def from_run(cls, path: str | Path, *, model: str | None = None, retrieve: int = RETRIEVE) -> Recommender:
        """Load a run's model.

        ``model``: None takes the best on validation rows (``napo combine`` measures it), see ``best_model``.
        ``retrieve``: SASRec proposes so many items, which the model ranks, and any others stay in SASRec's order behind
        them; in the styles with candidates a prompt has room for 20, and no others follow. A run without SASRec ranks
        the whole catalogue.
        """
        return cls(Run(path, create=False), model=model, retrieve=retrieve)

    def recommend(
        self,
        history: Sequence[Item] | None = None,
        *,
        user: str | int | float | None = None,
        k: int = 10,
        exclude: Sequence[Item] = (),
        exact: bool = False,
        unknown: Unknown = "error",
    ) -> Recommendations:
        """The best ``k`` items to follow ``history`` (titles or ids, oldest first) or the user's known items; these are
        left out. ``exact``: titles are taken letter by letter, and nothing is guessed. ``unknown="skip"`` leaves items
        out of the history that are not known."""
        query = Query(history=history, user=user, k=k, exclude=exclude, exact=exact, unknown=unknown)
        return self.recommend_many([query])[0]

    def recommend_many(self, queries: Iterable[Query]) -> list[Recommendations]:
        """The same answers as ``recommend`` gives one by one, to the last bit, computed together."""
        return self.answer([self.resolve(query) for query in queries])

    def answer(self, asked: Sequence[Asked]) -> list[Recommendations]:
        """The answers to queries that were resolved, each as if it were the only one."""
        warm = [number for number, one in enumerate(asked) if one.history]
        ranked = dict(zip(warm, self._rank([asked[number] for number in warm]), strict=True)) if warm else {}
        return [
            self._answer(one, *ranked[number]) if number in ranked else self._popular(one)
            for number, one in enumerate(asked)
        ]

    def try_out(self) -> None:
        """An answer for nobody. With the first one a language model is compared with its own forward: some seconds, and
        ValueError where they differ."""
        self.answer([Asked(history=[0], k=1, barred=set(), notes=[])])

    @property
    def why_not_popular(self) -> str:
        """Of a run without counts."""
        return (
            f"history: expected at least one item; got none, and {self.run.path}, of an older napo, does not know "
            "what is popular; train or evaluate any of its models again with its data"
        )

    @property
    def longest_name(self) -> int:
        """Characters of the longest title or id that may be asked for."""
        names = (*self.catalogue.titles, *self.catalogue.source_ids, *(self._users or ()))
        return max(LONGEST_TITLE, max(map(len, names), default=0))

    def fingerprints(self) -> tuple[str, str]:
        """sha256 of what ranks, and of the prepared data ("" in a run of an older napo, which did not note it)."""
        names = {self.model} | ({RETRIEVER} if self.retriever is not None else set())
        weights = " ".join(find(self.run, name).fingerprint(self.run) for name in sorted(names))
        return text_hash(weights), self.run.config.get("data_sha256", "")

    @property
    def knows_users(self) -> bool:
        return self._users is not None

    def resolve(self, query: Query, searches: Searches | None = None) -> Asked:
        """Titles, ids and users as numbers of items; ValueError for what is not of the catalogue. ``searches``: for
        titles that are not in the catalogue; None for any number."""
        notes: list[str] = []
        find = partial(self.catalogue.find, notes=notes, exact=query.exact, searches=searches)
        if isinstance(query.k, bool) or not isinstance(query.k, (int, np.integer)):
            raise ValueError(f"k: expected a whole number of at least 1; got {shown(repr(query.k))}")
        if query.k < 1:
            raise ValueError(f"k: expected at least 1; got {query.k}")
        if query.history is not None and query.user is not None:
            raise ValueError("user: expected a history or a user; got both")
        if query.unknown not in get_args(Unknown):
            raise ValueError(f"unknown: expected {UNKNOWN}; got {shown(repr(query.unknown))}")
        for name in ("history", "exclude"):
            given = getattr(query, name)
            if isinstance(given, (str, Mapping)) or not isinstance(given, (Iterable, type(None))):
                raise ValueError(f"{name}: expected a list of titles or ids; got {shown(repr(given))}")
        if query.user is not None:
            history = self._history_of(query.user, notes)
        else:
            history, unknown, error = _found(find, query.history, "history")
            if error is not None and query.unknown == "error":
                more = _named(unknown[1:])
                raise UnknownItem(f"{error}{f'; nor are these known: {more}' if more else ''}")
            if unknown:
                notes.append(f"{_count(unknown)} not known: {_named(unknown)}")
        # As `napo prepare` does: in the training an item is met once, where it was met first.
        first_meetings = list(dict.fromkeys(history))
        if len(first_meetings) < len(history):
            repeats = len(history) - len(first_meetings)
            notes.append(f"{repeats} repeat{'s' if repeats > 1 else ''} left out of the history")
            history = first_meetings
        # What is not known cannot be recommended, so there is nothing to exclude.
        exclude, unknown, _ = _found(find, query.exclude, "exclude")
        if unknown:
            notes.append(f"exclude: {_count(unknown)} not known: {_named(unknown)}")
        return Asked(history=history, k=query.k, barred={*exclude, *history}, notes=notes)

    def _history_of(self, user: str | int | float, notes: list[str]) -> list[int]:
        if self._users is None:
            raise ValueError(
                f"user: {self.run.path} knows no users: its data named none, or it is of an older napo; give a history"
            )
        number = self._users.get(user) if isinstance(user, str) else None
        if number is None:  # 4.0 and " 4" are 4, as in the files that `napo prepare` reads
            try:
                number = self._users.get(key(user))
            except (ValueError, TypeError) as error:
                raise ValueError(f"user: {error}") from None
        if number is None:
            notes.append(
                f"user {shown(repr(str(user)))} is not known (not in the data, or left out by napo prepare): popular "
                "items, with how often each was met"
            )
            return []
        return self._log[self._starts[number] : self._starts[number + 1]].tolist()

    def _rank(self, asked: list[Asked]) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Items and their scores for each query, best first. The model ranks those that SASRec proposes, which are
        the same for any k; those behind them stay in SASRec's order, with its scores."""
        histories = [one.history for one in asked]
        if self.retriever is None:
            of_all = _checked(self.model, self.ranker.all_scores(histories))  # type: ignore[attr-defined]
            return [best(row, one.k, one.barred) for row, one in zip(of_all, asked, strict=True)]
        retrieved = _checked(RETRIEVER, self.retriever.all_scores(histories))
        if self.ranker is self.retriever:
            return [best(row, one.k, one.barred) for row, one in zip(retrieved, asked, strict=True)]
        proposed = [
            best(row, self._pool if self.ranker.most_items else max(one.k, self._pool), one.barred)
            for row, one in zip(retrieved, asked, strict=True)
        ]
        pools = [items[: self._pool] for items, _ in proposed]
        found: list[NDArray[np.float64]] = [np.empty(0)] * len(asked)
        for size in {len(pool) for pool in pools} - {0}:
            rows = [number for number, pool in enumerate(pools) if len(pool) == size]
            ids = np.stack([pools[row] for row in rows])
            scores = _checked(self.model, self._scores([histories[row] for row in rows], ids, retrieved[rows]))
            for row, of_row in zip(rows, scores, strict=True):
                found[row] = of_row
        return [_ahead(scores, items, of_sasrec) for scores, (items, of_sasrec) in zip(found, proposed, strict=True)]

    def _scores(self, histories: list[list[int]], ids: NDArray[np.int64], retrieved: NDArray[np.float64]) -> Any:
        """(n, C) of the ranker; SASRec's part is known already."""
        if not isinstance(self.ranker, Combination):
            return self.ranker.scores(histories, ids)
        parts = self.ranker.parts.items()
        scores = {name: part.scores(histories, ids) for name, part in parts if part is not self.retriever}
        scores[RETRIEVER] = np.take_along_axis(retrieved, ids, 1)
        return self.ranker.combine(scores)

    def _answer(self, asked: Asked, items: NDArray[np.int64], scores: NDArray[np.float64]) -> Recommendations:
        found = self._recommendations(asked, items[: asked.k], scores[: asked.k], self.model)
        if self.retriever not in (None, self.ranker) and len(found.items) > self._pool:
            found.notes.append(
                f"places {self._pool + 1} to {len(found.items)} are in the order of {RETRIEVER}, with its scores: "
                f"{self.model} ranks the first {self._pool} that {RETRIEVER} proposes"
            )
        if isinstance(self.ranker, Shortening) and (left_out := self.ranker.left_out(asked.history, items.tolist())):
            found.notes.append(left_out)
        return found

    def _popular(self, asked: Asked) -> Recommendations:
        if self.popularity is None:
            raise ValueError(self.why_not_popular)
        items, scores = best(self.popularity, asked.k, asked.barred)
        return self._recommendations(asked, items, scores, "popularity")

    def _recommendations(self, asked: Asked, items: Any, scores: Any, model: str) -> Recommendations:
        notes = list(asked.notes)
        if len(items) < asked.k:
            limit = self.ranker.most_items
            why = f"{model} ranks {limit} items at most" if limit == len(items) else "there are no more items"
            notes.append(f"{len(items)} of {asked.k}: {why}")
        catalogue = self.catalogue
        return Recommendations(
            items=[
                Recommendation(catalogue.source_ids[item], catalogue.titles[item], float(score))
                for item, score in zip(items.tolist(), scores.tolist(), strict=True)
            ],
            model=model,
            notes=notes,
        )

    def _retriever(self) -> SASRec | None:
        for ranker in (self.ranker, *getattr(self.ranker, "parts", {}).values()):
            if isinstance(ranker, SASRec):
                return ranker
        if RETRIEVER not in available(self.run):
            if self.run.gone(RETRIEVER):
                logger.warning(
                    "run: %s is gone, so %s ranks the whole catalogue", self.run.path / RETRIEVER, self.model
                )
            return None
        return sasrec_of(self.run, self.data)


def models_offered(run: Run) -> list[str]:
    """The recommenders: SASRec, language models, and combinations of the two."""
    return [name for name, kind in available(run).items() if kind.by_default and kind.recommends]


def best_model(run: Run) -> str:
    """The model that ranked the validation rows best: of the combinations and their parts, which `napo combine`
    measured on the same lists. Where there is none ``napo``, else the newest model. A warning names those that the run
    made and that cannot be taken."""
    offered = models_offered(run)
    if not offered:
        raise ValueError(f"run: {run.path} has no model yet; run `{run.command('sasrec')}` first")
    intact, others = combinations_of(run)
    measured: dict[str, tuple[float, float]] = {}
    for fitted in intact.values():
        for name, figures in fitted.validation.items():
            if name in offered:  # the others are there to be compared with
                measured[name] = (figures["hr@1"], figures["mrr"])
    if measured:
        first = max(measured, key=lambda name: measured[name])
    else:
        first = next((name for name in PREFERRED if name in offered), offered[-1])
    others |= {Path(output).name: "it is gone" for output in run.gone("models")}
    if others:
        reasons = "; ".join(f"{name} is passed over ({why})" for name, why in others.items())
        logger.warning("model: %s; %s is taken", shown(reasons, 1500), first)
    return first


def _found(
    find: Callable[..., int], wanted: Iterable[Item] | None, name: str
) -> tuple[list[int], list[Item], UnknownItem | None]:
    """Numbers of items, those that are not known, and what is said of the first of these."""
    found: list[int] = []
    unknown: list[Item] = []
    first: UnknownItem | None = None
    for item in () if wanted is None else wanted:
        try:
            found.append(find(item, name=name))
        except UnknownItem as error:
            unknown.append(item)
            first = first or error
    return found, unknown, first


def _count(items: Sequence[Item]) -> str:
    return f"{len(items)} item{'s' if len(items) > 1 else ''}"


def _named(items: Sequence[Item]) -> str:
    """The first of them, for a note."""
    values = [next(iter(item.values())) if isinstance(item, Mapping) else item for item in items[:TOLD]]
    more = f" and {len(items) - TOLD} more" if len(items) > TOLD else ""
    return ", ".join("null" if is_missing(value) else shown(repr(str(value)), 60) for value in values) + more


def _ahead(
    scores: NDArray[np.float64], items: NDArray[np.int64], scores_behind: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The first ``items``, as many as there are ``scores``, by these, and the others behind them as they are."""
    order = np.argsort(-scores, kind="stable")
    size = len(scores)
    return np.append(items[order], items[size:]), np.append(scores[order], scores_behind[size:])


def _checked(name: str, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN has no place in an order, and would be sorted last in silence; JSON has neither NaN nor infinities."""
    wrong = scores.size - int(np.isfinite(scores).sum())
    if wrong:
        raise ValueError(
            f"model: {name} gives {wrong} of {scores.size} titles a score that is no finite number; train it again"
        )
    return scores


def _prepared(run: Run) -> PreparedData | None:
    """For a run of an older napo, which keeps no log: the prepared data where it is in reach and what it was."""
    try:
        run.check_data(run.data)
        return PreparedData.load(run.data)
    except ValueError:
        return None


def _histories(kept: PreparedData | None) -> tuple[dict[str, int] | None, NDArray[Any], NDArray[Any]]:
    """Numbers of users by their names in the source, and the log by user; None where users have no names."""
    if kept is None or not kept.has_users or not (kept.path / "users.parquet").is_file():
        return None, np.empty(0, np.int64), np.empty(0, np.int64)
    log = kept.interactions
    return (
        {name: number for number, name in enumerate(kept.users["source_id"])},
        log["item_id"].to_numpy(),
        user_starts(log["user_id"].to_numpy()),
    )
