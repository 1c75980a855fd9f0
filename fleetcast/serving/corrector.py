"""The expert layer in service: closed bins teach it, sweeps ask it, a restart does not forget it.

Owns: which rows of the layer belong to which server, and `feedback.npz` in the buffer's folder.
Does not know: how forecasts are mixed (`forecast/experts/`), when bins close, the ledger.

A kill loses what was learned since the last save, at most a minute, and which forecasts were open:
those teach nothing. A file that cannot be read is logged, and learning starts afresh.

`feedback.npz` (format 5): `format`, `bin_ms`, `through_ms` (newest bin that taught), `horizons`, the arrays
of `Mixture` (`losses`, `counts`, `last_losses`, `widen`, `misses`, `trend_sums`, `apart`, `lately`: a row per
server; `fleet_widen`), after a clean stop the open forecasts (`pending_*`), and names as UTF-8 lines in byte
arrays (`servers`, `metrics`, `version`). Up to format 4 the fleet's part of a factor counted in full: what no
longer counts of it is taken over into the series' own. Format 3 had no `lately` and other open forecasts.
Format 2 knew one state of a series, where it usually is: its arrays are taken over for that state, open
forecasts are not. Of format 1, written before there were experts, only the widths of intervals are. The zip's
own CRC-32 guards every array; nothing is pickled.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fleetcast import files
from fleetcast.archive import open_arrays
from fleetcast.clock import DAY_MS, monotonic
from fleetcast.errors import CorruptFile
from fleetcast.forecast.encoding import is_percent
from fleetcast.forecast.experts.layer import ExpertLayer
from fleetcast.forecast.experts.mixture import Mixture
from fleetcast.forecast.experts.rules import RuleForecasts
from fleetcast.schema import ClosedBin, Floats32, HistoryWindow, Longs
from fleetcast.serving.history import BinHistory
from fleetcast.serving.ledger import pack_lines, unpack_lines

logger = logging.getLogger(__name__)

FILE = "feedback.npz"
FORMAT = 5
SAVE_S = 60.0  # wall time between two saves
_FORGET_AT = 64  # servers not seen any more before their rows are given up
# what older formats have in common with ours, by format
_SHARED = {
    1: ("widen", "fleet_widen"),
    2: ("losses", "counts", "last_losses", "widen", "trend_sums", "fleet_widen"),
    3: (*(name for name in Mixture.ROW_ARRAYS if name != "lately"), "fleet_widen"),
    4: (*Mixture.ROW_ARRAYS, "fleet_widen"),
    FORMAT: (*Mixture.ROW_ARRAYS, "fleet_widen"),
}

Arrays = Mapping[str, NDArray[Any]]


class Corrector:
    """Turns the forecasts of the version in service into what clients get. Not thread safe."""

    def __init__(
        self, folder: Path, history: BinHistory, horizons: tuple[int, ...], file: str = FILE
    ) -> None:
        """Take up what an earlier process learned on the same bins and metrics."""
        self._path = folder / file
        self._history = history
        self._horizons = tuple(sorted(set(horizons)))
        self._saved_at = monotonic()
        self._is_changed = self._is_unforgotten = False
        self._begin()
        self._take_up()

    def _begin(self) -> None:
        is_percents = np.array([is_percent(metric) for metric in self._history.metrics], np.bool_)
        self._layer = ExpertLayer(is_percents, self._horizons)
        self._rows: dict[str, int] = {}
        self._version: str | None = None
        self._through_ms = -DAY_MS  # newest bin learned from

    @property
    def version(self) -> str | None:
        """Return the version that what is known about the model is of."""
        return self._version

    def beside(self, file: str) -> "Corrector":
        """Return what an earlier process kept in another file."""
        return Corrector(self._path.parent, self._history, self._horizons, file)

    def fork(self, server_names: Sequence[str], file: str) -> "Corrector":
        """Return another one, kept in another file, that knows of some servers what this one does."""
        files.remove_leftover(self._path.parent / file)
        other = Corrector(self._path.parent, self._history, self._horizons, file)
        other._layer = self._layer.copy_of(self._rows_of(server_names))
        other._rows = {name: row for row, name in enumerate(server_names)}
        other._version, other._through_ms, other._is_changed = self._version, self._through_ms, True
        return other

    def take_model_evidence(self, other: "Corrector") -> None:
        """Know of the model what another one learned of it: it comes back into service."""
        names = [name for name in other._rows if name in self._rows]
        self._layer.take_model_evidence(self._rows_of(names), other._layer, other._rows_of(names))
        self._is_changed = True

    def forget_file(self) -> None:
        """Remove what is kept; nothing is saved any more."""
        self._is_changed = False
        files.remove_leftover(self._path)

    def note_version(self, version: str | None) -> None:
        """Note which model forecasts; what is known of the one before counts for it, too.

        A version that the gate let through resembles the one before (docs/decisions/expert-layer.md), and one
        that does not is taken back.
        """
        self._version = version

    def learn(self, closed: ClosedBin) -> None:
        """Take in a closed bin; one that closes again after a kill is skipped."""
        if self._through_ms - DAY_MS < closed.bin_ms <= self._through_ms:  # further back: the clock stepped
            return
        columns = [closed.metrics.index(name) if name in closed.metrics else -1 for name in self._metrics]
        actual = closed.values[:, columns].astype(np.float32)
        actual[:, [column < 0 for column in columns]] = np.nan
        number = closed.bin_ms // self._history.bin_ms
        self._layer.settle(number, self._rows_of(closed.server_names), actual)
        self._through_ms = closed.bin_ms
        self._is_changed = True

    def mix(
        self, part: HistoryWindow, quantiles: Floats32, experts: RuleForecasts, leads: Longs | None = None
    ) -> None:
        """Mix the model's (or the naive) forecasts of one part of the fleet with the experts', in place.

        Args:
            quantiles: (server, metric, horizon, quantile), NaN = none.
            experts: what the rules say of the same servers and bins ahead.
            leads: these bins ahead; None: every one.
        """
        origin = part.end_bin_ms // part.bin_ms
        served = self._layer.serve(self._rows_of(part.server_names), origin, experts, quantiles, leads)
        is_served = np.isfinite(served).all(axis=(2, 3)) & np.isfinite(quantiles).all(axis=(2, 3))
        quantiles[is_served] = served[is_served]

    def save(self, *, at_once: bool = False) -> None:
        """Keep what was learned, about once a minute.

        Args:
            at_once: the daemon stops: keep what is open, too.
        Raises:
            StorageFull, StorageBroken: the older file stands.
        """
        if not self._is_changed or (not at_once and monotonic() - self._saved_at < SAVE_S):
            return
        self._saved_at = monotonic()
        self._forget_the_gone()
        kept = _Kept(tuple(self._rows), self._metrics, self._history.bin_ms, self._version, self._through_ms)
        mixture = self._layer.mixture
        mixture.reserve(len(self._rows))
        arrays = {name: getattr(mixture, name)[: len(self._rows)] for name in Mixture.ROW_ARRAYS}
        arrays["fleet_widen"] = mixture.fleet_widen
        arrays |= self._layer.pending_arrays() if at_once else {}
        files.write_atomic(self._path, partial(_write, kept, self._horizons, arrays))
        self._is_changed = False

    @property
    def _metrics(self) -> tuple[str, ...]:
        return self._history.metrics

    def _rows_of(self, server_names: Sequence[str]) -> Longs:
        rows = self._rows
        return np.fromiter((rows.setdefault(name, len(rows)) for name in server_names), np.int64)

    def _forget_the_gone(self) -> None:
        """Give up the rows of servers that the history no longer knows."""
        gone = set(self._history.unknown(self._rows))
        if len(gone) >= _FORGET_AT:
            self._give_up(gone)

    def forget(self, servers: Collection[str]) -> None:
        """Forget what forecasts of some servers taught, on disk as well.

        Raises:
            StorageFull, StorageBroken: the older file stands; call it again.
        """
        if any(name in self._rows for name in servers):
            self._give_up(servers)
            self._is_changed = self._is_unforgotten = True
        if self._is_unforgotten:
            self._saved_at = float("-inf")
            self.save()
            self._is_unforgotten = False

    def _give_up(self, gone: Collection[str]) -> None:
        kept = [(name, row) for name, row in self._rows.items() if name not in gone]
        self._layer.mixture.reserve(len(self._rows))
        self._layer.keep_rows(np.array([row for _, row in kept], np.int64))
        self._rows = {name: row for row, (name, _) in enumerate(kept)}

    def _take_up(self) -> None:
        try:
            kept, arrays = _unpack(self._path)
            if (kept.metrics, kept.bin_ms) != (self._metrics, self._history.bin_ms):
                raise CorruptFile(self._path, "made for other metrics or bins")
            self._fill(kept, arrays)
        except FileNotFoundError:
            return
        except CorruptFile as error:
            logger.warning("feedback starts afresh: %s", error)
            self._begin()
            return
        self._rows = {name: row for row, name in enumerate(kept.server_names)}
        self._version, self._through_ms = kept.version, kept.through_ms

    def _fill(self, kept: "_Kept", arrays: Arrays) -> None:
        """Give the layer the arrays of a file, checked."""
        mixture, n_row = self._layer.mixture, len(kept.server_names)
        if tuple(arrays["horizons"].tolist()) != self._horizons:
            raise CorruptFile(self._path, f"made for horizons {arrays['horizons'].tolist()}")
        found_format = int(arrays["format"])
        if found_format < FORMAT:
            names = ", ".join(_SHARED[found_format])
            logger.info("feedback of format %d: taken over is %s, the rest begins anew", found_format, names)
        mixture.reserve(n_row)
        for name in _SHARED[found_format]:
            own, found = getattr(mixture, name), arrays.get(name)
            if found_format < FORMAT and found is not None:
                found = _with_states(found, own.ndim)
            shape = own.shape if name == "fleet_widen" else (n_row, *own.shape[1:])
            if found is None or found.shape != shape or found.dtype != own.dtype:
                raise CorruptFile(self._path, f"{name} is not {own.dtype} of shape {shape}")
            if not np.isfinite(found).all():
                raise CorruptFile(self._path, f"{name} is not finite")
            if name == "fleet_widen":
                mixture.fleet_widen = found
            else:
                own[:n_row] = found
        if found_format < FORMAT:
            mixture.take_over_fleet_part()
        self._layer.restore_pending(arrays)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the arrays of a file belong to."""

    server_names: tuple[str, ...]  # by row
    metrics: tuple[str, ...]
    bin_ms: int
    version: str | None
    through_ms: int


