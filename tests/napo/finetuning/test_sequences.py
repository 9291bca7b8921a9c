"""Whole-sequence training: what windows hold, and that they train towards the catalogue's own distribution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from napo.catalogue import CatalogueScorer, Trie
from napo.data.prepared import PreparedData
from napo.data.prompts import PromptEncoder, PromptSettings
from napo.data.windows import Tiling, grow, window_rows
from napo.files import read_json
from napo.finetuning import callbacks
from napo.finetuning.options import PreferenceOptions, SFTOptions
from napo.finetuning.preferences import train_preferences
from napo.finetuning.sft import SFTCollator, WindowCollator, sequence_examples, train_sft
from napo.language_models.loading import load_model, load_tokenizer
from napo.recommenders.language_model import LanguageModel
from napo.recommenders.options import SASRecOptions
from napo.recommenders.sasrec import SASRec
from napo.runs import Run
from napo.scoring import CandidateScorer
from napo.signals import Stopped
from napo.stages import sasrec_stage, sft_stage, train_stage

SEQUENCES = [np.arange(12), np.arange(3), np.arange(1), np.arange(5, 45)]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_title_with_one_before_it_is_a_target_once(seed: int | None) -> None:
    tiling = Tiling(titles=5, lengths=np.full(50, 3), header=4, max_length=1000)
    rng = None if seed is None else np.random.default_rng(seed)
    windows = tiling.windows(SEQUENCES, rng=rng)
    for number, sequence in enumerate(SEQUENCES):
        own = [window for window in windows if window.sequence == number]
        assert [place for w in own for place in range(w.target, w.end)] == list(range(1, len(sequence)))
        assert all(w.end - w.begin <= 5 and w.begin == w.target - 1 for w in own)
    assert tiling.tokens(windows[0], SEQUENCES[0]) == 4 + 3 * (windows[0].end - windows[0].begin - 1)


def test_long_titles_end_a_window_early() -> None:
    lengths = np.array([3, 3, 3, 90, 3, 3, 3, 3])
    tiling = Tiling(titles=6, lengths=lengths, header=4, max_length=20)
    windows = tiling.windows([np.arange(8)])
    assert [place for w in windows for place in range(w.target, w.end)] == list(range(1, 8))
    for window in windows:
        tokens = 4 + lengths[window.begin : window.end].sum()
        assert tokens <= 20 or window.end - window.target == 1  # a title that is too long stands by itself


def test_what_is_only_shown_is_no_target() -> None:
    tiling = Tiling(titles=4, lengths=np.full(50, 3), header=4, max_length=1000)
    (window,) = tiling.windows([np.arange(10)], [9])
    assert (window.begin, window.target, window.end) == (6, 9, 10)


def test_budget_of_tokens_and_of_epochs() -> None:
    tiling = Tiling(titles=5, lengths=np.full(50, 3), header=4, max_length=1000)
    windows, spent = tiling.budget(SEQUENCES, np.random.default_rng(0), epochs=1.0, tokens=900)
    assert 900 <= spent < 900 + 16
    assert spent == sum(tiling.tokens(window, SEQUENCES[window.sequence]) for window in windows)
    two, _ = tiling.budget(SEQUENCES, np.random.default_rng(0), epochs=2.0, tokens=None)
    targets = np.bincount([w.sequence for w in two for _ in range(w.target, w.end)], minlength=4)
    assert targets.tolist() == [22, 4, 0, 78]
    assert tiling.budget([np.arange(1)], np.random.default_rng(0), epochs=1.0, tokens=50) == ([], 0)


def test_windows_as_rows(data: PreparedData) -> None:
    tiling = Tiling(titles=6, lengths=np.full(data.num_items, 3), header=4, max_length=1000)
    windows = tiling.windows(data.training_sequences())
    rows = window_rows(data.longest_training_rows(), windows)
    log = data.interactions.groupby("user_id")["item_id"].agg(list)
    for _, row in rows.iterrows():
        place = len(row["full_history"])
        assert log[row["user_id"]][: place + 1] == [*row["full_history"], row["next"]]
        assert row["full_history"].tolist()[-len(row["history"]) :] == row["history"].tolist()
    assert len(grow(rows, 1)) == sum(len(sequence) - 1 for sequence in data.training_sequences())


def test_both_kinds_of_examples_are_the_same_windows(small_world: Path, data: PreparedData) -> None:
    encoder = PromptEncoder(load_tokenizer(small_world / "model"), data.titles, noun=data.noun)
    options = SFTOptions(window=6, tokens=400)
    made = [
        sequence_examples(data, encoder, options, trie, np.random.default_rng(3), np.random.default_rng(0))
        for trie in (Trie.of(encoder.answers), None)
    ]
    assert made[0][0][1] == made[1][0][1]  # tokens
    for part in (0, 1):
        items, tokens = (made[kind][0][0] if part == 0 else made[kind][1] for kind in (0, 1))
        assert len(items) == len(tokens) > 0
        for (window, first), (prompt, answer) in zip(items, tokens, strict=True):
            assert prompt + answer == encoder.prompt(window) and prompt == encoder.prompt(window[:first])
    # The catalogue's probability of a title is never below the vocabulary's.
    model, _ = load_model(str(small_world / "model"))
    trie = Trie.of(encoder.answers)
    by_items = WindowCollator(trie=trie, header=encoder.header, pad_id=0)(made[0][0][0])["packed"]
    by_tokens = SFTCollator(pad_id=0, max_length=512, keep_prefix=encoder.prefix_length)(made[1][0][0])["packed"]
    assert by_items.title_lengths.sum() == by_tokens.targets.numel()
    with torch.no_grad():
        assert CatalogueScorer(model)(by_items).sum() > CandidateScorer(model)(by_tokens).sum()


def test_training_lowers_the_loss_and_the_run_says_how(small_world: Path, data: PreparedData, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    model = str(small_world / "model")
    options = {"tokens": 12_000, "learning_rate": 1e-2, "window": 8, "history": 6, "lora": {"top_layers": 1}}
    sft_stage(run, data, model=model, style="history", seed=0, options=options)
    log = read_json(run.path / "models" / "sft" / "log_history.json")
    speeds = [row for row in log if "loss" in row]
    assert speeds and all(row["tokens_per_second"] > row["targets_per_second"] > 0 for row in speeds)
    assert all(0 < row["matmul_share"] < 1 for row in speeds)
    validation = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert validation[-1] < validation[0]
    assert 12_000 <= read_json(run.path / "models" / "sft" / "budget.json")["tokens"] < 12_100
    ranker = LanguageModel.load(run, data, "sft")
    assert ranker.settings == PromptSettings(style="history", history=6, normalise="catalogue")
    history = [int(item) for item in data.test["full_history"].iloc[0]]
    assert ranker.prompt(history, ()) == ranker.encoder.prompt(history[-6:])
    np.testing.assert_allclose(np.exp(ranker.all_scores([history, history[:3]])).sum(1), 1.0, atol=1e-5)

    SASRec(data.num_items, SASRecOptions(dim=8)).save(run.path / "sasrec")
    sequences = {"prefixes": True, "window": 6, "min_history": 1, "tokens": 3000, "negatives": 3, "batch_size": 4}
    for objective, extra in (("napo", {"sft_weight": 0.5}), ("sdpo", {})):
        options = {**sequences, **extra, "learning_rate": 5e-3}
        train_stage(run, data, objective=objective, name=objective, init_from="sft", seed=0, options=options)
        log = read_json(run.path / "models" / objective / "log_history.json")
        losses = [entry["loss"] for entry in log if "loss" in entry]
        if objective == "sdpo":  # the reference is the model at the start, under the same trie
            assert losses[0] == pytest.approx(np.log(4), abs=1e-5)
        else:
            assert np.mean(losses[-3:]) < np.mean(losses[:3])
        assert LanguageModel.load(run, data, objective).settings == ranker.settings


def test_switched_off_it_is_the_full_softmax(small_world: Path, data: PreparedData, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    options = {"tokens": 600, "window": 8, "normalise": "vocabulary", "lora": {"top_layers": 1}}
    sft_stage(run, data, model=str(small_world / "model"), style="history", seed=0, options=options)
    assert not LanguageModel.load(run, data, "sft").by_catalogue


def test_errors_name_the_option(small_world: Path, data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss_on: 'sequences' needs the style history, got style 'candidates'"):
        SFTOptions(loss_on="sequences").loss_in("candidates")
    with pytest.raises(ValueError, match=r"normalise: 'catalogue' needs loss_on 'sequences', got 'answer'"):
        SFTOptions(loss_on="answer", normalise="catalogue").loss_in("history")
    with pytest.raises(ValueError, match=r"tokens: needs loss_on 'sequences', got 'titles'"):
        SFTOptions(loss_on="titles", tokens=5).loss_in("history")
    with pytest.raises(ValueError, match=r"history: expected at least 1, got 0"):
        SFTOptions(history=0)
    with pytest.raises(ValueError, match=r"window: expected at least 2"):
        train_sft(data, tmp_path, SFTOptions(window=1), model=str(small_world / "model"))
    with pytest.raises(ValueError, match=r"window: 6 needs prefixes"):
        PreferenceOptions(window=6, prefixes=False)
    with pytest.raises(ValueError, match=r"tokens: needs windows of whole sequences"):
        PreferenceOptions(prefixes=True, tokens=6)
    listed = PromptSettings(style="candidates-first")
    with pytest.raises(ValueError, match=r"window: needs the style history, got style 'candidates-first'"):
        options = PreferenceOptions(prefixes=True, window=6)
        train_preferences(data, tmp_path, options, model=str(small_world / "model"), prompt=listed)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_sasrec_of_other_items_trains_nobody(
    small_world: Path, data: PreparedData, tmp_path: Path, more: int
) -> None:
    """Where its items are fewer, ids would be out of range; where they are more, nothing else would tell."""
    SASRec(data.num_items + more, SASRecOptions(dim=8)).save(tmp_path / "sasrec")
    model = str(small_world / "model")
    line = rf"sasrec: knows {data.num_items + more} items, expected {data.num_items}; delete it and run napo sasrec"
    with pytest.raises(ValueError, match=line):
        train_sft(data, tmp_path, SFTOptions(distill=0.5), model=model)
    with pytest.raises(ValueError, match=line):
        train_preferences(data, tmp_path, PreferenceOptions(), model=model)


def test_a_stop_keeps_its_checkpoint_beside_the_best(
    small_world: Path, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer used to delete it when there was a better one, so hours of training since then were lost."""
    steps = iter(range(1, 1000))
    monkeypatch.setattr(callbacks, "stop_asked", lambda: next(steps) == 9)
    options = SFTOptions(tokens=3_000, window=8, evaluations=4, val_examples=8)
    with pytest.raises(Stopped):
        train_sft(data, tmp_path, options, model=str(small_world / "model"))
    work = tmp_path / "models" / ".sft.work"
    found = sorted(int(folder.name.split("-")[1]) for folder in work.glob("checkpoint-*"))
    best = read_json(work / "checkpoint-9" / "trainer_state.json")["best_global_step"]
    assert found == [best, 9] and best < 9


