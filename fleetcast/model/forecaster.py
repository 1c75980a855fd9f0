"""The model in service: load, forecast a window, save.

Owns: the checkpoint's bytes, and arrays → tensors → quantiles. With `network.py` and
`training.py` the owner of torch. Does not know: who serves, where versions live.

Checkpoint (format 1, `torch.save` of plain types only, read with weights_only=True and nothing
else): {"format": 1, "version": str, "trained_at": ISO 8601, "metrics": [str], "grid": {...},
"network": {...}, "state_dict": {name: float32 tensor}}.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from fleetcast.errors import BadCheckpoint, BadData, CorruptFile, OtherBins
from fleetcast.files import read_regular, write_atomic
from fleetcast.model.encoding import AHEAD_REALS, PAST_REALS, STATIC_REALS, ModelArrays, decode, encode
from fleetcast.model.gridshape import GridShape
from fleetcast.model.network import METRIC_SLOTS, NetworkConfig, as_batch
from fleetcast.model.scaling import is_percent
from fleetcast.model.sweepnetwork import SweepNetwork
from fleetcast.schema import QUANTILES, Floats32, HistoryWindow, Longs

FORMAT = 1
MIN_HISTORY_S = 3600.0
_CHUNK = 256  # windows per forward pass: the tensors of one stay in a core's cache


def set_threads(count: int) -> None:
    """Set how many threads torch uses in this process."""
    torch.set_num_threads(count)


@dataclass(frozen=True)
class ModelDescription:
    """What a model is, beside its weights."""

    version: str
    trained_at: str
    metrics: tuple[str, ...]  # their slots are 1, 2, ...; slot 0 is any other
    grid: GridShape
    network: NetworkConfig

    def slot(self, metric: str) -> int:
        """Return the network's slot of a metric, 0 for one it was not trained on."""
        return self.metrics.index(metric) + 1 if metric in self.metrics else 0


