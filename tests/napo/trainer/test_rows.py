"""Rows that cannot be used, and losses that are not finite."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_cases import config, make_rows, own_logps, tiny_model, tiny_tokenizer, trainer
from transformers import BloomConfig, BloomForCausalLM, TrainerCallback

from napo.trainer import NAPOTrainer

BAD = [
    ({"rejected": []}, "rejected", "non-empty list"),
    ({"rejected": ""}, "rejected", "non-empty list"),
    ({"rejected": ["t1", 7, "t3"]}, "rejected[1]", "non-empty string"),
    ({"rejected": ["t1", "", "t3"]}, "rejected[1]", "non-empty string"),
    ({"prompt": None}, "prompt", "answers that begin with the same words"),
    ({"prompt": [1.5, 2.0]}, "prompt", "list of token ids"),
    ({"chosen": ["a", "b"]}, "chosen", "list of token ids"),
    ({"chosen": "t1", "rejected": ["t2", "t1", "t3"]}, "rejected", "other than the chosen"),
    ({"chosen_id": 4, "rejected_ids": [3, 4, 5]}, "rejected_ids", "other than the chosen"),
    ({"chosen_id": None}, "chosen_id", "item id"),
    ({"rejected_ids": [1]}, "rejected_ids", "expected 3 item ids, got 1"),
    ({"rejected_scores": [0.1, 0.2]}, "rejected_scores", "expected 3 numbers, got 2"),
    ({"rejected_scores": [0.1, float("nan"), 0.2]}, "rejected_scores", "finite"),
    ({"rejected_scores": None}, "rejected_scores", "since this objective uses it"),
    ({"user_state": None}, "user_state", "since this objective uses it"),
    ({"user_state": [1.0]}, "user_state", "expected 4 numbers, got 1"),
    ({"user_state": ["a", "b", "c", "d"]}, "user_state", "expected numbers"),
    ({"history_ids": [1.5]}, "history_ids", "integers"),
    ({"user_id": [3]}, "user_id", "string or an integer"),
    ({"prompt": "watched " * 20}, "prompt", "at most max_length 64"),
]


@pytest.mark.parametrize(("fault", "field", "words"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_row_is_named_before_training(fault: dict[str, Any], field: str, words: str, tmp_path: Path) -> None:
    rows = make_rows(4, ragged=False)
    rows[2] |= fault
    with pytest.raises(ValueError, match="train_dataset") as error:
        trainer(tmp_path, rows, max_length=64)
    message = str(error.value)
    assert message.startswith(f"train_dataset[2].{field}: ")
    assert words in message
    assert "\n" not in message


def test_bad_rows_are_skipped_counted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = make_rows(8, ragged=False)
    rows[1]["rejected"] = []
    rows[4]["prompt"] = ""
    rows[6]["prompt"] = 3
    with caplog.at_level(logging.WARNING, logger="napo"):
        run = trainer(tmp_path, rows, on_bad_row="skip")
    assert dict(run.train_dataset.skipped) == {"rejected": 1, "prompt": 2}
    assert [example.row for example in run.train_dataset.examples] == [0, 2, 3, 5, 7]
    assert "skipped 3 of 8 rows (2 for prompt, 1 for rejected); train_dataset[1].rejected" in caplog.text
    with pytest.raises(ValueError, match="at least one usable row of 2"):
        trainer(tmp_path, [{}, {}], on_bad_row="skip")


class Drawn:
    """A data set that draws a row's negatives when it is asked for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.rng = rows, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        ids = self.rng.choice(np.arange(100, 900), 3, replace=False).tolist()
        texts = {"rejected": [f"t{item}" for item in ids]}
        return {**self.rows[number], **texts, "rejected_ids": ids, "rejected_scores": [float(item) for item in ids]}


