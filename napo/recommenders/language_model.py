"""A tuned language model as a recommender: it ranks titles by likelihood, or names one greedily.

A model that was trained with log-probabilities normalised over the catalogue ranks with them too: then only the tokens
that decide between titles are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from napo.catalogue import (
    CatalogueBatch,
    CatalogueScorer,
    Trie,
    all_logps,
    best_items,
    greedy_items,
    pack_items,
)
from napo.data.candidates import checked_ids
from napo.data.prepared import PreparedData
from napo.data.prompts import PromptEncoder, PromptSettings, PromptStyle, shows_candidates
from napo.language_models.bases import Bases
from napo.language_models.loading import autocast, most_positions, pad_id
from napo.language_models.merging import merge_adapter
from napo.progress import progress
from napo.recommenders.lower_layers import LowerLayers
from napo.recommenders.protocol import WIDTH_STEP, Histories, ScoringOptions
from napo.recommenders.ranking import best
from napo.runs import Run
from napo.scoring import CandidateScorer, PackedBatch, pack, width_multiple
from napo.scoring.packing import up_to_multiple

S = TypeVar("S", bound=CandidateScorer)
ANSWER_TOKENS = 20
"""What greedy decoding may use in the styles with candidates; the field's protocol."""
TITLES_TOGETHER = 256
"""Titles of a pass over the whole catalogue where log-probabilities are normalised over the vocabulary."""
MOST_LISTED = 20
"""Candidates that a prompt has room for: as many as the lists of the field."""
WHOLE_PASS = 1024
"""Tokens of the trie's choices up to which the best items come from scoring the whole catalogue in one pass."""
SEARCHED = 32
"""Nodes of the trie that a search opens in a pass, behind each prompt."""


