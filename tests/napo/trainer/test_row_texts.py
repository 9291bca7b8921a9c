"""Rows of text: the tokens of a prompt and its answers, for several families of tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from trainer_cases import tiny_model, trainer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SPECIALS = ["<unk>", "<s>", "</s>"]
LINES = ["Q: river of Rome? A: Tiber", "A: Arno", "A: Po", "the river: Tiber flows", "user: hi\nbot: Tiber"]


def learned(pre_tokenizer: Any, alphabet: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer that puts <s> before a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet or [], show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 9, trainer)
    return framed(tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a blank before every text, and pieces that merge over any border but a word's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    blanks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # to learn words; gone when they are used
    learner = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(LINES * 9, learner)
    return framed(Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "pre_tokenizer": None})))


def framed(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def characters(begin: str = "<s>", template: bool = True) -> PreTrainedTokenizerFast:
    words = [*dict.fromkeys(["<unk>", begin, "</s>"]), *"abcdefghijklmnopqrstuvwxyz \n"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if template:
        return framed(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", bos_token=begin, eos_token="</s>"
    )


FAMILIES = {
    "sentencepiece": sentencepiece,
    "metaspace-always": lambda: learned(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace-first": lambda: learned(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "byte-level": lambda: learned(
        pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()
    ),
    "byte-level-blank": lambda: learned(
        pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.ByteLevel.alphabet()
    ),
    "characters": characters,
}


def encoded(folder: Path, tokenizer: Any, row: dict[str, Any], **options: Any) -> Any:
    model = options.pop("model", None) or tiny_model(vocab_size=len(tokenizer))
    run = trainer(folder, [row], model, processing_class=tokenizer, objective="softmax", **options)
    return run.train_dataset[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Q: river of Rome? A:", " Tiber", [" Arno", " Po"]),
        ("Q: river of Rome? A: ", "Tiber", ["Arno", " Po"]),
        ("user: hi\nbot:", "Tiber", ["\nArno", "Po"]),
        ("the riv", "er", ["al", "eting"]),
    ],
)
def test_answers_are_what_stands_behind_the_prompt(
    family: str, prompt: str, chosen: str, rejected: list[str], tmp_path: Path
) -> None:
    tokenizer = FAMILIES[family]()
    example = encoded(tmp_path, tokenizer, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    for answer, ids in zip([chosen, *rejected], example.answers, strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert example.prompt + ids[:-1] == tokenizer(prompt + answer)["input_ids"]


def test_a_text_behind_a_prompt_of_ids_has_no_blank_of_its_own(tmp_path: Path) -> None:
    tokenizer = FAMILIES["sentencepiece"]()
    prompt = tokenizer("A:")["input_ids"]
    example = encoded(tmp_path, tokenizer, {"prompt": prompt, "chosen": " Tiber", "rejected": ["Arno"]})
    assert example.prompt == prompt
    texts = ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in example.answers]
    assert texts == ["▁Tiber</s>", "Arno</s>"]


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        (("<s>ab", "cd", ["e"]), "<s>ab", ["cd</s>", "e</s>"]),
        (("ab", "cd</s>", ["e"]), "<s>ab", ["cd</s>", "e</s>"]),
        (("ab", "cd</s>\n", ["e</s>\n"]), "<s>ab", ["cd</s>", "e</s>"]),
        (("<s>ab</s>", "cd</s>fg", ["</s>"]), "<s>ab</s>", ["cd</s>fg</s>", "</s>"]),
        (("ab</s>\n", "cd", ["e"]), "<s>ab</s>\n", ["cd</s>", "e</s>"]),
    ],
)
def test_rendered_text_keeps_its_own_begin_and_end(row: Any, prompt: str, answers: list[str], tmp_path: Path) -> None:
    tokenizer = characters()
    example = encoded(tmp_path, tokenizer, dict(zip(("prompt", "chosen", "rejected"), row, strict=True)))
    assert "".join(tokenizer.convert_ids_to_tokens(example.prompt)) == prompt
    assert ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in example.answers] == answers


def test_a_begin_token_that_is_the_end_token_is_a_prompt(tmp_path: Path) -> None:
    """The unconditional prompt of GPT-2 and its kin."""
    tokenizer = characters(begin="</s>", template=False)
    for prompt in ("</s>", "ab</s>"):
        example = encoded(tmp_path, tokenizer, {"prompt": prompt, "chosen": "c", "rejected": "d"})
        assert "".join(tokenizer.convert_ids_to_tokens(example.prompt)) == prompt


def test_an_answer_that_ends_in_a_newline_gets_no_second_one(tmp_path: Path) -> None:
    tokenizer = characters()
    row = {"prompt": "ab", "chosen": "cd\n", "rejected": ["e"]}
    example = encoded(tmp_path, tokenizer, row, answer_end="newline")
    assert ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in example.answers] == ["cd\n", "e\n"]


ROWS = {
    "prompt": ({"prompt": [3, 99]}, r"prompt: expected token ids in \[0, 31\), .* got 99"),
    "negative": ({"prompt": [3, -100]}, r"prompt: expected token ids in \[0, 31\), .* got -100"),
    "answer": ({"rejected": [[4, 2], [5, 31]]}, r"rejected\[1\]: expected token ids in \[0, 31\), .* got 31"),
    "nothing": ({"prompt": "\u200b"}, r"prompt: expected a text of at least one token"),
    "messages": (
        {"prompt": [{"role": "user", "content": "hi"}]},
        r"chosen: expected a list of messages, like the row's other fields",
    ),
    "long": ({"prompt": "a" * 30}, r"prompt: expected at most 16 tokens with the answer, as many as .* got 31 and 2"),
}


@pytest.mark.parametrize("fault", ROWS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_the_model_cannot_read_is_named_by_row(fault: str, kind: str, tmp_path: Path) -> None:
    changes, message = ROWS[fault]
    tokenizer = characters(template=fault != "nothing")
    if fault == "nothing":
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    good = {"prompt": "ab", "chosen": "c", "rejected": ["d", "e"]}
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = (
        GPT2LMHeadModel(GPT2Config(vocab_size=31, bos_token_id=1, eos_token_id=2, **sizes))
        if kind == "gpt2"
        else tiny_model(vocab_size=31, max_position_embeddings=16)
    )
    rows = [good, {**good, **changes}]
    options: dict[str, Any] = {"processing_class": tokenizer, "objective": "softmax"}
    with pytest.raises(ValueError, match=rf"^train_dataset\[1\]\.{message}") as error:
        trainer(tmp_path, rows, model, **options)
    assert "\n" not in str(error.value)
    assert len(trainer(tmp_path, rows, model, on_bad_row="skip", **options).train_dataset) == 1
    if fault == "long":
        run = trainer(tmp_path, rows, model, truncate_prompts=True, keep_prefix=2, **options)
        assert run.collator([run.train_dataset[1]])["batch"].packed.prompt_lengths == (14,)
        run.train()
        with pytest.raises(ValueError, match="or lower keep_prefix=14"):
            trainer(tmp_path, rows, model, truncate_prompts=True, keep_prefix=14, **options)


def test_an_end_token_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    tokenizer = characters()
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    with pytest.raises(ValueError, match=r"^train_dataset\[0\]\.chosen: .* got 31; .*resize_token_embeddings"):
        encoded(tmp_path, tokenizer, {"prompt": "a", "chosen": "b", "rejected": "c"}, model=tiny_model(vocab_size=31))


def test_the_default_config_trains_a_plain_row(tmp_path: Path) -> None:
    from napo import trainer as package

    args = package.NAPOConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=3, report_to=[], save_strategy="no")
    rows = [{"prompt": "ab", "chosen": "c", "rejected": ["d", "e"]}, {"prompt": "ab", "chosen": "e", "rejected": "d"}]
    model = tiny_model(vocab_size=31)
    before = model.lm_head.weight.detach().clone()
    package.NAPOTrainer(model, args, train_dataset=rows, processing_class=characters()).train()
    assert not torch.equal(before, model.lm_head.weight)


@pytest.mark.parametrize(
    ("options", "field", "help"), [({}, "rejected_scores", "alpha=0"), ({"alpha": 0}, "user_state", "rho=0")]
)
def test_a_field_that_the_objective_needs_names_the_way_out(
    options: dict[str, Any], field: str, help: str, tmp_path: Path
) -> None:
    row = {"prompt": "ab", "chosen": "c", "rejected": ["d"]}
    with pytest.raises(ValueError, match=rf"^train_dataset\[0\]\.{field}: .*set {help} or objective='softmax'"):
        trainer(tmp_path, [row], tiny_model(), processing_class=characters(), objective="napo", **options)
