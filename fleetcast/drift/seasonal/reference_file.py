"""The file of a reference: arrays under dotted names, checked when read, never pickled.

Owns: `reference.npz`, format 2: one array per field of `Reference`, fields of fields under dotted
names (`shape.profiles`, `books.values.edges`, ...), names as fixed-width unicode, scalars as 0-d
arrays. Does not know: what the arrays mean beyond their shapes.
"""

import io
import zipfile
import zlib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np

from fleetcast.drift.seasonal.residuals import N_CODES, N_EDGES
from fleetcast.drift.seasonal.season import WEEKDAYS, DayClock
from fleetcast.drift.seasonal.shifted_day import LAGS_H
from fleetcast.drift.seasonal.statistics import N_STATISTICS
from fleetcast.errors import BadData, CorruptFile, UnknownFormat
from fleetcast.files import read_regular

FORMAT = 2
Kind = TypeVar("Kind")


def reference_bytes(reference: Any) -> bytes:
    """Return the content of a reference's file."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **{"format": np.int64(FORMAT), **_flattened(reference, "")})
    return stream.getvalue()


def read_reference(path: Path, kind: type[Kind]) -> Kind:
    """Read a reference; see `Reference.load` for what it raises."""
    content = read_regular(path)
    try:
        archive = np.load(io.BytesIO(content), allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise CorruptFile(path, "a bare array, not a reference archive")
        arrays = {name: archive[name] for name in archive.files}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise CorruptFile(path, f"not a reference: {error}") from error
    found = arrays.get("format")
    if found is None or found.shape or found != FORMAT:
        raise UnknownFormat(path, f"reference format {found}", hint=f"expected {FORMAT}")
    try:
        loaded: Kind = _built(kind, arrays, "")
        _check_rows(path, loaded)
    except (KeyError, TypeError, ValueError, IndexError, BadData) as error:
        raise CorruptFile(path, f"reference field missing or of the wrong kind: {error}") from error
    return loaded


def _flattened(value: Any, prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in fields(value):
        own = getattr(value, item.name)
        if is_dataclass(own):
            out.update(_flattened(own, f"{prefix}{item.name}."))
        else:
            text = isinstance(own, tuple | str)
            out[prefix + item.name] = np.array(own, np.str_) if text else np.asarray(own)
    return out


def _built(kind: Any, arrays: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for item in fields(kind):
        name, hint = prefix + item.name, hints[item.name]
        if is_dataclass(hint):
            values[item.name] = _built(hint, arrays, f"{name}.")
        elif hint in (int, float, str):
            values[item.name] = hint(arrays[name].item())
        elif hint == tuple[str, ...]:
            values[item.name] = tuple(str(text) for text in arrays[name])
        else:
            values[item.name] = arrays[name]
    return kind(**values)


def _check_rows(path: Path, loaded: Any) -> None:
    clock = DayClock(loaded.bin_ms, loaded.timezone)  # refuses a nonsensical bin or zone
    n_series, slots = len(loaded.server_names) * len(loaded.metrics), clock.n_slots
    n_weekly = int((loaded.shape.weekly_rows >= 0).sum())
    books = loaded.books
    expected: list[tuple[str, Any, tuple[int, ...]]] = [
        ("shape.profiles", loaded.shape.profiles, (n_series, slots)),
        ("shape.spreads", loaded.shape.spreads, (n_series, slots)),
        ("shape.weekday_profiles", loaded.shape.weekday_profiles, (n_weekly, WEEKDAYS, slots)),
        ("limits", loaded.limits, (n_series, N_STATISTICS)),
        ("shared_growth", loaded.shared_growth, (N_STATISTICS,)),
        ("books.tails", books.tails, (n_series, 2)),
        ("books.log_moves", books.log_moves, (n_series, 2)),
        ("books.distances", books.distances, (n_series, len(LAGS_H))),
        ("shape.template", loaded.shape.template, (n_series, clock.bins_per_day)),
    ]
    for name in ("values", "innovations", "errors"):
        expected.append((f"books.{name}.edges", getattr(books, name).edges, (n_series, N_EDGES)))
        expected.append((f"books.{name}.shares", getattr(books, name).shares, (n_series, N_CODES)))
    for owner, names in (
        (loaded.shape, ("weekly_rows", "centres", "ranges", "lows", "highs")),
        (books, ("log_size", "rhythm_power", "rhythm_noise")),
        (loaded, ("pull", "n_days", "start_days", "still_limits")),
    ):
        expected += [(name, getattr(owner, name), (n_series,)) for name in names]
    for name, found, shape in expected:
        if found.shape != shape or found.dtype.kind not in "if":
            raise CorruptFile(path, f"{name} is {found.dtype} {found.shape}, expected numbers {shape}")
    if n_weekly and int(loaded.shape.weekly_rows.max()) >= n_weekly:
        raise CorruptFile(path, "shape.weekly_rows points past the weekday profiles")
    if books.tails.size and not (books.tails.min() >= 0 and books.tails.max() < N_CODES):
        raise CorruptFile(path, f"books.tails must be within 0..{N_CODES - 1}")
