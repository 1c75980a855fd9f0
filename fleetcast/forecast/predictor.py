"""A model: load it from a file, forecast a window, try it once.

Owns: arrays → quantiles, and which of a model's weights forecast a series. Does not know: what a file holds
(`checkpoint`), which model is in service, where versions live.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from fleetcast.errors import BadCheckpoint, BadData, CorruptFile, OtherBins
from fleetcast.files import read_regular
from fleetcast.forecast.checkpoint import (
    FILE_MAX_BYTES,
    ModelDescription,
    Specialist,
    parse,
    read_content,
    to_bytes,
)
from fleetcast.forecast.encoding import (
    FINE_PAST,
    INPUT_LIMIT,
    GridShape,
    ModelArrays,
    decode,
    encode,
    is_percent,
)
from fleetcast.forecast.network import SweepNetwork
from fleetcast.forecast.selection import Weights
from fleetcast.schema import QUANTILES, Floats32, HistoryWindow, Longs

# Answers to plain histories, in spreads: targets are cut off at INPUT_LIMIT. The base and every model
# trained here stay below 9 with no quantiles crossed, fresh weights cross by 0.4; random ones reach
# 22 and cross by 23, the base's, shuffled, cross by 2 in half of all answers.
_SANE_ANSWER, _SANE_CROSSING, _SANE_CROSSED_SHARE = 2 * INPUT_LIMIT, 0.5, 0.1
MIN_HISTORY_S = 3600.0
_CHUNK = 256  # windows per forward pass
# what a file raises that can be read and that is no model of this program
_FOREIGN = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError)


def set_threads(count: int) -> None:
    """Set how many threads a product of matrices may use in this process; more gain nothing at our sizes."""
    threadpool_limits(count, user_api="blas")


class Forecaster:
    """A trained model.

    Guarantee: forecasts are finite, non-decreasing over the quantiles and within what the last
    days make plausible; NaN where a series has too little history. A metric that no training saw is
    forecast as any other: a window is measured from its own values, and a training shows some as unknown.
    """

    def __init__(
        self,
        description: ModelDescription,
        weights: Weights,
        specialists: Sequence[Specialist] = (),
        *,
        min_history_s: float = MIN_HISTORY_S,
    ) -> None:
        self.description = description
        self.weights = dict(weights)
        self.specialists = tuple(specialists)
        self._min_history_bins = max(1, round(min_history_s * 1000 / description.grid.bin_ms))
        self._networks = tuple(
            SweepNetwork(own, description.network)
            for own in (self.weights, *(item.weights for item in self.specialists))
        )

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
            content = read_regular(model_ckpt, FILE_MAX_BYTES)
        except OSError as error:
            raise BadCheckpoint(model_ckpt, f"cannot be read: {error.strerror}") from error
        except CorruptFile as error:
            raise BadCheckpoint(model_ckpt, error.why) from error
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
            BadCheckpoint: damaged, foreign, unsafe, or its answers are none of a trained network.
        """
        found = read_content(content, path)
        try:
            loaded = cls(*parse(found), min_history_s=min_history_s)
            loaded._try_once()
        except _FOREIGN as error:
            raise BadCheckpoint(path, f"not a model of ours: {type(error).__name__} {error}") from error
        return loaded

    def to_bytes(self) -> bytes:
        """Return the content of a checkpoint."""
        return to_bytes(self.description, self.weights, self.specialists)

    def predict(self, window: HistoryWindow) -> Floats32:
        """Forecast every series of one window.

        Args:
            window: bin means, NaN = no record; the last column is the newest closed bin.
        Returns:
            quantiles (server, metric, horizon, quantile) in native units, non-decreasing on the
            last axis; NaN for a series without an hour of history in the last day or without a
            value in the last hour (12 bins).
        Raises:
            BadData: the window's bins are not the model's.
        """
        grid = self.description.grid
        if window.bin_ms != grid.bin_ms:
            raise BadData(f"the model forecasts bins of {grid.bin_ms} ms, the window has {window.bin_ms} ms")
        n_server, n_metric, _ = window.values.shape
        quantiles = np.full((n_server, n_metric, grid.horizon_bins, len(QUANTILES)), np.nan, np.float32)
        slots = np.array([self.description.slot(metric) for metric in window.metrics], np.int64)
        percents = np.array([is_percent(metric) for metric in window.metrics], np.bool_)
        for servers, columns, network in self._passes(window.server_names, window.metrics):
            quantiles[servers, columns] = self._forecast(
                window.values[servers, columns],
                np.full(len(servers), window.end_bin_ms, np.int64),
                slots[columns],
                percents[columns],
                network,
            )
        return quantiles

    def networks(self, servers: Sequence[str], metrics: Sequence[str]) -> Longs:
        """Return whose weights forecast each series, (server, metric): 0 the fleet's, else a specialist's."""
        chosen = np.zeros((len(servers), len(metrics)), np.int64)
        rows = {name: index for index, name in enumerate(servers)} if self.specialists else {}
        columns = {name: index for index, name in enumerate(metrics)}
        for network, specialist in enumerate(self.specialists, 1):
            for server, metric in specialist.changed_ms:
                if server in rows and metric in columns:
                    chosen[rows[server], columns[metric]] = network
        return chosen

    def _passes(self, servers: Sequence[str], metrics: Sequence[str]) -> Iterator[tuple[Longs, Longs, int]]:
        """Yield the series pass by pass: their rows, their columns, the network that forecasts them."""
        networks = self.networks(servers, metrics)
        for network in range(len(self._networks)):
            rows, columns = np.nonzero(networks == network)
            for start in range(0, len(rows), _CHUNK):
                part = slice(start, start + _CHUNK)
                yield rows[part], columns[part], network

    def _forecast(
        self,
        history: Floats32,
        end_bin_ms: Longs,
        slots: Longs,
        percents: NDArray[np.bool_],
        network: int,
    ) -> Floats32:
        """Forecast windows (window, bin) → (window, horizon, quantile)."""
        grid = self.description.grid
        arrays = encode(history, end_bin_ms, percents, grid, self._min_history_bins)
        quantiles = decode(self.answer(arrays, slots, network), arrays.scale, grid)
        quantiles[~arrays.scale.is_usable] = np.nan
        return quantiles

    def answer(self, arrays: ModelArrays, slots: Longs, network: int = 0) -> Floats32:
        """Return one network's answer (window, knot, quantile) in the windows' own units."""
        return self._networks[network](arrays.past, arrays.ahead, arrays.static, slots)

    def _try_once(self) -> None:
        """Let every network answer plain histories; decoding would hide what is wrong with an answer.

        Raises:
            ValueError: an answer is not one that a trained network gives.
        """
        grid = self.description.grid
        history = _plain_histories(grid)
        arrays = encode(history, np.zeros(len(history), np.int64), np.zeros(len(history), np.bool_), grid)
        for network in range(len(self._networks)):
            answer = self.answer(arrays, np.zeros(len(history), np.int64), network)
            if answer.shape != (len(history), grid.n_knots, len(QUANTILES)) or not np.isfinite(answer).all():
                raise ValueError("its answer is not finite numbers of the expected shape")
            if (furthest := float(np.abs(answer).max())) > _SANE_ANSWER:
                raise ValueError(
                    f"it answers {furthest:.3g} spreads from now, at most {_SANE_ANSWER} are sane"
                )
            crossed = float((np.diff(answer, axis=-1) < -_SANE_CROSSING).mean())
            if crossed > _SANE_CROSSED_SHARE:
                raise ValueError(f"the quantiles of {crossed:.0%} of its answers are not in order")


def _plain_histories(grid: GridShape) -> Floats32:
    """Return what a sane network has an answer for: nothing, a level, a day's rhythm, a step, a ramp."""
    bins = np.arange(grid.history_bins)
    histories = np.zeros((5, grid.history_bins))
    histories[1] = 50.0
    histories[2] = 50 + 10 * np.sin(bins * (2 * np.pi / grid.season_bins))
    histories[3] = np.where(bins < grid.history_bins - FINE_PAST, 20.0, 80.0)
    histories[4] = 100 * bins / grid.history_bins
    return histories.astype(np.float32)
