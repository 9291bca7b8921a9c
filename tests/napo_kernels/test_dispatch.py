"""What `backends` says of a compiled module that is missing or of other sources."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from napo_kernels import backends, dispatch
from napo_kernels.dispatch import resolve, why_not
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


def test_the_table_has_the_ops_that_a_backend_has_kernels_for() -> None:
    """By the files that there are, so that a new op or backend is in it by itself."""
    table = backends()
    losses = ["sequence_logps", "linear_sequence_logps", "shared_negatives", "napo_loss"]
    assert set(table["reference"]["ops"]) == {*losses, "catalogue_sequence_logps"}
    assert set(table["triton"]["ops"]) == {*losses, "body", "catalogue_sequence_logps"}
    if table["cpu"]["available"]:
        assert set(table["cpu"]["ops"]) == {*losses, "catalogue_sequence_logps", "masked_attention", "body"}
        assert set(table["cuda"]["ops"]) == set(losses)