def _with_states(found: NDArray[Any], n_dims: int) -> NDArray[Any]:
    """Return an array of format 1 or 2 as the first of two states, the second empty."""
    if found.ndim != n_dims - 1 or found.ndim < 3:
        return found
    return np.stack([found, np.zeros_like(found)], axis=-3)


def _write(kept: _Kept, horizons: tuple[int, ...], arrays: Arrays, stream: BinaryIO) -> None:
    np.savez(
        stream,
        allow_pickle=False,
        format=np.int64(FORMAT),
        bin_ms=np.int64(kept.bin_ms),
        through_ms=np.int64(kept.through_ms),
        horizons=np.array(horizons, np.int64),
        servers=pack_lines(kept.server_names),
        metrics=pack_lines(kept.metrics),
        version=pack_lines([kept.version or ""]),
        **arrays,
    )


def _unpack(path: Path) -> tuple[_Kept, dict[str, NDArray[Any]]]:
    """Return what a file holds.

    Raises:
        CorruptFile: the file is damaged or foreign.
    """
    with open_arrays(path, "a file of feedback") as archive:
        arrays = {name: archive[name] for name in archive.files}
        if int(arrays["format"]) not in _SHARED:
            raise CorruptFile(path, f"format {int(arrays['format'])}, expected {FORMAT}")
        kept = _Kept(
            unpack_lines(arrays["servers"]),
            unpack_lines(arrays["metrics"]),
            int(arrays["bin_ms"]),
            arrays["version"].tobytes().decode() or None,
            int(arrays["through_ms"]),
        )
        arrays["horizons"].tolist()
    return kept, arrays
