"""Learning a reference: what enters it, what does not, and what it says about itself."""

from pathlib import Path

import numpy as np
import pytest
from rhythm_fleet import (
    BIN_MS,
    DAY,
    METRICS,
    REFERENCE_DAYS,
    SERVERS,
    START_MS,
    Grid,
    fitted,
    fleet_grid,
    made_grid,
    usual_reference,
)

from fleetcast.clock import DAY_MS
from fleetcast.drift.seasonal.detector import SeasonalDetector
from fleetcast.drift.seasonal.learning import (
    MIN_DAYS,
    fit_all,
    fit_chunk,
    sample,
)
from fleetcast.drift.seasonal.reference import Reference, ReferenceOptions
from fleetcast.drift.seasonal.renewal import learn_reference
from fleetcast.drift.seasonal.season import DayClock, Shape
from fleetcast.drift.seasonal.statistics import INDEX, N_STATISTICS, Books
from fleetcast.errors import BadData
from fleetcast.settings import DriftSettings


def weeks(days: int = REFERENCE_DAYS) -> Grid:
    return made_grid()[:, :, : days * DAY]


def test_every_series_with_days_enough_has_limits_and_a_rhythm() -> None:
    reference = usual_reference()

    assert reference.is_compared.all()
    assert (reference.n_days == REFERENCE_DAYS).all()
    judged = [index for name, index in INDEX.items() if not name.startswith("error_")]
    assert np.isfinite(reference.limits[:, judged]).all() and (reference.limits[:, judged] > 0).all()
    swing = reference.shape.profiles.max(axis=1) - reference.shape.profiles.min(axis=1)
    assert swing == pytest.approx(20, abs=5)


def test_errors_have_no_limit_where_none_are_known() -> None:
    assert np.isnan(usual_reference().limits[:, INDEX["error_3h"]]).all()


def test_it_reports_the_false_alarms_it_was_calibrated_to_and_those_it_showed() -> None:
    fleet = usual_reference().fleet

    assert fleet.false_alarms_per_month == 1.0 and fleet.factor >= 1
    assert fleet.days >= REFERENCE_DAYS - 2
    assert fleet.shown_per_month <= 30 / fleet.days * 1.01
    assert fleet.series_alarm_share < 0.02


def test_a_rarer_alarm_asks_for_a_larger_factor() -> None:
    often, rarely = (
        fitted(weeks(), ReferenceOptions(false_alarms_per_month=30.0)),
        fitted(weeks(), ReferenceOptions(false_alarms_per_month=0.001)),
    )

    assert rarely.fleet.factor >= often.fleet.factor


def test_fewer_days_give_wider_limits() -> None:
    few = fitted(weeks(6))

    assert few.is_compared.all()
    assert np.nanmedian(few.limits / usual_reference().limits) > 0.95


def test_a_series_with_too_few_days_is_not_compared() -> None:
    grid = weeks()
    grid[2, 1, : -(MIN_DAYS - 1) * DAY] = np.nan
    grid[4, 0] = np.nan

    reference = fitted(grid)

    missing = np.flatnonzero(~reference.is_compared).tolist()
    assert missing == [2 * len(METRICS) + 1, 4 * len(METRICS)]
    assert np.isnan(reference.limits[missing]).all()


