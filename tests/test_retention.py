"""A smaller retention waits for a day, across restarts, and says so."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from buffer_rows import batch, rows_of
from odd_files import KINDS, put

from data_buffer import DataBuffer
from fleetcast.clock import FakeClock, to_ms
from fleetcast.settings import BufferSettings
from fleetcast.storage.retention import FILE, Retention

NOW = datetime(2026, 1, 15, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def kept(folder: Path, now: datetime, days: int, max_mb: int = 0) -> tuple[int, int]:
    return Retention(folder, BufferSettings(retention_days=days, retention_max_mb=max_mb)).limits(now)


def test_smaller_limits_hold_after_a_day_whatever_restarts_between(tmp_path: Path) -> None:
    assert kept(tmp_path, NOW, 60) == (60, 0)
    assert kept(tmp_path, NOW, 1, 5) == (60, 0)
    assert kept(tmp_path, NOW + 23 * HOUR, 1, 5) == (60, 0)
    assert kept(tmp_path, NOW + 24 * HOUR, 1, 5) == (1, 5)
    assert kept(tmp_path, NOW + 25 * HOUR, 90) == (90, 0), "larger ones hold at once"
    assert kept(tmp_path, NOW + 25 * HOUR, 60) == (90, 0)


def test_the_day_counts_anew_for_another_value_or_a_clock_that_stepped_back(tmp_path: Path) -> None:
    kept(tmp_path, NOW, 60)
    kept(tmp_path, NOW, 30)
    assert kept(tmp_path, NOW + 20 * HOUR, 1) == (60, 0)
    assert kept(tmp_path, NOW + 30 * HOUR, 1) == (60, 0)
    assert kept(tmp_path, NOW - 10 * HOUR, 1) == (60, 0)
    assert kept(tmp_path, NOW + 13 * HOUR, 1) == (60, 0)
    assert kept(tmp_path, NOW + 14 * HOUR, 1) == (1, 0)


def test_a_setting_that_goes_back_deletes_nothing_and_the_notice_ends(tmp_path: Path) -> None:
    retention = Retention(tmp_path, BufferSettings(retention_days=1))
    retention.limits(NOW)
    assert retention.notice == (
        "The retention shrinks: buffer.retention_days 60 to 1; what is older is deleted from "
        "2026-01-16T12:00:00Z on, unless the setting goes back."
    )
    back = Retention(tmp_path, BufferSettings())
    assert back.limits(NOW + 48 * HOUR) == (60, 0)
    assert back.notice == ""


@pytest.mark.parametrize("kind", KINDS)
def test_an_unreadable_note_deletes_nothing_at_once(tmp_path: Path, kind: str) -> None:
    put(kind, tmp_path / FILE)
    assert kept(tmp_path, NOW, 1) == (60, 0)
    assert kept(tmp_path, NOW + 24 * HOUR, 1) == (1, 0)


def test_a_buffer_with_a_smaller_retention_keeps_its_days_for_a_day(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock(NOW)
    buffer = DataBuffer(tmp_path, clock=clock)
    for age in (0, 5, 9):
        buffer.append_batch(batch([("a", to_ms(NOW - timedelta(days=age)), {"x": 1.0})]))
    buffer.flush()
    buffer.maintain(NOW)
    buffer.close()

    small = DataBuffer(tmp_path, clock=clock, retention_days=1).open()
    small.maintain(NOW + HOUR)
    assert len(rows_of(small.iter_batches(0, 2**45))) == 3
    assert "buffer.retention_days 60 to 1" in small.retention_notice
    assert small.retention_notice in caplog.text
    small.close()

    later = DataBuffer(tmp_path, clock=clock, retention_days=1).open()
    later.maintain(NOW + 26 * HOUR)
    assert len(rows_of(later.iter_batches(0, 2**45))) == 1
    assert later.retention_notice == ""
    later.close()
