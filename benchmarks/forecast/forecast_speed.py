"""How many servers a core forecasts per second, from rolling arrays to the encoded answer.

    .venv/bin/python -m benchmarks.forecast.forecast_speed [--servers 20 1000 10000] [--peer-servers 20 100]

Ours: what a sweep does with 8 days of 5-minute bins of 4 metrics: encode the windows, run the
network (hidden 32), read its answer, correct it by settled forecasts, encode 96 steps x 3
quantiles as the JSON of `/predictions/current`, read once. Peer: the same library's model trained in
its documented way, `TemporalFusionTransformer.from_dataset(...).predict(DataFrame)` at 288 -> 96,
in the same process; its answer is an array, not JSON, and its weights are random (speed does not
depend on them). CPU seconds of this process, one torch thread. Memory is what the process holds
at its peak above what it held with the model loaded and warm.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from benchmarks.forecast.parts.library import library_rates
from benchmarks.results_file import write_results
from fleetcast.bins import HISTORY_BINS
from fleetcast.clock import DataClock, from_ms
from fleetcast.forecast.checkpoint import ModelDescription
from fleetcast.forecast.encoding import GridShape
from fleetcast.forecast.network import NetworkConfig
from fleetcast.forecast.predictor import Forecaster, set_threads
from fleetcast.schema import FleetForecast, Floats, Floats32, HistoryWindow, RecordBatch
from fleetcast.serving.board import PredictionBoard
from fleetcast.serving.corrector import Corrector
from fleetcast.serving.history import BinGrid
from fleetcast.serving.roster import Roster
from fleetcast.serving.sweep import CHUNK_SERVERS
from fleetcast.settings import ForecastSettings
from fleetcast.training.network import as_arrays, build

METRICS = ("cpu_pct", "mem_pct", "disk_io_mb_s", "latency_ms")
BIN_MS, HORIZON = 300_000, 96
NEWEST_MS = 1_768_471_200_000
STAGES = ("history", "network", "correction", "json")
WARM_ROUNDS = 1


class RollingArrays:
    """A fleet's bins as the history keeps them: 16-bit codes, decoded part by part."""

    metrics: tuple[str, ...] = METRICS
    bin_ms = BIN_MS

    def __init__(self, n_servers: int) -> None:
        rng = np.random.default_rng(7)
        day = 2 * np.pi * np.arange(HISTORY_BINS) / 288
        few = 40 + 15 * np.sin(day) + rng.normal(0, 4, (200, len(METRICS), HISTORY_BINS))
        few[::9, :, 700:760] = np.nan  # a server was down
        self._grid = BinGrid(METRICS, BIN_MS, HISTORY_BINS)
        self._grid.advance(NEWEST_MS)
        for row in range(n_servers):
            self._put(row, few[row % len(few)].clip(0, 100))
        self.server_names = tuple(f"server-{number:05d}" for number in range(n_servers))

    def _put(self, row: int, values: Floats) -> None:
        """Fill a server's row with values (metric, bin)."""
        n_bins = values.shape[1]
        starts = NEWEST_MS - np.arange(n_bins)[::-1] * BIN_MS
        self._grid.put(np.full(n_bins, row, np.int32), starts, values.T)

    def parts(self) -> Iterator[HistoryWindow]:
        """Yield what a sweep is given, part by part."""
        for start in range(0, len(self.server_names), CHUNK_SERVERS):
            names = self.server_names[start : start + CHUNK_SERVERS]
            values = self._grid.values(np.arange(start, start + len(names)))
            yield HistoryWindow(names, METRICS, values, NEWEST_MS, BIN_MS)

    def recent(self, server_names: Sequence[str], last_bin_ms: int, n_bins: int = 12) -> Floats32:
        """Nothing is settled here."""
        return np.full((len(server_names), len(METRICS), n_bins), np.nan, np.float32)

    def unknown(self, server_names: Iterable[str]) -> list[str]:
        """Return none: every server reports."""
        return []


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every size and the library, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", type=int, nargs="+", default=[20, 1000, 10_000])
    parser.add_argument("--peer-servers", type=int, nargs="*", default=[20, 100], help="none: leave it out")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # the library's own, at its import
    set_threads(1)
    model = _model()
    model.predict(next(RollingArrays(64).parts()))
    rows = []
    for n_servers in options.servers:
        rows.append(measured(model, n_servers))
        print(
            f"{n_servers:6d} servers: {rows[-1]['cpu_s']:7.3f} CPU s, {rows[-1]['servers_per_core_s']:6.0f} "
            f"servers/s/core, {rows[-1]['memory_mb']:5.0f} MB above idle  {rows[-1]['stage_cpu_s']}",
            flush=True,
        )
    peer = library_rates(options.peer_servers, METRICS)
    for row in peer:
        rate = row["servers_per_core_s"]
        print(f"{row['servers']:6d} servers: library's predict() {rate:6.0f} servers/s/core")
    best = max((row["servers_per_core_s"] for row in peer), default=None)
    ratio = round(min(row["servers_per_core_s"] for row in rows) / best, 1) if best else None
    print(f"slowest of ours over the library's fastest: {ratio or 'n/a'}")
    print(write_results("forecast_speed", {"ours": rows, "library_predict": peer, "ratio": ratio}))
    return 0


