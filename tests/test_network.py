"""Claims about the network: the static graph is the library's, at every width."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from fleetcast.forecast.network import NetworkConfig, real_names
from fleetcast.training.network import Batch, StaticNetwork, build

N_PAST, N_KNOTS = 68, 26


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own, at its import and construction
        yield


def config(hidden_size: int) -> NetworkConfig:
    return NetworkConfig(N_PAST, N_KNOTS, hidden_size, min(8, hidden_size // 2))


def windows(shape: NetworkConfig, count: int = 5) -> Batch:
    return Batch(
        past=torch.randn(count, N_PAST, len(shape.past_reals)) * 3,
        ahead=torch.randn(count, N_KNOTS, len(shape.ahead_reals)) * 3,
        static=torch.randn(count, len(shape.static_reals)),
        metric=torch.randint(0, 32, (count,)),
    )


def library_input(shape: NetworkConfig, batch: Batch) -> dict[str, torch.Tensor]:
    """Return a batch as the library's forward takes it."""
    names, count = real_names(shape), len(batch.metric)

    def columns(steps: torch.Tensor, reals: tuple[str, ...]) -> torch.Tensor:
        filled = torch.zeros(count, steps.shape[1], len(names))
        for index, name in enumerate(shape.static_reals):
            filled[:, :, names.index(name)] = batch.static[:, None, index]
        for index, name in enumerate(reals):
            filled[:, :, names.index(name)] = steps[:, :, index]
        return filled

    metric = batch.metric[:, None, None]
    return {
        "encoder_cat": metric.expand(count, N_PAST, 1),
        "decoder_cat": metric.expand(count, N_KNOTS, 1),
        "encoder_cont": columns(batch.past, shape.past_reals),
        "decoder_cont": columns(batch.ahead, shape.ahead_reals),
        "encoder_lengths": torch.full((count,), N_PAST),
        "decoder_lengths": torch.full((count,), N_KNOTS),
        "target_scale": torch.tensor([[0.0, 1.0]]).expand(count, 2),
    }


def shaken(shape: NetworkConfig) -> torch.nn.Module:
    """Return the library's network with no weight left at a special value."""
    torch.manual_seed(1)
    network = build(shape)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("hidden_size", [4, 5, 8, 16, 32, 48])
def test_the_static_graph_answers_as_the_library_does(hidden_size: int) -> None:
    shape = config(hidden_size)
    network, batch = shaken(shape), windows(config(hidden_size))
    expected = network(library_input(shape, batch))["prediction"]
    found = StaticNetwork(network.state_dict(), shape)(batch)
    assert float((expected - found).abs().max()) <= 1e-5


def test_the_static_graph_teaches_as_the_library_does() -> None:
    # Given the same loss through both
    shape = config(16)
    network, batch = shaken(shape), windows(shape)
    network(library_input(shape, batch))["prediction"].square().mean().backward()
    expected = {name: item.grad.clone() for name, item in network.named_parameters() if item.grad is not None}
    network.zero_grad()
    weights = dict(network.named_parameters(remove_duplicate=False))
    StaticNetwork(weights, shape)(batch).square().mean().backward()
    # Then every weight is taught, and alike
    for name, item in network.named_parameters():
        assert item.grad is not None, name
        torch.testing.assert_close(item.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_a_window_s_answer_does_not_depend_on_its_neighbours() -> None:
    shape = config(16)
    network, batch = StaticNetwork(shaken(shape).state_dict(), shape), windows(shape, 7)
    alone = Batch(batch.past[3:4], batch.ahead[3:4], batch.static[3:4], batch.metric[3:4])
    torch.testing.assert_close(network(batch)[3:4], network(alone), rtol=1e-4, atol=1e-5)


def test_fresh_weights_forecast_about_the_last_value() -> None:
    shape = config(32)
    torch.manual_seed(1)
    answer = StaticNetwork(build(shape).state_dict(), shape)(windows(shape, 50))
    assert float(answer[..., 1].abs().mean()) < 0.5
    assert (answer.mean(dim=(0, 1)).diff() > 0).all()


def test_a_configuration_survives_a_checkpoint() -> None:
    shape = config(16)
    assert NetworkConfig.from_config(shape.as_config()) == shape


@pytest.mark.parametrize("hidden_size", [4, 9, 10, 32])
def test_the_shapes_a_checkpoint_is_held_to_are_the_librarys(hidden_size: int) -> None:
    of_library = {name: tuple(part.shape) for name, part in build(config(hidden_size)).state_dict().items()}
    assert config(hidden_size).weight_shapes() == of_library
