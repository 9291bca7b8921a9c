"""From a prepared data set to SFT examples and preference rows, and training on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from napo.data.prepared import PreparedData
from napo.data.prompts import PromptEncoder, PromptSettings
from napo.data.splits import tile
from napo.data.styles import PromptStyle
from napo.data.windows import add_lists, draw_windows, grow, met_items
from napo.files import read_json
from napo.finetuning.options import NegativesFrom, PreferenceOptions, SFTOptions
from napo.finetuning.preferences import NegativeSampler, drawn_rows, preference_rows, train_preferences
from napo.finetuning.sft import answer_examples, title_examples, train_sft
from napo.language_models.loading import load_model, load_tokenizer
from napo.language_models.options import LoraOptions
from napo.recommenders.options import SASRecOptions
from napo.recommenders.sasrec import SASRec
from napo.runs import Run


def test_tiles_cover_a_sequence_without_overlap(data: PreparedData) -> None:
    rows = data.train.iloc[tile(data.train)]
    assert len(rows)
    for _, own in rows.groupby("user_id"):
        places = [
            set(range(len(full) - len(past), len(full) + 1))
            for full, past in zip(own["full_history"], own["history"], strict=True)
        ]
        assert sum(map(len, places)) == len(set().union(*places))


def test_windows_grow_title_by_title(data: PreparedData) -> None:
    tiles = data.train.iloc[tile(data.train)[:3]]
    grown = grow(tiles, 2)
    for number, (_, row) in enumerate(tiles.iterrows()):
        own = grown[grown["window"] == number]
        titles = [*row["history"], row["next"]]
        assert [len(h) for h in own["history"]] == list(range(2, len(titles)))
        for _, small in own.iterrows():
            assert [*small["history"], small["next"]] == titles[: len(small["history"]) + 1]
            assert small["full_history"].tolist() == row["full_history"].tolist()[: len(small["full_history"])]
            assert small["full_history"].tolist()[-len(small["history"]) :] == small["history"].tolist()


@pytest.mark.parametrize("source", get_args(NegativesFrom))
def test_rows_hold_no_negative_that_the_user_met(
    data: PreparedData, encoder: PromptEncoder, source: NegativesFrom
) -> None:
    sasrec = SASRec(data.num_items, SASRecOptions(dim=8)).eval()
    options = PreferenceOptions(negatives=5, negatives_from=source, negatives_best=6)
    draw = NegativeSampler(options, sasrec, data.training_counts(), np.random.default_rng(0))
    rows = preference_rows(data.train[:50], encoder, sasrec, met_items(data), draw)
    met = data.interactions.groupby("user_id")["item_id"].agg(set)
    for row, (_, source) in zip(rows, data.train[:50].iterrows(), strict=True):
        assert not set(row["rejected_ids"]) & met[source["user_id"]]
        assert len(set(row["rejected_ids"])) == 5
        assert row["chosen"] == encoder.title(source["next"])
        expected = sasrec.scores([source["full_history"]], [row["rejected_ids"]])[0]
        np.testing.assert_allclose(row["rejected_scores"], expected, rtol=1e-5, atol=1e-6)


def test_negatives_come_from_where_the_option_says(data: PreparedData) -> None:
    sasrec = SASRec(data.num_items, SASRecOptions(dim=8)).eval()
    state = sasrec.user_states([data.train["full_history"].iloc[0]])[0]
    scores = (sasrec.item_vectors @ state + sasrec.item_bias).numpy()
    best = set(np.argsort(-scores)[:8].tolist())
    counts = data.training_counts()

    def drawn(source: NegativesFrom) -> NegativeSampler:
        options = PreferenceOptions(negatives=4, negatives_from=source, negatives_best=8)
        return NegativeSampler(options, sasrec, counts, np.random.default_rng(0))

    sample = drawn("sasrec")
    assert all(set(sample(set(), state)) <= best for _ in range(50))
    sample = drawn("mixed")
    assert all(len(set(sample(set(), state)) & best) >= 2 for _ in range(50))
    uniform, popular = drawn("uniform"), drawn("popularity")
    means = [np.mean([counts[sample(set(), state)].mean() for _ in range(400)]) for sample in (uniform, popular)]
    # Drawn in proportion to the counts, the mean count of what is drawn rises towards E[c^2] / E[c].
    assert means[1] > means[0] + 0.5 * (np.mean(counts**2.0) / counts.mean() - counts.mean())
    with pytest.raises(ValueError, match="negatives_from: expected uniform, popularity, sasrec, mixed, got 'best'"):
        PreferenceOptions(negatives_from="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"negatives_best: expected at least negatives \(4\), got 3"):
        PreferenceOptions(negatives_from="sasrec", negatives_best=3)


def test_too_few_popular_items_are_said_and_filled_up() -> None:
    sasrec = SASRec(20, SASRecOptions(dim=8)).eval()
    state = sasrec.user_states([[1]])[0]
    counts = np.zeros(20, np.int64)
    counts[[1, 2, 3, 4, 5]] = 7
    options = PreferenceOptions(negatives=4, negatives_from="popularity")
    draw = NegativeSampler(options, sasrec, counts, np.random.default_rng(0))
    assert set(draw({5}, state)) == {1, 2, 3, 4} and draw.shortage is None
    for _ in range(20):
        drawn = draw({1, 2, 8}, state)
        assert len(set(drawn)) == 4 and {3, 4, 5} <= set(drawn) and not {1, 2, 8} & set(drawn)
    assert draw.shortage is not None and "popularity: for 20 of 21 rows too few items were ever chosen" in draw.shortage
    listed = NegativeSampler(options, sasrec, counts, np.random.default_rng(0))
    assert listed.from_list([6, 7, 9]) == [6, 7, 9]
    assert listed.shortage is not None and "1 of 1 rows list fewer than 4 titles" in listed.shortage


@pytest.mark.parametrize(
    "given, style, decided",
    [
        ({}, "history", (True, 20, 4)),
        ({"tokens": 50}, "history", (True, 20, 4)),
        ({"window": 6, "batch_size": 3}, "history", (True, 6, 3)),
        ({"prefixes": True}, "history", (True, None, 4)),
        ({"prefixes": False}, "history", (False, None, 8)),
        ({}, "candidates", (False, None, 8)),
        ({}, "candidates-first", (False, None, 8)),
        ({"prefixes": True}, "candidates-first", (True, None, 4)),
    ],
)
def test_what_is_null_follows_the_style(
    given: dict[str, Any], style: PromptStyle, decided: tuple[bool, int | None, int]
) -> None:
    chosen = PreferenceOptions(**given).in_style(style)
    assert (chosen.prefixes, chosen.window, chosen.batch_size) == decided
    assert chosen.in_style(style) == chosen


def test_whole_sequences_are_of_the_style_history() -> None:
    for name, value in (("window", 6), ("tokens", 50)):
        with pytest.raises(ValueError, match=rf"{name}: needs the style history, got style 'candidates'"):
            PreferenceOptions(**{name: value}).in_style("candidates")


def test_a_shortage_of_negatives_is_printed_once(
    small_world: Path, data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    SASRec(data.num_items, SASRecOptions(dim=8)).save(run.path / "sasrec")
    model = str(small_world / "model")
    train_sft(data, run.path, SFTOptions(examples=16, lora=LoraOptions(top_layers=1), val_examples=8), model=model)
    few = data.training_counts()
    few[4:] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreparedData, "training_counts", lambda self: few)
        options = PreferenceOptions(prefixes=False, users=8, negatives=5, negatives_from="popularity", batch_size=8)
        train_preferences(data, run.path, options, model=model, name="few")
    assert capsys.readouterr().out.count("few: negatives_from: popularity: for 8 of 8 rows too few items") == 1


def test_sft_examples_are_the_prompts_text(data: PreparedData, encoder: PromptEncoder) -> None:
    for prompt, answer in title_examples(data.train, encoder, met_items(data), 0, 5, np.random.default_rng(0)):
        assert prompt == encoder.header and answer[-1] == encoder.title(0)[-1]
    answers = answer_examples(data.train, encoder, None, np.random.default_rng(0))
    assert len(answers) == len(data.train)


def test_one_list_holds_all_targets_of_a_window(small_world: Path, data: PreparedData) -> None:
    encoder = PromptEncoder(
        load_tokenizer(small_world / "model"), data.titles, noun=data.noun, style="candidates-first"
    )
    met = data.interactions.groupby("user_id")["item_id"].agg(set)
    rng = np.random.default_rng(0)
    windows = add_lists(draw_windows(data.train, 6, rng), met_items(data), data.num_items, 3, rng)
    grown = grow(windows, 3)
    sasrec = SASRec(data.num_items, SASRecOptions(dim=8)).eval()
    draw = NegativeSampler(PreferenceOptions(negatives=4), sasrec, data.training_counts(), rng)
    rows = preference_rows(grown, encoder, sasrec, met_items(data), draw)
    for row, (_, source) in zip(rows, grown.iterrows(), strict=True):
        assert len(source["candidates"]) == len(set(source["candidates"])) == len(data.train["candidates"].iloc[0])
        assert set(source["targets"]) <= set(source["candidates"]) and source["next"] in source["targets"]
        assert set(source["candidates"]) - met[source["user_id"]] >= set(row["rejected_ids"])
        assert row["prompt"] == encoder.prompt(source["history"], source["candidates"])
    for (_, window), (prompt, answer) in zip(
        windows.iterrows(),
        title_examples(data.train, encoder, met_items(data), 3, 6, np.random.default_rng(0)),
        strict=True,
    ):
        titles = [*window["history"], window["next"]]
        assert [*prompt, *answer] == encoder.prompt(titles, window["candidates"])


def test_training_on_windows_lowers_the_loss(small_world: Path, data: PreparedData, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    SASRec(data.num_items, SASRecOptions(dim=8)).save(run.path / "sasrec")
    model = str(small_world / "model")
    options = SFTOptions(loss_on="titles", examples=32, lora=LoraOptions(top_layers=1), val_examples=8)
    train_sft(data, run.path, options, model=model)
    folder = train_preferences(
        data,
        run.path,
        PreferenceOptions(users=48, prefixes=True, negatives=3, learning_rate=1e-2, batch_size=4),
        model=model,
    )
    losses = [entry["loss"] for entry in read_json(folder / "log_history.json") if "loss" in entry]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    adapter, _ = load_model(model, adapter=folder)
    assert not any(parameter.requires_grad for parameter in adapter.parameters())


def test_negatives_count_among_the_tokens(small_world: Path, data: PreparedData, tmp_path: Path) -> None:
    """What the trainer computes is what was asked for, up to a window, however many negatives a title has."""
    run = Run(tmp_path / "run")
    SASRec(data.num_items, SASRecOptions(dim=8)).save(run.path / "sasrec")
    model = str(small_world / "model")
    train_sft(data, run.path, SFTOptions(tokens=500, val_examples=0, lora=LoraOptions(top_layers=1)), model=model)
    prompt = PromptSettings(style="history", history=10, normalise="catalogue")
    for negatives in (1, 6):
        chosen = PreferenceOptions(
            prefixes=True, window=6, min_history=1, batch_size=2, negatives=negatives, tokens=1500, count_negatives=True
        )
        folder = train_preferences(data, run.path, chosen, objective="softmax", model=model, prompt=prompt)
        computed = read_json(folder / "log_history.json")[-1]["num_input_tokens_seen"]
        assert 1500 <= computed < 1500 + 10 * (30 + 20 * negatives)  # a micro-batch more at most
    with pytest.raises(ValueError, match="count_negatives: needs tokens, got none; set tokens"):
        PreferenceOptions(count_negatives=True)


def test_random_neighbours_and_other_ways_to_share(
    small_world: Path, data: PreparedData, encoder: PromptEncoder, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    sasrec = SASRec(data.num_items, SASRecOptions(dim=8)).eval()
    sasrec.save(run.path / "sasrec")
    windows = {"prefixes": True, "window": 6, "min_history": 1, "batch_size": 2, "negatives": 2, "tokens": 300}
    states = []
    for neighbours in ("similar", "random"):
        chosen = PreferenceOptions(**windows, neighbours=neighbours)
        rows = drawn_rows(data, encoder, sasrec, chosen, PromptSettings(), trie=None, rho=0.7, seed=0).rows
        states.append(np.array([row["user_state"] for row in rows]))
    assert states[0].shape[1] == 8 and len(states[0]) == len(states[1])
    np.testing.assert_allclose(np.linalg.norm(states[1], axis=1), 1.0)
    assert np.abs(states[1] @ states[1].T - np.eye(len(rows))).max() < 0.7  # no two rows alike, those of a user neither
    model = str(small_world / "model")
    train_sft(data, run.path, SFTOptions(tokens=300, val_examples=0, lora=LoraOptions(top_layers=1)), model=model)
    prompt = PromptSettings(style="history", history=10, normalise="catalogue")
    weights = []
    for other in ({}, {"authors_compat": True}, {"exact": True, "rho": 0.2}, {"shared_gradient": False}):
        chosen = PreferenceOptions(**windows, learning_rate=1e-2, **other)
        folder = train_preferences(data, run.path, chosen, model=model, prompt=prompt, name="other")
        weights.append(load_file(folder / "adapter_model.safetensors"))
    for number, one in enumerate(weights):
        assert all(any(not torch.equal(one[key], other[key]) for key in one) for other in weights[:number])
    with pytest.raises(ValueError, match="neighbours: 'random' leaves no states for granularity 'pair'"):
        PreferenceOptions(neighbours="random", granularity="pair")


def test_validation_lists_are_ranked_for_the_log(small_world: Path, data: PreparedData, tmp_path: Path) -> None:
    run, model = Run(tmp_path / "run"), str(small_world / "model")
    options = SFTOptions(tokens=2000, window=6, val_examples=4, val_lists=5, evaluations=2, patience=9)
    folder = train_sft(data, run.path, options, model=model)
    log = [entry for entry in read_json(folder / "log_history.json") if "eval_hr@1" in entry]
    assert len(log) >= 2 and all(0 <= entry["eval_hr@1"] <= entry["eval_mrr"] <= 1 for entry in log)
    plain = train_sft(data, run.path, replace(options, val_lists=0), model=model, name="plain")
    assert not any("eval_hr@1" in entry for entry in read_json(plain / "log_history.json"))
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, plain))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)  # looking changes nothing


def test_errors_name_the_option(small_world: Path, data: PreparedData, tmp_path: Path) -> None:
    model = str(small_world / "model")
    with pytest.raises(ValueError, match=r"loss_on: 'titles' needs a style that answers continue"):
        train_sft(data, tmp_path, SFTOptions(loss_on="titles"), model=model, style="candidates")
    with pytest.raises(ValueError, match=r"prefixes: needs a style that answers continue"):
        train_preferences(
            data, tmp_path, PreferenceOptions(prefixes=True), model=model, prompt=PromptSettings(style="candidates")
        )
    with pytest.raises(ValueError, match=r"top_layers: expected 1\.\.2 for this model, got 3"):
        load_model(model, lora=LoraOptions(top_layers=3))
    with pytest.raises(ValueError, match=r"dtype: expected one of auto"):
        load_model(model, dtype="int4")
