"""Claims about the forecasts of a loop replay: what a monitor may read of them, and when."""

from pathlib import Path

import numpy as np

from benchmarks.loop.parts.fleet import BIN_MS, ReplayFleet
from benchmarks.loop.parts.record import HORIZONS, ReplayRecord, forecast_stretch, last_values
from fleetcast.forecast.predictor import Forecaster
from fleetcast.schema import HistoryWindow
from fleetcast.training.grid import TrainingGrid

MODEL = Path(__file__).parent / "data" / "model_format_1.ckpt"
METRICS = ("cpu_pct", "mem_pct", "disk_write_pct")
START_MS, BEGIN, N_BINS = 1_700_006_400_000, 300, 420
AT = [horizon - 1 for horizon in HORIZONS]


def fleet() -> ReplayFleet:
    random = np.random.default_rng(5)
    values = np.clip(30 + random.normal(0, 5, (2, 3, N_BINS)), 0, 100).astype(np.float32)
    return ReplayFleet("test", TrainingGrid(("a", "b"), METRICS, values, START_MS, BIN_MS), BEGIN, ())


def bin_ms(number: int) -> int:
    return START_MS + number * BIN_MS


def test_a_stretch_of_forecasts_is_what_the_model_in_service_says_bin_by_bin() -> None:
    model, scene = Forecaster.load(MODEL), fleet()
    made = forecast_stretch(model, scene, 350, 353)
    for origin in (350, 352):
        past = scene.grid.values[:, :, : origin + 1]
        served = model.predict(HistoryWindow(("a", "b"), METRICS, past, bin_ms(origin), BIN_MS))
        np.testing.assert_allclose(
            made[:, :, origin - 350],
            served[:, :, [horizon - 1 for horizon in HORIZONS]],
            rtol=1e-4,
            atol=1e-3,
        )


def test_nothing_of_the_future_can_be_read() -> None:
    scene = fleet()
    record = ReplayRecord.begun(scene)
    record.note(BEGIN, np.zeros((2, 3, 6, 3, 3), np.float32), "v1")
    rows = record.read_predictions(0, bin_ms(N_BINS))
    assert int(rows.target_ms.max()) == bin_ms(BEGIN + 5)
    assert record.newest_record_time().timestamp() * 1000 == bin_ms(BEGIN + 5)


def test_a_forecast_is_read_at_its_target_with_its_version_and_the_actual() -> None:
    scene = fleet()
    record = ReplayRecord.begun(scene)
    record.note(BEGIN, np.full((2, 3, 6, 3, 3), 7.0, np.float32), "v1")
    rows = record.read_predictions(bin_ms(BEGIN), bin_ms(BEGIN + 2), 1)
    assert len(rows) == 2 * 6  # bins x series
    assert rows.model_version.tolist() == [None] * 6 + ["v1"] * 6
    first = scene.grid.values[0, 0, BEGIN - 1]
    assert rows.p50[0] == first and rows.p50[6] == 7.0  # before the replay the last value was given
    assert rows.actual[0] == scene.grid.values[0, 0, BEGIN]
    assert (rows.target_ms - rows.origin_ms == BIN_MS).all()


def test_a_gap_in_the_model_is_filled_by_the_last_value_and_a_gap_in_the_data_by_nothing() -> None:
    scene = fleet()
    scene.grid.values[1, 2, BEGIN + 3] = np.nan
    record = ReplayRecord.begun(scene)
    record.note(BEGIN, np.full((2, 3, 6, 3, 3), np.nan, np.float32), "v1")
    assert record.quantiles[0, 0, BEGIN + 1, 2, 1] == scene.grid.values[0, 0, BEGIN + 1]
    rows = record.read_predictions(bin_ms(BEGIN + 3), bin_ms(BEGIN + 4), 1)
    assert len(rows) == 5


def test_the_last_value_is_at_most_an_hour_old() -> None:
    values = np.array([[[5.0, *[np.nan] * 13]]], np.float32)
    assert np.isfinite(last_values(values)[0, 0]).tolist() == [True] * 12 + [False] * 2
