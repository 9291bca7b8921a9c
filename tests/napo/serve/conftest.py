"""What tests of the service share; each of its files has a ``recommender`` of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from napo.recommend import Recommender


@pytest.fixture
def held(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is computed before it is set."""
    event, rank = threading.Event(), recommender._rank

    def late(asked: Any) -> Any:
        event.wait(60)
        return rank(asked)

    monkeypatch.setattr(recommender, "_rank", late)
    yield event
    event.set()
