"""A day moved by some hours: known answers, and what must say nothing about the time of day."""

import numpy as np
import pytest

from fleetcast.drift.seasonal.season import (
    ABSENT_PLACE,
    LAGS_H,
    PLACE_CAP,
    PLACE_STEPS,
    distances,
    evidence,
    places,
)

DAY = 288
HOUR = DAY // 24
DAY_BINS = np.arange(DAY)
ONE_JOB = np.zeros((1, DAY), np.int16)
ONE_JOB[0, 30] = 5 * PLACE_STEPS  # five minutes a day
WAVE = np.rint(PLACE_STEPS * np.sin(2 * np.pi * DAY_BINS / DAY)).astype(np.int16)[None]


def fit_of(template: np.ndarray, day: np.ndarray) -> np.ndarray:
    """Return (lag,): -1 = the usual day, 1 = exactly the day moved by that lag."""
    found = evidence(template, day.astype(np.int16), DAY_BINS).sum(axis=2)[:, 0]
    return found / (DAY * distances(template)[0])


@pytest.mark.parametrize("template", [ONE_JOB, WAVE])
@pytest.mark.parametrize("hours", [1, 6, 17])
def test_a_moved_day_fits_the_moved_template_and_the_usual_day_its_own(
    template: np.ndarray, hours: int
) -> None:
    moved = np.roll(template, hours * HOUR, axis=1)

    assert fit_of(template, moved)[LAGS_H.index(hours)] == pytest.approx(1)
    assert fit_of(template, moved).max() == pytest.approx(1)
    assert fit_of(template, template) == pytest.approx(-1)


@pytest.mark.parametrize("level", [-10 * PLACE_STEPS, 10 * PLACE_STEPS])
def test_another_level_says_nothing_about_the_time_of_day(level: int) -> None:
    assert fit_of(WAVE, np.full((1, DAY), level)) == pytest.approx(0, abs=1e-3)


def test_a_job_that_did_not_run_is_not_a_job_at_another_time() -> None:
    assert fit_of(ONE_JOB, np.zeros((1, DAY))) == pytest.approx(0)


def test_one_spike_counts_for_no_more_than_the_templates_differ_there() -> None:
    day = WAVE.copy()
    day[0, 100] = 14 * PLACE_STEPS

    assert fit_of(WAVE, day).max() < -0.97


def test_what_is_absent_says_nothing() -> None:
    values = np.array([[np.nan, 1.0, np.inf, -1e30]], np.float32)

    found = places(values, np.zeros(1, np.float32), np.full(1, 2.0, np.float32))

    assert found.tolist() == [
        [ABSENT_PLACE, PLACE_STEPS // 2, PLACE_CAP * PLACE_STEPS, -PLACE_CAP * PLACE_STEPS]
    ]
    assert not evidence(WAVE, np.full((1, DAY), ABSENT_PLACE, np.int16), DAY_BINS).any()


def test_evidence_between_the_farthest_places_fits_its_integers() -> None:
    far = np.full((1, DAY), int(PLACE_CAP * PLACE_STEPS), np.int16)
    template = np.where(DAY_BINS % 2, far, -far).astype(np.int16)

    found = evidence(template, far, DAY_BINS)

    assert np.abs(found.astype(np.int64)).max() <= 2 * PLACE_CAP * PLACE_STEPS
