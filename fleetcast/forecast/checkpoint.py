"""The bytes of a model file: what is in one, its checks, and the reading of it without torch.

Owns: the checkpoint's content and what of it is believed. Does not know: what a network answers, where
versions live.

Checkpoint (`torch.save` of plain types only):
{"format": 1, "version": str, "trained_at": ISO 8601, "metrics": [str], "grid": {...},
"network": {...}, "state_dict": {name: float32 tensor}}. Format 2 adds
"specialists": [{"series": [[server, metric, ms since 1970 when it changed], ...], "state_dict":
{the same names}}, ...], no series twice. A model without specialists is written as format 1, which
older programs read, too.

A program reads it without torch, which takes more memory than all else an idle daemon holds: the file is a
zip of one pickle and of the tensors' bytes, and no unpickler sees it. Writing is torch's.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fleetcast.errors import BadCheckpoint
from fleetcast.forecast.encoding import AHEAD_REALS, PAST_REALS, STATIC_REALS, GridShape
from fleetcast.forecast.network import METRIC_SLOTS, NetworkConfig
from fleetcast.forecast.selection import Weights
from fleetcast.schema import Floats32, Series

FORMAT, FORMAT_WITH_SPECIALISTS = 1, 2
FILE_MAX_BYTES = 2**29
MOST_SPECIALISTS = 4
_PICKLE_MAX_BYTES = 2**24
# what the reader raises on foreign bytes (found by feeding it damaged files)
UNREADABLE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, MemoryError),
    *(RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
)


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


def to_bytes(description: ModelDescription, weights: Weights, specialists: Sequence[Specialist]) -> bytes:
    """Return the content of a checkpoint."""
    import torch  # only what makes models writes them

    def tensors(own: Weights) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array.copy()) for name, array in own.items()}

    content: dict[str, Any] = {
        "format": FORMAT_WITH_SPECIALISTS if specialists else FORMAT,
        "version": description.version,
        "trained_at": description.trained_at,
        "metrics": list(description.metrics),
        "grid": description.grid.as_config(),
        "network": description.network.as_config(),
        "state_dict": tensors(weights),
    }
    if specialists:
        content["specialists"] = [
            {
                "series": [[*pair, ms] for pair, ms in sorted(item.changed_ms.items())],
                "state_dict": tensors(item.weights),
            }
            for item in specialists
        ]
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def read_content(content: bytes, path: Path) -> Any:
    """Return what a checkpoint holds, tensors as read-only arrays; nothing is believed of it yet.

    Raises:
        BadCheckpoint: it is no file that `torch.save` writes of plain types.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _read_archive(archive, len(content))
    except (*UNREADABLE, Warning) as error:  # of an escape in a text, where warnings are errors
        why = f"not a checkpoint of plain types: {type(error).__name__} {str(error)[:200]}"
        raise BadCheckpoint(path, why) from error


