"""The folder that the tests of files write into."""

from __future__ import annotations

from pathlib import Path

import pytest
from table_folder import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)
