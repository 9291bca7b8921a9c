"""The reference's log-probabilities: from the adapter switched off, or computed once and kept."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from trainer_cases import config, distance, make_rows, step_gradients, tiny_model, tiny_tokenizer, trainer

import napo.signals as signals
import napo.trainer.references as references
import napo.trainer.referring as referring
from napo.trainer import NAPOTrainer

ROWS = make_rows(12)
FRESH = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("objective", ["sdpo", "dmpo"])
def test_precomputed_equals_adapter_switched_off(objective: str, tmp_path: Path) -> None:
    """Over steps that move the adapter away from the reference, micro-batches and accumulated pools alike."""
    options: dict[str, Any] = {"objective": objective, "max_steps": 3, "learning_rate": 0.5, "optim": "sgd"}
    for pool in ("batch", "accumulated"):
        options |= {"pool": pool, "gradient_accumulation_steps": 1 if pool == "batch" else 2, "peft_config": FRESH}
        kept = step_gradients(tmp_path / pool / "kept", ROWS, precompute_ref_log_probs=True, **options)
        switched = step_gradients(tmp_path / pool / "switched", ROWS, precompute_ref_log_probs=False, **options)
        for a, b in zip(kept, switched, strict=True):
            assert distance(a, b) < 1e-4


def test_the_cache_is_for_these_weights_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    replacing = references.replacing
    monkeypatch.setattr(references, "replacing", lambda path: written.append(path) or replacing(path))

    def run(rows: list[dict[str, Any]], seed: int) -> Any:
        model = get_peft_model(tiny_model(), FRESH)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        made = trainer(tmp_path, rows, model, objective="sdpo")
        made.train()
        return made.train_dataset.ref_logps

    def files() -> list[Path]:
        return [path for path in written if path.name.startswith("ref_logps")]

    first = run(ROWS, seed=1)  # a trained adapter: precomputed without being asked to
    assert len(files()) == 1
    again = run(ROWS, seed=1)
    assert len(files()) == 1
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    other = run(ROWS, seed=2)
    assert len(files()) == 2
    assert not np.allclose(other[0], first[0])
    run(make_rows(12, seed=5), seed=1)
    assert len(set(files())) == 3


def test_prompts_that_continue_each_other_are_scored_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a window of 40 titles would be computed again for each of its rows."""
    shown = [(window, titles) for window in "ab" for titles in (3, 1, 2, 4)]
    rows = [{**make_rows(1, seed=titles)[0], "prompt": f"{window} " + "Ran; " * titles} for window, titles in shown]
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 1}
    run = trainer(tmp_path, rows, objective="sdpo", precompute_ref_log_probs=True, peft_config=FRESH, **sizes)
    tokens: list[int] = []
    collate = references.Collator.__call__

    def counted(self: Any, examples: Any) -> Any:
        batch = collate(self, examples)
        tokens.append(batch["batch"].packed.num_tokens)
        return batch

    monkeypatch.setattr(references.Collator, "__call__", counted)
    examples = run._with_references("train_dataset", run.train_dataset).examples
    monkeypatch.undo()
    apart = [run.collator([example])["batch"].packed.num_tokens for example in examples]
    assert len(tokens) == 2
    assert sum(tokens) < 0.7 * sum(apart)


