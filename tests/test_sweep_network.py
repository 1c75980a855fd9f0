"""Claims about the forward pass of a sweep: the library's answer, whatever the width and the count."""

import numpy as np
import pytest
import torch
from test_network import N_KNOTS, N_PAST, config, library_input, one_thread, shaken

from fleetcast.forecast.encoding import INPUT_LIMIT, GridShape, encode
from fleetcast.forecast.network import NetworkConfig, SweepNetwork
from fleetcast.training.network import Batch, as_arrays, as_batch

__all__ = ["one_thread"]  # a fixture


def windows(shape: NetworkConfig, count: int) -> Batch:
    """Scalars within their bounds, the outermost among them."""

    def scalars(steps: int, reals: tuple[str, ...]) -> torch.Tensor:
        values = (torch.randn(count, steps, len(reals)) * 3).clamp(-INPUT_LIMIT, INPUT_LIMIT)
        values[0], values[-1, 0] = INPUT_LIMIT, -INPUT_LIMIT
        for index, real in enumerate(reals):
            if real in ("hour_sin", "hour_cos", "seen"):
                values[..., index] = values[..., index].clamp(-1, 1)
            elif real == "log_horizon":
                values[..., index] = values[..., index].clamp(-1, 3.6)
        return values

    return Batch(
        past=scalars(N_PAST, shape.past_reals),
        ahead=scalars(N_KNOTS, shape.ahead_reals),
        static=torch.randn(count, len(shape.static_reals)),
        metric=torch.randint(0, 32, (count,)),
    )


def answer(network: torch.nn.Module, shape: NetworkConfig, batch: Batch) -> torch.Tensor:
    """Return what a sweep answers."""
    arrays = [tensor.numpy() for tensor in (batch.past, batch.ahead, batch.static, batch.metric)]
    return torch.from_numpy(SweepNetwork(as_arrays(network.state_dict()), shape)(*arrays))


def exact(network: torch.nn.Module, shape: NetworkConfig, batch: Batch) -> torch.Tensor:
    """Return what the library answers in double precision; in single it is off by more than a sweep is."""
    doubled = {name: value.double() if value.is_floating_point() else value
               for name, value in library_input(shape, batch).items()}  # fmt: skip
    found: torch.Tensor = network.double()(doubled)["prediction"]
    network.float()
    return found


@pytest.mark.parametrize(
    ("hidden_size", "count"),
    [(4, 5), (5, 5), *((size, count) for size in (8, 16, 32, 48) for count in (1, 5, 127, 129))],
)
def test_a_sweep_answers_as_the_library_does(hidden_size: int, count: int) -> None:
    shape = config(hidden_size)
    network, batch = shaken(shape), windows(shape, count)
    with torch.inference_mode():
        difference = answer(network, shape, batch) - exact(network, shape, batch)
    assert float(difference.abs().max()) <= (1e-5 if hidden_size > 5 else 3e-5)


@pytest.mark.parametrize("count", [2, 127, 128, 129, 300])
def test_the_answer_does_not_depend_on_how_many_windows_are_asked_together(count: int) -> None:
    shape = config(8)
    network, batch = shaken(shape), windows(shape, count)
    last = Batch(batch.past[-1:], batch.ahead[-1:], batch.static[-1:], batch.metric[-1:])
    difference = answer(network, shape, batch)[-1:] - answer(network, shape, last)
    assert float(difference.abs().max()) <= 2e-6


def test_encoded_histories_with_gaps_are_within_the_tabulated_bounds() -> None:
    grid = GridShape(300_000, 96)
    shape = NetworkConfig.for_grid(grid, 16)
    values = np.random.default_rng(1).normal(50, 20, (40, 2304)).cumsum(1).astype(np.float32) % 100
    values[::3, 500:900] = np.nan
    values[5], values[6, -1] = 0.0, 1e9
    percents = np.arange(40) % 2 == 0
    arrays = encode(values, np.full(40, 1_768_471_200_000), percents, grid)
    batch = as_batch(arrays, np.arange(40) % 5)
    network = shaken(shape)
    with torch.inference_mode():
        difference = answer(network, shape, batch) - exact(network, shape, batch)
    assert float(difference.abs().max()) <= 1e-5


def test_gates_whose_exponentials_overflow_are_shut() -> None:
    shape = config(16)
    network, batch = shaken(shape), windows(shape, 5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm.norm" not in name:  # norms keep values within bounds, here as in a training
                parameter.mul_(100)
    assert bool(torch.isfinite(answer(network, shape, batch)).all())
