"""Claims about which candidates may serve."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle_fleet import N_BIN, Oracle, grid, verdict

from fleetcast.forecast.naive import NaiveForecaster
from fleetcast.schema import ChangedSeries, HistoryWindow
from fleetcast.training.gate import CONFIDENCE, MIN_BLOCKS, GateVerdict, Sides, judge
from fleetcast.training.holdout import Losses

METRICS = ("cpu_pct", "mem_pct")
N_SERVER, N_ORIGIN = 6, 12


def losses(pinball: np.ndarray, *, every_bins: int = 24) -> Losses:
    """Return a side's losses (origin, server, metric) at origins so far apart."""
    origins = np.arange(len(pinball), dtype=np.int64) * every_bins
    return Losses(pinball, np.ones((*pinball.shape, 3)), True, origins)


def test_a_better_candidate_serves() -> None:
    fleet = grid()
    answer = verdict(fleet, Oracle(fleet, 0.5), Oracle(fleet, 1.0))
    assert answer.promoted
    assert answer.figures["unchanged"]["ratio"] == pytest.approx(0.5, abs=0.05)
    assert answer.figures["changed"] == {"windows": 0, "ratio": None, "confidence": None}


def test_a_worse_and_an_equal_candidate_do_not() -> None:
    fleet = grid()
    for error in (1.0, 2.0):
        answer = verdict(fleet, Oracle(fleet, error), Oracle(fleet, 1.0))
        assert not answer.promoted
        assert answer.why.startswith("not better")


def test_a_gain_that_rests_on_chance_is_no_gain() -> None:
    # Given two sides that differ only by luck: 40 pairs of seeds, a 10 % rule
    random = np.random.default_rng(4)
    shape = (12, 6, 2)
    promoted = 0
    for _ in range(40):
        ours, theirs = (losses(random.gamma(2, 1, shape)) for _ in range(2))
        promoted += judge(Sides(ours, theirs), np.zeros((6, 2), np.bool_), METRICS, 1).promoted
    assert promoted <= 10


def test_learning_a_change_does_not_buy_the_right_to_harm_the_others() -> None:
    fleet = grid()
    changed = tuple(ChangedSeries(0, metric, N_BIN - 100) for metric in (0, 1))
    others = fleet.server_names[1:]
    better_there = Oracle(fleet, 0.2, on=fleet.server_names[:1])
    assert verdict(fleet, better_there, Oracle(fleet, 0.5), changed).promoted

    class Harmful:
        def predict(self, window: HistoryWindow) -> np.ndarray:
            return Oracle(fleet, 0.2, on=fleet.server_names[:1]).predict(window) + (
                Oracle(fleet, 0.55, on=others).predict(window) - Oracle(fleet).predict(window)
            )

    answer = verdict(fleet, Harmful(), Oracle(fleet, 0.5), changed)
    assert not answer.promoted
    assert answer.why.startswith("harms")


def test_a_gain_on_the_others_does_not_count_for_a_change() -> None:
    fleet = grid()
    changed = tuple(ChangedSeries(0, metric, N_BIN - 100) for metric in (0, 1))
    answer = verdict(fleet, Oracle(fleet, 1.0, on=fleet.server_names[:1]), Oracle(fleet, 1.0), changed)
    assert not answer.promoted
    assert answer.figures["unchanged"]["ratio"] == 0.0


def test_forecasts_that_are_no_numbers_never_serve() -> None:
    class Broken:
        def predict(self, window: HistoryWindow) -> np.ndarray:
            forecast = NaiveForecaster(96).predict(window)
            forecast[0, 0, 5, 1] = np.inf
            return forecast

    fleet = grid()
    answer = verdict(fleet, Broken(), Oracle(fleet, 50.0))
    assert not answer.promoted
    assert answer.why == "its forecasts are not finite"


def test_a_tail_without_values_judges_nobody() -> None:
    fleet = grid()
    fleet.values[:, :, -288:] = np.nan
    answer = verdict(fleet, Oracle(fleet), Oracle(fleet, 1.0))
    assert not answer.promoted
    assert answer.why == "nothing to judge by: the held-out tail holds no window of all series"


def one_changed() -> np.ndarray:
    is_changed = np.zeros((N_SERVER, 2), np.bool_)
    is_changed[0, 0] = True
    return is_changed


def any_losses(seed: int, n_origin: int = N_ORIGIN) -> np.ndarray:
    """Return losses as they come: some windows cost a hundred times others, some are unknown."""
    random = np.random.default_rng(seed)
    pinball = random.lognormal(0, 1.5, (n_origin, N_SERVER, 2))
    pinball[random.random(pinball.shape) < 0.1] = np.nan
    pinball[:, 0, 0] = np.nan_to_num(pinball[:, 0, 0], nan=1.0)
    return pinball


seeds = st.integers(0, 10_000)


@given(seeds, st.booleans())
def test_an_identical_candidate_is_never_better(seed: int, has_change: bool) -> None:
    side = losses(any_losses(seed))
    answer = judge(Sides(side, side), one_changed() & has_change, METRICS, seed)
    assert not answer.promoted
    assert answer.why.startswith("not better")
    assert answer.figures["changed" if has_change else "unchanged"]["ratio"] == 1.0
    assert answer.figures["changed" if has_change else "unchanged"]["confidence"] == 0.0


