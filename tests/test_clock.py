from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetcast.clock import (
    BIN_EPOCH,
    DataClock,
    FakeClock,
    SystemClock,
    from_ms,
    iso_z,
    monotonic,
    parse_plain_utc,
    plain_utc,
    to_ms,
    utc_struct_time,
)

TEN = datetime(2026, 1, 15, 10, 0, tzinfo=UTC)
BERLIN = timezone(timedelta(hours=1))


def test_the_system_clock_is_aware_utc() -> None:
    assert SystemClock().now().utcoffset() == timedelta(0)


def test_the_data_clock_stands_at_the_newest_record_and_before_the_first_in_1970() -> None:
    newest: list[datetime | None] = [None]
    clock = DataClock(lambda: newest[0])
    assert clock.now() == BIN_EPOCH
    newest[0] = TEN
    assert clock.now() == TEN
    assert clock.now() == TEN  # it does not run by itself


def test_the_fake_clock_moves_only_by_hand_and_also_back() -> None:
    clock = FakeClock(TEN)
    clock.advance(hours=6)
    clock.advance(minutes=-1)
    assert clock.now() == TEN + timedelta(hours=5, minutes=59)


def test_monotonic_never_steps_back() -> None:
    assert monotonic() <= monotonic()


def test_plain_utc_has_seconds_and_no_offset_as_the_state_file_shows() -> None:
    assert plain_utc(TEN.astimezone(BERLIN)) == "2026-01-15T10:00:00"


@pytest.mark.parametrize("text", ["2026-01-15T10:00:00", "2026-01-15T11:00:00+01:00", "2026-01-15T10:00:00Z"])
def test_a_plain_time_is_utc_and_an_offset_is_honoured(text: str) -> None:
    assert parse_plain_utc(text) == TEN


def test_iso_z_shows_milliseconds_only_where_there_are_some() -> None:
    assert iso_z(TEN) == "2026-01-15T10:00:00Z"
    assert iso_z(TEN + timedelta(milliseconds=5)) == "2026-01-15T10:00:00.005Z"


def test_the_log_calendar_is_utc() -> None:
    assert utc_struct_time(0)[:6] == (1970, 1, 1, 0, 0, 0)


@given(st.integers(min_value=-62_135_596_800_000, max_value=253_402_300_799_999))
def test_milliseconds_survive_the_round_trip(milliseconds: int) -> None:
    assert to_ms(from_ms(milliseconds)) == milliseconds


@given(st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30)))  # noqa: DTZ001
def test_to_ms_rounds_towards_the_past_never_up(moment: datetime) -> None:
    aware = moment.replace(tzinfo=UTC)
    assert timedelta(0) <= aware - from_ms(to_ms(aware)) < timedelta(milliseconds=1)
