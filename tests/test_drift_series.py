"""Which series drift and since when."""

import dataclasses

import numpy as np
import pytest
from settled_rows import BIN_MS, START_MS, RowStore, joined, settled

from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.literal.series import SeriesDrift, change_times, series_drift, split_point
from fleetcast.drift.literal.window import DriftWindow, PairWindow
from fleetcast.settings import DriftSettings

SERVERS = ("a", "b", "c")
DAY_BINS = 288
CHANGE = 2 * DAY_BINS + 100


def daily(server: str, metric: str, number: int) -> float:
    """A daily rhythm with a little noise that is the same each time it is asked for."""
    noise = np.random.default_rng(number * 7 + ord(server)).normal(0, 1)
    return float(40 + 15 * np.sin(2 * np.pi * number / DAY_BINS) + noise)


def changed(server: str, metric: str, number: int) -> float:
    """As before, but server b stays higher by 30 after the change."""
    return daily(server, metric, number) + (30 if server == "b" and number >= CHANGE else 0)


def sawtooth(server: str, metric: str, number: int) -> float:
    """As before, but server b jumps up and down from bin to bin after the change."""
    return daily(server, metric, number) + (12 * (-1) ** number if server == "b" and number >= CHANGE else 0)


def last_value(value: object) -> object:
    def forecast(server: str, metric: str, number: int) -> float:
        return value(server, metric, number - 1)  # type: ignore[operator]

    return forecast


def baseline(days: int = 2) -> Baseline:
    values = np.array(
        [[[daily(s, "cpu_pct", n) for n in range(days * DAY_BINS)]] for s in SERVERS], np.float32
    )
    made = Baseline.from_grid(values, START_MS, BIN_MS, SERVERS, ("cpu_pct",), "v1")
    return dataclasses.replace(made, series_error_mae=np.full((3, 1), 1.2, np.float32))


def store_of(value: object, last: int = CHANGE + 60) -> RowStore:
    return RowStore(settled(SERVERS, range(DAY_BINS, last), value, last_value(value)))  # type: ignore[arg-type]


def window_of(store: RowStore, pairs: int = 150) -> PairWindow:
    window = DriftWindow(store.read_predictions, DriftSettings(window_size=pairs), BIN_MS)
    return window.refresh("v1", 0, int(store.rows.target_ms.max()))


def drifting(store: RowStore) -> list[SeriesDrift]:
    return [item for item in series_drift(window_of(store), baseline(), 10) if item.is_drifting]


def test_an_unchanged_fleet_names_nobody() -> None:
    assert drifting(store_of(daily)) == []


def test_a_level_shift_names_the_server_that_shifted() -> None:
    (found,) = drifting(store_of(changed))
    assert (found.server, found.metric) == ("b", "cpu_pct")
    assert found.shift > 3
    assert found.ks > 0.5


def test_new_dynamics_at_the_same_level_are_named_by_the_models_error() -> None:
    (found,) = drifting(store_of(sawtooth))
    assert found.server == "b"
    assert found.shift < 3
    assert found.error_ratio is not None
    assert found.error_ratio > 10


def test_the_daily_rhythm_is_no_shift_although_the_window_is_a_few_hours() -> None:
    worst = max(
        item.shift for item in series_drift(window_of(store_of(daily, DAY_BINS + 80), 60), baseline(), 10)
    )
    assert worst < 1.5


def test_the_list_is_cut_at_the_top_and_ordered() -> None:
    scores = [item.score for item in series_drift(window_of(store_of(changed)), baseline(), 2)]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)


def test_a_server_the_baseline_does_not_know_is_not_judged() -> None:
    rows = joined(store_of(changed).rows, settled(["new"], range(CHANGE, CHANGE + 60), daily_new))
    named = {item.server for item in series_drift(window_of(RowStore(rows)), baseline(), 10)}
    assert named == set(SERVERS)


def daily_new(server: str, metric: str, number: int) -> float:
    return 99.0


def test_without_a_known_model_error_the_shift_alone_speaks() -> None:
    unknown = dataclasses.replace(baseline(), series_error_mae=np.full((3, 1), np.nan, np.float32))
    found = series_drift(window_of(store_of(sawtooth)), unknown, 10)
    assert all(item.error_ratio is None and not item.is_drifting for item in found)


@pytest.mark.parametrize("value", [changed, sawtooth])
def test_the_time_of_change_is_found_within_a_quarter_of_an_hour(value: object) -> None:
    store = store_of(value)
    found = drifting(store)
    newest_ms = int(store.rows.target_ms.max())
    since = change_times(found, baseline(), store.read_predictions, "v1", newest_ms, BIN_MS)
    late_bins = (since["b", "cpu_pct"] - START_MS) / BIN_MS - CHANGE
    assert abs(late_bins) <= 3


def test_nothing_is_read_for_nobody() -> None:
    store = store_of(daily)
    assert change_times([], baseline(), store.read_predictions, "v1", START_MS, BIN_MS) == {}
    assert store.reads == []


@pytest.mark.parametrize(
    ("values", "split"), [([], 0), ([1.0], 0), ([2.0, 2.0, 2.0], 0), ([1, 1, 1, 5, 5], 3), ([9, 1, 1, 1], 1)]
)
def test_the_split_is_the_first_value_after_the_change(values: list[float], split: int) -> None:
    assert split_point(np.array(values, float))[0] == split


def test_one_outage_does_not_outweigh_a_day_of_new_values() -> None:
    values = np.concatenate((np.full(161, 1.0), np.full(100, 2.0))) + np.tile([0.1, 0.0, -0.1], 87)
    values[100] = 900.0
    assert split_point(values)[0] == 161
