"""The errors a daemon lived through: kept, bounded, and not logged over and over."""

import logging

import pytest

from fleetcast.clock import FakeClock
from fleetcast.errors import StorageFull
from fleetcast.serving import status
from fleetcast.serving.status import ERRORS_KEPT, RecentErrors


def test_the_newest_errors_are_kept_newest_first() -> None:
    clock = FakeClock()
    errors = RecentErrors(clock)
    for number in range(ERRORS_KEPT + 5):
        clock.advance(seconds=1)
        errors.note("ledger", StorageFull(f"full {number}"))
    kept = errors.newest_first()
    assert len(kept) == ERRORS_KEPT
    assert kept[0] == {"time": "2026-01-15T10:00:25Z", "part": "ledger", "error": "full 24"}
    assert errors.newest_by_part() == {"ledger": clock.now().timestamp()}


def test_the_same_error_is_logged_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wall = iter([0.0, 0.0, 30.0, 61.0, 61.0])
    monkeypatch.setattr(status, "monotonic", lambda: next(wall))
    errors = RecentErrors(FakeClock())
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            errors.note("buffer", StorageFull("no space"))
    assert [record.getMessage() for record in caplog.records] == [
        "part failed part=buffer error=no space"
    ] * 2
