"""Arrays in a file, and a frozen dataclass of them: `baseline.npz`, `reference.npz`. Never pickled.

Owns: how any `.npz` is opened (a regular file, unpacked within bounds), and the layout of a
dataclass: one array per field, fields of fields under dotted names (`shape.profiles`), names as
fixed-width unicode, scalars as 0-d arrays, and `format`, the version of the file. Does not know:
what the arrays mean; each owner checks their shapes.
"""

import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np

from fleetcast.errors import BadData, CorruptFile, UnknownFormat
from fleetcast.files import read_regular

Kind = TypeVar("Kind")
PACKED_MAX_BYTES, UNPACKED_MAX_BYTES = 2**29, 2**30  # 10,000 servers need some 80 MB
_DAMAGES = (
    *(ValueError, LookupError, TypeError, OSError, EOFError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),
)  # fmt: skip


def pack(value: Any, version: int) -> bytes:
    """Return the content of a file of that format version."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **{"format": np.int64(version), **_flatten(value, "")})
    return stream.getvalue()


@contextmanager
def open_arrays(path: Path, what: str) -> Iterator[Any]:
    """Give the arrays of a file; what goes wrong in the block makes the file a damaged one.

    Raises:
        FileNotFoundError: there is none.
        CorruptFile: it is damaged, would unpack to too much, or lacks an array the block asks for.
    """
    content = read_regular(path, PACKED_MAX_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            size = sum(entry.file_size for entry in packed.infolist())
        if size > UNPACKED_MAX_BYTES:
            raise CorruptFile(path, f"unpacks to {size} bytes, at most {UNPACKED_MAX_BYTES} are read")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            yield arrays
    except _DAMAGES as error:
        raise CorruptFile(path, f"not {what}: {error}") from error


def unpack(
    path: Path,
    kind: type[Kind],
    what: str,
    version: int,
    earlier: Mapping[int, Callable[[dict[str, Any]], None]] | None = None,
) -> Kind:
    """Read a file of that format version.

    Args:
        what: what it is called in errors.
        earlier: format version -> what adds the arrays that a file of that version does not have.
    Raises:
        FileNotFoundError: there is none.
        UnknownFormat: another format version wrote it.
        CorruptFile: it is something else.
    """
    with open_arrays(path, f"a {what}") as archive:
        arrays = {name: archive[name] for name in archive.files}
    found = arrays.get("format")
    known = {version, *(earlier or ())}
    if found is None or found.shape or found.item() not in known:
        raise UnknownFormat(path, f"{what} format {found}", hint=f"expected {version}")
    try:
        if earlier and found.item() != version:
            earlier[found.item()](arrays)
        built: Kind = _build(kind, arrays, "")
    except (KeyError, TypeError, ValueError, IndexError, BadData) as error:
        raise CorruptFile(path, f"{what} field missing or of the wrong kind: {error}") from error
    return built


def check_shapes(path: Path, expected: Iterable[tuple[str, Any, tuple[int, ...]]]) -> None:
    """Check (name, array, shape) of each.

    Raises:
        CorruptFile: an array is of another shape, or holds no numbers.
    """
    for name, found, shape in expected:
        if found.shape != shape or found.dtype.kind not in "if":
            raise CorruptFile(path, f"{name} is {found.dtype} {found.shape}, expected numbers {shape}")


def _flatten(value: Any, prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in fields(value):
        own = getattr(value, item.name)
        if is_dataclass(own):
            out.update(_flatten(own, f"{prefix}{item.name}."))
        else:
            is_text = isinstance(own, tuple | str)
            out[prefix + item.name] = np.array(own, np.str_) if is_text else np.asarray(own)
    return out


def _build(kind: Any, arrays: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for item in fields(kind):
        name, hint = prefix + item.name, hints[item.name]
        if is_dataclass(hint):
            values[item.name] = _build(hint, arrays, f"{name}.")
        elif hint in (int, float, str):
            values[item.name] = hint(arrays[name].item())
        elif hint == tuple[str, ...]:
            values[item.name] = tuple(str(text) for text in arrays[name])
        else:
            values[item.name] = arrays[name]
    return kind(**values)