class LanguageModel:
    """Scores items by the likelihood of their titles, and generates titles."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        encoder: PromptEncoder,
        titles: list[str],
        settings: PromptSettings,
        options: ScoringOptions | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.titles = titles
        self.settings = settings
        self.options = options or ScoringOptions()
        self.pad_id = pad_id(tokenizer, model)
        self.device = next(model.parameters()).device
        self.positions = most_positions(model)
        self._scorers: dict[tuple[type[CandidateScorer], bool], CandidateScorer] = {}
        self.check: Callable[[], None] = lambda: None
        """Raises where ``model`` is not what it was any more."""

    @classmethod
    def load(
        cls, run: Run, data: PreparedData, name: str | None, options: ScoringOptions | None = None
    ) -> LanguageModel:
        """The run's model ``name``, or for None the untuned base of its first one, with prompts as that one has."""
        origin = run.origin(name or run.model_names()[0])
        settings = origin.prompt
        if name is not None:
            origin.check_base(name)
        options = options or ScoringOptions()
        adapter = None if name is None else run.adapter(name)
        # A base that others take after this model must stay what it is.
        bases = Bases() if options.bases is None or options.merged else options.bases
        model, tokenizer, check = bases.load(origin.base, adapter)
        if options.merged:
            merge_adapter(model)
        encoder = PromptEncoder(tokenizer, data.titles, noun=data.noun, style=settings.style)
        ranker = cls(model, tokenizer, encoder, data.titles, settings, options)
        ranker.check = check
        ranker.shown((), ())  # whether its positions are enough for any prompt at all
        return ranker

    @property
    def protocol(self) -> dict[str, str]:
        kind = "average" if self.options.average else "sum"
        over = ", normalised over the titles of the catalogue" if self.by_catalogue else ""
        return {
            "score": f"{kind} of the title's token log-probabilities, end token included{over}",
            "prompt": self.settings.style,
            "shown": f"the last {self.settings.history} titles{self._where_they_fit}",
        }

    @property
    def by_catalogue(self) -> bool:
        return self.settings.normalise == "catalogue"

    @cached_property
    def trie(self) -> Trie:
        return Trie.of(self.encoder.answers)

    @property
    def most_items(self) -> int | None:
        return MOST_LISTED if shows_candidates(self.settings.style) else None

    def prompt(self, history: Sequence[int] | np.ndarray, candidates: Sequence[int]) -> list[int]:
        shown = self.shown(history, candidates)
        return self.encoder.prompt(shown, candidates if shows_candidates(self.settings.style) else None)

    def shown(self, history: Sequence[int] | np.ndarray, candidates: Sequence[int]) -> list[int]:
        """The items of a history that its prompt shows. The oldest are left out where the model has no positions for
        them beside the longest title of the catalogue: of the catalogue, so that a score is the same in any list."""
        shown = self.settings.shown(history)
        if self.positions is None:
            return shown
        lines = self.encoder.lines
        listed = sum(len(lines[item]) for item in candidates) if shows_candidates(self.settings.style) else 0
        room = self.positions - self._around - listed
        if room < 0:
            raise ValueError(
                f"model: expected at least {self._around + listed} positions, for a prompt without a history and the "
                f"longest title of the catalogue; it has {self.positions}; train a model with more, or shorten titles"
            )
        first = len(shown)
        while first and len(lines[shown[first - 1]]) <= room:
            first -= 1
            room -= len(lines[shown[first]])
        return shown[first:]

    def left_out(self, history: Sequence[int], item_ids: Sequence[int]) -> str:
        whole, shown = self.settings.shown(history), self.shown(history, item_ids)
        if len(shown) == len(whole):
            return ""
        fitted = f"the last {len(shown)} of {len(whole)} titles"
        return f"the language model was shown {fitted}: its {self.positions} positions hold no more"

    @cached_property
    def _around(self) -> int:
        """Tokens that a prompt has beside the titles of the history and the list, and those of the longest answer. Its
        last token is never read."""
        longest = max(map(len, self.encoder.answers))
        if shows_candidates(self.settings.style):
            longest = max(longest, ANSWER_TOKENS)
        return len(self.encoder.prompt((), ())) + longest - 1

    @property
    def _where_they_fit(self) -> str:
        """In words what ``shown`` may leave out, where that can happen."""
        most = self.settings.history + (self.most_items or 0)
        if self.positions is None or self._around + most * max(map(len, self.encoder.lines)) <= self.positions:
            return ""
        return f", or as many as fit into {self.positions} tokens with the longest title"

    def scores(self, histories: Histories, item_ids: Any) -> NDArray[np.float64]:
        """(n, C) log-probability of each item's title; each prompt is encoded once for all of its titles."""
        candidates = checked_ids(item_ids, len(histories), len(self.titles))
        lower = self.options.lower or LowerLayers()
        prompts = [self.prompt(h, c) for h, c in zip(histories, candidates, strict=True)]
        if self.options.equal_widths:
            return self._scores_each(prompts, candidates)
        sizes = self.trie.inputs if self.by_catalogue else np.array([len(answer) for answer in self.encoder.answers])
        lengths = [len(p) + int(sizes[c].sum()) for p, c in zip(prompts, candidates, strict=True)]
        scorer = self._scorer
        result = np.empty(candidates.shape, dtype=np.float64)
        with progress("rank", len(prompts), unit="users") as bar, self._inference():
            scorer.compare_once()
            for number, rows in enumerate(self._batches(lengths)):
                layout = self._layout(lengths[rows[0]])
                batch = self._pack([prompts[row] for row in rows], candidates[rows], layout).to(self.device)
                with lower.of(self.model, number):
                    result[rows] = scorer(batch).view(len(rows), -1).double().cpu().numpy()  # type: ignore[arg-type]
                bar.advance(len(rows))
        return result

    def _scores_each(self, prompts: list[list[int]], candidates: NDArray[np.int64]) -> NDArray[np.float64]:
        """Those of ``scores`` under ``equal_widths``. Each prompt is laid out by itself, so that its width is what it
        takes and no more: how much its titles share is not known before."""
        layout = {"pad_id": self.pad_id, "width_multiple": self._width_step, "row_tokens": 1}
        alone = [self._pack([prompt], candidates[row : row + 1], layout) for row, prompt in enumerate(prompts)]
        packed = [batch.packed if isinstance(batch, CatalogueBatch) else batch for batch in alone]
        widths = np.array([batch.input_ids.shape[1] for batch in packed], np.int64)
        scorer = self._scorer
        result = np.empty(candidates.shape)
        with progress("rank", len(prompts), unit="users") as bar, self._inference():
            for width in np.unique(widths)[::-1].tolist():
                of_width = np.flatnonzero(widths == width)
                size = max(1, self.options.tokens_per_batch // width)
                for rows in np.split(of_width, range(size, len(of_width), size)):
                    for row, logps in zip(rows, scorer.each([alone[row] for row in rows]), strict=True):
                        result[row] = logps.double().cpu().numpy()
                    bar.advance(len(rows))
        return result

    def all_scores(self, histories: Histories) -> NDArray[np.float64]:
        """n histories -> (n, items) the score of every item, by item id: those that ``scores`` gives. With
        log-probabilities normalised over the catalogue, one pass computes them from the trie's choices. Not for styles
        whose prompt lists candidates."""
        if shows_candidates(self.settings.style):
            raise ValueError(
                f"style: {self.settings.style} lists at most {MOST_LISTED} candidates in the prompt, so the whole "
                "catalogue cannot be ranked; retrieve first"
            )
        num_items = len(self.titles)
        result = np.empty((len(histories), num_items))
        if not self.by_catalogue:
            for begin in range(0, num_items, TITLES_TOGETHER):
                piece = np.arange(begin, min(begin + TITLES_TOGETHER, num_items))
                result[:, piece] = self.scores(histories, np.tile(piece, (len(histories), 1)))
            return result
        prompts = [self.prompt(history, ()) for history in histories]
        behind = min(self._choice_tokens, self.options.tokens_per_batch)
        lengths = [len(prompt) + behind for prompt in prompts]
        scorer = self._catalogue_scorer
        with progress("rank", len(prompts), unit="users") as bar, self._inference():
            for rows in self._batches(lengths, prompts):
                result[rows] = all_logps(
                    scorer,
                    [prompts[row] for row in rows],
                    self.trie,
                    tokens_at_a_time=self.options.tokens_per_batch,
                    **self._layout(lengths[rows[0]]),
                )
                bar.advance(len(rows))
        return result / np.diff(self.trie.path_start) if self.options.average else result

    def best_items(
        self, histories: Histories, k: int, *, exclude: Sequence[Collection[int]] | None = None
    ) -> list[list[tuple[int, float]]]:
        """For each history the ``k`` items of the whole catalogue with the highest scores, without those in
        ``exclude``, the best first and of equal ones the lower number: exactly the first of ``all_scores``.

        A large catalogue is not scored as a whole where a title's score is the log-probability over the catalogue:
        then the search opens only what can hold one of the best."""
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        if exclude is not None and len(exclude) != len(histories):
            raise ValueError(
                f"exclude: expected one collection for each of {len(histories)} histories, got {len(exclude)}"
            )
        if not self.by_catalogue or self.options.average or self._choice_tokens <= WHOLE_PASS:
            scores = self.all_scores(histories)
            unwanted = exclude if exclude is not None else [()] * len(histories)
            of_rows = [best(row, k, items) for row, items in zip(scores, unwanted, strict=True)]
            return [list(zip(items.tolist(), values.tolist(), strict=True)) for items, values in of_rows]
        prompts = [self.prompt(history, ()) for history in histories]
        scorer = self._catalogue_scorer
        found: list[list[tuple[int, float]]] = [[] for _ in prompts]
        lengths = [len(prompt) + SEARCHED * int(self.trie.depths.max()) for prompt in prompts]
        with progress("search", len(prompts), unit="users") as bar, self._inference():
            for rows in self._batches(lengths, prompts):
                of_part = best_items(
                    scorer,
                    [prompts[row] for row in rows],
                    self.trie,
                    k,
                    exclude=None if exclude is None else [exclude[row] for row in rows],
                    nodes_at_a_time=SEARCHED,
                    **self._layout(lengths[rows[0]]),
                )
                for row, of_row in zip(rows.tolist(), of_part, strict=True):
                    found[row] = of_row
                bar.advance(len(rows))
        return found

    @cached_property
    def _choice_tokens(self) -> int:
        """Tokens that stand before some choice of the trie, at most: what the whole catalogue costs behind a prompt."""
        return int(self.trie.depths[self.trie.branching].sum())

    def greedy_items(self, histories: Histories) -> NDArray[np.int64] | None:
        """(n,) the items that greedy decoding under the catalogue's trie names; None in the styles with candidates,
        where the prompt's list is what can be named."""
        if shows_candidates(self.settings.style):
            return None
        prompts = [self.prompt(history, ()) for history in histories]
        longest = int(np.diff(self.trie.path_start).max())
        score = self._catalogue_scorer
        items = np.empty(len(prompts), np.int64)
        with progress("decode", len(prompts), unit="users") as bar, self._inference():
            for rows in self._batches([len(prompt) + longest for prompt in prompts]):
                chosen = [prompts[row] for row in rows]
                items[rows], _ = greedy_items(score, chosen, self.trie, pad_id=self.pad_id)
                bar.advance(len(rows))
        return items

    @property
    def _scorer(self) -> CandidateScorer:
        kind = CatalogueScorer if self.by_catalogue else CandidateScorer
        return self._kept(kind, average=self.options.average)

    @property
    def _catalogue_scorer(self) -> CatalogueScorer:
        """Of sums over a title's tokens, whatever is asked for."""
        return self._kept(CatalogueScorer, average=False)

    def _kept(self, kind: type[S], *, average: bool) -> S:
        """A new scorer would look through the whole model before its first batch."""
        if (kind, average) not in self._scorers:
            self._scorers[kind, average] = kind(self.model, average=average)
        found = self._scorers[kind, average]
        assert isinstance(found, kind)
        return found

    def _layout(self, length: int) -> dict[str, int]:
        """The options of ``pack`` for a batch whose longest row has up to ``length`` tokens."""
        if self.options.equal_widths:
            width = up_to_multiple(length, self._width_step)
            return {"pad_id": self.pad_id, "width_multiple": width, "row_tokens": 1}
        return {"pad_id": self.pad_id, "width_multiple": width_multiple(self.device)}

    def _pack(
        self, prompts: list[list[int]], items: NDArray[np.int64], options: dict[str, Any]
    ) -> PackedBatch | CatalogueBatch:
        if self.by_catalogue:
            return pack_items(prompts, items.tolist(), self.trie, **options)
        answers = self.encoder.answers
        return pack(prompts, [[answers[item] for item in row] for row in items], **options)

    def answers(self, histories: Histories, item_ids: NDArray[np.int64]) -> list[str]:
        """What greedy decoding says, one line a row."""
        prompts = [self.prompt(h, c) for h, c in zip(histories, item_ids, strict=True)]
        end = self.encoder.answers[0][-1]
        new_tokens = ANSWER_TOKENS
        if self.settings.style == "history":  # the whole catalogue may be named: room for its longest title
            new_tokens = max(map(len, self.encoder.answers))
        result = [""] * len(prompts)
        with progress("generate", len(prompts), unit="users") as bar, self._inference():
            for rows in self._batches([len(p) + new_tokens for p in prompts]):
                width = max(len(prompts[row]) for row in rows)
                ids = torch.full((len(rows), width), self.pad_id)  # left-padded: answers begin in one column
                mask = torch.zeros(len(rows), width, dtype=torch.long)
                for position, row in enumerate(rows):
                    ids[position, width - len(prompts[row]) :] = torch.tensor(prompts[row])
                    mask[position, width - len(prompts[row]) :] = 1
                out = self.model.generate(  # type: ignore[operator]
                    input_ids=ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    max_new_tokens=new_tokens,
                    use_cache=True,
                    do_sample=False,
                    num_beams=1,
                    eos_token_id=[i for i in (end, self.tokenizer.eos_token_id) if i is not None],
                    pad_token_id=self.pad_id,
                )
                for row, text in zip(rows, self._texts(out[:, width:]), strict=True):
                    result[row] = text
                bar.advance(len(rows))
        return result

    def judge(self, answers: list[str], item_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
        return judge(answers, item_ids, self._texts(self.encoder.answers), self.settings.style)

    def _texts(self, tokens: Any) -> list[str]:
        """Answers as text. Titles take the same way before they are compared with answers, since some tokenizers
        change what they read (case, blanks before punctuation)."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    def _batches(
        self, lengths: list[int], prompts: Sequence[Sequence[int]] | None = None
    ) -> Iterator[NDArray[np.int64]]:
        """Rows of similar length together, the longest first, so that memory peaks at once or never."""
        order = np.argsort(lengths, kind="stable")[::-1]
        start = 0
        while start < len(order):
            size = max(1, self.options.tokens_per_batch // lengths[order[start]])
            rows = order[start : start + size]
            if self.options.equal_widths and prompts is not None:
                rows = rows[: self._computed_alike(rows, lengths, prompts)]
            yield rows
            start += len(rows)

    def _computed_alike(self, rows: NDArray[np.int64], lengths: Sequence[int], prompts: Sequence[Sequence[int]]) -> int:
        """How many of the rows, from the first on, get one width and a row of their own each: ``pack`` lays a prompt
        out with the one before it where one is the beginning of the other."""
        widths = [up_to_multiple(lengths[row], self._width_step) for row in rows]
        for place in range(1, len(rows)):
            before, here = prompts[rows[place - 1]], prompts[rows[place]]
            short = min(len(before), len(here))
            if widths[place] != widths[0] or before[:short] == here[:short]:
                return place
        return len(rows)

    @property
    def _width_step(self) -> int:
        return math.lcm(WIDTH_STEP, width_multiple(self.device))

    @contextmanager
    def _inference(self) -> Iterator[None]:
        self.check()
        with torch.no_grad(), autocast(self.model):
            yield


def judge(
    answers: list[str], candidates: NDArray[np.int64], titles: list[str], style: PromptStyle
) -> tuple[NDArray[np.int64], str]:
    """The item that each greedy answer names, -1 where it is not valid, and the rule in words."""
    items = np.full(len(answers), -1, dtype=np.int64)
    if shows_candidates(style):
        for row, answer in enumerate(answers):
            named = [item for item in candidates[row] if titles[item] in answer]
            if len(named) == 1:
                items[row] = named[0]
        return items, "valid: exactly one of the candidates is a substring of the answer"
    by_title = {title: item for item, title in enumerate(titles)}
    for row, answer in enumerate(answers):
        items[row] = by_title.get(answer, -1)
    return items, "the prompt lists no candidates; valid: the answer is the title of one item of the whole catalogue"
