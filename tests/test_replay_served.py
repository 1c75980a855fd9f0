"""Claims about replaying the expert layer at its settled horizons alone: the same as live."""

import numpy as np

from benchmarks.loop.parts.fleet import BIN_MS, DAY, ReplayFleet, natural
from benchmarks.loop.parts.record import HORIZONS
from benchmarks.loop.parts.served import HISTORY_BINS, SceneRules, serve
from fleetcast.forecast.experts.layer import ExpertLayer
from fleetcast.schema import ChangedSeries
from fleetcast.training.grid import TrainingGrid

BEGIN = HISTORY_BINS + 100
N_BINS = BEGIN + 40


def scene() -> ReplayFleet:
    random = np.random.default_rng(5)
    wave = 20 + 40 * (np.arange(N_BINS) % 50) / 50
    values = (wave + random.normal(0, 1, (2, 2, N_BINS))).astype(np.float32)
    values[1, 1] = 10 + 2.0 / 12 * np.maximum(0, np.arange(N_BINS) - BEGIN + 72)  # a leak
    return natural(TrainingGrid(("a", "b"), ("cpu_pct", "net_mb_s"), values, 0, BIN_MS), BEGIN, None)


def model(fleet: ReplayFleet) -> np.ndarray:
    """Return the last value and one either side, at every horizon."""
    last = fleet.grid.values[:, :, BEGIN:, None, None]
    return np.broadcast_to(last + np.array([-1, 0, 1], np.float32), (2, 2, 40, 3, 3)).astype(np.float32)


def test_a_replay_at_three_horizons_serves_what_the_layer_serves_at_all_of_them() -> None:
    fleet = scene()
    quantiles = model(fleet)
    replayed = serve(fleet, SceneRules.compute(fleet), quantiles)
    layer, rows = ExpertLayer(np.array([True, False]), HORIZONS), np.arange(2)
    for origin in range(HISTORY_BINS, N_BINS):
        layer.settle(origin, rows, fleet.grid.values[:, :, origin])
        history = fleet.grid.values[:, :, origin - HISTORY_BINS + 1 : origin + 1]
        said = np.full((2, 2, 96, 3), np.nan, np.float32)
        if origin >= BEGIN:
            said[:] = quantiles[:, :, origin - BEGIN, :1]
        live = layer.serve(rows, origin, layer.experts(history, DAY, 96), said)
        if origin >= BEGIN:
            at = [horizon - 1 for horizon in HORIZONS]
            np.testing.assert_allclose(replayed[:, :, origin - BEGIN], live[:, :, at], rtol=2e-3, atol=2e-3)


def test_without_a_network_the_rules_are_served_and_nothing_is_missing() -> None:
    fleet = scene()
    served = serve(fleet, SceneRules.compute(fleet), None)
    assert served.shape == (2, 2, 40, 3, 3)
    assert np.isfinite(served).all()
    assert (np.diff(served, axis=-1) >= 0).all()


def test_a_scene_asks_the_rules_only_where_it_differs_from_what_was_recorded() -> None:
    recorded = scene()
    values = recorded.grid.values.copy()
    values[0, 0, BEGIN + 10 :] += 15
    grid = TrainingGrid(recorded.grid.server_names, recorded.grid.metrics, values, 0, BIN_MS)
    changed = ReplayFleet("test", grid, BEGIN, ((ChangedSeries(0, 0, BEGIN + 10),),))
    shared = SceneRules.compute(changed, SceneRules.compute(recorded))
    np.testing.assert_allclose(shared.values, SceneRules.compute(changed).values, rtol=1e-4, atol=1e-4)
