"""Users of TRL expect these to work: the script in the documents, a command line, TensorBoard, a model card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from peft import PeftModel
from trainer_cases import make_rows, tiny_model, tiny_tokenizer, trainer
from transformers import HfArgumentParser

from napo.trainer import NAPOConfig

PAGE = Path(__file__).parents[3] / "docs" / "preference_data.md"


def test_the_script_of_the_documents_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = [
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "NAPOTrainer(" in block
    ]
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("my-model")
    tiny_tokenizer().save_pretrained("my-model")
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in make_rows(10)]
    Path("preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict[str, object] = {}
    exec(compile(script, str(PAGE), "exec"), names)
    history = names["trainer"].state.log_history  # type: ignore[attr-defined]
    assert history[-1]["step"] == 6  # 10 rows by 4, twice
    assert json.loads(Path("out/log_history.json").read_text()) == history
    adapter = PeftModel.from_pretrained(tiny_model(), "out/final")
    assert any(bool(value.any()) for name, value in adapter.named_parameters() if "lora_B" in name)


def test_the_config_reads_a_command_line(tmp_path: Path) -> None:
    words = f"--output_dir {tmp_path} --use_cpu true --objective sdpo --beta 0.5 --average false --pool accumulated"
    kwargs = '{"attn_implementation": "sdpa"}'
    (config,) = HfArgumentParser(NAPOConfig).parse_args_into_dataclasses(  # type: ignore[arg-type]
        [*words.split(), "--model_init_kwargs", kwargs]
    )
    assert (config.objective, config.beta, config.average, config.pool) == ("sdpo", 0.5, False, "accumulated")
    assert config.rho is None and config.resolved_objective.rho == 0.0
    assert config.model_init_kwargs == json.loads(kwargs)


def test_tensorboard_shows_the_figures_under_trls_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = make_rows(8)
    run = trainer(tmp_path, rows, eval_dataset=rows, max_steps=2, eval_strategy="epoch", report_to=["tensorboard"])
    run.train()
    (events,) = tmp_path.rglob("events.out.tfevents*")
    shown = EventAccumulator(str(events)).Reload()
    assert {f"eval/{name}" for name in ("loss", "rewards/margins", "logps/rejected")} <= set(shown.Tags()["scalars"])
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
                 "logps/rejected", "gamma", "pool_size", "shared_fraction", "tokens_per_second"):  # fmt: skip
        logged = [entry[name] for entry in run.state.log_history if "loss" in entry]
        assert [event.value for event in shown.Scalars(f"train/{name}")][:2] == pytest.approx(logged, rel=1e-5)


def test_a_model_card_can_be_written(tmp_path: Path) -> None:
    """Which ``push_to_hub`` does first."""
    rows = make_rows(8)
    run = trainer(tmp_path, rows, eval_dataset={"some": rows, "few": rows[:4]}, eval_strategy="epoch")
    run.train()
    run.create_model_card(model_name="tiny-napo")
    card = (tmp_path / "README.md").read_text()
    assert "# tiny-napo" in card and "- learning_rate: 0.0" in card
    numbers = [f"{name} {getattr(run.objective, name)}" for name in ("beta", "gamma", "alpha", "rho")]
    assert "Objective: napo (form softmax, " in card and all(number in card for number in numbers)
    assert "Trained on 8 rows with 2 to 3 rejected answers each." in card
    assert "Evaluated on few 4 rows" in card and "steps taken: 1" in card
    value = next(entry["eval_few_loss"] for entry in run.state.log_history if "eval_few_loss" in entry)
    assert f"| eval_few_loss | {value:.4g} | 1 |" in card
    for untrue in ("unknown dataset", "More information needed", "[](https://huggingface.co/)", str(tmp_path)):
        assert untrue not in card