@pytest.mark.parametrize("options", [{}, {"cache_rows": True}, {"dataset_num_proc": 2}], ids=str)
def test_rows_that_are_drawn_are_drawn_once(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Texts and scores are of the same negatives, and it is said that no epoch has others."""
    tokenizer = tiny_tokenizer()
    with caplog.at_level(logging.WARNING, logger="napo"):
        run = trainer(tmp_path, Drawn(make_rows(600, ragged=False)), objective="napo", **options)
    assert caplog.text.count("train_dataset: a row is another one each time it is asked for") == 1
    for example in run.train_dataset.examples:
        texts = [tokenizer.decode(answer[:-1]).replace(" ", "") for answer in example.answers[1:]]
        assert texts == [f"t{score:.0f}" for score in example.scores]


def test_rows_that_are_made_when_asked_for_need_no_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Made:
        def __len__(self) -> int:
            return 6

        def __getitem__(self, number: int) -> dict[str, Any]:
            return make_rows(6)[number]

    with caplog.at_level(logging.WARNING, logger="napo"):
        trainer(tmp_path, Made())
    assert "each time it is asked for" not in caplog.text


def test_rows_from_parquet_are_the_same(tmp_path: Path) -> None:
    rows = make_rows(6)
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    read = pd.read_parquet(tmp_path / "rows.parquet").to_dict("records")
    ours, theirs = (trainer(tmp_path, one).train_dataset for one in (rows, read))
    assert ours.fingerprint() == theirs.fingerprint()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.scores, b.scores)
        assert (a.group, a.chosen_id, *a.rejected_ids, *a.history) == (
            b.group,
            b.chosen_id,
            *b.rejected_ids,
            *b.history,
        )


def test_long_prompts_can_be_shortened(tmp_path: Path) -> None:
    rows = make_rows(4)
    rows[2]["prompt"] = "watched " * 20
    run = trainer(tmp_path, rows, max_length=64, truncate_prompts=True, keep_prefix=5)
    batch = run.collator([run.train_dataset[2]])["batch"]
    assert batch.packed.truncated == 1
    longest = max(len(answer) for answer in run.train_dataset[2].answers)
    assert batch.packed.prompt_lengths == (64 - longest,)


def test_wrong_options_are_named(tmp_path: Path) -> None:
    for options, name in (
        ({"objective": "orpo"}, "objective"),
        ({"pool": "all"}, "pool"),
        ({"objective": "dpo", "rho": 0.5}, "rho"),
        ({"objective": "dmpo", "alpha": 0.5}, "alpha"),
        ({"authors_compat": True, "average": True}, "authors_compat"),
        ({"exact": True, "pool": "accumulated"}, "exact"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            config(tmp_path, **options)
    with pytest.raises(ValueError, match=r"^item_vectors: "):
        trainer(tmp_path, make_rows(4), granularity="pair")
    with pytest.raises(ValueError, match=r"^precompute_ref_log_probs: "):
        trainer(tmp_path, make_rows(4), objective="sdpo", precompute_ref_log_probs=False)


class Poison(TrainerCallback):
    """Makes a weight NaN at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model.model.norm.weight.fill_(float("nan"))


def test_nan_stops_at_the_next_logging_step_with_the_rows_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path, make_rows(40), max_steps=9, logging_steps=3, callbacks=[Poison(4)])
    with pytest.raises(FloatingPointError, match="not finite in or before step 6"):
        run.train()
    saved = json.loads((tmp_path / "nonfinite_rows-0.json").read_text())
    assert saved == {"global_step": 6, "train_dataset_rows": [16, 17, 18, 19]}


def test_nan_is_never_saved(tmp_path: Path) -> None:
    options = {"max_steps": 9, "logging_steps": 100, "save_strategy": "steps", "save_steps": 2}
    run = trainer(tmp_path, make_rows(40), callbacks=[Poison(4)], **options)
    with pytest.raises(FloatingPointError, match="not finite in or before step 6"):
        run.train()
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-4"]