def test_a_signal_ends_the_reference_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training saves first, but here is nothing to save: it took minutes, deaf to SIGTERM."""
    run = trainer(tmp_path, ROWS, objective="sdpo", precompute_ref_log_probs=True, peft_config=FRESH)
    monkeypatch.setattr(signals, "_asked", None)  # put back as it was
    before = signal.signal(signal.SIGTERM, signals._stop)
    try:
        with signals.saving_first(), pytest.raises(signals.Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
            run._with_references("train_dataset", run.train_dataset)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.glob("ref_logps*"))


def test_packing_order_keeps_chains_and_sorts_them_by_length() -> None:
    prompts = [[1, 2, 3, 4, 5], [1, 9], [1, 2, 3], [7], [1, 2, 3, 4], [1, 9, 9]]
    assert references.packing_order(prompts) == [3, 1, 5, 2, 4, 0]
    assert references.packing_order([]) == []
    assert references.packing_order([[], []]) == [0, 1]


def test_resuming_takes_the_model_that_the_run_began_with(tmp_path: Path) -> None:
    """Given the trained one, the reference would be another without anybody's noticing."""
    options: dict[str, Any] = {"objective": "sdpo", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path, ROWS, max_steps=1, **options)
    run.train()
    with pytest.raises(ValueError, match=r"^model: expected the weights that the run of .* began with"):
        trainer(tmp_path, ROWS, run.model, max_steps=2, **options).train(resume_from_checkpoint=True)
    again = trainer(tmp_path, ROWS, max_steps=2, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_resuming_takes_any_fresh_adapter(tmp_path: Path) -> None:
    """Its first matrix is drawn anew in each process; the reference is the model below it, as it does nothing yet."""
    options: dict[str, Any] = {"objective": "sdpo", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    options["precompute_ref_log_probs"] = True
    for steps in (1, 2):
        base = tiny_model()
        torch.manual_seed(steps)
        run = trainer(tmp_path, ROWS, get_peft_model(base, FRESH), max_steps=steps, **options)
        run.train(resume_from_checkpoint=steps > 1)
    assert run.state.global_step == 2
    with pytest.raises(ValueError, match=r"^model: expected the weights that the run of .* began with"):
        trainer(tmp_path, ROWS, run.model, max_steps=3, **options).train(resume_from_checkpoint=True)


def also_trains(name: str) -> Any:
    """A fresh adapter, and beside it something that switching it off leaves on."""
    extra = {"bias": {"bias": "lora_only"}, "all-biases": {"bias": "all"}}.get(name, {})
    model = get_peft_model(
        tiny_model(attention_bias=True), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **extra)
    )
    for parameter_name, parameter in model.named_parameters():
        parts = {"norms": "norm", "embeddings": "embed_tokens", "head": "lm_head"}
        if name in parts and parts[name] in parameter_name:
            parameter.requires_grad_(True)
    return model


def drift(folder: Path, model: Any, **options: Any) -> tuple[bool, float]:
    """Whether the reference was computed beforehand, and how far it is at the end from what it was at the start."""
    settings: dict[str, Any] = {"objective": "sdpo", "max_steps": 4, "learning_rate": 0.1, **options}
    run = trainer(folder, ROWS, model, **settings)
    batch = run.collator([run.train_dataset[i] for i in range(6)])["batch"]
    with torch.no_grad():
        start = run._scored(run.model.eval(), batch)
    run.train()
    batch = run.collator([run.train_dataset[i] for i in range(6)])["batch"]
    moved = run._reference(run.model, batch) - start
    return run.train_dataset.ref_logps is not None, float(moved.abs().max())


@pytest.mark.parametrize("name", ["bias", "all-biases", "norms", "embeddings", "head"])
def test_the_reference_stays_where_more_than_the_adapter_trains(name: str, tmp_path: Path) -> None:
    precomputed, moved = drift(tmp_path, also_trains(name))
    assert precomputed
    assert moved < 1e-5
    with pytest.raises(ValueError, match=r"^precompute_ref_log_probs: .*or other parameters train too"):
        trainer(tmp_path, ROWS, also_trains(name), objective="sdpo", precompute_ref_log_probs=False)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [3, 4]}},
        {"use_dora": True},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_what_is_switched_off_with_the_adapter_needs_no_precomputing(extra: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **extra)
    precomputed, moved = drift(tmp_path, get_peft_model(tiny_model(attention_bias=True), config))
    assert not precomputed
    assert moved < 1e-5


def test_a_trained_copy_of_a_module_is_part_of_the_reference(tmp_path: Path) -> None:
    """Its adapter's matrices are still zero, so only the copy says that switching off would go back too far."""
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    precomputed, moved = drift(tmp_path, model)
    assert precomputed
    assert moved < 1e-5


def test_what_is_unfrozen_after_the_trainer_was_made_counts(tmp_path: Path) -> None:
    run = trainer(tmp_path, ROWS, get_peft_model(tiny_model(), FRESH), objective="sdpo")
    run.model.get_input_embeddings().weight.requires_grad_(True)
    run.train()
    assert run.train_dataset.ref_logps is not None


def test_an_adapter_of_transformers_is_precomputed(tmp_path: Path) -> None:
    """It has no context in which it is off."""
    model = tiny_model()
    model.add_adapter(FRESH)
    precomputed, moved = drift(tmp_path, model)
    assert precomputed
    assert moved < 1e-5


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj"], "all-linear"], ids=str)
def test_an_adapter_on_an_adapter_is_refused(targets: Any, tmp_path: Path) -> None:
    second = LoraConfig(r=2, target_modules=targets)
    held = tiny_model()
    held.add_adapter(FRESH)
    for model in (get_peft_model(tiny_model(), FRESH), held):
        with pytest.raises(
            ValueError, match=r"^peft_config: expected a model without an adapter, got one with default;"
        ):
            trainer(tmp_path, ROWS, model, objective="sdpo", peft_config=second)
    merged = get_peft_model(tiny_model(), FRESH).merge_and_unload()
    trainer(tmp_path, ROWS, merged, objective="sdpo", peft_config=second).train()


def test_a_model_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    get_peft_model(tiny_model(), FRESH).save_pretrained(tmp_path / "adapter")
    for objective in ("softmax", "sdpo"):
        run = trainer(
            tmp_path, ROWS, PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter"), objective=objective
        )
        with pytest.raises(ValueError, match=r"^model: expected parameters that train, got none; .*is_trainable=True"):
            run.train()
        assert run.evaluate(ROWS)["eval_loss"] > 0


