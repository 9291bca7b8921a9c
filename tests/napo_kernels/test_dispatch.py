"""What `backends` says of a compiled module that is missing or of other sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import pytest
import torch

from napo_kernels import backends, dispatch
from napo_kernels.dispatch import resolve, runs_on, why_not
from napo_kernels.native import stub


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("_C")
    for name in re.findall(r"^def (\w+)", stub.FILE.read_text(), re.MULTILINE):
        if not name.startswith("select_nearest"):
            setattr(module, name, None)
    module.build_config = lambda: {"cuda": False}  # type: ignore[attr-defined]
    monkeypatch.setattr(dispatch, "compiled", lambda: module)
    why_not.cache_clear()
    yield
    why_not.cache_clear()


def test_a_module_of_other_sources_is_named_and_warned_about_once(stale: None) -> None:
    cpu = torch.device("cpu")
    missing = "select_nearest, select_nearest_of_scores"
    with pytest.warns(RuntimeWarning, match=f"without its kernels: .*other sources .*{missing}.*make ext") as caught:
        assert resolve("napo_loss", cpu) == "reference"
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("napo_loss", cpu) == "reference"
        assert "other sources" in backends()["cpu"]["why_not"]
        with pytest.raises(
            ValueError, match="'cpu' cannot run napo_loss here: the compiled module is of other sources"
        ):
            resolve("napo_loss", cpu, "cpu")


def test_sources_that_hide_the_installed_package_are_warned_about(tmp_path: Path) -> None:
    """Python that is started in a clone takes the sources there, which have no compiled module."""
    sources, installed = Path(dispatch.__file__).parent, tmp_path / "site" / "napo_kernels"
    skipped = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(sources, tmp_path / "clone" / "napo_kernels", ignore=skipped)
    shutil.copytree(sources, installed, ignore=skipped)
    (installed / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"")
    call = "import napo_kernels as k, torch; x = torch.zeros(2, 2); k.napo_loss(x[0], x, share=x == 0)"
    command = [sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path[1:]!r}; {call}"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    said = subprocess.run(command, cwd=tmp_path / "clone", env=environment, capture_output=True, text=True, check=True)
    assert said.stderr.count("RuntimeWarning") == 1, said.stderr
    wanted = (
        f"without its kernels: the sources in {tmp_path}/clone stand before the installed package in {tmp_path}/site;"
    )
    assert wanted in said.stderr


def test_the_table_has_the_ops_that_a_backend_has_kernels_for() -> None:
    """By the files that there are, so that a new op or backend is in it by itself."""
    table = backends()
    losses = ["sequence_logps", "linear_sequence_logps", "shared_negatives", "napo_loss"]
    assert set(table["reference"]["ops"]) == {*losses, "catalogue_sequence_logps"}
    assert set(table["triton"]["ops"]) == {*losses, "body", "catalogue_sequence_logps"}
    if table["cpu"]["available"]:
        assert set(table["cpu"]["ops"]) == {*losses, "catalogue_sequence_logps", "masked_attention", "body"}
        assert set(table["cuda"]["ops"]) == set(losses)


@pytest.fixture
def hopper_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A module of these sources that was built for sm_90 only; torch sees one GPU, which the test chooses."""
    module = ModuleType("_C")
    module.build_config = lambda: {"cuda": True, "cuda_architectures": "90-real"}  # type: ignore[attr-defined]
    monkeypatch.setattr(dispatch, "compiled", lambda: module)
    monkeypatch.setattr(dispatch, "_stale", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    caches = (why_not, dispatch.serves, dispatch._no_code_for)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("name", "capability", "chosen"), [("NVIDIA H100", (9, 0), "cuda"), ("NVIDIA A100", (8, 0), "triton")]
)
def test_a_module_without_code_for_the_device_is_not_chosen(
    name: str, capability: tuple[int, int], chosen: str, hopper_module: pytest.MonkeyPatch
) -> None:
    """Its launches would fail with "no kernel image is available", although Triton has kernels for the device."""
    hopper_module.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    hopper_module.setattr(torch.cuda, "get_device_name", lambda _: name)
    hopper_module.setattr(dispatch, "serves", lambda *_: True)
    gpu = torch.device("cuda")
    assert resolve("napo_loss", gpu) == chosen
    if chosen == "triton":
        message = r"built for 90-real, which NVIDIA A100 \(8\.0\) cannot run; .*CMAKE_CUDA_ARCHITECTURES=80$"
        with pytest.raises(ValueError, match=message):
            resolve("napo_loss", gpu, "cuda")


def test_an_old_device_does_not_speak_for_a_new_one(hopper_module: pytest.MonkeyPatch) -> None:
    names = {0: "NVIDIA T400", 1: "NVIDIA H100"}
    hopper_module.setattr(torch.cuda, "device_count", lambda: 2)
    hopper_module.setattr(torch.cuda, "get_device_capability", lambda index: [(7, 5), (9, 0)][index])
    hopper_module.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    hopper_module.setattr(dispatch, "serves", lambda *_: True)
    old, new = (torch.device("cuda", index) for index in names)
    assert why_not("cuda") is None
    assert resolve("napo_loss", new) == resolve("napo_loss", new, "cuda") == "cuda"
    assert resolve("napo_loss", old) == "triton"
    with pytest.raises(ValueError, match=r"which NVIDIA T400 \(7\.5\) cannot run"):
        resolve("napo_loss", old, "cuda")


@pytest.mark.parametrize(
    ("architectures", "devices", "others"),
    [
        ("90-real", ["9.0"], ["8.0", "8.9", "10.0", "12.0"]),
        ("80-real", ["8.0", "8.6", "8.9"], ["7.5", "9.0"]),
        ("86-real", ["8.6", "8.9"], ["8.0"]),
        ("80-real 90-real 100-real 100-virtual", ["8.0", "8.6", "9.0", "10.0", "10.3", "12.0"], ["7.5"]),
        ("75-virtual", ["7.5", "8.0", "12.0"], ["7.0"]),
        ("80", ["8.0", "8.6", "9.0", "12.1"], ["7.5"]),  # both
        ("90a-real", ["9.0"], ["10.0"]),
        ("90a", ["9.0"], ["10.0", "12.0"]),
        ("100f-real", ["10.0", "10.3"], ["9.0", "12.0"]),
        ("native", ["8.0"], []),
        ("", ["8.0"], []),  # a module that does not say
    ],
)
def test_the_devices_that_a_build_has_code_for(architectures: str, devices: list[str], others: list[str]) -> None:
    for device in (*devices, *others):
        assert runs_on(architectures, *map(int, device.split("."))) == (device in devices), device
