"""A made fleet and forecasters that know its future, for tests of what is held out and of the gate."""

import numpy as np

from fleetcast.forecast.encoding import GridShape
from fleetcast.schema import ChangedSeries, HistoryWindow
from fleetcast.training.gate import GateVerdict, Sides, judge
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.holdout import HoldOut, Sample, first_held_bins

SHAPE = GridShape(300_000, 96)
N_BIN = 4000


def grid(n_server: int = 6) -> TrainingGrid:
    random = np.random.default_rng(0)
    steps = random.normal(0, 1, (n_server, 2, N_BIN)).cumsum(axis=2)
    values = np.clip(50 + steps, 1, 99).astype(np.float32)
    names = tuple(f"web-{index}" for index in range(n_server))
    return TrainingGrid(names, ("cpu_pct", "mem_pct"), values, 0, 300_000)


class Oracle:
    """Knows the future, and adds an error."""

    def __init__(self, fleet: TrainingGrid, error: float = 0.0, on: tuple[str, ...] | None = None) -> None:
        self._fleet, self._error = fleet, error
        self._on = fleet.server_names if on is None else on

    def predict(self, window: HistoryWindow) -> np.ndarray:
        origin = window.end_bin_ms // 300_000
        rows = [self._fleet.server_names.index(name) for name in window.server_names]
        bins = np.minimum(np.arange(origin + 1, origin + 97), N_BIN - 1)
        future = self._fleet.values[rows][..., bins]
        noise = np.random.default_rng(origin).normal(0, 1, future.shape) * self._error
        is_on = np.isin(window.server_names, self._on)[:, None, None]
        return np.repeat((future + noise * is_on)[..., None], 3, axis=-1).astype(np.float32)


def verdict(
    fleet: TrainingGrid, candidate: object, serving: object, changed: tuple[ChangedSeries, ...] = ()
) -> GateVerdict:
    hold_out = HoldOut(
        fleet, SHAPE, first_held_bins(fleet, changed, 0.1, 288), changed, (1, 12, 96), Sample(1)
    )
    sides = Sides(hold_out.losses(candidate), hold_out.losses(serving))  # type: ignore[arg-type]
    return judge(sides, hold_out.is_changed, fleet.metrics, 1)
