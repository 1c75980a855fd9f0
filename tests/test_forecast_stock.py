"""Claims about the stock recipe as a peer: it answers for what it was trained on, and for nothing else."""

import numpy as np
import pytest

from benchmarks.forecast.parts.stock import AHEAD, PAST, StockRecipe
from fleetcast.schema import HistoryWindow
from fleetcast.training.grid import TrainingGrid


@pytest.mark.slow
def test_it_has_no_forecast_of_a_server_a_metric_or_a_past_it_does_not_know() -> None:
    # Given a recipe trained, for one step, on one metric of two servers
    noise = np.random.default_rng(0).normal(0, 1, (3, 2, 2 * PAST))
    values = (50 + 10 * np.sin(np.arange(2 * PAST) / 40) + noise).astype(np.float32)
    known = TrainingGrid(("a", "b"), ("cpu_pct", "mem_pct"), values[:2], 0, 300_000)
    peer = StockRecipe(known, ("cpu_pct",), steps=1, seed=1)
    # When asked about them, a stranger, and one of them with a hole of two hours
    values[1, 0, -60:-36] = np.nan
    names = ("a", "b", "stranger")
    answer = peer.predict(HistoryWindow(names, known.metrics, values, (2 * PAST - 1) * 300_000, 300_000))
    # Then there is an answer in order for the first alone
    assert answer.shape == (3, 2, AHEAD, 3)
    assert np.isfinite(answer[0, 0]).all()
    assert (np.diff(answer[0, 0], axis=-1) >= 0).all()
    assert np.isnan(answer[1:]).all()
    assert np.isnan(answer[:, 1]).all()
