"""Claims about the synthetic processes that the base model is trained on."""

import numpy as np
import pytest

from benchmarks.forecast.parts.synthetic import (
    BIN_MS,
    DAY,
    PROCESSES,
    bursts,
    days,
    jobs,
    kernels,
    leaks,
    levels,
    saw_teeth,
    synthetic_fleet,
    trends,
    variances,
    walks,
)

METRICS = ("cpu_pct", "mem_pct", "queue_depth")
N_SERIES, N_BINS = 60, 6 * DAY


def random() -> np.random.Generator:
    return np.random.default_rng(5)


def test_one_seed_gives_one_fleet_and_another_another() -> None:
    first, again, other = (synthetic_fleet(METRICS, 20, N_BINS, seed) for seed in (1, 1, 2))
    assert (first.server_names, first.metrics, first.bin_ms) == (again.server_names, METRICS, BIN_MS)
    np.testing.assert_array_equal(first.values, again.values)
    assert (first.values != other.values).mean() > 0.9
    assert first.start_ms % (DAY * BIN_MS) == 0, "a daily curve begins at midnight"


def test_percents_stay_within_their_bounds_and_rates_are_of_every_size() -> None:
    values = synthetic_fleet(METRICS, 100, N_BINS, seed=1).values
    assert values.shape == (100, 3, N_BINS) and values.dtype == np.float32 and np.isfinite(values).all()
    percents, rates = values[:, :2], values[:, 2]
    assert percents.min() >= 0 and percents.max() <= 100
    assert np.ptp(percents, axis=2).max() > 60
    assert rates.min() >= 0
    assert np.percentile(rates.max(axis=1), [5, 95]) == pytest.approx([0.3, 300], rel=0.9)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.__name__)
def test_every_process_moves_each_series_in_its_own_way(process) -> None:  # type: ignore[no-untyped-def]
    values = process(N_SERIES, N_BINS, random())
    assert values.shape == (N_SERIES, N_BINS) and np.isfinite(values).all()
    assert (np.ptp(values, axis=1) > 0).mean() > 0.8
    assert len(np.unique(values.mean(axis=1))) > 0.8 * N_SERIES


def test_trends_are_straight_lines_that_bend_or_are_freed() -> None:
    values = trends(N_SERIES, N_BINS, random())
    bends = np.abs(np.diff(values, 2, axis=1)) > 1e-9
    assert 0 < bends.mean() < 0.03
    falls = np.diff(values, axis=1).min(axis=1)
    assert 0.2 < (falls < -0.05).mean() < 0.8, "some series are freed at once, others never"
    climbed, fallen = values.max(axis=1) - values[:, 0], values[:, 0] - values.min(axis=1)
    assert (climbed > fallen).mean() > 0.5


def test_leaks_rest_climb_and_are_freed_or_stay_full() -> None:
    values = leaks(N_SERIES, N_BINS, random())
    steps = np.diff(values, axis=1)
    is_climbing = steps > 0
    assert values.min() == 0 and 0.3 < is_climbing.mean() < 0.7
    goes_on = is_climbing[:, :-96] & is_climbing[:, 96:]
    assert goes_on.sum() > 0.6 * is_climbing[:, :-96].sum(), "most climbs go on for eight hours"
    rests = values[:, 1:][steps == 0]
    assert 0.05 < (rests > 0).mean() < 0.5, "some stay where they came to"


def test_levels_hold_and_jump() -> None:
    steps = np.diff(levels(N_SERIES, N_BINS, random()), axis=1) != 0
    assert 0 < steps.mean() < 0.03


def test_the_size_of_the_noise_changes_in_variance_regimes() -> None:
    hours = variances(N_SERIES, N_BINS, random()).reshape(N_SERIES, -1, 12).std(axis=2)
    assert np.median(np.percentile(hours, 95, axis=1) / np.percentile(hours, 5, axis=1)) > 4


def test_saw_teeth_come_back_every_twenty_minutes_to_every_day() -> None:
    values = saw_teeth(N_SERIES, N_BINS, random())
    assert values.min() >= 0 and values.max() <= 1
    drops = (np.abs(np.diff(values, axis=1)) > 0.5).sum(axis=1)
    assert drops.min() <= 6 and drops.max() > 0.15 * N_BINS


def test_jobs_begin_by_a_timetable_most_of_them_at_whole_hours() -> None:
    values = jobs(N_SERIES, N_BINS, random())
    assert values.min() == 0
    shown = [row for row in values > 0 if np.flatnonzero(np.diff(row.astype(int)) == 1).size >= 3]
    gaps = [np.diff(np.flatnonzero(np.diff(row.astype(int)) == 1)) for row in shown]
    is_hourly = [np.all(found % 12 == 0) for found in gaps]
    assert 0.4 < np.mean(is_hourly) < 0.95


def test_bursts_die_away_and_walks_wander() -> None:
    kicked = bursts(N_SERIES, N_BINS, random())
    assert (np.diff(kicked, axis=1) < 0).mean() > 0.5 and kicked.min() >= 0
    walked = walks(N_SERIES, N_BINS, random())
    short, long = (np.abs(walked[:, lag:] - walked[:, :-lag]).mean() for lag in (1, 100))
    assert long > 4 * short


def test_days_repeat_and_some_are_quiet_at_the_weekend() -> None:
    values = days(N_SERIES, N_BINS, random()).reshape(N_SERIES, -1, DAY)
    np.testing.assert_allclose(values[:, 0], values[:, 4], atol=1e-9)
    assert 0.2 < (np.abs(values[:, 5] - values[:, 4]).max(axis=1) > 0.05).mean() < 0.6


def test_gaussian_processes_are_smooth_or_rough_and_remember_for_hours() -> None:
    values = kernels(N_SERIES, N_BINS, random())
    assert values.min() == 0 and values.max() == 1
    steps = np.abs(np.diff(values, axis=1)).mean(axis=1)
    assert np.percentile(steps, 90) > 5 * np.percentile(steps, 10)
    assert np.median([np.corrcoef(row[1:], row[:-1])[0, 1] for row in values]) > 0.9
