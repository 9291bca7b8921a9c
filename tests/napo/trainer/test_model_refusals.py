"""What the trainer says about models whose own loss or forward has more in it than packed scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import config, make_rows, own_logps, tiny_model, tiny_tokenizer, trainer
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM

from napo.catalogue import Trie
from napo.trainer import NAPOTrainer


class Cool(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


def test_a_forward_of_somebody_else_is_not_passed_over(tmp_path: Path) -> None:
    model = tiny_model()
    model.__class__ = Cool
    rows = make_rows(4)
    with pytest.raises(
        ValueError, match=r"Cool with test_model_refusals\.Cool scores random titles .* set packed=False"
    ):
        trainer(tmp_path, rows, model, objective="softmax").train()
    run = trainer(tmp_path, rows, model, objective="softmax", packed=False)
    example = run.train_dataset[1]
    expected = own_logps(model, example)
    with torch.no_grad():
        logps = run._scored(run.model, run.collator([example])["batch"])
    assert logps.tolist() == pytest.approx(expected, abs=1e-4)
    run.train()


def cooled() -> Any:
    model = tiny_model()
    own = model.forward

    def cool(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    model.forward = cool
    return model


def test_a_forward_below_accelerates_autocast_is_not_passed_over(tmp_path: Path) -> None:
    rows = make_rows(4)
    with pytest.raises(ValueError, match=r"cooled.*cool as forward of LlamaForCausalLM scores .* set packed=False"):
        trainer(tmp_path, rows, cooled(), objective="softmax", bf16=True).train()
    model = cooled()
    run = trainer(tmp_path, rows, model, objective="softmax", bf16=True, packed=False)
    run.train()
    expected = own_logps(model, run.train_dataset[1])
    with torch.no_grad():
        logps = run._scored(run.model, run.collator([run.train_dataset[1]])["batch"])
    assert logps.tolist() == pytest.approx(expected, abs=1e-2)


def test_the_trainers_own_debugging_looks_on(tmp_path: Path) -> None:
    for packed in (True, False):
        run = trainer(tmp_path, make_rows(4), objective="softmax", debug="underflow_overflow", packed=packed)
        run.train()
        assert run.state.global_step == 1


def test_noise_that_depends_on_the_length_of_a_row_is_refused_in_packed_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^neftune_noise_alpha: expected None, .* got 5\.0; .* set packed=False$"):
        config(tmp_path, neftune_noise_alpha=5.0)
    args = config(tmp_path, neftune_noise_alpha=5.0, packed=False, objective="softmax")
    NAPOTrainer(tiny_model(), args, train_dataset=make_rows(4), processing_class=tiny_tokenizer()).train()
    with pytest.raises(ValueError, match="packed: titles of a trie are scored packed"):
        NAPOTrainer(
            tiny_model(),
            args,
            train_dataset=make_rows(4),
            processing_class=tiny_tokenizer(),
            trie=Trie.of([[4, 2], [5, 2]]),
        )


def mixtral(**options: Any) -> MixtralForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=48, **sizes, **heads, **options))


def test_a_loss_that_keeps_experts_in_balance_is_not_left_out_in_silence(tmp_path: Path) -> None:
    rows = make_rows(4)
    with pytest.raises(ValueError, match=r"^model: expected output_router_logits=False, .* to train without it$"):
        trainer(tmp_path, rows, mixtral(output_router_logits=True), objective="softmax")
    trainer(tmp_path, rows, mixtral(), objective="softmax").train()
    trainer(tmp_path, rows, mixtral(output_router_logits=True, router_aux_loss_coef=0.0), objective="softmax")


def longrope(length: int) -> Phi3ForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=48,
            pad_token_id=0,
            original_max_position_embeddings=length,
            rope_parameters={**rope, "original_max_position_embeddings": length},
            **sizes,
            **heads,
        )
    )


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_rows_beyond_the_length_of_a_longrope_are_refused_before_training(name: str, tmp_path: Path) -> None:
    rows = {"train_dataset": make_rows(4), "eval_dataset": make_rows(4)}
    rows[name] = [*rows[name], {**make_rows(1)[0], "prompt": "a" * 30}]

    def made(model: Any, **options: Any) -> NAPOTrainer:
        train = rows["train_dataset"]
        return trainer(tmp_path, train, model, eval_dataset=rows["eval_dataset"], objective="softmax", **options)

    with pytest.raises(ValueError, match=r"rope type 'longrope', .* got 3\d; set max_length=28, or packed=False"):
        made(longrope(28))
    made(longrope(64))
    made(longrope(28), max_length=28, truncate_prompts=True)
    made(longrope(28), packed=False)


def test_answers_that_are_borrowed_keep_below_the_length_of_a_longrope(tmp_path: Path) -> None:
    """No row is too long by itself."""
    rows = make_rows(8)
    rows[0]["rejected"][0] = "t" + "x" * 20
    rows[2]["prompt"] = "watched " + "a" * 18
    options: dict[str, Any] = {"exact": True, "alpha": 0.0, "rho": 1.0}
    with_room = trainer(tmp_path, rows, longrope(64), **options)
    run = trainer(tmp_path, rows, longrope(34), **options)
    longest = [
        made.collator([made.train_dataset[i] for i in range(4)])["batch"].packed.longest for made in (with_room, run)
    ]
    assert longest[0] > 34 >= longest[1]
    run.train()
    assert run.state.global_step == 1
