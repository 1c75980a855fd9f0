"""The figure: drawn from what there is, refused with a reason where there is nothing."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.dates import date2num
from matplotlib.figure import Figure
from rhythm_fleet import BIN_MS, START_MS, Grid, made_grid
from seasonal_store import VERSION, source_of, store_of
from test_seasonal_monitor import CHANGE, END, changed_grid, monitor_of, report_of

import drift_monitor
from drift_monitor import DriftMonitor
from fleetcast.clock import from_ms
from fleetcast.drift.evidence import DriftEvidence
from fleetcast.drift.figure import RED, drift_figure, drift_png
from fleetcast.errors import NotEnoughData
from fleetcast.settings import DriftSettings


def drawn(folder: Path, grid: Grid) -> Figure:
    store = store_of(grid, END)
    source_of(folder, store)
    return drift_figure(monitor_of(folder, store).report(), store.read_predictions)


def lines_of(figure: Figure, panel: int) -> dict[str, np.ndarray]:
    """Return the values of each labelled line of a panel; 0 is that of the scores."""
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[panel].lines}


def test_a_panel_for_each_series_in_alarm_with_a_red_line_at_its_change(tmp_path: Path) -> None:
    figure = drawn(tmp_path, changed_grid())

    _, *panels = figure.axes
    assert len(panels) == 6
    for panel in panels:
        (change,) = [line for line in panel.lines if line.get_color() == RED]
        at = date2num(from_ms(START_MS + CHANGE * BIN_MS))
        assert abs(date2num(change.get_xdata()[0]) - at) <= 2 / 24, "within two hours"  # type: ignore[index]
        assert "times the limit" in panel.get_title(loc="left")


def test_the_scores_of_the_last_day_rise_over_their_limit_to_what_the_report_says(tmp_path: Path) -> None:
    store = store_of(changed_grid(), END)
    report = monitor_of(tmp_path, store).report()

    scores = lines_of(drift_figure(report, store.read_predictions), 0)

    (limit,) = set(scores.pop("limit"))
    assert limit == 1
    assert len(scores) == len(report.metrics)
    for values, (name, score) in zip(scores.values(), report.metrics.items(), strict=True):
        assert values[0] < 1 < values[-1]
        assert values[-1] == pytest.approx(score / report.thresholds[name], rel=1e-5)


def test_a_calm_fleet_shows_what_is_nearest_to_its_limit(tmp_path: Path) -> None:
    _, *panels = drawn(tmp_path, made_grid()).axes

    assert len(panels) == 3
    assert all(panel.get_title(loc="left").endswith(" times its limit") for panel in panels)
    assert all(line.get_color() != RED for panel in panels for line in panel.lines)


def test_a_gap_in_the_data_is_a_gap_in_the_line(tmp_path: Path) -> None:
    grid = changed_grid()
    grid[:, :, END - 100 : END - 50] = np.nan

    was = lines_of(drawn(tmp_path, grid), 1)["what was"]

    assert np.isnan(was[-99:-49]).all() and np.isfinite(was[-40:]).all()


def test_the_file_is_a_png(tmp_path: Path) -> None:
    store = store_of(made_grid(), END)
    report = monitor_of(tmp_path, store).report()
    assert drift_png(report, store.read_predictions).startswith(b"\x89PNG\r\n\x1a\n")


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
    (tmp_path / "data_buffer").mkdir()
    assert drift_monitor.main(["--plot", "out.png"]) == 5
    assert "nothing to draw yet: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data_buffer"]


def test_without_matplotlib_the_program_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_buffer").mkdir()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert drift_monitor.main(["--plot", "out.png"]) == 1
    assert "--plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data_buffer"]