def test_the_fingerprint_is_of_every_weight() -> None:
    model = tiny_model(hidden_size=64, intermediate_size=128)
    before = references.weights_fingerprint(model)
    assert before == references.weights_fingerprint(tiny_model(hidden_size=64, intermediate_size=128))
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for place in (1, flat.numel() // 2 + 1, -1):  # between any samples
            flat[place] += 1.0
            assert references.weights_fingerprint(model) != before
            flat[place] -= 1.0


def test_another_base_below_a_fresh_adapter_is_not_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"objective": "sdpo", "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, ROWS, get_peft_model(tiny_model(), FRESH), max_steps=1, **options).train()
    other = tiny_model()
    other.model.layers[0].mlp.up_proj.weight.data[3, 5] += 1.0
    with pytest.raises(ValueError, match=r"^model: expected the weights that the run of .* began with"):
        trainer(tmp_path, ROWS, get_peft_model(other, FRESH), max_steps=2, **options).train(resume_from_checkpoint=True)


def test_without_rows_to_train_on_the_trainer_says_so(tmp_path: Path) -> None:
    run = NAPOTrainer(
        tiny_model(), config(tmp_path, objective="sdpo"), eval_dataset=ROWS, processing_class=tiny_tokenizer()
    )
    assert run.evaluate()["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    with pytest.raises(ValueError, match="train_dataset"):
        run.train()


def test_predictions_of_a_trained_model_know_its_reference(tmp_path: Path) -> None:
    """Rows that the trainer had at the start have a reference; of others nobody can say it any more."""
    held_out, others = make_rows(6, seed=7), make_rows(6, seed=8)
    options: dict[str, Any] = {"objective": "sdpo", "max_steps": 4, "learning_rate": 0.05, "eval_dataset": held_out}
    run = trainer(tmp_path, ROWS, **options)
    run.train()
    known = run.evaluate()
    assert abs(known["eval_rewards/margins"]) > 0.01
    for rows in (held_out, run.eval_dataset):
        assert run.predict(rows).metrics["test_rewards/margins"] == pytest.approx(known["eval_rewards/margins"])
    with pytest.raises(ValueError, match=r"^test_dataset: expected rows that the trainer has had from the start"):
        run.predict(others)
    with pytest.raises(ValueError, match=r"^eval_dataset: expected rows that the trainer has had from the start"):
        run.evaluate(others)
    run.train()  # on from here: the reference is still the first model
    assert run.predict(held_out).metrics["test_rewards/margins"] != pytest.approx(known["eval_rewards/margins"])


@pytest.mark.parametrize("policy", [torch.float32, torch.bfloat16], ids=str)
def test_a_reference_by_name_has_the_policys_dtype(policy: torch.dtype, tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"train_dataset": ROWS, "processing_class": tiny_tokenizer()}
    args = config(tmp_path / "out", objective="sdpo")
    name = str(tmp_path / "model")
    run = NAPOTrainer(tiny_model().to(policy), args, ref_model=name, **options)
    assert {parameter.dtype for parameter in run.ref_model.parameters()} == {policy}
    args = config(tmp_path / "out", objective="sdpo", model_init_kwargs={"dtype": "float16"})
    run = NAPOTrainer(tiny_model().to(policy), args, ref_model=name, **options)
    assert {parameter.dtype for parameter in run.ref_model.parameters()} == {torch.float16}


def test_a_reference_that_shares_weights_is_refused(tmp_path: Path) -> None:
    base = tiny_model()
    adapted = get_peft_model(base, FRESH)
    options: dict[str, Any] = {"train_dataset": ROWS, "processing_class": tiny_tokenizer()}
    with pytest.raises(ValueError, match=r"^ref_model: expected a model with weights of its own, got one that shares"):
        NAPOTrainer(adapted, config(tmp_path, objective="sdpo"), ref_model=base, **options)
    assert any(parameter.requires_grad for parameter in adapted.parameters())


def test_a_reference_of_its_own_goes_back_after_its_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is fetched only where something is to be computed."""
    moves: list[str] = []
    monkeypatch.setattr(referring, "_move", lambda model, device: moves.append(str(device)))
    weights = referring.weights_fingerprint(reference := tiny_model(vocab_size=50))
    monkeypatch.setattr(referring, "weights_fingerprint", lambda *_: weights)
    options: dict[str, Any] = {"train_dataset": ROWS, "processing_class": tiny_tokenizer()}
    for place in ("cpu", "meta"):  # where it could compute nothing
        run = NAPOTrainer(tiny_model(), config(tmp_path, objective="sdpo"), ref_model=reference.to(place), **options)
        run.train()
        assert id(run.ref_model) not in run._scorers
    assert moves == ["cpu", "cpu", "cpu", "meta"]  # before each of two batches, and back; then the cache has it all


def test_a_reference_pass_leaves_each_module_in_its_mode(tmp_path: Path) -> None:
    run = trainer(tmp_path, ROWS, objective="sdpo", peft_config=FRESH)
    kept_out = run.model.base_model.model.model.layers[0]
    run.model.train()
    kept_out.eval()
    before = [module.training for module in run.model.modules()]
    run._reference(run.model, run.collator([run.train_dataset[0]])["batch"])
    assert [module.training for module in run.model.modules()] == before
