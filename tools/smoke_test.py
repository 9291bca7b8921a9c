"""Shows that an installed napo works: python tools/smoke_test.py [--level module|kernels|toolkit]

Runs in the environment that is tested, from any folder but the repository's root, and imports nothing of the sources.

- ``module``: the compiled module, with numpy alone (where no torch can be had for a Python).
- ``kernels``: `napo_kernels` with torch and numpy, and that `napo` names the extra that is missing.
- ``toolkit``: `napo info` and three training steps of NAPOTrainer on a random model, with ``napo[toolkit]``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

LEVELS = ("module", "kernels", "toolkit")


class NamesOnly(types.ModuleType):
    """In place of torch: every name stands for itself, as the dtypes do for the compiled module."""

    def __getattr__(self, name: str) -> str:
        return sys.intern(name)


def check_module() -> None:
    """The three nearest of nine users, from numpy arrays: the module asks a tensor for its address and dtype only."""
    import numpy as np

    package = importlib.util.find_spec("napo_kernels")
    assert package is not None and package.origin is not None, "napo_kernels is not installed"
    file = next(Path(package.origin).parent.glob("_C*.so"))
    spec = importlib.util.spec_from_file_location("_C", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if importlib.util.find_spec("torch") is None:
        sys.modules["torch"] = NamesOnly("torch")
    torch: Any = importlib.import_module("torch")

    def tensor(array: np.ndarray, dtype: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(dtype=dtype, data_ptr=lambda: array.ctypes.data)

    states = np.random.default_rng(0).standard_normal((9, 8), dtype=np.float32)
    share = np.zeros((9, 9), dtype=bool)
    select = {
        "users": 9, "owners": 9, "k": 3, "pool_offset": 0, "groups": None, "pool_groups": None,
        "share": tensor(share, torch.bool),
    }  # fmt: skip
    found = tensor(states, torch.float32)
    module.select_nearest({"select": select, "states": found, "pool": found, "width": 8}, False, 2)
    similar = states @ states.T
    np.fill_diagonal(similar, np.inf)  # a user always has its own negatives
    expected = similar >= np.sort(similar, axis=1)[:, -4][:, None]
    assert (share == expected).all(), "select_nearest of the compiled module does not agree with numpy"
    print(f"module: {file.name} agrees with numpy; {module.build_config()}")


def check_kernels() -> None:
    import torch

    import napo_kernels
    from napo_kernels import linear_sequence_logps, napo_loss, sequence_logps, shared_negatives

    torch.manual_seed(0)
    assert napo_kernels.backends()["cpu"]["available"], napo_kernels.backends()["cpu"]
    states = torch.randn(9, 8)
    share = shared_negatives(states, 3, backend="cpu")
    assert torch.equal(share, shared_negatives(states, 3, backend="reference"))
    chosen, rejected = torch.randn(9), torch.randn(9, 4)
    losses, gradients = [], []
    for backend in ("cpu", "reference"):
        leaf = rejected.clone().requires_grad_()
        losses.append(napo_loss(chosen, leaf, share=share, margin=0.5, backend=backend))
        losses[-1].backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    hidden, weight = torch.randn(12, 16), torch.randn(50, 16)
    targets, sequences = torch.randint(50, (12,)), torch.arange(12) // 4
    fused = linear_sequence_logps(hidden, weight, targets, sequence_ids=sequences, num_sequences=3, backend="cpu")
    plain = sequence_logps((hidden @ weight.T).view(3, 4, 50), targets.view(3, 4), backend="reference")
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    print(f"kernels: torch {torch.__version__}, the C++ kernels agree with the reference")


def check_missing_extra() -> None:
    """Without the toolkit `napo` ends with one line that names what to install."""
    done = subprocess.run([sys.executable, "-m", "napo", "info"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done
    assert "pip install '.[toolkit]'" in done.stderr, done.stderr
    print(f"without the toolkit: {done.stderr.strip()}")


def check_toolkit() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from napo.trainer import NAPOConfig, NAPOTrainer

    subprocess.run([sys.executable, "-m", "napo", "info"], check=True)
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), num_key_value_heads=2, **shape))
    row = {"prompt": "Watched: Alien\nNext: ", "chosen": "Aliens", "rejected": ["Bambi", "Dumbo"]}
    with tempfile.TemporaryDirectory() as folder:
        config = NAPOConfig(
            output_dir=folder, objective="sdpo", per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = NAPOTrainer(model, config, train_dataset=[row] * 12, processing_class=tokenizer)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 3 and losses[-1] < losses[0], losses
        trainer.save_model(folder + "/final")
        assert json.loads(Path(folder, "final", "config.json").read_text())["model_type"] == "llama"
    print(f"toolkit: three steps of NAPOTrainer, loss {losses[0]:.3f} to {losses[-1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level", choices=LEVELS, default="toolkit")
    level = parser.parse_args().level
    check_module()
    if level != "module":
        check_kernels()
        check_missing_extra() if level == "kernels" else check_toolkit()
    print(f"smoke test passed: Python {sys.version.split()[0]}, level {level}")


if __name__ == "__main__":
    main()
