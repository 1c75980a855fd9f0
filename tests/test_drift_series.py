"""Which series drift and since when."""

import dataclasses

import numpy as np
import pytest
from settled_rows import BIN_MS, START_MS, RowStore, joined, settled

from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.literal.series import (
    SeriesDrift,
    change_times,
    geometric_mean,
    relative_to_last,
    series_drift,
    split_point,
)
from fleetcast.drift.literal.window import DriftWindow, PairWindow
from fleetcast.drift.report import FRESH_BUT_FELT, IN_ORDER, STALE_AND_FELT, STALE_NOT_FELT, ServedError
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


def told(served: float, model: float) -> PairWindow:
    """Return a window in which both sides miss by so many times what the last value misses."""
    values = {number: daily("a", "cpu_pct", number) for number in range(DAY_BINS + 80)}
    rows = settled(SERVERS, range(DAY_BINS, DAY_BINS + 80), lambda s, m, n: values[n])
    step = np.array([abs(values[n] - values[n - 1]) for n in (rows.target_ms - START_MS) // BIN_MS])
    rows = dataclasses.replace(rows, p50=rows.actual + served * step, model_p50=rows.actual + model * step)
    return window_of(RowStore(rows))


def test_what_clients_get_is_told_apart_from_what_the_model_says() -> None:
    errors = relative_to_last(told(served=0.5, model=1.5))
    assert geometric_mean(errors.served.values()) == pytest.approx(0.5, rel=1e-3)
    assert geometric_mean(errors.model.values()) == pytest.approx(1.5, rel=1e-3)
    assert errors.n_series == 3
    assert errors.of({("b", "cpu_pct")}).n_series == 1


def test_a_horizon_that_was_not_forecast_has_no_error() -> None:
    assert relative_to_last(told(served=0.5, model=0.5), 12).n_series == 0
    assert relative_to_last(PairWindow()).n_series == 0


def test_a_series_that_stands_still_has_no_last_value_to_be_compared_with() -> None:
    rows = settled(SERVERS, range(DAY_BINS, DAY_BINS + 60), lambda s, m, n: 40.0, lambda s, m, n: 41.0)
    errors = relative_to_last(window_of(RowStore(rows)))
    assert geometric_mean(errors.served.values()) is None


@pytest.mark.parametrize(
    ("is_stale", "served", "says"),
    [
        (False, 0.7, IN_ORDER),
        (False, 1.1, FRESH_BUT_FELT),
        (True, 0.7, STALE_NOT_FELT),
        (True, 1.1, STALE_AND_FELT),
    ],
)
def test_the_report_says_whether_the_model_is_stale_and_whether_it_matters(
    is_stale: bool, served: float, says: str
) -> None:
    error = ServedError({1: relative_to_last(told(served, 1.4))}, frozenset(), is_stale=is_stale)
    found = error.as_json()
    assert found["says"] == says
    assert found["fleet"] == found["by_metric"]["cpu_pct"] == found["by_horizon"]["1"]
    assert found["fleet"] == pytest.approx(served, rel=1e-3)
    assert found["model"]["fleet"] == pytest.approx(1.4, rel=1e-3)
    assert f"fleet: clients get {served:.2f}, the model alone 1.40" in "\n".join(error.lines())


def test_series_in_alarm_are_told_apart_and_decide_whether_a_stale_model_matters() -> None:
    good, bad = relative_to_last(told(0.6, 1.4)), relative_to_last(told(1.2, 1.4))
    is_b = [name == "b" for name in SERVERS]
    served = {"cpu_pct": np.where(is_b, bad.served["cpu_pct"], good.served["cpu_pct"])}
    error = ServedError(
        {1: dataclasses.replace(good, served=served)}, frozenset({("b", "cpu_pct")}), is_stale=True
    )
    found = error.as_json()
    assert found["fleet"] < 1 < found["in_alarm"]
    assert found["says"] == STALE_AND_FELT
    assert "series in alarm: clients get 1.20" in "\n".join(error.lines())


def test_without_settled_forecasts_nothing_is_said() -> None:
    error = ServedError({}, frozenset(), is_stale=False)
    assert error.lines() == []
    assert (error.as_json()["fleet"], error.as_json()["says"]) == (None, "")