def _read_archive(archive: zipfile.ZipFile, n_bytes: int) -> Any:
    """Read an archive that cannot take more memory than its bytes: packed members would."""
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("a member is packed")
    if sum(member.file_size for member in members) > n_bytes:
        raise ValueError("its members are larger than the file")
    pickles = [member for member in members if member.filename.endswith(".pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _PICKLE_MAX_BYTES:
        raise ValueError("it has not one small pickle")
    folder = pickles[0].filename.rpartition("/")[0]
    order = f"{folder}/byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError("its numbers are not little-endian")
    return _Content(archive, folder).read(archive.read(pickles[0]))


class _Content:
    """Makes the plain values of a pickle whose numbers are members of an archive, by the format's own words.

    It is no unpickler: it knows what torch.save writes of dicts, lists, tuples, texts and numbers, and the
    one call that makes a tensor. It cannot name, import or call anything else.
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive, self._folder = archive, folder
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, Floats32] = {}  # each read once: a pickle may ask for one a million times

    def read(self, code: bytes) -> Any:
        """Return the value; raises one of UNREADABLE."""
        for operation, argument, _ in pickletools.genops(code):
            name = operation.name
            if name in _PUSHES:
                self._stack.append(argument)
            elif name in _MAKES:
                self._stack.append(_MAKES[name]())
            elif name in _PUTS:
                self._memo[int(argument or 0)] = self._stack[-1]
            elif name in _GETS:
                self._stack.append(self._memo[int(argument or 0)])
            elif name == "MARK":
                self._marks.append(len(self._stack))
            elif name not in ("PROTO", "STOP"):
                self._build(name)
        (value,) = self._stack
        return value

    def _build(self, name: str) -> None:
        """Do an operation that takes values from the stack."""
        if name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            self._stack.append(tuple(self._take(int(name[5:]) if name[5:] else None)))
        elif name in ("APPEND", "APPENDS"):
            self._add(list, self._take(1 if name == "APPEND" else None))
        elif name in ("SETITEM", "SETITEMS"):
            self._add(dict, self._take(2 if name == "SETITEM" else None))
        elif name == "BINPERSID":
            self._stack.append(self._storage(*self._stack.pop()))
        elif name == "REDUCE":
            called, arguments = self._take(2)
            self._stack.append(_CALLED[called](*arguments))
        else:
            raise ValueError(f"it has the operation {name}")

    def _take(self, count: int | None) -> list[Any]:
        """Remove the last values, or those since the last mark."""
        start = self._marks.pop() if count is None else len(self._stack) - count
        if not 0 <= start <= len(self._stack):
            raise ValueError("it takes more than there is")
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _add(self, kind: type, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not kind:
            raise TypeError(f"it adds to a {type(target).__name__} as to a {kind.__name__}")
        if isinstance(target, dict):
            target.update(zip(items[::2], items[1::2], strict=True))
        elif isinstance(target, list):
            target.extend(items)

    def _storage(self, what: Any, kind: Any, key: Any, _device: Any, count: Any) -> Floats32:
        """Return the numbers of one storage."""
        if (what, kind, type(key), type(count)) != ("storage", _FLOATS, str, int):
            raise ValueError("a storage is not one of float32 numbers")
        if key not in self._storages:
            self._storages[key] = np.frombuffer(self._archive.read(f"{self._folder}/data/{key}"), "<f4")
        if len(self._storages[key]) != count:
            raise ValueError("a storage is not of as many numbers as it says")
        return self._storages[key]


def _array(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Floats32:
    """Return a tensor as an array on its storage's numbers, as torch would lay it out."""
    if not isinstance(storage, np.ndarray) or not all(type(part) is tuple for part in (shape, strides)):
        raise TypeError("a tensor is not one of numbers")
    if not all(type(n) is int and n > 0 for n in shape) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor's shape is none")
    size = math.prod(shape)
    if offset + size > len(storage):
        raise ValueError("a tensor reaches beyond its numbers")
    wanted = (math.prod(shape[place + 1 :]) for place in range(len(shape)))
    if any(n > 1 and found != own for n, found, own in zip(shape, strides, wanted, strict=True)):
        raise ValueError("a tensor is not in one piece")
    return storage[offset : offset + size].reshape(shape)


_FLOATS = "torch FloatStorage"
_CALLED: Mapping[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _array,
    "collections OrderedDict": dict,  # the hooks of a tensor, always empty
}
_PUSHES = frozenset(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "GLOBAL"))
_MAKES: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_PUTS, _GETS = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")


def parse(content: Any) -> tuple[ModelDescription, Weights, tuple[Specialist, ...]]:
    """Return the model that a checkpoint's content says; raises LookupError, TypeError or ValueError."""
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


def _parse_weights(content: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Floats32]:
    """Compare names and shapes with the network's own before a number is read."""
    if not isinstance(content, dict) or content.keys() != shapes.keys():
        raise ValueError("its weights are not the ones of its network")
    for name, shape in shapes.items():
        array = content[name]
        if not isinstance(array, np.ndarray):
            raise TypeError(f"weight {name} is not a float32 tensor")
        if array.shape != shape:
            raise ValueError(f"weight {name} has shape {array.shape[:9]}, expected {shape} in one piece")
    if not all(bool(np.isfinite(array).all()) for array in content.values()):
        raise ValueError("its weights are not finite")
    return dict(content)
