"""The asset cache against an index of one tiny wheel on disk: no network, and pip is the real one."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from napo import assets
from napo.extras import MissingExtra


def tiny_wheel(folder: Path) -> assets.Wheel:
    """Writes tiny-1.0 into ``folder``; it holds one data file."""
    folder.mkdir()
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny/data.txt", "payload")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return assets.Wheel(requirement="tiny==1.0", sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size="1 kB")


def unpack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        (folder / "data.txt").write_bytes(wheel.read("tiny/data.txt"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see, and an empty cache beside it."""
    monkeypatch.setenv("NAPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_second_call_downloads_nothing(index: Path) -> None:
    wheel = tiny_wheel(index)
    folder = assets._asset("tiny", wheel, unpack)
    assert (folder / "data.txt").read_text() == "payload"
    shutil.rmtree(index)
    assert assets._asset("tiny", wheel, unpack) == folder
    assert [path.name for path in folder.parent.iterdir() if not path.name.startswith(".")] == ["tiny"]


def test_other_bytes_are_refused(index: Path) -> None:
    wheel = tiny_wheel(index)
    path = next(index.iterdir())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("tiny/more.txt", "tampered")
    with pytest.raises(ValueError, match=f"its sha256 is not {wheel.sha256}"):
        assets._asset("tiny", wheel, unpack)
    assert not (assets.cache_dir() / "tiny").exists()


def test_failed_unpacking_leaves_nothing_and_can_be_repeated(index: Path) -> None:
    wheel = tiny_wheel(index)

    def fails(archive: Path, folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        assets._asset("tiny", wheel, fails)
    assert not (assets.cache_dir() / "tiny").exists()
    assert (assets._asset("tiny", wheel, unpack) / "data.txt").is_file()


def test_no_network_and_empty_cache(index: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot fetch recbole==1.2.1 .*check that pip reaches") as caught:
        assets.movielens_100k()
    assert "\n" not in str(caught.value)


def test_converter_is_asked_for_before_the_download(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("napo.extras.find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(MissingExtra, match=r"^gguf: not installed.*pip install '\.\[demo\]'$"):
        assets.smollm2()


def test_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NAPO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="set NAPO_CACHE"):
        assets.movielens_100k()


def test_model_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAPO_CACHE", str(tmp_path))
    (tmp_path / "smollm2-135m").mkdir()
    assert assets.resolve_model("smollm2-135m") == str(tmp_path / "smollm2-135m")
    assert assets.resolve_model("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(ValueError, match="is a folder without"):
        assets.resolve_model(model)
    (model / "config.json").write_text("{}")
    assert assets.resolve_model(model) == str(model)
    with pytest.raises(ValueError, match="is a file"):
        assets.resolve_model(model / "config.json")
    for missing in ("./missing", "~/missing", "a/b/c", "tiny modell", "models/tiny modell", "missing/"):
        with pytest.raises(ValueError, match="no such folder"):
            assets.resolve_model(missing)


@pytest.mark.slow
def test_smollm2_says_something_sensible() -> None:
    """The converted checkpoint, where the cache has it: nothing is downloaded for a test."""
    if not (assets.cache_dir() / "smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not in the cache; `napo demo` or napo.assets.smollm2() puts it there")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tokenizer.eos_token == "<|im_end|>" and "<|im_start|>" in tokenizer.chat_template
    assert len(tokenizer("1995")["input_ids"]) == 4  # every digit is a token
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=2, do_sample=False)[0])
    assert answer == "The capital of France is Paris."
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
    assert model(**ids, labels=ids["input_ids"]).loss < 4.5  # ln of the vocabulary is 10.8
