"""Claims about the accuracy benchmark: what is scored, and that feedback sees nothing of the future."""

import numpy as np
import pytest

from benchmarks.forecast.parts.rounds import HORIZON, Walk, measured
from fleetcast.schema import Floats32, HistoryWindow
from fleetcast.training.grid import TrainingGrid

DAY = 288
SPLIT = 3 * DAY
WALK = Walk(SPLIT, 5 * DAY, every=6, scored_every=4)


class Repeat:
    """Forecasts the last value plus a bias."""

    def __init__(self, bias: float = 0.0, blind_to: int | None = None) -> None:
        self._bias, self._blind_to = bias, blind_to
        self.ends: list[int] = []

    def predict(self, window: HistoryWindow) -> Floats32:
        self.ends.append(window.end_bin_ms)
        last = window.values[:, :, -1, None, None] + np.array([-1, 0, 1], np.float32) + self._bias
        answer = np.repeat(last, HORIZON, axis=2).astype(np.float32)
        if self._blind_to is not None:
            answer[:, self._blind_to] = np.nan
        return answer


@pytest.fixture
def grid() -> TrainingGrid:
    random = np.random.default_rng(3)
    values = (50 + np.cumsum(random.normal(0, 1, (2, 2, 5 * DAY)), axis=2) / 10).astype(np.float32)
    return TrainingGrid(("a", "b"), ("cpu_pct", "mem_pct"), values, 0, 300_000)


def test_last_value_against_itself_is_exactly_one(grid: TrainingGrid) -> None:
    table = measured(grid, Repeat(), {}, WALK, SPLIT)
    for metric in grid.metrics:
        cell = table["ours"][metric]["mean_8h"]
        assert cell["relative_mae"] == 1.0 == table["last"][metric]["mean_8h"]["relative_mae"]
        assert cell["wape"] == table["last"][metric]["mean_8h"]["wape"]
        assert 0 < cell["coverage"] < 1


def test_a_peer_without_forecasts_of_a_metric_has_none_there_and_costs_nobody_a_window(
    grid: TrainingGrid,
) -> None:
    alone = measured(grid, Repeat(), {}, WALK, SPLIT)
    beside = measured(grid, Repeat(), {"stock": Repeat(blind_to=1)}, WALK, SPLIT)
    assert beside["stock"]["mem_pct"] is None
    assert beside["stock"]["cpu_pct"]["5min"]["relative_mae"] == 1.0
    assert beside["ours"] == alone["ours"]


def test_feedback_learns_a_bias_from_what_settled_and_nothing_of_the_future(grid: TrainingGrid) -> None:
    table = measured(grid, Repeat(bias=4.0), {}, WALK, SPLIT)
    fed, raw = (table[name]["cpu_pct"]["5min"]["relative_mae"] for name in ("ours_feedback", "ours"))
    assert raw > 5
    assert fed < 0.9 * raw
    # a change of everything after the last scored origin changes no score at the first horizon
    later = grid.values.copy()
    last_scored = WALK.origins[:: WALK.scored_every][-1]
    later[:, :, last_scored + 2 :] += 1000
    changed = TrainingGrid(grid.server_names, grid.metrics, later, 0, 300_000)
    again = measured(changed, Repeat(bias=4.0), {}, WALK, SPLIT)
    assert again["ours_feedback"]["cpu_pct"]["5min"] == table["ours_feedback"]["cpu_pct"]["5min"]


def test_every_target_lies_before_the_end_of_the_test_days(grid: TrainingGrid) -> None:
    assert WALK.origins[0] == SPLIT
    assert WALK.origins[-1] + HORIZON < 5 * DAY
    assert set(np.diff(WALK.origins)) == {6}
