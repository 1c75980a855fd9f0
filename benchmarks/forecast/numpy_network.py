"""What forecasts cost without torch: the network in numpy beside its twin in torch, and the memory of each.

    .venv/bin/python -m benchmarks.forecast.numpy_network [--windows 1024] [--rounds 9]

CPU microseconds per window of this process, one thread, both in turn, the median of the rounds, in passes of
256 windows as in a sweep. The twin is what a training runs (`training.network.StaticNetwork`), without
gradients. Memory is the resident set of a new process that has loaded the shipped model, and of one that
has imported torch besides.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time

import numpy as np
import torch

from benchmarks.results_file import write_results
from fleetcast.forecast.encoding import GridShape
from fleetcast.forecast.network import METRIC_SLOTS, NetworkConfig, SweepNetwork
from fleetcast.forecast.predictor import set_threads
from fleetcast.schema import Floats32
from fleetcast.training.network import Batch, StaticNetwork, as_arrays, build

PASS = 256  # windows
SHIPPED = Path(__file__).parents[2] / "models" / "last.ckpt"
LOADED = """
import sys
from pathlib import Path
from fleetcast.forecast.predictor import Forecaster
model = Forecaster.load(Path(sys.argv[1]))
for name in sys.argv[2:]:
    __import__(name)
import psutil
print(psutil.Process().memory_info().rss / 1e6)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    figures = costs(options.windows, options.rounds)
    figures["memory_loaded_mb"], figures["memory_with_torch_mb"] = memory_mb(), memory_mb("torch")
    for name, value in figures.items():
        print(f"{name:24s} {value}")
    print(write_results("numpy_network", {"windows": options.windows, **figures}))
    return 0


def costs(n_windows: int, rounds: int) -> dict[str, float]:
    """Return microseconds per window of both, and how far their answers are apart."""
    set_threads(1)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    config = NetworkConfig.for_grid(GridShape(300_000, 96), 32)
    weights = build(config).state_dict()
    rng = np.random.default_rng(1)

    def scalars(*shape: int) -> Floats32:
        return rng.uniform(-1, 1, shape).astype(np.float32)

    arrays = (
        scalars(n_windows, config.n_past, len(config.past_reals)),
        scalars(n_windows, config.n_knots, len(config.ahead_reals)),
        scalars(n_windows, len(config.static_reals)),
        rng.integers(0, METRIC_SLOTS, n_windows),
    )
    in_numpy, in_torch = SweepNetwork(as_arrays(weights), config), StaticNetwork(weights, config)
    passes = [slice(start, start + PASS) for start in range(0, n_windows, PASS)]
    batches = [Batch(*(torch.from_numpy(array[rows]) for array in arrays)) for rows in passes]

    def by_numpy() -> Floats32:
        return np.concatenate([in_numpy(*(array[rows] for array in arrays)) for rows in passes])

    def by_torch() -> Floats32:
        with torch.inference_mode():
            return torch.cat([in_torch(batch) for batch in batches]).numpy()

    difference = float(np.abs(by_numpy() - by_torch()).max())
    took: dict[str, list[float]] = {"numpy_us": [], "torch_us": []}
    for _ in range(rounds):
        took["numpy_us"].append(_cpu_s(by_numpy))
        took["torch_us"].append(_cpu_s(by_torch))
    figures = {name: round(float(np.median(some)) / n_windows * 1e6, 1) for name, some in took.items()}
    return {**figures, "largest_difference": difference}


def memory_mb(*imported: str) -> float:
    """Return what a new process holds that has loaded the shipped model and imported these."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(SHIPPED), *imported], capture_output=True, text=True, check=True
    )
    return round(float(done.stdout), 1)


def _cpu_s(work: Callable[[], object]) -> float:
    started = process_time()
    work()
    return process_time() - started


if __name__ == "__main__":
    raise SystemExit(main())
