"""One training as the retraining daemon starts it, measured: the real program, its CPU, its forecasts.

Owns: writing an export and its context, running `tft_trainer.py`, the errors of the version it
made on days after the training. Does not know: which changes are asked about.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fleetcast.clock import from_ms, iso_z
from fleetcast.forecast.registry import Registry
from fleetcast.schema import ChangedSeries, Floats, Floats32, HistoryWindow
from fleetcast.training.grid import TrainingGrid

ROOT = Path(__file__).resolve().parents[3]
HORIZON, HISTORY_BINS = 96, 2304
HORIZONS: Mapping[str, tuple[int, int]] = {"5min": (1, 1), "1h": (12, 12), "8h": (96, 96), "mean_8h": (1, 96)}
MEASURED_FILE = "measured.json"


class Predictor(Protocol):
    """Anything that forecasts a window."""

    def predict(self, window: HistoryWindow) -> Floats32: ...


@dataclass(frozen=True)
class Training:
    """What one run of the trainer cost and said."""

    cpu_s: float  # user + system of the process and its children, start-up and gate included
    verdict: Mapping[str, Any]  # checkpoints/attempts/<id>.json
    version: str


def part(grid: TrainingGrid, start: int, stop: int) -> TrainingGrid:
    """Return the bins [start, stop) of a grid."""
    return replace(grid, values=grid.values[:, :, start:stop], start_ms=grid.start_ms + start * grid.bin_ms)


def write_export(path: Path, grid: TrainingGrid) -> None:
    """Write a grid as the retraining daemon exports it: rows of bins, server by server."""
    server, number = np.nonzero(np.isfinite(grid.values).any(axis=1))
    rows = {"timestamp": pa.array(grid.start_ms + number * grid.bin_ms, pa.timestamp("ms", tz="UTC"))}
    rows["server_name"] = pa.array([grid.server_names[index] for index in server])
    for index, metric in enumerate(grid.metrics):
        rows[metric] = pa.array(grid.values[server, index, number], from_pandas=True)
    pq.write_table(pa.table(rows), path)


def write_context(path: Path, grid: TrainingGrid, changed: Sequence[ChangedSeries]) -> None:
    """Write which series changed, and when, as the retraining daemon does."""
    drifting = [
        {
            "server": grid.server_names[item.server],
            "metric": grid.metrics[item.metric],
            "since": iso_z(from_ms(grid.start_ms + item.since_bin * grid.bin_ms)),
        }
        for item in changed
    ]
    path.write_text(json.dumps({"drifting": drifting}))


def train(
    folder: Path, data: Path, metrics: Sequence[str], flags: Sequence[str], settings: Mapping[str, str]
) -> Training:
    """Run the trainer in `folder`; its versions are in `folder/checkpoints` afterwards.

    A training that `folder` already holds is not run again: an interrupted benchmark goes on.

    Args:
        settings: of the trainer part, by name, where they are not the defaults.
    Raises:
        RuntimeError: it ended with another exit code than 0; says what it wrote.
    """
    measured = folder / MEASURED_FILE
    if measured.exists():
        return Training(**json.loads(measured.read_text()))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TFT_", "FLEETCAST_"))}
    given = {f"FLEETCAST_TRAINER_{name.upper()}": value for name, value in settings.items()}
    given["FLEETCAST_BINS_FORECAST_METRICS"] = ",".join(metrics)
    given["FLEETCAST_PATHS_MODELS_DIR"] = str(folder / "models")  # no shipped base beside the one measured
    command = [sys.executable, str(ROOT / "tft_trainer.py"), "--data", str(data), *flags]
    with (folder / "trainer.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=inherited | given, stderr=log, stdout=log)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = (folder / "trainer.log").read_text()[-2000:]
        raise RuntimeError(f"{' '.join(command)} exited {process.returncode}:\n{said}")
    newest = max((folder / "checkpoints" / "attempts").glob("*.json"), key=lambda path: path.stat().st_mtime)
    verdict = json.loads(newest.read_text())
    made = Training(round(usage.ru_utime + usage.ru_stime, 1), verdict, verdict["version"])
    measured.write_text(json.dumps(asdict(made)))
    return made


def copy_service(checkpoints: Path, folder: Path) -> None:
    """Copy the version in service of another checkpoint folder to `folder`."""
    served = Registry(checkpoints).current()
    if served is None:
        raise RuntimeError(f"{checkpoints}: no version is in service there")
    contents = {name: (served.folder / name).read_bytes() for name in served.manifest["files"]}
    kept = {key: value for key, value in served.manifest.items() if key not in ("format", "id", "files")}
    registry = Registry(folder / "checkpoints")
    registry.add(served.id, contents, kept)
    registry.promote(served.id)
    registry.set_baseline(served.id)


@dataclass(frozen=True, eq=False)
class TestDays:
    """The days after a training, and the windows forecasts are made for."""

    __test__ = False  # no test class

    grid: TrainingGrid  # all of it: windows look back
    origins: NDArray[np.int64]

    @classmethod
    def after(cls, grid: TrainingGrid, now_bin: int, days: float, count: int) -> "TestDays":
        """Return `count` origins spread over the days after a bin, each with a whole horizon."""
        stop = min(grid.n_bins, now_bin + round(days * 288)) - HORIZON - 1
        return cls(grid, np.unique(np.linspace(now_bin - 1, stop, count).round().astype(np.int64)))

    def errors(self, predictor: Predictor | None) -> dict[str, Floats]:
        """Return mean |p50 - actual| by horizon, (server, metric); None repeats the last value."""
        grid = self.grid
        sums = np.zeros((*grid.values.shape[:2], HORIZON))
        counts = np.zeros(sums.shape)
        for origin in self.origins:
            past = grid.values[:, :, max(0, origin + 1 - HISTORY_BINS) : origin + 1]
            actual = grid.values[:, :, origin + 1 : origin + 1 + HORIZON]
            # every side is judged on the windows where there is a last value to repeat
            known = np.isfinite(actual) & np.isfinite(past[:, :, -1:]) & _has_an_hour(past)[..., None]
            if predictor is None:
                middle = past[:, :, -1:]
            else:
                end_ms = grid.start_ms + int(origin) * grid.bin_ms
                window = HistoryWindow(grid.server_names, grid.metrics, past, end_ms, grid.bin_ms)
                middle = predictor.predict(window)[..., 1]
            sums += np.where(known, np.abs(actual - middle), 0.0)
            counts += known
        return {
            name: sums[..., first - 1 : last].sum(axis=-1)
            / np.maximum(counts[..., first - 1 : last].sum(axis=-1), 1)
            for name, (first, last) in HORIZONS.items()
        }


def _has_an_hour(past: Floats32) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(past[:, :, -288:]).sum(axis=-1) >= 12)


def relative(errors: Floats, naive: Floats, chosen: NDArray[np.bool_]) -> float | None:
    """Return the geometric mean over series of error / error of the last value; None for no series."""
    usable = chosen & (naive > 0) & np.isfinite(errors)
    if not usable.any():
        return None
    return round(float(np.exp(np.log(np.maximum(errors[usable] / naive[usable], 1e-3)).mean())), 4)