def test_distilled_training_and_its_validation(small_world: Path, data: PreparedData, tmp_path: Path) -> None:
    """SASRec has a part of every target in training; validation stays with the titles that followed."""
    run, model = Run(tmp_path / "run"), str(small_world / "model")
    options = {"tokens": 3_000, "window": 8, "evaluations": 2, "lora": {"top_layers": 1}}

    def trained(name: str, **more: object) -> tuple[float, float]:
        sft_stage(run, data, model=model, style="history", seed=0, name=name, options={**options, **more})
        log = read_json(run.path / "models" / name / "log_history.json")
        losses = [[row[kind] for row in log if kind in row][-1] for kind in ("loss", "eval_loss")]
        return losses[0], losses[1]

    with pytest.raises(ValueError, match=r"distill: 0.5 needs loss_on 'sequences'"):  # before SASRec is asked for
        trained("early", distill=0.5, normalise="vocabulary")
    with pytest.raises(
        ValueError,
        match=r"distill: 0.5 needs the run's SASRec, got none in .*; run `napo sasrec --data \S+ --run \S+` first",
    ):
        trained("early", distill=0.5)
    sasrec_stage(run, data, seed=0, options={"max_epochs": 2, "dim": 16})
    (hard, validated), (soft, the_same) = (
        trained("hard", learning_rate=0.0),
        trained("soft", learning_rate=0.0, distill=0.5),
    )
    assert validated == the_same and hard != soft
    assert trained("learnt", learning_rate=1e-2, distill=0.5)[1] < validated
    assert trained("soft", learning_rate=0.0, distill=0.5)[0] == soft  # skipped
    assert run.stale("soft") is None
    sasrec_stage(run, data, seed=1, options={"max_epochs": 2, "dim": 16}, overwrite=True)
    assert run.stale("hard") is None
    assert run.stale("soft") == "soft: SASRec was trained again, or removed, after soft was trained with it"
    again = trained("soft", learning_rate=0.0, distill=0.5)[0]
    assert again not in (hard, soft)  # another one teaches now, so it was trained again
    assert run.stale("soft") is None


def test_where_distillation_cannot_be() -> None:
    for options in (SFTOptions(distill=0.5, loss_on="answer"), SFTOptions(distill=0.5, normalise="vocabulary")):
        with pytest.raises(ValueError, match=r"distill: 0.5 needs loss_on 'sequences' and normalise 'catalogue'"):
            options.loss_in("history")