@given(seeds, st.floats(0.0, 0.95))
def test_better_on_the_changed_and_equal_elsewhere_serves(seed: int, share: float) -> None:
    theirs = any_losses(seed)
    ours = np.where(one_changed(), theirs * share, theirs)
    answer = judge(Sides(losses(ours), losses(theirs)), one_changed(), METRICS, seed)
    assert answer.promoted
    assert answer.figures["changed"]["ratio"] == pytest.approx(share, abs=1e-4)
    assert answer.figures["unchanged"]["ratio"] == 1.0


@given(seeds, st.floats(1.03, 5.0))
def test_harm_to_the_unchanged_is_refused_whatever_is_gained(seed: int, factor: float) -> None:
    theirs = any_losses(seed)
    ours = np.where(one_changed(), 0.0, theirs * factor)
    answer = judge(Sides(losses(ours), losses(theirs)), one_changed(), METRICS, seed)
    assert not answer.promoted
    assert answer.why.startswith("harms: loss on unchanged series")


@given(seeds)
def test_harm_to_one_metric_is_not_paid_for_by_another(seed: int) -> None:
    theirs = np.ones((N_ORIGIN, N_SERVER, 2))
    ours = theirs.copy()
    ours[:, :, 1] *= 1.1
    ours[:, 1:, 0] *= 0.8
    ours[:, 0, 0] = 0.5
    answer = judge(Sides(losses(ours), losses(theirs)), one_changed(), METRICS, seed)
    assert answer.figures["unchanged"]["ratio"] < 1
    assert answer.why.startswith("harms: loss on unchanged mem_pct is 1.100")


def test_nor_where_no_change_is_known() -> None:
    theirs = np.ones((N_ORIGIN, N_SERVER, 2))
    ours = np.stack([theirs[..., 0] * 0.5, theirs[..., 1] * 1.1], axis=-1)
    answer = judge(Sides(losses(ours), losses(theirs)), np.zeros((N_SERVER, 2), np.bool_), METRICS, 1)
    assert answer.why.startswith("harms: loss on unchanged mem_pct is 1.100")
    told = judge(Sides(losses(theirs / 2), losses(theirs)), np.zeros((N_SERVER, 2), np.bool_), METRICS, 1)
    assert told.why == "better: loss on all series is 0.500 of the champion's, confidence 1.000"


@given(seeds, st.integers(1, 8))
def test_a_tiny_tail_is_said_to_be_too_little(seed: int, n_origin: int) -> None:
    # Given origins of 8 bins, which are at most two blocks of 15 minutes and a rest
    theirs = any_losses(seed, n_origin)
    answer = judge(
        Sides(losses(theirs / 2, every_bins=1), losses(theirs, every_bins=1)), one_changed(), METRICS, seed
    )
    assert answer.promoted == (n_origin > 3 * (MIN_BLOCKS - 1))
    if not answer.promoted:
        assert answer.why.startswith(f"too little is held out of changed series: {n_origin} windows in")


def test_a_change_without_a_held_out_window_is_not_judged_by_the_others() -> None:
    theirs = np.ones((N_ORIGIN, N_SERVER, 2))
    theirs[:, 0, 0] = np.nan
    answer = judge(Sides(losses(theirs / 2), losses(theirs)), one_changed(), METRICS, 1)
    assert not answer.promoted
    assert answer.why == "nothing to judge by: the held-out tail holds no window of changed series"


def test_one_bad_hour_of_the_fleet_is_one_observation() -> None:
    # Given a candidate that wins by far in one block of time, on every server, and loses all others by little
    theirs = np.ones((N_ORIGIN, N_SERVER, 2))
    ours = theirs * 1.01
    ours[4] = 0.5
    answer = judge(Sides(losses(ours), losses(theirs)), np.zeros((N_SERVER, 2), np.bool_), METRICS, 1)
    # Then it is better on average, and a resample without that block says otherwise
    assert answer.figures["unchanged"]["ratio"] < 1
    assert answer.figures["unchanged"]["confidence"] < CONFIDENCE
    assert not answer.promoted


def test_one_odd_server_is_one_observation() -> None:
    theirs = np.ones((N_ORIGIN, N_SERVER, 2))
    ours = theirs * 1.01
    ours[:, 3] = 0.5
    answer = judge(Sides(losses(ours), losses(theirs)), np.zeros((N_SERVER, 2), np.bool_), METRICS, 1)
    assert answer.figures["unchanged"]["ratio"] < 1
    assert not answer.promoted


def test_a_first_model_has_to_beat_the_fallback_beside_the_base() -> None:
    ones = np.ones((N_ORIGIN, N_SERVER, 2))
    nothing = np.zeros((N_SERVER, 2), np.bool_)

    def first(fallback: float) -> GateVerdict:
        return judge(Sides(losses(ones), losses(ones * 2), losses(ones * fallback)), nothing, METRICS, 1)

    assert first(1.5).promoted
    answer = first(0.9)
    assert not answer.promoted
    assert answer.why.startswith("not better: loss on all series is 1.111 of the fallback's")
    assert answer.figures["fallback"]["ratio"] == 1.1111


def test_one_series_that_gains_among_changed_ones_that_stay_as_they_are_serves() -> None:
    """Resamples of servers would leave it out in a third of all cases."""
    theirs = np.ones((N_ORIGIN, N_SERVER, 2)) + np.random.default_rng(1).random((N_ORIGIN, N_SERVER, 2))
    ours = theirs.copy()
    ours[:, 0, 0] *= 0.7
    is_changed = np.zeros((N_SERVER, 2), np.bool_)
    is_changed[:3, 0] = True
    assert judge(Sides(losses(ours), losses(theirs)), is_changed, METRICS, 1).promoted
    assert not judge(Sides(losses(theirs), losses(theirs)), is_changed, METRICS, 1).promoted, "nothing gained"
