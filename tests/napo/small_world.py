"""A whole small world without network: RecBole files with a pattern to learn, a tokenizer and a Llama with 2 layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from napo.demo import Budget

WORDS = ("Blue", "Red", "Silent", "Golden", "Lost", "Night", "River", "King", "Moon", "Storm")
ITEMS = [f"{first} {second}" for first in WORDS for second in WORDS if first != second][:60]
NEWLINE = "\n"


def recbole_files(folder: Path, *, users: int = 90, length: int = 14, seed: int = 0) -> Path:
    """``tiny.inter`` and ``tiny.item``: everybody walks the catalogue in steps of one to three."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    rows = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        place = int(random.integers(len(ITEMS)))
        for step in range(length):
            rows.append(f"{user + 1}\t{place + 1}\t4\t{1000 + step}")
            place = (place + int(random.integers(1, 4))) % len(ITEMS)
    (folder / "tiny.inter").write_text("\n".join(rows) + "\n")
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token"]
    lines += [f"{number + 1}\t{title}\t1990" for number, title in enumerate(ITEMS)]
    (folder / "tiny.item").write_text("\n".join(lines) + "\n")
    return folder


def tokenizer(folder: Path) -> Any:
    """Byte-level BPE with merges learnt from the catalogue."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([title + NEWLINE for title in ITEMS] + ["Movies watched, in order:\n"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return fast


def lossy_model(folder: Path) -> Path:
    """A folder as of a model, whose tokenizer has no words for the titles: only the blank between them is known."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    words = ["<unk>", "</s>", NEWLINE, " ", *"abcdefghijklmnopqrstuvwxyz:,"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(text, "isolated") for text in (" ", NEWLINE)]
    )
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)
    LlamaConfig(vocab_size=len(words)).save_pretrained(folder)
    return folder


def model(folder: Path) -> Path:
    """A saved causal LM with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def budget() -> Budget:
    """A demo of seconds."""
    from napo.demo import Budget

    return Budget(
        style="history",
        prepare={"test_users": 30, "val_users": 10, "min_user": 2, "min_item": 1},
        sasrec={"max_epochs": 3, "dim": 16},
        sft={
            "tokens": 24_000,
            "window": 10,
            "history": 10,
            "val_examples": 16,
            "learning_rate": 1e-2,
            "lora": {"top_layers": 1},
        },
        napo={"prefixes": True, "window": 6, "min_history": 1, "tokens": 2_000, "negatives": 4, "batch_size": 4},
        sft_longer={"tokens": 4_000, "val_examples": 16, "learning_rate": 1e-3},
    )
