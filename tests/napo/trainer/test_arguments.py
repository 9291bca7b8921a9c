"""Arguments and options that cannot be meant, have no effect, or do not fit one another, are refused at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from trainer_cases import config, make_rows, tiny_model, tiny_tokenizer, title, trainer
from transformers import TrainingArguments

from napo.catalogue import Trie
from napo.data.prompts import close_answer, encode_answer
from napo.trainer import NAPOConfig, NAPOTrainer

PAIR: dict[str, Any] = {"objective": "napo", "granularity": "pair"}
AUTHORS: dict[str, Any] = {"objective": "napo", "authors_compat": True}
VECTORS = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": "foo"}, "granularity: expected one of batch, user, negative, pair; got 'foo'"),
        ({"beta": 0.0}, "beta: expected a number above 0, got 0.0"),
        ({"beta": float("inf")}, "beta: expected a number above 0, got inf"),
        ({"gamma": -1.0}, "gamma: expected 0 or more, got -1.0"),
        ({"objective": "napo", "alpha": -1.0}, "alpha: expected 0 or more, got -1.0"),
        ({"objective": "napo", "alpha": float("nan")}, "alpha: expected 0 or more, got nan"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a finite number, got inf"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs: expected a finite number, got nan"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a finite number, got nan"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm: expected a finite number, got nan"),
        ({"objective": "napo", "rho": 1.5}, "rho: expected a share from 0 to 1, got 1.5"),
        ({"sft_weight": -3.0}, "sft_weight: expected 0 or more, got -3.0"),
        ({"objective": "napo", "margin_decay": 2.0}, "margin_decay: expected 0 or more and less than 1, got 2.0"),
        ({"truncate_prompts": True, "keep_prefix": -3}, "keep_prefix: expected at least 0, or None, got -3"),
        ({"max_length": 1}, "max_length: expected at least 2, or None, got 1"),
        ({"dataset_num_proc": 0}, "dataset_num_proc: expected at least 1, or None, got 0"),
        ({"granularity": "pair"}, "granularity: expected 'negative', since the margin of softmax is constant"),
        ({"standardize": True}, "standardize: expected False, since the margin of softmax is constant with alpha 0"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs: expected None, since softmax has no reference"),
        (
            {**AUTHORS, "granularity": "user"},
            "granularity: expected 'negative', since authors_compat=True does as the authors' code, got 'user'; leave",
        ),
        ({**AUTHORS, "margin_decay": 0.5}, "margin_decay: expected 0.9, since authors_compat=True"),
        ({**AUTHORS, "standardize": True}, "standardize: expected False, since authors_compat=True"),
        ({**AUTHORS, "metric": "cosine"}, "metric: expected 'dot', since authors_compat=True"),
        ({**AUTHORS, "shared_gradient": False}, "shared_gradient: expected True, since authors_compat=True"),
        ({**AUTHORS, "pool_ranks": False}, "pool_ranks: expected True, since authors_compat=True"),
        ({"metric": "cosine"}, "metric: expected 'dot', since no negative is borrowed with rho 0, got 'cosine'"),
        (
            {"objective": "napo", "rho": 0.0, "shared_gradient": False},
            "shared_gradient: expected True, since no negative",
        ),
        (
            {"objective": "napo", "exact": True, "shared_gradient": False},
            "shared_gradient: expected True, since borrowed",
        ),
        ({"keep_prefix": 3}, "keep_prefix: expected None, since no prompt is shortened without truncate_prompts=True"),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        config(tmp_path, **{"objective": "softmax", **options})
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_a_norm_without_limit_clips_nothing(tmp_path: Path) -> None:
    assert config(tmp_path, objective="softmax", max_grad_norm=float("inf")).max_grad_norm == float("inf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "softmax", "item_vectors": VECTORS}, "item_vectors: expected None, since the margin is"),
        (
            {**PAIR, "item_vectors": VECTORS[:, :3]},
            r"item_vectors: expected \(items, 4\), as many columns as",
        ),
        ({**PAIR, "item_vectors": VECTORS[0]}, r"item_vectors: expected \(items, D\), got \(4,\)"),
        ({**PAIR, "item_vectors": VECTORS / 0.0}, "item_vectors: expected finite numbers"),
        (
            {**PAIR, "item_vectors": VECTORS, "item_bias": torch.zeros(39)},
            r"item_bias: expected \(40,\), a number",
        ),
        ({**PAIR, "item_vectors": VECTORS, "item_bias": torch.zeros(40, 1)}, r"item_bias: expected \(40,\).*\(40, 1\)"),
        (
            {"objective": "softmax", "model_init_kwargs": {"dtype": "float32"}},
            "model_init_kwargs: expected None",
        ),
        ({"accelerator_config": {"dispatch_batches": True}}, r"accelerator_config\.dispatch_batches: expected None or"),
    ],
    ids=str,
)
def test_arguments(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{words}") as error:
        trainer(tmp_path, make_rows(8, items=40), **options)
    assert "\n" not in str(error.value)


def test_states_of_evaluated_rows_fit_the_vectors_too(tmp_path: Path) -> None:
    rows = make_rows(8, items=40)
    others = [{**row, "user_state": row["user_state"][:2]} for row in rows]
    message = r"^item_vectors: expected \(items, 2\), as many columns as user_state of eval_dataset.* has numbers"
    for evaluated in (others, {"a": rows, "b": others}):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, rows, eval_dataset=evaluated, item_vectors=VECTORS, **PAIR)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, rows, item_vectors=VECTORS, **PAIR).evaluate(others)


def test_what_needs_no_model_is_checked_before_one_is_loaded(tmp_path: Path) -> None:
    options: dict[str, Any] = {"train_dataset": make_rows(4), "processing_class": tiny_tokenizer()}
    missing = str(tmp_path / "no model here")
    with pytest.raises(ValueError, match=r"^ref_model: objective 'softmax' has no reference"):
        NAPOTrainer(missing, config(tmp_path, objective="softmax"), ref_model=missing, **options)
    with pytest.raises(ValueError, match=r"^item_vectors: granularity 'pair' needs"):
        NAPOTrainer(missing, config(tmp_path, **PAIR), **options)


def test_the_model_is_not_its_own_reference(tmp_path: Path) -> None:
    model = tiny_model()
    options: dict[str, Any] = {"train_dataset": make_rows(4), "processing_class": tiny_tokenizer()}
    with pytest.raises(ValueError, match=r"^ref_model: expected another model than the one that trains, got the same"):
        NAPOTrainer(model, config(tmp_path, objective="sdpo"), ref_model=model, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_plain_training_arguments(tmp_path: Path) -> None:
    args: Any = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=r"^args: expected a NAPOConfig, got TrainingArguments"):
        NAPOTrainer(tiny_model(), args, train_dataset=make_rows(4), processing_class=tiny_tokenizer())


def test_a_reference_with_fewer_embeddings_names_the_row(tmp_path: Path) -> None:
    small = tiny_model(vocab_size=30)
    options: dict[str, Any] = {"train_dataset": make_rows(4), "processing_class": tiny_tokenizer()}
    with pytest.raises(ValueError, match=r"^train_dataset\[0\]\.\w+.*: expected token ids in \[0, 30\)"):
        NAPOTrainer(tiny_model(), config(tmp_path, objective="sdpo"), ref_model=small, **options)


def test_vectors_of_numpys_own_dtype(tmp_path: Path) -> None:
    """float64, which the states are not."""
    vectors, bias = VECTORS.numpy().astype(np.float64), np.zeros(40)
    run = trainer(tmp_path, make_rows(8, items=40), item_vectors=vectors, item_bias=bias, **PAIR)
    run.train()
    assert np.isfinite(run.state.log_history[0]["loss"])


def titles_of_all(items: int = 40) -> Trie:
    tokenizer = tiny_tokenizer()
    assert tokenizer.eos_token_id is not None
    return Trie.of([close_answer(tokenizer, encode_answer(tokenizer, title(i)), 2) for i in range(items)])


def test_texts_of_other_items_than_the_tries(tmp_path: Path) -> None:
    rows = make_rows(8, items=40, ragged=False)
    trie = titles_of_all()
    run = trainer(tmp_path / "right", rows, trie=trie, include_num_input_tokens_seen="all")
    run.train()
    assert run.state.num_input_tokens_seen > 0
    rows[3]["rejected"][1] = title((rows[3]["rejected_ids"][1] + 1) % 40)
    said = rf"^train_dataset\[3\]\.rejected\[1\]: expected the title of item {rows[3]['rejected_ids'][1]}, whose tokens"
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path / "wrong", rows, trie=trie)


def test_a_loss_by_hand_is_that_of_its_batch(tmp_path: Path) -> None:
    """Before, between and after steps of training."""
    rows = make_rows(16)
    run = trainer(tmp_path, rows, objective="softmax", gradient_accumulation_steps=2, per_device_train_batch_size=4)
    batch = run.collator([run.train_dataset[i] for i in range(3)])
    run.model.train()
    expected = float(run.compute_loss(run.model, batch))
    run.evaluate(rows[:3])
    assert expected == pytest.approx(run.state.log_history[-1]["eval_loss"], rel=1e-5)
    run.train()
    assert float(run.compute_loss(run.model, batch)) == pytest.approx(expected, rel=1e-5)  # the rate is 0


@pytest.mark.parametrize("options", [{}, {"authors_compat": True}], ids=["napo", "authors"])
def test_a_loss_by_hand_moves_neither_margin_nor_figures(options: dict[str, Any], tmp_path: Path) -> None:
    rows = make_rows(8, ragged=False)
    run = trainer(tmp_path, rows, gradient_accumulation_steps=2, **options)
    run.train()
    batch = run.collator([run.train_dataset[i] for i in range(3)])
    before = {name: figure.clone() for name, figure in run.margin.named_buffers()}
    run.model.train()
    run.compute_loss(run.model, batch).backward()
    for name, figure in run.margin.named_buffers():
        assert torch.equal(figure, before[name]), name
    assert run._step_metrics["train"].users == 0


def test_exact_predictions_are_of_own_answers(tmp_path: Path) -> None:
    """And a borrowed answer that is too long behind the borrower's prompt is left out."""
    seen: list[np.ndarray] = []

    def keep(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {}

    rows = make_rows(10, ragged=True)
    options: dict[str, Any] = {"exact": True, "alpha": 0.0, "rho": 0.7, "compute_metrics": keep}
    options["per_device_eval_batch_size"] = 4
    run = trainer(tmp_path, rows, eval_dataset=rows, **options)
    run.evaluate()
    (rewards,) = seen
    assert rewards.shape == (10, 4)
    assert [int(np.isinf(row).sum()) for row in rewards] == [3 - len(row["rejected"]) for row in rows]
    rows[0]["rejected"][0] = "t" + "x" * 30
    rows[2] |= {"prompt": "watched " + "ab " * 12, "history_ids": []}
    most = len("watched ") + 36 + 9
    longest = {}
    for limit in (None, most):
        run = trainer(tmp_path, rows, max_length=limit, **options)
        longest[limit] = run.collator([run.train_dataset[i] for i in range(4)])["batch"].packed.longest
    assert longest[None] > most > longest[most]


def test_a_whole_model_by_name_trains_in_single_precision(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"train_dataset": make_rows(4)}
    args = {"objective": "softmax"}
    name = str(tmp_path / "model")
    run = NAPOTrainer(name, config(tmp_path / "a", **args), **options)
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    run = NAPOTrainer(
        name, config(tmp_path / "b", **args), peft_config=LoraConfig(target_modules=["q_proj"]), **options
    )
    frozen = {parameter.dtype for parameter in run.model.parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16}
    chosen = {**args, "model_init_kwargs": {"dtype": "bfloat16"}}
    run = NAPOTrainer(name, config(tmp_path / "c", **chosen), **options)
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.bfloat16}
    with caplog.at_level(logging.WARNING, logger="napo"):
        run.train()
    assert "parameter tensors that train are in bfloat16, where small updates round to nothing" in caplog.text


def test_a_truncated_prompt_keeps_its_begin_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    rows = [{**row, "prompt": "watched " * 10} for row in make_rows(4)]
    options: dict[str, Any] = {"objective": "softmax", "processing_class": tokenizer, "truncate_prompts": True}
    rows[2]["prompt"] = "watched"
    with caplog.at_level(logging.WARNING, logger="napo"):
        run = trainer(tmp_path, rows, max_length=20, **options)
    assert "train_dataset: 3 of 4 prompts lose tokens behind their first 1, since they have more than 20" in caplog.text
    assert run.collator.keep_prefix == 1
    batch = run.collator([run.train_dataset[0]])["batch"]
    assert batch.packed.truncated == 1 and int(batch.packed.input_ids[0, 0]) == 1
    assert NAPOConfig(output_dir=str(tmp_path), report_to=[]).keep_prefix is None
