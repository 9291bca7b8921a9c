"""Rotations that change for a whole batch beyond a length: no score depends on what is beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_equality import plain_logps, ragged_batch
from tiny_models import ARCHITECTURES, assert_equal_gradients, tiny_model

from napo.catalogue import CatalogueScorer, Trie, pack_items
from napo.scoring import CandidateScorer, pack
from napo.scoring.rope import Border, border_of

LENGTH = 20  # only one title of the batch makes a longer sequence, and its user has shorter ones too
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 8.0,
    "original_max_position_embeddings": LENGTH,
}


def long_model(monkeypatch: pytest.MonkeyPatch, length: int = LENGTH) -> Any:
    monkeypatch.setitem(ARCHITECTURES, "phi3", ("phi3", {"eos_token_id": 1, "bos_token_id": 1}))
    rope = {**LONG, "original_max_position_embeddings": length}
    return tiny_model("phi3", torch.float64, original_max_position_embeddings=length, rope_parameters=rope)


def dynamic_model() -> Any:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return tiny_model("llama", torch.float64, max_position_embeddings=LENGTH, rope_parameters=rope)


def short() -> tuple[list[list[int]], list[list[list[int]]]]:
    prompts, titles = ragged_batch()
    return prompts, [[title for title in group if len(title) < 6] for group in titles]


def packed(prompts: Any, titles: Any) -> Any:
    return pack(prompts, titles, pad_id=0, row_tokens=60)  # a row is longer than LENGTH


def test_longrope_is_refused_packed_where_one_sequence_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = CandidateScorer(long_model(monkeypatch))
    message = (
        rf"^model: expected at most {LENGTH} tokens, .* rope type 'longrope', .* got 22; set max_length={LENGTH}, or "
        r"packed=False \(of CandidateScorer or NAPOConfig\)$"
    )
    with pytest.raises(ValueError, match=message):
        scorer(packed(*ragged_batch()))
    with pytest.raises(ValueError, match=message):
        scorer.each([packed(*ragged_batch())])


def test_longrope_is_right_where_all_sequences_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = long_model(monkeypatch)
    truth = plain_logps(model, *short())
    scores = CandidateScorer(model)(packed(*short()))
    torch.testing.assert_close(scores, truth, rtol=1e-10, atol=1e-10)
    assert_equal_gradients(model, scores, truth, 1e-6)


def test_longrope_alone_is_right_for_a_user_with_titles_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = long_model(monkeypatch)
    truth = plain_logps(model, *ragged_batch())
    scores = CandidateScorer(model, packed=False)(packed(*ragged_batch()))
    torch.testing.assert_close(scores, truth, rtol=1e-10, atol=1e-10)
    assert_equal_gradients(model, scores, truth, 1e-6)


def test_longrope_is_refused_under_a_trie(monkeypatch: pytest.MonkeyPatch) -> None:
    trie = Trie.of([[4, 5, 2], [4, 6, 2], [7, 2]])
    prompts = [[9, 8], list(range(10, 31))]
    scorer = CatalogueScorer(long_model(monkeypatch))
    scorer(pack_items(prompts[:1], [[0, 1, 2]], trie, pad_id=0))
    with pytest.raises(ValueError, match=r"rope type 'longrope', .* got 22"):
        scorer(pack_items(prompts, [[0, 1, 2]] * 2, trie, pad_id=0))


@pytest.mark.parametrize("alone", [False, True])
def test_dynamic_rope_is_refused_beyond_its_length(alone: bool) -> None:
    """The rotation of a longer sequence depends on the longest one that the model has met before."""
    model = dynamic_model()
    scorer = CandidateScorer(model, packed=not alone)
    with torch.no_grad():
        truth = plain_logps(model, *short())
        torch.testing.assert_close(scorer(packed(*short())), truth, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=rf"rope type 'dynamic', .* got 22; set max_length={LENGTH}$"):
        scorer(packed(*ragged_batch()))


def test_borders_are_found_in_layers_of_each_kind() -> None:
    model = tiny_model("gemma3")
    assert border_of(model) is None
    model.config.rope_parameters = {"full_attention": LONG, "sliding_attention": {"rope_type": "default"}}
    assert border_of(model) == Border("longrope", LENGTH)
