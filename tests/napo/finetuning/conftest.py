"""Prepared data of the small world, and its prompts as tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_files import prepare

from napo.data.prepared import PreparedData
from napo.data.prompts import PromptEncoder
from napo.language_models.loading import load_tokenizer


@pytest.fixture(scope="module")
def data(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare("recbole", small_world / "files", out, test_users=10, val_users=5, min_user=2, min_item=1)
    return PreparedData.load(out)


@pytest.fixture(scope="module")
def encoder(small_world: Path, data: PreparedData) -> PromptEncoder:
    return PromptEncoder(load_tokenizer(small_world / "model"), data.titles, noun=data.noun)