def measured(model: Forecaster, n_servers: int) -> dict[str, Any]:
    """Return CPU seconds of one sweep (the best of a few, for small fleets) and the peak of memory."""
    idle_mb = _memory_mb("VmRSS")
    _forget_peak()
    arrays = RollingArrays(n_servers)
    board = PredictionBoard(_roster(arrays.server_names), DataClock(lambda: from_ms(NEWEST_MS)))
    with tempfile.TemporaryDirectory() as folder:
        corrector = Corrector(Path(folder), arrays, (1, 12, 96))
        corrector.note_version(model.version)
        rounds = max(2, 2000 // n_servers)
        sweeps = [sweep(model, arrays, corrector, board) for _ in range(rounds + WARM_ROUNDS)][WARM_ROUNDS:]
    best = min(sweeps, key=lambda stages: sum(stages.values()))
    cpu_s = sum(best.values())
    return {
        "servers": n_servers,
        "cpu_s": round(cpu_s, 4),
        "servers_per_core_s": round(n_servers / cpu_s),
        "memory_mb": round(_memory_mb("VmHWM") - idle_mb),
        "stage_cpu_s": {name: round(value, 4) for name, value in best.items()},
        "rounds": rounds,
    }


def sweep(
    model: Forecaster, arrays: RollingArrays, corrector: Corrector, board: PredictionBoard
) -> dict[str, float]:
    """Return the CPU seconds of each stage of one sweep."""
    took = dict.fromkeys(STAGES, 0.0)
    made = []
    parts = arrays.parts()
    while part := _timed(took, "history", partial(next, parts, None)):
        quantiles = _timed(took, "network", partial(model.predict, part))
        is_model = np.isfinite(quantiles).all(axis=(2, 3))
        medians = quantiles[..., 1].copy()
        _timed(took, "correction", partial(corrector.correct, part, quantiles))
        made.append((quantiles, is_model, medians))
    columns = [np.concatenate(column) for column in zip(*made, strict=True)]
    made.clear()
    forecast = FleetForecast(
        NEWEST_MS, BIN_MS, arrays.server_names, METRICS, columns[0], columns[1], "v", columns[2]
    )
    _timed(took, "json", partial(board.publish, forecast, None))
    _timed(took, "json", lambda: sum(len(piece) for piece in board.document()))
    return took


def _roster(server_names: tuple[str, ...]) -> Roster:
    """Return servers that are here, with a value each."""
    roster, n_servers = Roster(ForecastSettings()), len(server_names)
    times, values = np.full(n_servers, NEWEST_MS), {METRICS[0]: np.full(n_servers, 40.0)}
    roster.add(RecordBatch(server_names, np.arange(n_servers, dtype=np.int32), times, values))
    return roster


def _timed(took: dict[str, float], stage: str, work: Callable[[], Any]) -> Any:
    started = process_time()
    answer = work()
    took[stage] += process_time() - started
    return answer


def _model() -> Forecaster:
    grid = GridShape(BIN_MS, HORIZON)
    config = NetworkConfig.for_grid(grid, 32)
    return Forecaster(ModelDescription("v", "", METRICS, grid, config), as_arrays(build(config).state_dict()))


def _memory_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    raise SystemExit(main())