def test_figures_of_a_step(tmp_path: Path) -> None:
    """Names as in TRL; one step's figures from the first log-probabilities, and the log in a file."""
    rows = make_rows(8, ragged=False)
    run = trainer(tmp_path, rows, per_device_train_batch_size=8, beta=2.0)
    batch = run.collator([run.train_dataset[i] for i in range(8)])["batch"]
    with torch.no_grad():
        logps = run._scored(run.model, batch)[batch.slots]
    run.train()
    figures = run.state.log_history[0]
    chosen, rejected = logps[:, 0], logps[:, 1:]
    known = [{row["chosen_id"], *row["history_ids"]} for row in rows]
    mask = torch.tensor(
        [[item not in seen for item in row["rejected_ids"]] for row, seen in zip(rows, known, strict=True)]
    )
    assert not mask.all()  # some own negatives are false
    own = torch.where(mask, rejected, 0).sum(1) / mask.sum(1)
    expected = {
        "logps/chosen": chosen.mean(),
        "logps/rejected": own.mean(),
        "rewards/chosen": 2 * chosen.mean(),
        "rewards/rejected": 2 * own.mean(),
        "rewards/margins": 2 * (chosen - own).mean(),
        "rewards/accuracies": (chosen > torch.where(mask, rejected, -torch.inf).amax(1)).float().mean(),
        "pool_size": torch.tensor(8.0),
        "shared_fraction": torch.tensor(4 / 5),  # 4 of the 7 others
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(float(value), abs=1e-5), name
    assert figures["gamma"] > 0
    assert figures["tokens_per_second"] > 0
    assert json.loads((tmp_path / "log_history.json").read_text()) == run.state.log_history


class ReadBacks(TorchDispatchMode):
    """Calls that on a GPU would wait for the device, by the place in our code that makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select
        if func.overloadpacket in waiting:
            frames = [f for f in traceback.extract_stack() if "/napo" in f.filename and f.filename != __file__]
            # On a GPU check_range is asynchronous; the comparison is there once, before the first batch.
            if not any(f.name in ("check_range", "compare_once") for f in frames):
                self.places.append(f"{frames[-1].filename}:{frames[-1].lineno}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"pool": "accumulated"}, {"granularity": "pair"}, {"authors_compat": True}])
def test_a_step_reads_nothing_back(options: dict[str, Any], tmp_path: Path) -> None:
    if "granularity" in options:
        options = {**options, "item_vectors": torch.randn(30, 4), "item_bias": torch.randn(30)}
    rows = make_rows(16, ragged=False)
    run = trainer(tmp_path, rows, gradient_accumulation_steps=2, max_steps=2, logging_steps=100, **options)
    compute, seen = run.compute_loss, ReadBacks()

    def watched(*arguments: Any, **named: Any) -> Any:
        with seen:
            return compute(*arguments, **named)

    run.compute_loss = watched  # type: ignore[method-assign]
    run.train()
    assert not seen.places


def test_evaluation_counts_users_and_leaves_the_margin_alone(tmp_path: Path) -> None:
    rows = make_rows(6)
    run = NAPOTrainer(
        tiny_model(),
        config(tmp_path, per_device_eval_batch_size=4, rho=0.0),
        train_dataset=rows,
        eval_dataset={"some": rows[:6], "few": rows[4:]},
        processing_class=tiny_tokenizer(),
    )
    run.train()
    before = {name: value.clone() for name, value in run.margin.state_dict().items()}
    metrics = run.evaluate()
    torch.testing.assert_close(run.margin.state_dict(), before)
    four = run.evaluate(rows[:4])["eval_loss"]  # by the same margin, no shared negatives: the users' mean
    assert metrics["eval_some_loss"] == pytest.approx((4 * four + 2 * metrics["eval_few_loss"]) / 6, abs=1e-5)
    assert "eval_some_rewards/accuracies" in metrics
    assert run.predict(rows[:4]).metrics["test_loss"] == pytest.approx(four)


def test_users_without_negatives_are_not_right(tmp_path: Path) -> None:
    """All negatives of user 1 are false, so that nothing is left to be better than."""
    rows = make_rows(2, ragged=False)
    for row, right in zip(rows, (False, True), strict=True):
        row |= {"chosen_id": 100, "rejected_ids": [101, 102, 103], "history_ids": [101, 102, 103] if right else []}
    run = trainer(tmp_path, rows, objective="softmax", eval_dataset=rows, per_device_eval_batch_size=2)
    figures = run.evaluate()
    alone = run.evaluate(rows[:1])
    for name in ("rewards/accuracies", "rewards/rejected", "rewards/margins", "logps/rejected"):
        assert figures[f"eval_{name}"] == pytest.approx(alone[f"eval_{name}"], abs=1e-5), name
    assert run.evaluate(rows[1:])["eval_rewards/accuracies"] == 0.0


INHERITED: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "label_names": ["labels"],
    "length_column_name": "size",
    "average_tokens_across_devices": False,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "train_sampling_strategy": "batch_rebalance",
}


@pytest.mark.parametrize("name", INHERITED)
def test_an_inherited_option_without_effect_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected ") as error:
        config(tmp_path, **{name: INHERITED[name]})
    assert "\n" not in str(error.value)


def test_rows_of_like_length_come_together(tmp_path: Path) -> None:
    rows = make_rows(64, ragged=False)
    for number, row in enumerate(rows):
        row["prompt"] = "a" * (1 + 5 * (number % 4))
    run = trainer(
        tmp_path, rows, eval_dataset=rows, train_sampling_strategy="group_by_length", per_device_train_batch_size=2
    )
    order = list(run._get_train_sampler())
    assert sorted(order) == list(range(64))
    examples = run.train_dataset.examples
    sizes = np.asarray([len(one.prompt) + sum(map(len, one.answers)) for one in examples])
    apart = [np.abs(sizes[drawn[::2]] - sizes[drawn[1::2]]).mean() for drawn in (np.asarray(order), np.arange(64))]
    assert apart[0] < apart[1] / 3
    in_order = trainer(tmp_path, rows, eval_dataset=rows)  # as evaluation always is
    assert run.evaluate()["eval_loss"] == pytest.approx(in_order.evaluate()["eval_loss"])
    run.train()


def test_tokens_are_counted_over_a_run(tmp_path: Path) -> None:
    counted = {}
    for kind in ("non_padding", "all"):
        run = trainer(tmp_path, make_rows(8), max_steps=2, include_num_input_tokens_seen=kind)
        packed = [
            run.collator([run.train_dataset[i] for i in part])["batch"].packed for part in (range(4), range(4, 8))
        ]
        run.train()
        counted[kind] = run.state.num_input_tokens_seen
        expected = [one.num_tokens if kind == "non_padding" else one.input_ids.numel() for one in packed]
        assert counted[kind] == sum(expected)
    assert counted["non_padding"] > 100


def test_a_model_that_needs_it_trains_unpacked(tmp_path: Path) -> None:
    """Bloom takes no positions. What the error advises is an option here, and gives the model's own scores."""
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=48, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.2))
    rows = make_rows(4)
    with pytest.raises(ValueError, match=r"^model: Bloom.* set packed=False \(of CandidateScorer or NAPOConfig\)"):
        trainer(tmp_path, rows, model, objective="softmax")
    run = trainer(tmp_path, rows, model, objective="softmax", packed=False, learning_rate=1e-2)
    example = run.train_dataset[1]
    expected = own_logps(model, example)
    with torch.no_grad():
        logps = run._scored(run.model, run.collator([example])["batch"])
    assert logps.tolist() == pytest.approx(expected, abs=1e-4)
    before = model.transformer.h[0].mlp.dense_h_to_4h.weight.detach().clone()
    run.train()
    assert not torch.equal(before, model.transformer.h[0].mlp.dense_h_to_4h.weight)
