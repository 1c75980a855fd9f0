"""A model as a file: what it is, the fleet's weights, and those of its specialists.

Owns: the checkpoint's bytes. With `network.py`, `forecaster.py` and `training.py` the owner of
torch. Does not know: how forecasts are made, where versions live.

Checkpoint (`torch.save` of plain types only, read with weights_only=True and nothing else):
{"format": 1, "version": str, "trained_at": ISO 8601, "metrics": [str], "grid": {...},
"network": {...}, "state_dict": {name: float32 tensor}}. Format 2 adds
"specialists": [{"series": [[server, metric, ms since 1970 when it changed], ...], "state_dict":
{the same names}}, ...], no series twice; a model without any is written as format 1, which older
programs read, too.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fleetcast.errors import BadCheckpoint
from fleetcast.forecast.encoding import AHEAD_REALS, PAST_REALS, STATIC_REALS
from fleetcast.forecast.gridshape import GridShape
from fleetcast.forecast.network import METRIC_SLOTS, NetworkConfig
from fleetcast.schema import Series

FORMAT, FORMAT_WITH_SPECIALISTS = 1, 2
MOST_SPECIALISTS = 4

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


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a checkpoint file."""

    description: ModelDescription
    weights: Weights
    specialists: tuple[Specialist, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the file's content."""
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

    @classmethod
    def from_bytes(cls, content: bytes, path: Path) -> "Checkpoint":
        """Read a file's content.

        Args:
            path: names it in errors.
        Raises:
            BadCheckpoint: damaged, foreign, unsafe or not finite.
        """
        try:
            return _parsed(_unpickled(content, path))
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
            raise not_ours(path, error) from error


def _plain(specialist: Specialist) -> dict[str, Any]:
    series = [[*pair, changed_ms] for pair, changed_ms in sorted(specialist.changed_ms.items())]
    return {"series": series, "state_dict": dict(specialist.weights)}


def not_ours(path: Path, error: Exception) -> BadCheckpoint:
    """Return what is said of a file that torch reads and that is no model of this program."""
    return BadCheckpoint(path, f"not a model of ours: {type(error).__name__} {error}")


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


def _parsed(content: Any) -> Checkpoint:
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
    metrics = tuple(str(metric) for metric in content["metrics"])
    if len(metrics) >= METRIC_SLOTS:
        raise ValueError(f"{len(metrics)} metrics, at most {METRIC_SLOTS - 1} are possible")
    description = ModelDescription(
        str(content["version"]), str(content["trained_at"]), metrics, grid, network
    )
    has_specialists = content["format"] == FORMAT_WITH_SPECIALISTS
    specialists = tuple(_specialist(item) for item in content["specialists"]) if has_specialists else ()
    if len(specialists) > MOST_SPECIALISTS:
        raise ValueError(f"{len(specialists)} specialists, at most {MOST_SPECIALISTS} are possible")
    if len({pair for item in specialists for pair in item.changed_ms}) < sum(
        len(item.changed_ms) for item in specialists
    ):
        raise ValueError("two specialists have a series in common")
    return Checkpoint(description, _weights(content["state_dict"]), specialists)


def _specialist(content: Any) -> Specialist:
    changed_ms = {(str(server), str(metric)): int(ms) for server, metric, ms in content["series"]}
    if not changed_ms:
        raise ValueError("a specialist has no series")
    return Specialist(_weights(content["state_dict"]), changed_ms)


def _weights(content: Any) -> dict[str, torch.Tensor]:
    weights = {str(name): tensor.to(torch.float32) for name, tensor in content.items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise ValueError("its weights are not finite")
    return weights