class Forecaster:
    """A trained model.

    Guarantee: forecasts are finite, non-decreasing over the quantiles and within what the last
    days make plausible; NaN where a series has too little history or an unknown metric.
    """

    def __init__(
        self,
        description: ModelDescription,
        weights: Mapping[str, torch.Tensor],
        *,
        min_history_s: float = MIN_HISTORY_S,
    ) -> None:
        self.description = description
        self.weights = {name: tensor.detach() for name, tensor in weights.items()}
        self._min_history_bins = max(1, round(min_history_s * 1000 / description.grid.bin_ms))
        with torch.inference_mode():
            self._network = SweepNetwork(self.weights, description.network)

    @property
    def version(self) -> str:
        """Return the id of the version in the registry."""
        return self.description.version

    @property
    def trained_at(self) -> str:
        """Return when it was trained, ISO 8601."""
        return self.description.trained_at

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics it was trained on."""
        return self.description.metrics

    @classmethod
    def load(
        cls,
        model_ckpt: Path,
        *,
        bin_ms: int | None = None,
        horizon_bins: int | None = None,
        min_history_s: float = MIN_HISTORY_S,
    ) -> Self:
        """Read a checkpoint and try it once.

        Args:
            bin_ms, horizon_bins: what the server forecasts; a model made for another is refused.
        Raises:
            BadCheckpoint: missing, damaged, foreign, unsafe, not finite; OtherBins: for other bins.
        """
        try:
            content = read_regular(model_ckpt)
        except OSError as error:
            raise BadCheckpoint(model_ckpt, f"cannot be read: {error.strerror}") from error
        except CorruptFile as error:
            raise BadCheckpoint(model_ckpt, "not a regular file") from error
        loaded = cls.from_bytes(content, model_ckpt, min_history_s=min_history_s)
        grid = loaded.description.grid
        if (bin_ms or grid.bin_ms, horizon_bins or grid.horizon_bins) != (grid.bin_ms, grid.horizon_bins):
            raise OtherBins(
                model_ckpt,
                f"made for {grid.horizon_bins} bins of {grid.bin_ms // 1000} s",
                hint=f"train one for {horizon_bins} bins of {(bin_ms or grid.bin_ms) // 1000} s",
            )
        return loaded

    @classmethod
    def from_bytes(cls, content: bytes, path: Path, *, min_history_s: float = MIN_HISTORY_S) -> Self:
        """Read the content of a checkpoint and try it once.

        Args:
            path: names it in errors.
        Raises:
            BadCheckpoint: damaged, foreign, unsafe or not finite.
        """
        try:
            description, weights = _parsed(_unpickled(content, path))
            loaded = cls(description, weights, min_history_s=min_history_s)
            loaded._try_once()
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
            raise BadCheckpoint(path, f"not a model of ours: {type(error).__name__} {error}") from error
        return loaded

    def to_bytes(self) -> bytes:
        """Return the content of a checkpoint."""
        stream = io.BytesIO()
        item = self.description
        torch.save(
            {
                "format": FORMAT,
                "version": item.version,
                "trained_at": item.trained_at,
                "metrics": list(item.metrics),
                "grid": item.grid.as_config(),
                "network": item.network.as_config(),
                "state_dict": self.weights,
            },
            stream,
        )
        return stream.getvalue()

    def save(self, path: Path) -> None:
        """Write a checkpoint in one durable step."""
        write_atomic(path, self.to_bytes())

    def predict(self, window: HistoryWindow) -> Floats32:
        """Forecast every series of one window.

        Args:
            window: bin means, NaN = no record; the last column is the newest closed bin.
        Returns:
            quantiles (server, metric, horizon, quantile) in native units, non-decreasing on the
            last axis; NaN for a metric the model does not know and a series without an hour of
            history in the last day or without a value in the last hour (12 bins).
        Raises:
            BadData: the window's bins are not the model's.
        """
        grid = self.description.grid
        if window.bin_ms != grid.bin_ms:
            raise BadData(f"the model forecasts bins of {grid.bin_ms} ms, the window has {window.bin_ms} ms")
        n_server, n_metric, _ = window.values.shape
        quantiles = np.full((n_server, n_metric, grid.horizon_bins, len(QUANTILES)), np.nan, np.float32)
        per_pass = max(1, _CHUNK // max(1, n_metric))
        known = [index for index, metric in enumerate(window.metrics) if metric in self.metrics]
        slots = np.array([self.description.slot(window.metrics[index]) for index in known], np.int64)
        percents = np.array([is_percent(window.metrics[index]) for index in known], np.bool_)
        for start in range(0, n_server if known else 0, per_pass):
            chunk = window.values[start : start + per_pass, known]  # (server, metric, bin)
            n_chunk = len(chunk)
            quantiles[start : start + n_chunk, known] = self._forecast(
                chunk.reshape(n_chunk * len(known), -1),
                np.full(n_chunk * len(known), window.end_bin_ms, np.int64),
                np.tile(slots, n_chunk),
                np.tile(percents, n_chunk),
            ).reshape(n_chunk, len(known), grid.horizon_bins, len(QUANTILES))
        return quantiles

    def _forecast(
        self, history: Floats32, end_bin_ms: Longs, slots: Longs, percents: "np.ndarray[Any, Any]"
    ) -> Floats32:
        """Forecast windows (window, bin) → (window, horizon, quantile)."""
        grid = self.description.grid
        arrays = encode(history, end_bin_ms, percents, grid, self._min_history_bins)
        quantiles = decode(self.answer(arrays, slots), arrays.scale, grid)
        quantiles[~arrays.scale.is_usable] = np.nan
        return quantiles

    def answer(self, arrays: ModelArrays, slots: Longs) -> Floats32:
        """Return the network's answer (window, knot, quantile) in the windows' own units."""
        with torch.inference_mode():
            return np.asarray(self._network(as_batch(arrays, slots)).numpy(), np.float32)

    def _try_once(self) -> None:
        grid = self.description.grid
        history = np.zeros((1, 1), np.float32)
        arrays = encode(history, np.zeros(1, np.int64), np.zeros(1, np.bool_), grid)
        answer = self.answer(arrays, np.zeros(1, np.int64))
        if answer.shape != (1, grid.n_knots, len(QUANTILES)) or not np.isfinite(answer).all():
            raise ValueError("its answer is not finite numbers of the expected shape")


# what torch's own unpickler raises on foreign bytes, found by feeding it damaged files
_FOREIGN = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, MemoryError),
    *(RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
)


def _unpickled(content: bytes, path: Path) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except _FOREIGN as error:
        why = f"not a checkpoint of plain types: {type(error).__name__} {str(error)[:200]}"
        raise BadCheckpoint(path, why) from error


def _parsed(content: Any) -> tuple[ModelDescription, dict[str, torch.Tensor]]:
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
    network, grid = NetworkConfig.from_config(content["network"]), GridShape.from_config(content["grid"])
    if (network.past_reals, network.ahead_reals, network.static_reals) != (
        PAST_REALS,
        AHEAD_REALS,
        STATIC_REALS,
    ):
        raise ValueError("its input variables are not the ones this program computes")
    if (network.n_past, network.n_knots) != (grid.n_past, grid.n_knots):
        raise ValueError("its network does not fit its grid")
    metrics = tuple(str(metric) for metric in content["metrics"])
    if len(metrics) >= METRIC_SLOTS:
        raise ValueError(f"{len(metrics)} metrics, at most {METRIC_SLOTS - 1} are possible")
    weights = {str(name): tensor.to(torch.float32) for name, tensor in content["state_dict"].items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise ValueError("its weights are not finite")
    description = ModelDescription(
        str(content["version"]), str(content["trained_at"]), metrics, grid, network
    )
    return description, weights
