"""Conveniences of the trainer: defaults that train, the model's tokenizer, a reference, own figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from trainer_cases import config, make_rows, tiny_model, tiny_tokenizer, trainer
from transformers import BitsAndBytesConfig, EvalPrediction

import napo
from napo.trainer import NAPOConfig, NAPOTrainer

PLAIN = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in make_rows(6)]


@pytest.fixture
def saved(tmp_path: Path) -> str:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_trainer_is_imported_from_napo_which_itself_is_light() -> None:
    assert napo.NAPOTrainer is NAPOTrainer and napo.NAPOConfig is NAPOConfig
    assert {"NAPOTrainer", "NAPOConfig"} <= set(dir(napo))
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        napo.Trainer  # noqa: B018
    code = "import napo, sys; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pandas')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plain_row_trains_with_the_default_config(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for args in (NAPOConfig(), None):
        run = napo.NAPOTrainer(saved, args, train_dataset=PLAIN)
        run.train()
        assert run.state.global_step == 3  # 6 rows by 8, three epochs
        assert np.isfinite(run.state.log_history[-1]["train_loss"])


def test_the_tokenizer_is_found_from_the_model(saved: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved)
    run = NAPOTrainer(model, config(tmp_path, objective="softmax"), train_dataset=PLAIN)
    assert run.processing_class.eos_token == "</s>"
    with pytest.raises(ValueError, match=r"^processing_class: .* does not say where it was loaded from; pass process"):
        NAPOTrainer(tiny_model(), config(tmp_path, objective="softmax"), train_dataset=PLAIN)
    tiny_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"^processing_class: .*bare has none that loads"):
        NAPOTrainer(str(tmp_path / "bare"), config(tmp_path, objective="softmax"), train_dataset=PLAIN)


def test_the_error_of_a_missing_field_names_the_objective(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rejected_scores: .* objective='softmax'") as error:
        trainer(tmp_path, PLAIN, objective="napo")
    assert "on_bad_row" not in str(error.value)
    with pytest.raises(ValueError, match=r"at least one usable row of 6; .* objective='softmax'") as error:
        trainer(tmp_path, PLAIN, objective="napo", on_bad_row="skip")


def other_model() -> Any:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def test_a_reference_of_its_own_is_what_rewards_are_against(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    run = NAPOTrainer(
        tiny_model(),
        config(tmp_path, objective="sdpo"),
        train_dataset=PLAIN,
        processing_class=tokenizer,
        ref_model=other_model(),
    )
    plain = trainer(tmp_path / "plain", PLAIN, objective="softmax", beta=1.0, average=False)
    batch = run.collator(list(run.train_dataset))["batch"]
    expected = plain._scored(other_model(), batch).detach()
    run.train()
    found = np.concatenate(run.train_dataset.ref_logps)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
    assert not np.allclose(found, plain._scored(tiny_model(), batch).detach().numpy(), atol=1e-2)


def test_references_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    def made(**options: Any) -> None:
        args = config(tmp_path, **options)
        NAPOTrainer(tiny_model(), args, train_dataset=PLAIN, processing_class=tiny_tokenizer(), ref_model=other_model())

    with pytest.raises(ValueError, match="ref_model: objective 'softmax' has no reference"):
        made(objective="softmax")
    with pytest.raises(ValueError, match="precompute_ref_log_probs: expected None or True with ref_model"):
        made(objective="sdpo", precompute_ref_log_probs=False)


def test_own_figures_get_the_rewards_of_all_rows(tmp_path: Path) -> None:
    seen: list[EvalPrediction] = []

    def figures(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"first": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    run = NAPOTrainer(
        tiny_model(),
        config(tmp_path, objective="softmax", per_device_eval_batch_size=4),
        train_dataset=PLAIN,
        eval_dataset=PLAIN,
        processing_class=tiny_tokenizer(),
        compute_metrics=figures,
    )
    result = run.evaluate()
    (prediction,) = seen
    counts = [len(row["rejected"]) for row in PLAIN]
    assert prediction.predictions.shape == (6, 1 + max(counts))
    assert np.isneginf(prediction.predictions).sum(1).tolist() == [max(counts) - count for count in counts]
    assert prediction.predictions[:, 0].mean() == pytest.approx(result["eval_rewards/chosen"], rel=1e-5)
    right = prediction.predictions[:, 0] > prediction.predictions[:, 1:].max(1)
    assert result["eval_first"] == pytest.approx(right.mean())


def test_quantised_models_are_loaded_by_name_and_under_an_adapter(saved: str, tmp_path: Path) -> None:
    args = config(tmp_path, objective="softmax")
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    lora = LoraConfig(target_modules="all-linear")
    with pytest.raises(ValueError, match="quantization_config: needs the model's name"):
        NAPOTrainer(
            tiny_model(),
            args,
            train_dataset=PLAIN,
            processing_class=tiny_tokenizer(),
            peft_config=lora,
            quantization_config=four_bit,
        )
    with pytest.raises(ValueError, match="quantization_config: quantised weights do not train; give peft_config"):
        NAPOTrainer(saved, args, train_dataset=PLAIN, quantization_config=four_bit)
    args.model_init_kwargs = {"quantization_config": four_bit}
    with pytest.raises(ValueError, match="quantization_config: given twice"):
        NAPOTrainer(saved, args, train_dataset=PLAIN, quantization_config=four_bit, peft_config=lora)


@pytest.mark.parametrize("given", ["argument", "model_init_kwargs"])
def test_without_bitsandbytes_it_says_so(given: str, saved: str, tmp_path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    args = config(tmp_path, objective="softmax")
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    options: dict[str, Any] = {"quantization_config": four_bit}
    if given == "model_init_kwargs":
        args.model_init_kwargs, options = options, {}
    lora = LoraConfig(target_modules="all-linear")
    with pytest.raises(
        ValueError, match="quantization_config: needs bitsandbytes, which is not installed; pip install"
    ):
        NAPOTrainer(saved, args, train_dataset=PLAIN, peft_config=lora, **options)
