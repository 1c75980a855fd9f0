"""Claims about which series a training without a known change sees more of."""

import numpy as np
import pytest
from oracle_fleet import N_BIN, SHAPE, Oracle, grid

from fleetcast.forecast.naive import NaiveForecaster
from fleetcast.schema import HistoryWindow
from fleetcast.training.challenger import series_weights
from fleetcast.training.holdout import first_held_bins

NAIVE = NaiveForecaster(96)


def weights(model: object) -> np.ndarray:
    fleet = grid()
    held = first_held_bins(fleet, (), 0.1, 288)
    return series_weights(model, fleet, SHAPE, held, 864, 1)  # type: ignore[arg-type]


def test_a_badly_forecast_server_is_drawn_more_often() -> None:
    # Given a model that knows every server but one, whose forecasts are far off
    found = weights(Oracle(grid(), 100.0, on=("web-3",)))
    # Then that one weighs as much as the bounds allow: 3² against 0.5²
    assert found.mean() == pytest.approx(1.0)
    assert found[3, 0] / found[1, 0] == pytest.approx(36.0)
    assert found[2, 1] == pytest.approx(found[1, 0])


def test_a_model_as_good_as_repetition_everywhere_prefers_nobody() -> None:
    np.testing.assert_allclose(weights(NAIVE), 1.0)


def test_the_held_out_tail_is_not_looked_at() -> None:
    class FailsInTheTail(Oracle):
        def predict(self, window: HistoryWindow) -> np.ndarray:
            assert window.end_bin_ms // 300_000 < N_BIN - 288
            return super().predict(window)

    np.testing.assert_allclose(weights(FailsInTheTail(grid())), 1.0)


def test_series_without_values_count_as_the_average() -> None:
    fleet = grid()
    fleet.values[2] = np.nan
    held = first_held_bins(fleet, (), 0.1, 288)
    found = series_weights(Oracle(fleet, 100.0, on=("web-3",)), fleet, SHAPE, held, 864, 1)
    assert np.isfinite(found).all()
    assert found[3, 0] > found[2, 0] > found[1, 0]
