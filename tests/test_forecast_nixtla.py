"""Claims about the peers a user would pick: where they are installed they are real opponents."""

import numpy as np
import pytest

from benchmarks.forecast.parts import nixtla
from benchmarks.forecast.parts.nixtla import AHEAD, DAY, MSTL, NHITS, Mstl, Nhits, Timed, available
from benchmarks.forecast.parts.rounds import Forecasts
from fleetcast.schema import HistoryWindow
from fleetcast.training.grid import TrainingGrid


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not available(name), reason=f"{name} is a peer, not a requirement")


def fleet_with_a_gap() -> TrainingGrid:
    """Return eight days of two servers with a daily rhythm and little noise; one has a gap."""
    noise = np.random.default_rng(0).normal(0, 1, (2, 1, 8 * DAY))
    values = (50 + 30 * np.sin(2 * np.pi * np.arange(8 * DAY) / DAY) + noise).astype(np.float32)
    values[1, 0, 400:430] = np.nan
    return TrainingGrid(("a", "b"), ("cpu_pct",), values, 0, 300_000)


def beats_the_last_value(peer: Forecasts, grid: TrainingGrid) -> bool:
    """Forecast from the last day's start, where the last value is furthest from what comes."""
    past, ahead = grid.values[:, :, : 7 * DAY], grid.values[:, :, 7 * DAY : 7 * DAY + AHEAD]
    window = HistoryWindow(grid.server_names, grid.metrics, past, (7 * DAY - 1) * 300_000, 300_000)
    answer = peer.predict(window)
    assert answer.shape == (2, 1, AHEAD, 3)
    assert (np.diff(answer, axis=-1) >= 0).all()
    error, naive = np.abs(answer[..., 1] - ahead).mean(), np.abs(past[:, :, -1:] - ahead).mean()
    return bool(error < 0.7 * naive)


@needs(MSTL)
def test_mstl_learns_a_daily_rhythm_and_its_forecasts_are_timed() -> None:
    peer = Timed(Mstl())
    assert beats_the_last_value(peer, fleet_with_a_gap())
    assert peer.n_series == 2 and peer.cpu_s > 0


@needs(NHITS)
@pytest.mark.slow
def test_nhits_learns_a_daily_rhythm() -> None:
    grid = fleet_with_a_gap()
    assert beats_the_last_value(Nhits(grid, steps=40, seed=1), grid)


def test_gaps_are_filled_and_are_not_learned() -> None:
    # Given a series that begins with a gap and has another
    frame = nixtla._frame(np.array([[np.nan, 4.0, np.nan, 6.0]], np.float32))
    # Then the library gets a whole one, told which bins were recorded
    assert frame["y"].tolist() == [4.0, 4.0, 4.0, 6.0]
    assert frame["available_mask"].tolist() == [0.0, 1.0, 0.0, 1.0]
