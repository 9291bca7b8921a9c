"""The whole catalogue behind a history: every item's score, the best items, and what greedy decoding names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_world import ITEMS
from transformers import GPT2Config, GPT2LMHeadModel

from napo.data.prompts import Normalise, PromptEncoder, PromptSettings
from napo.data.styles import PromptStyle
from napo.language_models.loading import load_model
from napo.recommenders import language_model
from napo.recommenders.language_model import ANSWER_TOKENS, LanguageModel
from napo.recommenders.protocol import WIDTH_STEP, ScoringOptions
from napo.scoring import CandidateScorer

HISTORIES = [[3, 4, 6], [10], [50, 52, 55, 57, 58, 1]]


@pytest.fixture(scope="module")
def ranker(small_world: Path) -> LanguageModel:
    """Untuned, with weights large enough that its probabilities differ."""
    model, tokenizer = load_model(small_world / "model")
    model.get_input_embeddings().weight.data *= 20  # tied to the head
    titles = [*ITEMS, f"{ITEMS[0]} and more"]  # which another one begins
    settings = PromptSettings(style="history", history=5, normalise="catalogue")
    return LanguageModel(model, tokenizer, PromptEncoder(tokenizer, titles, style="history"), titles, settings)


def with_options(ranker: LanguageModel, settings: dict, options: dict) -> LanguageModel:
    return LanguageModel(
        ranker.model,
        ranker.tokenizer,
        ranker.encoder,
        ranker.titles,
        replace(ranker.settings, **settings),
        ScoringOptions(**options),
    )


@pytest.mark.parametrize("normalise", ["catalogue", "vocabulary"])
@pytest.mark.parametrize("options", [{}, {"average": True}, {"tokens_per_batch": 40}])
def test_all_scores_are_those_of_lists(ranker: LanguageModel, normalise: str, options: dict) -> None:
    ranker = with_options(ranker, {"normalise": normalise}, options)
    scores = ranker.all_scores(HISTORIES)
    lists = np.stack([np.random.default_rng(user).permutation(len(ranker.titles)) for user in range(3)])
    np.testing.assert_allclose(np.take_along_axis(scores, lists, 1), ranker.scores(HISTORIES, lists), atol=1e-4)
    if normalise == "catalogue" and not options.get("average"):
        np.testing.assert_allclose(np.exp(scores).sum(1), 1.0, atol=1e-5)


@pytest.mark.parametrize("whole_pass", [0, 10**6])  # by the search, or from all scores
def test_best_items_are_those_of_brute_force(
    ranker: LanguageModel, whole_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "WHOLE_PASS", whole_pass)
    lists = np.tile(np.arange(len(ranker.titles)), (3, 1))
    truth = ranker.scores(HISTORIES, lists)
    exclude = [set(), {int(truth[1].argmax())}, HISTORIES[2]]
    for k in (1, 5, len(ranker.titles) + 1):
        for found, row, unwanted in zip(ranker.best_items(HISTORIES, k, exclude=exclude), truth, exclude, strict=True):
            wanted = [item for item in range(len(row)) if item not in unwanted]
            ordered = sorted(wanted, key=lambda item: (-round(row[item], 4), item))[:k]
            assert [item for item, _ in found] == ordered
            np.testing.assert_allclose([score for _, score in found], row[ordered], atol=1e-4)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        ranker.best_items(HISTORIES, 0)
    with pytest.raises(ValueError, match="exclude: expected one collection for each of 3 histories, got 1"):
        ranker.best_items(HISTORIES, 1, exclude=[{1}])


def test_greedy_decoding_under_the_trie_always_names_an_item(ranker: LanguageModel) -> None:
    """And without the trie this untuned model never does."""
    named = ranker.greedy_items(HISTORIES)
    answers = ranker.answers(HISTORIES, np.zeros((3, 1), np.int64))
    assert named is not None and ((named >= 0) & (named < len(ranker.titles))).all()
    assert (ranker.judge(answers, np.zeros((3, 1), np.int64))[0] == -1).all()


@pytest.mark.parametrize("normalise", ["catalogue", "vocabulary"])
def test_equal_widths_pad_as_little_as_they_can(
    ranker: LanguageModel, normalise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt has the width that it takes with the beginnings of its titles shared; its scores are the same to the
    last bit beside any others."""
    each = with_options(ranker, {"normalise": normalise}, {"equal_widths": True, "tokens_per_batch": 256})
    padded: list[int] = []
    kind = type(each._scorer)
    scores_of = kind.each

    def watched(self: CandidateScorer, batches: Sequence[Any]) -> Any:
        for batch in (getattr(batch, "packed", batch) for batch in batches):
            padded.append(batch.input_ids.numel() - batch.num_tokens)
        return scores_of(self, batches)

    monkeypatch.setattr(kind, "each", watched)
    histories = [list(range(length)) for length in (1, 2, 5, 3, 3, 4, 1)]
    lists = np.stack([np.random.default_rng(user).permutation(len(each.titles))[:30] for user in range(len(histories))])
    together = each.scores(histories, lists)
    assert len(padded) == len(histories) and max(padded) < WIDTH_STEP
    alone = [each.scores([history], row[None])[0] for history, row in zip(histories, lists, strict=True)]
    assert np.array_equal(together, alone)
    plain = with_options(ranker, {"normalise": normalise}, {})
    np.testing.assert_allclose(together, plain.scores(histories, lists), atol=1e-4)


