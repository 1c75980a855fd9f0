"""The log names each series in alarm and each broken sensor once."""

import logging
from pathlib import Path

import numpy as np
import pytest
from rhythm_fleet import DAY, SERVERS, fitted, made_grid
from seasonal_store import FIRST_TEST_BIN, registry_with, store_of
from test_seasonal_monitor import END, changed_grid, monitor_of, report_of

from drift_monitor import DriftMonitor
from fleetcast.retraining.report import DriftLog


@pytest.fixture(autouse=True)
def everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_an_alarm_is_told_when_it_begins_and_when_it_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, drifting = DriftLog(), report_of(tmp_path, changed_grid())
    log.note(drifting)
    assert caplog.text.count("series in alarm: ") == 6
    assert "app-1 cpu_pct" in caplog.text
    log.note(drifting)
    assert caplog.text.count("series in alarm: ") == 6, "told once"
    log.note(report_of(tmp_path, made_grid()))
    assert "series in alarm=0 begun=0 ended=6 of compared=10" in caplog.text


def test_broken_data_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid = made_grid()
    grid[1, :, END - 30 :] = np.nan
    log, report = DriftLog(), report_of(tmp_path, grid)
    log.note(report)
    log.note(report)
    (record,) = (item for item in caplog.records if item.levelno == logging.WARNING)
    assert record.message == f"data quality, not drift: kind=outage server={SERVERS[1]} metric=all"


def test_series_with_too_few_days_are_told_once_with_their_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = made_grid()
    grid[2, 1, : FIRST_TEST_BIN - DAY] = np.nan
    registry_with(tmp_path, fitted(grid[:, :, :FIRST_TEST_BIN]))
    log, report = DriftLog(), monitor_of(tmp_path, store_of(grid, END - 12)).report()
    log.note(report)
    log.note(report)
    said = "series not compared=1 reason=too few days in the reference until about 2026-01-17 00:00Z"
    assert caplog.text.count(said) == 1


def test_the_literal_basis_says_nothing_here(caplog: pytest.LogCaptureFixture) -> None:
    DriftLog().note(DriftMonitor().report())
    assert caplog.text == ""
