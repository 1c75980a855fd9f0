"""Claims about the loss, the schedule and what a fit leaves behind."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fleetcast.model.gridshape import GridShape
from fleetcast.model.network import NetworkConfig
from fleetcast.model.sampler import WindowMix, WindowSampler
from fleetcast.model.traingrid import TrainingGrid
from fleetcast.model.training import Fit, fit, pinball, rate_share
from fleetcast.schema import QUANTILES

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


@pytest.mark.slow
def test_a_fit_learns_repeats_itself_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a fleet with a rhythm, in an empty folder
    monkeypatch.chdir(tmp_path)
    values = (50 + 30 * np.sin(2 * np.pi * np.arange(1500) / 48)).astype(np.float32)
    grid = TrainingGrid(("a",), ("cpu_pct",), np.tile(values, (1, 1, 1)), 0, 300_000)
    shape = GridShape(300_000, 12)

    def fitted() -> tuple[dict[str, torch.Tensor], list[float]]:
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
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in first.values())
    assert list(tmp_path.iterdir()) == []
