"""Claims about the baseline a training leaves behind."""

import numpy as np
import pytest
from oracle_fleet import N_BIN, SHAPE, Oracle, grid

from fleetcast.drift.literal.baseline import Baseline
from fleetcast.schema import ChangedSeries
from fleetcast.training.holdout import HoldOut, Sample, first_held_bins
from fleetcast.training.verdict import training_baseline, with_errors

WEEK_BINS = 7 * 288


def made(changed: tuple[ChangedSeries, ...], error: float = 0.0) -> Baseline:
    fleet = grid()
    for item in changed:
        fleet.values[item.server, item.metric, item.since_bin :] = 77.0
    hold_out = HoldOut(fleet, SHAPE, first_held_bins(fleet, changed, 0.1, 288), changed, (1, 12), Sample(1))
    in_service = hold_out.losses(Oracle(fleet, error))
    return with_errors(training_baseline(fleet, changed, 7.0, "v1"), in_service, hold_out)


def test_the_baseline_is_the_newest_week() -> None:
    baseline = made(())
    assert (baseline.end_ms, baseline.start_ms) == (N_BIN * 300_000, (N_BIN - WEEK_BINS) * 300_000)
    assert (baseline.series_counts == WEEK_BINS).all()
    expected = grid().values[:, :, -WEEK_BINS:].mean(axis=2)
    np.testing.assert_allclose(baseline.series_means, expected, rtol=1e-4)


def test_a_changed_series_is_known_since_its_change_alone() -> None:
    baseline = made((ChangedSeries(2, 1, N_BIN - 100),))
    assert baseline.series_counts[2, 1] == 100
    assert baseline.series_means[2, 1] == 77.0
    assert baseline.series_stds[2, 1] == 0.0
    assert baseline.series_counts[2, 0] == WEEK_BINS


def test_a_change_of_minutes_ago_does_not_empty_the_baseline() -> None:
    assert made((ChangedSeries(2, 1, N_BIN - 5),)).series_counts[2, 1] == WEEK_BINS


def test_the_errors_to_expect_are_those_of_what_serves() -> None:
    assert (made(()).error_mae == 0.0).all()
    baseline = made((), error=2.0)
    assert baseline.error_horizons.tolist() == [1, 12]
    # the mean of |N(0, 2)| is 2 * sqrt(2 / pi)
    assert baseline.error_mae == pytest.approx(2 * np.sqrt(2 / np.pi), abs=0.3)
    assert np.isfinite(baseline.series_error_mae).all()
