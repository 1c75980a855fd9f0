"""Outages, restarts and frozen sensors, seen bin by bin."""

import numpy as np

from fleetcast.drift.seasonal.sensors import (
    FROZEN,
    NEVER_STILL,
    OUTAGE,
    RESTART,
    SensorWatch,
    clean_reference,
    run_lengths,
    still_limits,
)

DAY = 288
BIN_MS = 300_000


def watching(values: np.ndarray, limits: list[int], n_metrics: int = 1) -> tuple[SensorWatch, np.ndarray]:
    """Watch (series, bin) and return the watch and what it admitted."""
    watch = SensorWatch(len(values) // n_metrics, n_metrics, np.array(limits), DAY)
    admitted = [watch.admit(values[:, place].astype(np.float32)) for place in range(values.shape[1])]
    return watch, np.stack(admitted, axis=1)


def test_a_value_repeated_too_often_stops_being_admitted_until_it_moves() -> None:
    values = np.array([[1, 2, 2, 2, 2, 3.0]])

    watch, admitted = watching(values, [3])

    assert np.array_equal(admitted, [[1, 2, 2, np.nan, np.nan, 3]], equal_nan=True)
    assert not watch.is_frozen.any()


def test_a_standstill_goes_on_through_a_gap() -> None:
    _, admitted = watching(np.array([[5, 5, np.nan, 5.0]]), [3])

    assert np.array_equal(admitted, [[5, 5, np.nan, np.nan]], equal_nan=True)


def test_a_long_silence_is_an_outage_and_its_end_a_restart() -> None:
    values = np.arange(40.0)[None].repeat(2, axis=0)  # two metrics of one server
    values[:, 5:20] = np.nan

    watch, admitted = watching(values, [99, 99], n_metrics=2)
    assert np.isnan(admitted[:, 20:26]).all() and np.isfinite(admitted[:, 26:]).all()

    quiet, _ = watching(values[:, :20], [99, 99], n_metrics=2)
    events = quiet.events(("a",), ("x", "y"), 20 * BIN_MS, BIN_MS)
    assert [(event.kind, event.metric, event.since_ms) for event in events] == [(OUTAGE, None, 5 * BIN_MS)]

    back, _ = watching(values[:, :22], [99, 99], n_metrics=2)
    events = back.events(("a",), ("x", "y"), 22 * BIN_MS, BIN_MS)
    assert [(event.kind, event.since_ms) for event in events] == [(RESTART, 20 * BIN_MS)]
    assert watch.events(("a",), ("x", "y"), 40 * BIN_MS, BIN_MS) == ()


def test_a_server_never_heard_is_no_outage() -> None:
    watch, _ = watching(np.full((1, 50), np.nan), [99])

    assert not watch.is_out.any()


def test_a_frozen_sensor_is_named_with_its_beginning() -> None:
    values = np.array([[1.0, 2, 7, 7, 7, 7], [1, 2, 3, 4, 5, 6]])

    watch, _ = watching(values, [3, 3], n_metrics=2)

    events = watch.events(("a",), ("x", "y"), 6 * BIN_MS, BIN_MS)
    assert [(event.kind, event.metric, event.since_ms) for event in events] == [(FROZEN, "x", 2 * BIN_MS)]


def test_runs_are_counted_within_each_series() -> None:
    values = np.array([[1, 1, np.nan, 1, 2], [3, 3, 3, 3, 3]], np.float32)

    assert run_lengths(values).tolist() == [[1, 2, 0, 3, 1], [1, 2, 3, 4, 5]]


def test_what_may_stand_still_for_days_is_never_frozen() -> None:
    limits = still_limits(np.array([1, 100, 5000]), DAY)

    assert limits.tolist() == [12, 150, NEVER_STILL]


def test_a_reference_is_cleaned_of_standstills_that_are_not_its_habit() -> None:
    generator = np.random.default_rng(1)
    grid = generator.normal(size=(2, 1, 6 * DAY)).astype(np.float32)
    grid[0, 0, 3 * DAY : 4 * DAY] = 4.0  # once
    grid[1, 0] = np.repeat(generator.normal(size=12), DAY // 2)  # every half day: a habit

    cleaned, limits = clean_reference(grid, DAY)

    assert np.isnan(cleaned[0]).sum() == DAY - 72
    assert np.isfinite(cleaned[1]).all()
    assert limits[1] >= DAY // 2
