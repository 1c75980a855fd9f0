from datetime import UTC, datetime, timedelta

import numpy as np

from benchmarks.loop.closed_loop import phases_of, phases_table
from fleetcast.clock import to_ms
from fleetcast.demo.harness import Reload
from fleetcast.schema import SettledForecasts

START = datetime(2026, 1, 15, tzinfo=UTC)
BIN = timedelta(minutes=5)


def rows(values: list[tuple[int, str, float, float, str | None]]) -> SettledForecasts:
    """Make one-bin-ahead rows from (bin, metric, p50, actual, version)."""
    target = np.array([to_ms(START + row[0] * BIN) for row in values], dtype=np.int64)
    p50 = np.array([row[2] for row in values])
    return SettledForecasts(
        origin_ms=target - 300_000,
        target_ms=target,
        horizon=np.ones(len(values), dtype=np.int32),
        server_name=np.array(["web"] * len(values), dtype=object),
        metric=np.array([row[1] for row in values], dtype=object),
        p10=p50,
        p50=p50,
        p90=p50,
        actual=np.array([row[3] for row in values]),
        model_version=np.array([row[4] for row in values], dtype=object),
    )


def test_per_has_a_floor_of_20_points_for_percents_and_each_model_its_own_time() -> None:
    settled = rows(
        [
            (0, "cpu_pct", 0.0, 10.0, None),
            (1, "cpu_pct", 12.0, 10.0, None),  # off by 2 of the floor 20; repeating 10: exact
            (2, "cpu_pct", 10.0, 40.0, "v1"),  # off by 30 of 40; repeating 10: the same
            (3, "cpu_pct", 39.0, 50.0, "v1"),  # off by 11 of 50; repeating 40: off by 10
            (4, "cpu_pct", 0.0, 50.0, None),  # the fallback for a moment: in no version's figures
        ]
    )
    fallback, model = phases_of(settled, [Reload("v1", START + 2 * BIN, 1.0)], START, START + 9 * BIN)
    assert (fallback.version, model.version) == ("fallback", "v1")
    assert (fallback.horizons[0].n, fallback.horizons[0].per) == (1, 0.1)
    assert (model.horizons[0].n, model.horizons[0].per) == (2, round((30 / 40 + 11 / 50) / 2, 4))
    assert model.horizons[0].per_last_value == round((30 / 40 + 10 / 50) / 2, 4)
    assert model.horizons[0].mae_by_metric == {"cpu_pct": (20.5, 20.0)}


def test_the_table_shows_each_phase_with_both_figures() -> None:
    settled = rows([(0, "cpu_pct", 0.0, 10.0, None), (1, "cpu_pct", 12.0, 10.0, None)])
    phases = phases_of(settled, [], START, START + 9 * BIN)
    assert "1: 0.100 (0.000)" in phases_table([phase.as_dict() for phase in phases])