@pytest.mark.parametrize("more_bins", [0, DAY // 4, DAY // 2], ids=["midnight", "a quarter", "half a day"])
def test_the_midnight_told_is_the_first_at_which_a_series_is_judged(more_bins: int) -> None:
    # Given a reference whose data end at that time of day, and one whole day of a series
    whole = made_grid(REFERENCE_DAYS + MIN_DAYS, n_servers=3)
    whole[2, 1, : (REFERENCE_DAYS - 1) * DAY] = np.nan
    changed = np.full((3, len(METRICS)), np.nan)
    changed[0, 0] = (
        START_MS + (REFERENCE_DAYS * DAY - 60) * BIN_MS
    )  # known to have changed 5 h before midnight

    def at(bins: int) -> Reference:
        return learn_reference(fleet_grid(whole[:, :, :bins], SERVERS[:3]), DriftSettings(), changed)

    known = at(REFERENCE_DAYS * DAY + more_bins)

    # When
    told = known.enough_days_ms(MIN_DAYS, known.end_ms)

    # Then
    one_day, new = 2 * len(METRICS) + 1, 0
    assert np.flatnonzero(np.isfinite(told)).tolist() == [new, one_day]
    for series in (one_day, new):
        bins = int(told[series] - START_MS) // BIN_MS
        assert not at(bins - DAY).is_compared[series] and at(bins).is_compared[series]


def test_a_midnight_that_passed_moves_on_and_a_metric_never_sent_waits_for_nothing() -> None:
    grid = weeks()
    grid[2, 1, : -(MIN_DAYS - 1) * DAY] = np.nan
    grid[4, 0] = np.nan
    reference = fitted(grid)

    told = reference.enough_days_ms(MIN_DAYS, reference.end_ms + DAY_MS + BIN_MS)

    assert told[2 * len(METRICS) + 1] == reference.end_ms + 2 * DAY_MS
    assert np.isnan(told[4 * len(METRICS)])


def test_what_came_before_a_known_change_does_not_count() -> None:
    grid = weeks()
    grid[0, 0, : 7 * DAY] += 50
    changed = np.full((len(SERVERS), len(METRICS)), np.nan)
    changed[0, 0] = START_MS + 7 * DAY * BIN_MS

    reference = fitted(grid, changed_ms=changed)

    assert reference.n_days[0] == REFERENCE_DAYS - 7
    assert np.abs(reference.shape.profiles[0] - usual_reference().shape.profiles[0]).max() < 5


def test_an_older_regime_is_cut_away_without_being_told() -> None:
    grid = weeks()
    grid[0, 0, : 5 * DAY] += 80

    reference = fitted(grid)

    assert reference.start_days[0] == 5 and (reference.start_days[1:] == 0).all()
    assert reference.shape.highs[0] < 80


def test_outages_and_standstills_do_not_enter() -> None:
    grid = weeks()
    grid[0, 0, 6 * DAY : 7 * DAY] = 0.0  # a sensor that stood at zero for a day
    grid[1, :, 6 * DAY : 7 * DAY] = np.nan

    reference = fitted(grid)

    # the first bins of a standstill cannot be told from chance; the rest is out
    plain = usual_reference()
    assert np.abs(reference.shape.profiles[0] - plain.shape.profiles[0]).max() < 3
    assert reference.limits[0, INDEX["shape_24h"]] < 1.5 * plain.limits[0, INDEX["shape_24h"]]
    assert reference.still_limits[0] <= plain.still_limits[0] * 1.5 + 12 * 9
    assert reference.n_days[2] == REFERENCE_DAYS - 1


def test_weekdays_are_told_apart_where_three_weeks_show_them() -> None:
    generator = np.random.default_rng(3)
    grid = (50 + generator.normal(0, 1, (2, 1, 21 * DAY))).astype(np.float32)
    day = np.arange(21 * DAY) // DAY
    grid[0, 0, (day % 7 == 2) | (day % 7 == 3)] += 30

    reference = Reference.fit(fleet_grid(grid, ("a", "b"), ("cpu_pct",)))

    assert reference.shape.weekly_rows.tolist() == [0, -1]
    profile = reference.shape.weekday_profiles[0].mean(axis=1)
    assert sorted(np.round(profile / 10).tolist()) == [5] * 5 + [8] * 2


def test_series_learned_in_chunks_are_the_same_as_learned_at_once() -> None:
    flat = weeks().reshape(-1, REFERENCE_DAYS * DAY)
    clock = DayClock(BIN_MS)
    bins = clock.local_bins(START_MS, flat.shape[1])
    floors = np.zeros(len(flat), np.float32)

    errors = np.full_like(flat, np.nan)

    whole = fit_chunk(flat, errors, bins, floors, clock)
    parts = [
        fit_chunk(flat[rows], errors[rows], bins, floors[rows], clock)
        for rows in (slice(0, 3), slice(3, None))
    ]

    assert np.array_equal(Shape.stack([part.shape for part in parts]).profiles, whole.shape.profiles)
    edges = Books.stack([part.books for part in parts]).values.edges
    assert np.array_equal(edges, whole.books.values.edges)
    series, left_out = sample(parts, len(METRICS))
    assert series.tolist() == list(range(len(flat)))
    assert np.array_equal(left_out, whole.left_out, equal_nan=True)
    assert len(fit_all(flat, errors, bins, floors, clock)) == 1


@pytest.mark.parametrize(
    ("shape", "words"),
    [((5, 2), "server, metric, bin"), ((5, 3, 10), "server, metric, bin"), ((5, 2, 0), "none")],
)
def test_a_grid_of_another_shape_is_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(BadData, match=words):
        Reference.fit(fleet_grid(np.zeros(shape, np.float32)))


def test_errors_of_another_shape_are_refused() -> None:
    with pytest.raises(BadData, match="errors must have the grid's shape"):
        fitted(weeks(), errors=weeks(3))


@pytest.mark.parametrize("value", [0.0, -3.5, np.nan, np.inf, 1e38, -1e38])
def test_hostile_references_make_no_warning_and_no_infinite_limit(value: float) -> None:
    # Given constants, nothing, or numbers at the end of float32 (warnings are errors here)
    grid = np.full((2, 1, 6 * DAY), value, np.float32)
    grid[1, 0, ::7] = 1e30 if np.isfinite(value) else value

    reference = Reference.fit(fleet_grid(grid, ("a", "b"), ("cpu_pct",)))

    assert not np.isinf(reference.limits).any()
    assert reference.limits.shape == (2, N_STATISTICS)


def test_a_reference_of_half_a_day_compares_nothing() -> None:
    reference = fitted(weeks(1)[:, :, : DAY // 2])

    assert not reference.is_compared.any()


def test_a_reference_of_format_2_judges_all_but_how_smooth_a_series_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a file that the release before wrote, of one server and six days
    caplog.set_level("INFO")
    loaded = Reference.load(Path(__file__).parent / "data" / "reference_format_2.npz")

    # Then it is compared, and only the statistic it knows nothing of is not judged
    assert loaded.is_compared.all() and np.isnan(loaded.books.order).all()
    assert "format 2" in caplog.text
    drift = SeasonalDetector(loaded)
    for place in range(DAY):
        drift.update(np.full((1, 1), 90.0 + place % 7, np.float32), place * BIN_MS + 6 * DAY_MS)
    assert [item.server_name for item in drift.check().drifting] == ["web-01"]

    # And written again it is of today's format, which says as much
    loaded.save(tmp_path / "again.npz")
    assert np.isnan(Reference.load(tmp_path / "again.npz").books.order).all()
