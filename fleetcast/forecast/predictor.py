"""A model file: check its content, load it, forecast a window, save it.

Owns: arrays → tensors → quantiles, which of a model's weights forecast a series, and the bytes of
a checkpoint. Does not know: which model is in service, where versions live.

Checkpoint (`torch.save` of plain types only, read with weights_only=True and nothing else):
{"format": 1, "version": str, "trained_at": ISO 8601, "metrics": [str], "grid": {...},
"network": {...}, "state_dict": {name: float32 tensor}}. Format 2 adds
"specialists": [{"series": [[server, metric, ms since 1970 when it changed], ...], "state_dict":
{the same names}}, ...], no series twice. A model without specialists is written as format 1, which
older programs read, too.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fleetcast.errors import BadCheckpoint, BadData, CorruptFile, OtherBins
from fleetcast.files import read_regular
from fleetcast.forecast.encoding import (
    AHEAD_REALS,
    FINE_PAST,
    INPUT_LIMIT,
    PAST_REALS,
    STATIC_REALS,
    GridShape,
    ModelArrays,
    decode,
    encode,
    is_percent,
)
from fleetcast.forecast.fast_network import SweepNetwork
from fleetcast.forecast.network import METRIC_SLOTS, NetworkConfig, as_batch
from fleetcast.schema import QUANTILES, Floats32, HistoryWindow, Longs, Series

FORMAT, FORMAT_WITH_SPECIALISTS = 1, 2
FILE_MAX_BYTES = 2**29
_PICKLE_MAX_BYTES = 2**24
_GLOBALS = ("torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict")
# Answers to plain histories, in spreads: targets are cut off at INPUT_LIMIT. The base and every model
# trained here stay below 9 with no quantiles crossed, fresh weights cross by 0.4; random ones reach
# 22 and cross by 23, the base's, shuffled, cross by 2 in half of all answers.
_SANE_ANSWER, _SANE_CROSSING, _SANE_CROSSED_SHARE = 2 * INPUT_LIMIT, 0.5, 0.1
MOST_SPECIALISTS = 4
MIN_HISTORY_S = 3600.0
_CHUNK = 256  # windows per forward pass: the tensors of one stay in a core's cache
# what torch's unpickler raises on foreign bytes (found by feeding it damaged files), and what a
# mapping of another shape raises
UNREADABLE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, MemoryError),
    *(RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
)
# what a file raises that torch can read and that is no model of this program
_FOREIGN = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError)

Weights = Mapping[str, torch.Tensor]


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


@dataclass(frozen=True, eq=False)
class Specialist:
    """Weights of the same network for series whose behaviour changed; they forecast no other."""

    weights: Weights
    changed_ms: Mapping[Series, int]  # its series, with when each changed (ms since 1970)


def series_of(specialists: Iterable[Specialist]) -> set[Series]:
    """Return the series that have a specialist."""
    return {pair for item in specialists for pair in item.changed_ms}


def set_threads(count: int) -> None:
    """Set how many threads torch uses in this process."""
    torch.set_num_threads(count)


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
        self.weights = {name: tensor.detach() for name, tensor in weights.items()}
        self.specialists = tuple(specialists)
        self._min_history_bins = max(1, round(min_history_s * 1000 / description.grid.bin_ms))
        with torch.inference_mode():
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
        unpickled = _unpickle(content, path)
        try:
            loaded = cls(*_parse(unpickled), min_history_s=min_history_s)
            loaded._try_once()
        except _FOREIGN as error:
            raise BadCheckpoint(path, f"not a model of ours: {type(error).__name__} {error}") from error
        return loaded

    def to_bytes(self) -> bytes:
        """Return the content of a checkpoint."""
        item = self.description
        content: dict[str, Any] = {
            "format": FORMAT_WITH_SPECIALISTS if self.specialists else FORMAT,
            "version": item.version,
            "trained_at": item.trained_at,
            "metrics": list(item.metrics),
            "grid": item.grid.as_config(),
            "network": item.network.as_config(),
            "state_dict": dict(self.weights),
        }
        if self.specialists:
            content["specialists"] = [_plain(specialist) for specialist in self.specialists]
        stream = io.BytesIO()
        torch.save(content, stream)
        return stream.getvalue()

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
        with torch.inference_mode():
            return np.asarray(self._networks[network](as_batch(arrays, slots)).numpy(), np.float32)

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


def _plain(specialist: Specialist) -> dict[str, Any]:
    series = [[*pair, changed_ms] for pair, changed_ms in sorted(specialist.changed_ms.items())]
    return {"series": series, "state_dict": dict(specialist.weights)}


def _unpickle(content: bytes, path: Path) -> Any:
    try:
        _check_archive(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        why = f"not a checkpoint of plain types: {type(error).__name__} {str(error)[:200]}"
        raise BadCheckpoint(path, why) from error


def _check_archive(content: bytes) -> None:
    """Refuse what would take more memory than its bytes: packed members, types that allocate.

    torch compares the size of every storage with its member, so nothing is read past an end; a
    tensor's shape and strides are only numbers until `_check_weights` has compared them.

    Raises:
        ValueError, BadZipFile, LookupError: it is no file that `Forecaster.save` writes.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("a member is packed")
        if sum(member.file_size for member in members) > len(content):
            raise ValueError("its members are larger than the file")
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _PICKLE_MAX_BYTES:
            raise ValueError("it has not one small pickle")
        code = archive.read(pickles[0])
    for operation, argument, _ in pickletools.genops(code):
        if operation.name == "STACK_GLOBAL" or (operation.name == "GLOBAL" and argument not in _GLOBALS):
            raise ValueError(f"it names {argument or 'a computed type'}")


