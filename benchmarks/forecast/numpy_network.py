"""Could a daemon forecast without torch: two parts of the network in numpy against all of it in torch.

    .venv/bin/python -m benchmarks.forecast.numpy_network [--windows 2048] [--rounds 5]

`import torch` is most of an idle daemon's memory. A numpy network would have to be as fast. This measures
the two parts that numpy has no call for, written as well as numpy allows: the LSTMs (one product per
step, gates in place) and the weighed sum of tabulated curves (torch: one embedding bag). CPU
microseconds per window of this process, one thread, the best of some rounds and block sizes; random
weights, hidden 32. What these two take alone is a lower bound for a numpy network.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from time import process_time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported

import numpy as np
import torch

from benchmarks.results_file import write_results
from fleetcast.forecast.encoding import GridShape
from fleetcast.forecast.fast_network import SweepNetwork
from fleetcast.forecast.network import METRIC_SLOTS, Batch, NetworkConfig, build
from fleetcast.forecast.predictor import set_threads
from fleetcast.schema import Floats32, Longs

BLOCKS = (128, 256, 512)  # windows computed together
_TABLE_ROWS = 60_000  # about what the curves of six scalars have


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    set_threads(1)
    config = NetworkConfig.for_grid(GridShape(300_000, 96), 32)
    weights = build(config).state_dict()
    figures = {"torch_whole_network_us": _torch_us(config, weights, options.windows, options.rounds)}
    arrays = {name: tensor.numpy() for name, tensor in weights.items() if name.startswith("lstm")}
    for name, work in (("lstm", _lstm_work(config, arrays)), ("curves", _curves_work(config))):
        for block in BLOCKS:
            took = _best_us(work(block), block, options.rounds * max(1, 512 // block))
            figures[f"numpy_{name}_us_in_blocks_of_{block}"] = took
    for name in ("lstm", "curves"):
        figures[f"numpy_{name}_us"] = min(
            v for k, v in figures.items() if k.startswith(f"numpy_{name}_us_in")
        )
    figures["numpy_two_parts_over_torch_whole"] = round(
        (figures["numpy_lstm_us"] + figures["numpy_curves_us"]) / figures["torch_whole_network_us"], 2
    )
    for name, value in figures.items():
        print(f"{name:40s} {value}")
    print(write_results("numpy_network", {"windows": options.windows, **figures}))
    return 0


def _torch_us(config: NetworkConfig, weights: dict[str, torch.Tensor], n_windows: int, rounds: int) -> float:
    batch = Batch(
        past=torch.randn(n_windows, config.n_past, len(config.past_reals)).clamp(-1, 1),
        ahead=torch.randn(n_windows, config.n_knots, len(config.ahead_reals)).clamp(-1, 1),
        static=torch.randn(n_windows, len(config.static_reals)),
        metric=torch.randint(0, METRIC_SLOTS, (n_windows,)),
    )
    with torch.inference_mode():
        network = SweepNetwork(weights, config)
        return _best_us(lambda: network(batch), n_windows, rounds)


def _lstm_work(config: NetworkConfig, weights: dict[str, Floats32]) -> Callable[[int], Callable[[], None]]:
    rng, wide = np.random.default_rng(1), config.hidden_size

    def of(block: int) -> Callable[[], None]:
        inputs = {
            "lstm_encoder": rng.normal(size=(config.n_past, block, wide)).astype(np.float32),
            "lstm_decoder": rng.normal(size=(config.n_knots, block, wide)).astype(np.float32),
        }

        def work() -> None:
            hidden, cell = np.zeros((2, block, wide), np.float32)
            for name, steps in inputs.items():
                _, hidden, cell = lstm(weights, name, steps, hidden, cell)

        return work

    return of


def lstm(
    weights: dict[str, Floats32], name: str, steps: Floats32, hidden: Floats32, cell: Floats32
) -> tuple[Floats32, Floats32, Floats32]:
    """Return the outputs (step, window, hidden) of an LSTM and its last state, with torch's weights."""
    wide = hidden.shape[1]
    inner = weights[f"{name}.weight_hh_l0"].T.copy()
    bias = weights[f"{name}.bias_ih_l0"] + weights[f"{name}.bias_hh_l0"]
    gates = steps.reshape(-1, wide) @ weights[f"{name}.weight_ih_l0"].T + bias
    gates = gates.reshape(len(steps), -1, 4 * wide)
    outputs = np.empty((len(steps), *hidden.shape), np.float32)
    half = np.full(4 * wide, 0.5, np.float32)  # sigmoid(x) = (1 + tanh(x / 2)) / 2: one tanh for all gates
    half[2 * wide : 3 * wide] = 1.0
    product, new = np.empty_like(gates[0]), np.empty_like(cell)
    for gate, output in zip(gates, outputs, strict=True):
        np.matmul(hidden, inner, out=product)
        gate += product
        gate *= half
        np.tanh(gate, out=gate)
        gate[:, : 2 * wide] *= 0.5
        gate[:, : 2 * wide] += 0.5
        gate[:, 3 * wide :] *= 0.5
        gate[:, 3 * wide :] += 0.5
        np.multiply(gate[:, :wide], gate[:, 2 * wide : 3 * wide], out=new)
        cell = cell * gate[:, wide : 2 * wide]
        cell += new
        np.multiply(np.tanh(cell), gate[:, 3 * wide :], out=output)
        hidden = output
    return outputs, hidden, cell


def _curves_work(config: NetworkConfig) -> Callable[[int], Callable[[], None]]:
    rng = np.random.default_rng(2)
    table = rng.normal(size=(_TABLE_ROWS, config.hidden_size)).astype(np.float32)

    def of(block: int) -> Callable[[], None]:
        parts = []
        for n_step, reals in ((config.n_past, config.past_reals), (config.n_knots, config.ahead_reals)):
            shape = (2 * len(reals), block * n_step)  # the point below and the one above, of each scalar
            points = rng.integers(0, _TABLE_ROWS, shape)
            parts.append((points, rng.uniform(size=(*shape, 1)).astype(np.float32)))

        def work() -> None:
            for points, shares in parts:
                sum_of_rows(table, points, shares)

        return work

    return of


def sum_of_rows(table: Floats32, points: Longs, shares: Floats32) -> Floats32:
    """Return what an embedding bag gives: rows (point, row) of a table, weighed and added."""
    total = np.zeros((points.shape[1], table.shape[1]), np.float32)
    read = np.empty_like(total)
    for point, share in zip(points, shares, strict=True):
        table.take(point, axis=0, out=read, mode="clip")
        read *= share
        total += read
    return total


def _best_us(work: Callable[[], object], n_windows: int, rounds: int) -> float:
    work()
    took = []
    for _ in range(rounds):
        started = process_time()
        work()
        took.append(process_time() - started)
    return round(min(took) / n_windows * 1e6, 1)


if __name__ == "__main__":
    raise SystemExit(main())
