"""`feedback.npz`: what settled forecasts taught, kept over a restart.

Owns: the format (1): `format`, `bin_ms`, `through_ms` (newest bin learned from), `horizons`, the
arrays of `Feedback` (`losses`, `counts`, `widen`: a row per server; `fleet_widen`), and names as
UTF-8 lines in byte arrays (`servers`, `metrics`, `version`). The zip's own CRC-32 guards every
array; nothing in it is pickled. Does not know: what the arrays mean.
"""

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fleetcast import files
from fleetcast.errors import CorruptFile
from fleetcast.forecast.feedback import Feedback
from fleetcast.serving.originfile import bytes_of, lines

FORMAT = 1


@dataclass(frozen=True, slots=True)
class KeptFeedback:
    """What the arrays of a `Feedback` belong to."""

    server_names: tuple[str, ...]  # by row
    metrics: tuple[str, ...]
    bin_ms: int
    version: str | None
    through_ms: int


def write_feedback(path: Path, kept: KeptFeedback, feedback: Feedback) -> None:
    """Replace the file in one durable step.

    Raises:
        StorageFull, StorageBroken: the older file stands.
    """
    n_row = len(kept.server_names)
    stream = io.BytesIO()
    np.savez(
        stream,
        format=np.int64(FORMAT),
        bin_ms=np.int64(kept.bin_ms),
        through_ms=np.int64(kept.through_ms),
        horizons=np.array(feedback.horizons, np.int64),
        losses=feedback.losses[:n_row],
        counts=feedback.counts[:n_row],
        widen=feedback.widen[:n_row],
        fleet_widen=feedback.fleet_widen,
        servers=bytes_of("\n".join(kept.server_names)),
        metrics=bytes_of("\n".join(kept.metrics)),
        version=bytes_of(kept.version or ""),
    )
    files.write_atomic(path, stream.getvalue())


def read_feedback(path: Path, feedback: Feedback) -> KeptFeedback:
    """Fill `feedback` with what `write_feedback` wrote, and return what it belongs to.

    Raises:
        FileNotFoundError: nothing was kept.
        CorruptFile: it is damaged, foreign, or for other horizons or metrics; `feedback` is as before.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            if int(arrays["format"]) != FORMAT:
                raise CorruptFile(path, f"format {int(arrays['format'])}, expected {FORMAT}")
            kept = KeptFeedback(
                lines(arrays["servers"]),
                lines(arrays["metrics"]),
                int(arrays["bin_ms"]),
                arrays["version"].tobytes().decode() or None,
                int(arrays["through_ms"]),
            )
            horizons = tuple(arrays["horizons"].tolist())
            loaded = {name: arrays[name] for name in ("losses", "counts", "widen", "fleet_widen")}
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptFile(path, f"not a file of feedback: {error}") from error
    _check(path, kept, horizons, loaded, feedback)
    for name, array in loaded.items():
        setattr(feedback, name, array)
    return kept


def _check(
    path: Path,
    kept: KeptFeedback,
    horizons: tuple[int, ...],
    loaded: "dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]",
    feedback: Feedback,
) -> None:
    if horizons != feedback.horizons:
        raise CorruptFile(path, f"made for horizons {horizons}, expected {feedback.horizons}")
    for name, array in loaded.items():
        expected = getattr(feedback, name).shape
        if name != "fleet_widen":
            expected = (len(kept.server_names), *expected[1:])
        if array.shape != expected or array.dtype != np.float32 or not np.isfinite(array).all():
            raise CorruptFile(path, f"{name} of shape {array.shape}, expected finite {expected}")
