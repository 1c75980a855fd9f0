"""Claims about the loss, the schedule and what a fit leaves behind."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fleetcast.forecast.encoding import GridShape
from fleetcast.forecast.network import NetworkConfig
from fleetcast.schema import QUANTILES, Floats32
from fleetcast.training.fit import Fit, Resumable, StateFile, fit, pinball, rate_share
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.network import StaticNetwork, as_batch, as_tensors
from fleetcast.training.sampler import TrainingBatch, WindowMix, WindowSampler

LEVELS = torch.tensor(QUANTILES)


def test_pinball_is_zero_on_the_target_and_asymmetric_beside_it() -> None:
    target, weights = torch.zeros(1, 1), torch.ones(1)
    assert float(pinball(torch.zeros(1, 1, 3), target, weights, LEVELS)) == 0.0
    under = torch.tensor([[[-1.0, 0.0, 0.0]]])  # the 10 % quantile one below: costs 0.1
    over = torch.tensor([[[1.0, 0.0, 0.0]]])  # one above: costs 0.9
    assert float(pinball(under, target, weights, LEVELS)) == pytest.approx(0.1 / 3)
    assert float(pinball(over, target, weights, LEVELS)) == pytest.approx(0.9 / 3)


def test_unknown_targets_cost_nothing_and_weights_share_the_rest() -> None:
    answer = torch.tensor([[[1.0] * 3, [1.0] * 3, [5.0] * 3]])
    targets = torch.tensor([[0.0, 1.0, torch.nan]])
    loss = pinball(answer, targets, torch.tensor([3.0, 1.0, 8.0]), LEVELS)
    assert float(loss) == pytest.approx(0.5 * 3 / 4)
    assert float(pinball(answer, torch.full((1, 3), torch.nan), torch.ones(3), LEVELS)) == 0.0


def test_the_rate_warms_up_and_never_ends_at_nothing() -> None:
    shares = [rate_share(step, 1000, 50) for step in range(1001)]
    assert shares[0] == pytest.approx(0.02)
    assert max(shares) == shares[49] == 1.0
    assert shares[-1] == pytest.approx(0.02)
    assert min(shares) > 0
    assert rate_share(0, 1, 50) > 0


SHAPE = GridShape(300_000, 12)


class Killed(Exception):
    """The machine went away."""


def sampler() -> WindowSampler:
    values = (50 + 30 * np.sin(2 * np.pi * np.arange(1500) / 48)).astype(np.float32)
    grid = TrainingGrid(("a",), ("cpu_pct",), np.tile(values, (1, 1, 1)), 0, 300_000)
    return WindowSampler(grid, SHAPE, np.full((1, 1), 1400), WindowMix(), 1)


def trained(plan: Fit, path: Path | None = None, n_batch: int = 1000) -> dict[str, Floats32]:
    """Train; with `path` resumable, with fewer batches than steps the machine goes away before the end."""
    source = sampler()
    validation = sampler().batch(32, [1])
    left = [n_batch]

    def draw() -> TrainingBatch:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return source.batch(16, [1])

    return fit(
        NetworkConfig.for_grid(SHAPE, 8),
        SHAPE,
        None,
        draw,
        plan,
        validation=validation,
        state=Resumable(StateFile(path, "one"), source) if path else None,
    )


def test_a_training_that_was_interrupted_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    plan = Fit(4, 6, 1e-2, 5, 1, 3)
    # Given a training that went away in its third epoch
    with pytest.raises(Killed):
        trained(plan, tmp_path / "state", n_batch=15)
    # When it is started again
    whole, resumed = trained(plan), trained(plan, tmp_path / "state", n_batch=12)
    # Then two epochs were enough, and nothing differs
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
    # and of a training that is over nothing is trained again
    again = trained(plan, tmp_path / "state", n_batch=0)
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_a_training_that_gets_no_better_stops_and_keeps_its_best_epoch() -> None:
    # Given a rate that destroys what it learns
    ruinous = Fit(50, 3, 30.0, 0, 1, 3, patience_epochs=2)
    with pytest.raises(Killed):
        trained(ruinous, n_batch=5)  # it did not stop before the end of its second epoch
    stopped = trained(ruinous, n_batch=24)  # of 150
    # Then what it learnt in its best epoch is left
    assert all(bool(np.isfinite(array).all()) for array in stopped.values())
    forever = Fit(50, 3, 30.0, 0, 1, 3, patience_epochs=0)
    with pytest.raises(Killed):
        trained(forever, n_batch=24)


@pytest.mark.slow
def test_a_fit_learns_repeats_itself_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a fleet with a rhythm, in an empty folder
    monkeypatch.chdir(tmp_path)
    values = (50 + 30 * np.sin(2 * np.pi * np.arange(1500) / 48)).astype(np.float32)
    grid = TrainingGrid(("a",), ("cpu_pct",), np.tile(values, (1, 1, 1)), 0, 300_000)
    shape = GridShape(300_000, 12)

    def fitted() -> tuple[dict[str, Floats32], list[float]]:
        sampler = WindowSampler(grid, shape, np.full((1, 1), 1400), WindowMix(), 1)
        return fit(
            NetworkConfig.for_grid(shape, 8),
            shape,
            None,
            lambda: sampler.batch(16, [1]),
            Fit(2, 15, 1e-2, 5, 1, 3),
        ), []

    # When it is fitted twice with the same seed
    first, second = fitted()[0], fitted()[0]
    # Then the weights are equal to the last bit, finite, and nothing was written
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert all(bool(np.isfinite(array).all()) for array in first.values())
    assert list(tmp_path.iterdir()) == []


def test_replayed_windows_hold_to_the_answers_of_the_starting_weights() -> None:
    # Given a start, and targets on replayed windows that say something else
    config = NetworkConfig.for_grid(SHAPE, 8)
    plan = Fit(1, 12, 0.02, 2, 1, 3)
    start = fit(config, SHAPE, None, lambda: sampler().batch(16, [1]), plan)
    batch = sampler().batch(16, [1])
    told = dataclasses.replace(batch, targets=batch.targets + np.float32(3.0))
    assert told.is_replay.all()

    def moved(keep_weight: float, *, is_replay: bool = True) -> float:
        seen = dataclasses.replace(told, is_replay=np.full(16, is_replay))
        after = fit(config, SHAPE, start, lambda: seen, dataclasses.replace(plan, keep_weight=keep_weight))
        windows = as_batch(batch.arrays, batch.metric_slots)
        answers = [StaticNetwork(as_tensors(weights), config)(windows) for weights in (start, after)]
        return float((answers[1] - answers[0]).abs().mean())

    # Then they move the answers; less so where replay holds them; a change is free to move them
    assert moved(0.0) > 0.5
    assert moved(100.0) < 0.1 * moved(0.0)
    assert moved(100.0, is_replay=False) == moved(0.0)
