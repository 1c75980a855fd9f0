"""Whether a first training is possible, told from a real buffer."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from data_buffer import DataBuffer
from fleetcast.clock import FakeClock
from fleetcast.retraining.order import Readiness
from fleetcast.settings import BinSettings, DecisionSettings, Settings

START = datetime(2026, 1, 10, 6, tzinfo=UTC)


def filled(folder: Path, hours: float, step_min: int = 5, metric: str = "cpu_pct") -> DataBuffer:
    clock = FakeClock(START + timedelta(days=30))
    buffer = DataBuffer(folder / "data_buffer", clock=clock, expire=False)
    n_rows = int(hours * 60 / step_min) + 1
    times = [START + timedelta(minutes=step_min * number) for number in range(n_rows)]
    buffer.append([{"timestamp": t.isoformat(), "server_name": "a", metric: 5.0} for t in times])
    buffer.close()
    return DataBuffer(folder / "data_buffer", clock=clock, expire=False)


def readiness(buffer: DataBuffer, **limits: float) -> Readiness:
    return Readiness(buffer, Settings(decision=DecisionSettings(**limits)))  # type: ignore[arg-type]


def test_an_empty_buffer_has_no_data(tmp_path: Path) -> None:
    assert (
        readiness(DataBuffer(tmp_path / "none")).why_not()
        == f"no records in {tmp_path / 'none'} (there is no buffer)"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("hours", "missing"), [(47, "data span 47.0 h of 48 h, complete about 2026-01-12 06:00Z"), (48, "")]
)
def test_two_days_are_enough(tmp_path: Path, hours: float, missing: str) -> None:
    assert readiness(filled(tmp_path, hours)).why_not() == missing


def test_a_span_with_holes_in_it_is_not_enough(tmp_path: Path) -> None:
    """A row an hour fills one bin in twelve: never half of a horizon."""
    assert readiness(filled(tmp_path, 72, step_min=60)).why_not() == "0 of 200 trainable windows"


def test_a_metric_nobody_forecasts_is_no_training_data(tmp_path: Path) -> None:
    assert "0 trainable windows" in readiness(filled(tmp_path, 72, metric="uptime_days")).why_not()


def test_the_trainer_agrees_on_the_same_data(tmp_path: Path) -> None:
    from fleetcast.bins import count_trainable, enough_to_train
    from fleetcast.training.grid import TrainingGrid

    buffer = filled(tmp_path, 48)
    buffer.export_training_data(tmp_path / "export.parquet", 60, 300)
    grid = TrainingGrid.read(tmp_path / "export.parquet", BinSettings().forecast_metrics, 300_000)
    n_windows = count_trainable(grid.values, 96)
    assert enough_to_train(grid.span_s, n_windows, DecisionSettings()) == readiness(buffer).why_not() == ""


def test_once_there_was_enough_nothing_is_read_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = filled(tmp_path, 48)
    own = readiness(buffer)
    assert own.why_not() == ""

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(buffer, "iter_batches", refuse)
    assert own.why_not() == ""
