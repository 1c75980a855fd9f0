"""The figure: drawn from what there is, refused with a reason where there is nothing."""

from pathlib import Path

import numpy as np
import pytest
from rhythm_fleet import Grid, made_grid
from seasonal_store import VERSION, source_of, store_of
from test_calibrated_monitor import END, changed_grid, monitor_of, report_of
from test_png_canvas import decoded

import drift_monitor
from drift_monitor import DriftMonitor
from fleetcast.drift.evidence import DriftEvidence
from fleetcast.drift.figure import RED, drift_figure
from fleetcast.errors import NotEnoughData
from fleetcast.settings import DriftSettings


def drawn(folder: Path, grid: Grid) -> np.ndarray:
    store = store_of(grid, END)
    source_of(folder, store)
    return decoded(drift_figure(monitor_of(folder, store).report(), store.read_predictions))


def test_a_panel_for_each_series_in_alarm_with_a_red_line_at_its_change(tmp_path: Path) -> None:
    pixels = drawn(tmp_path, changed_grid())
    assert pixels.shape == (150 + 6 * 150 + 10, 980, 3)
    red = (pixels[150:] == RED).all(axis=2)
    (columns,) = np.nonzero(red.any(axis=0))
    assert abs(columns - (60 + 900 * 2 / 3)).max() <= 4, "two of three days in"


def test_a_calm_fleet_shows_what_is_nearest_to_its_limit(tmp_path: Path) -> None:
    pixels = drawn(tmp_path, made_grid())
    assert pixels.shape[0] == 150 + 3 * 150 + 10
    assert not (pixels == RED).all(axis=2).any()


def test_a_gap_in_the_data_is_a_gap_in_the_line(tmp_path: Path) -> None:
    grid = changed_grid()
    grid[:, :, END - 100 : END - 50] = np.nan
    assert drawn(tmp_path, grid).shape[1] == 980


def test_without_a_verdict_the_reason_is_told(tmp_path: Path) -> None:
    store = store_of(made_grid(), END)
    with pytest.raises(NotEnoughData, match="basis is literal"):
        literal = monitor_of(tmp_path, store, DriftSettings(basis="literal"))
        drift_figure(literal.report(), store.read_predictions)
    empty = DriftMonitor()
    empty.observe(DriftEvidence(source_of(tmp_path, store).evidence(VERSION).window, None))
    with pytest.raises(NotEnoughData):
        drift_figure(empty.report(), store.read_predictions)
    assert report_of(tmp_path, made_grid()).status == "ready"


def test_the_program_refuses_an_empty_folder_with_exit_5_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert drift_monitor.main(["--plot", "out.png"]) == 5
    assert "nothing to draw yet: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