@pytest.mark.parametrize("style", ["history", "candidates", "candidates-first"])
@pytest.mark.parametrize("normalise", ["catalogue", "vocabulary"])
def test_prompts_end_where_the_positions_do(small_world: Path, style: PromptStyle, normalise: Normalise) -> None:
    """A model that cannot be asked beyond its positions: the oldest titles are left out, and that is said."""
    if style != "history" and normalise == "catalogue":
        pytest.skip("no such model is trained")
    tokenizer = load_model(small_world / "model")[1]
    encoder = PromptEncoder(tokenizer, ITEMS, style=style)
    listed = [7, 8, 9, 10] if style != "history" else []
    enough = (
        len(encoder.prompt([1, 2, 3], listed)) + max(ANSWER_TOKENS if listed else 0, *map(len, encoder.answers)) - 1
    )
    settings = PromptSettings(style=style, history=10, normalise=normalise)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer)}

    def ranker(positions: int) -> LanguageModel:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_positions=positions, **sizes))
        return LanguageModel(model, tokenizer, encoder, ITEMS, settings)

    full, short = ranker(512), ranker(enough)
    short.model.load_state_dict(
        {
            name: weight[:enough] if name.endswith("wpe.weight") else weight
            for name, weight in full.model.state_dict().items()
        }
    )
    history, ids = [*range(20, 40), 1, 2, 3], np.array([listed or [7, 8, 9, 10]])
    np.testing.assert_array_equal(short.scores([history], ids), full.scores([[1, 2, 3]], ids))
    assert short.answers([history], ids) == full.answers([[1, 2, 3]], ids)
    assert short.left_out(history, ids[0].tolist()) == (
        f"the language model was shown the last 3 of 10 titles: its {enough} positions hold no more"
    )
    assert short.left_out([2, 3], ids[0].tolist()) == full.left_out(history, ids[0].tolist()) == ""
    assert short.protocol["shown"].startswith("the last 10 titles, or as many as fit into")
    assert full.protocol["shown"] == "the last 10 titles"
    if style == "history":
        np.testing.assert_allclose(short.all_scores([history]), full.all_scores([[1, 2, 3]]), atol=1e-6)
        assert (short.greedy_items([history]) == full.greedy_items([[1, 2, 3]])).all()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^model: expected at least \d+ positions, .*; it has 9; train a model"):
        ranker(9).scores([history], ids)
