"""The log of a service is bounded, and says what it left out."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from napo.serve.logs import RateLimitFilter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def filtered(clock: Clock) -> Iterator[tuple[logging.Logger, RateLimitFilter]]:
    logger, limit = logging.getLogger("napo.test.logs"), RateLimitFilter(most=3, seconds=60.0, clock=clock)
    logger.addFilter(limit)
    yield logger, limit
    logger.removeFilter(limit)


Filtered = tuple[logging.Logger, RateLimitFilter]
BAD = "Invalid HTTP request received."


def test_a_message_that_comes_again_and_again(
    filtered: Filtered, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    logger, limit = filtered
    for _ in range(9):
        logger.warning(BAD)
    logger.warning("another %s", "one")
    assert caplog.messages == [BAD] * 3 + ["another one"]
    clock.now = 59.0
    limit.flush()
    assert len(caplog.messages) == 4
    clock.now = 61.0
    limit.flush()  # though no other message comes
    limit.flush()
    assert caplog.messages[4:] == [f"{BAD} (and 6 more like it in 61 s)"]
    logger.warning(BAD)
    assert caplog.messages[5:] == [BAD]


def test_the_rest_is_said_with_the_next_message_or_at_the_end(
    filtered: Filtered, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    logger, limit = filtered
    for _ in range(5):
        logger.warning("%d bad", 7)
    clock.now = 70.0
    logger.warning("another")
    assert caplog.messages == ["7 bad"] * 3 + ["7 bad (and 2 more like it in 70 s)", "another"]
    for _ in range(4):
        logger.warning("the last")
    limit.flush(everything=True)
    assert caplog.messages[-1] == "the last (and 1 more like it in 0 s)"


def test_failures_in_two_places_are_of_two_kinds(filtered: Filtered, caplog: pytest.LogCaptureFixture) -> None:
    logger, _ = filtered

    def fail(number: int) -> None:
        if number == 0:
            raise IndexError("here")
        if number == 1:
            raise IndexError("there")
        raise KeyError("elsewhere")

    for _ in range(5):
        for number in range(3):
            try:
                fail(number)
            except LookupError:
                logger.exception("Exception in ASGI application")
    assert len(caplog.messages) == 9


def test_kinds_without_end_take_no_memory_without_end(
    filtered: Filtered, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("napo.serve.logs.MOST_KINDS", 5)
    logger, limit = filtered
    for number in range(20):
        for _ in range(4):
            logger.warning(f"kind {number}")
        assert len(limit._seen) <= 5
    limit.flush(everything=True)
    assert sum("(and 1 more like it" in message for message in caplog.messages) == 20
