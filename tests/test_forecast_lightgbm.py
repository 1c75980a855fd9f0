"""Claims about the LightGBM peer: it is a real opponent, and its features know nothing of the future."""

import numpy as np
import pytest

from benchmarks.forecast.parts import lightgbm
from benchmarks.forecast.parts.lightgbm import HORIZON, LightGbm, available
from fleetcast.schema import HistoryWindow
from fleetcast.training.grid import TrainingGrid

DAY = 288
needs_it = pytest.mark.skipif(not available(), reason="lightgbm is a peer, not a requirement of the daemons")


@needs_it
def test_it_learns_a_daily_rhythm_that_the_last_value_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given twelve days of two servers with a rhythm and little noise, the last one kept back
    monkeypatch.setattr(lightgbm, "_TREES", 30)
    noise = np.random.default_rng(0).normal(0, 1, (2, 1, 12 * DAY))
    values = (50 + 30 * np.sin(2 * np.pi * np.arange(12 * DAY) / DAY) + noise).astype(np.float32)
    grid = TrainingGrid(("a", "b"), ("cpu_pct",), values[:, :, : 11 * DAY], 0, 300_000)
    # When it forecasts from the last day's start, where the last value is furthest from what comes
    peer = LightGbm(grid, n_window=1500, seed=1)
    past, ahead = values[:, :, : 11 * DAY], values[:, :, 11 * DAY : 11 * DAY + HORIZON]
    window = HistoryWindow(grid.server_names, grid.metrics, past, (11 * DAY - 1) * 300_000, 300_000)
    answer = peer.predict(window)
    # Then its quantiles are ordered, and its median beats repeating the last value
    assert answer.shape == (2, 1, HORIZON, 3)
    assert (np.diff(answer, axis=-1) >= 0).all()
    error, naive = np.abs(answer[..., 1] - ahead).mean(), np.abs(past[:, :, -1:] - ahead).mean()
    assert error < 0.7 * naive