def _parse(content: Any) -> tuple[ModelDescription, Weights, tuple[Specialist, ...]]:
    if not isinstance(content, dict):
        raise TypeError(f"expected a mapping, got {type(content).__name__}")
    if content["format"] not in (FORMAT, FORMAT_WITH_SPECIALISTS):
        raise ValueError(f"format {content['format']!r}, expected {FORMAT} or {FORMAT_WITH_SPECIALISTS}")
    network, grid = NetworkConfig.from_config(content["network"]), GridShape.from_config(content["grid"])
    if (network.past_reals, network.ahead_reals, network.static_reals) != (
        PAST_REALS,
        AHEAD_REALS,
        STATIC_REALS,
    ):
        raise ValueError("its input variables are not the ones this program computes")
    if (network.n_past, network.n_knots) != (grid.n_past, grid.n_knots):
        raise ValueError("its network does not fit its grid")
    metrics = _texts(content["metrics"], METRIC_SLOTS - 1)
    version, trained_at = _texts([content["version"], content["trained_at"]], 2)
    description = ModelDescription(version, trained_at, metrics, grid, network)
    shapes = network.weight_shapes()
    weights = _parse_weights(content["state_dict"], shapes)
    has_specialists = content["format"] == FORMAT_WITH_SPECIALISTS
    listed = content["specialists"] if has_specialists else []
    if not isinstance(listed, list) or len(listed) > MOST_SPECIALISTS:
        raise ValueError(f"not a list of at most {MOST_SPECIALISTS} specialists")
    specialists = tuple(_parse_specialist(item, shapes) for item in listed)
    if len(series_of(specialists)) < sum(len(item.changed_ms) for item in specialists):
        raise ValueError("two specialists have a series in common")
    return description, weights, specialists


def _parse_specialist(content: Any, shapes: Mapping[str, tuple[int, ...]]) -> Specialist:
    changed_ms: dict[Series, int] = {}
    for server, metric, ms in content["series"]:
        if not isinstance(server, str) or not isinstance(metric, str) or not isinstance(ms, int):
            raise TypeError("a specialist's series is not [server, metric, ms]")
        changed_ms[server, metric] = ms
    if not changed_ms:
        raise ValueError("a specialist has no series")
    return Specialist(_parse_weights(content["state_dict"], shapes), changed_ms)


def _texts(listed: Any, at_most: int) -> tuple[str, ...]:
    """Return a list of texts; nothing else is turned into one, since its text may be endless."""
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise TypeError("a name is not a text")
    if len(listed) > at_most:
        raise ValueError(f"{len(listed)} names, at most {at_most} are possible")
    return tuple(listed)


def _parse_weights(content: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Compare names, types, shapes and strides with the network's own before a number is read."""
    if not isinstance(content, dict) or content.keys() != shapes.keys():
        raise ValueError("its weights are not the ones of its network")
    for name, shape in shapes.items():
        tensor = content[name]
        if (
            type(tensor) is not torch.Tensor
            or tensor.dtype != torch.float32
            or tensor.layout != torch.strided
        ):
            raise TypeError(f"weight {name} is not a float32 tensor")
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"weight {name} has shape {tuple(tensor.shape)[:9]}, expected {shape} in one piece"
            )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in content.values()):
        raise ValueError("its weights are not finite")
    return dict(content)
