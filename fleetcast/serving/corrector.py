"""Feedback in service: settled forecasts in, corrected forecasts out, kept over a restart.

Owns: which rows of `Feedback` belong to which server, and `feedback.npz` in the buffer's folder.
Does not know: how the correction is computed (`forecast/feedback.py`), when bins close, the ledger.

Only forecasts of the version in service teach it. A kill loses what was learned since the last
save, at most a minute. A file that cannot be read is logged, and learning starts afresh: until
there is evidence again, the model's forecasts go out as they are.

`feedback.npz` (format 1): `format`, `bin_ms`, `through_ms` (newest bin that taught), `horizons`, the
arrays of `Feedback` (`losses`, `counts`, `widen`: a row per server; `fleet_widen`), and names as
UTF-8 lines in byte arrays (`servers`, `metrics`, `version`). The zip's own CRC-32 guards every
array; nothing in it is pickled.
"""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetcast import files
from fleetcast.bins import RECENT_BINS
from fleetcast.clock import DAY_MS, monotonic
from fleetcast.errors import CorruptFile
from fleetcast.forecast.encoding import is_percent
from fleetcast.forecast.feedback import Feedback
from fleetcast.forecast.naive import last_known, same_time_yesterday
from fleetcast.schema import Floats, Floats32, HistoryWindow, Longs, SettledForecasts
from fleetcast.serving.history import BinHistory
from fleetcast.serving.ledger import open_npz, pack_lines, unpack_lines

logger = logging.getLogger(__name__)

FILE = "feedback.npz"
FORMAT = 1
SAVE_S = 60.0  # wall time between two saves
_FORGET_AT = 64  # servers not seen any more before their rows are given up

Flags = NDArray[np.bool_]


class Corrector:
    """Corrects the forecasts of the version in service. Not thread safe."""

    def __init__(self, folder: Path, history: BinHistory, horizons: tuple[int, ...]) -> None:
        """Take up what an earlier process learned on the same bins and metrics."""
        self._path = folder / FILE
        self._history = history
        self._horizons = tuple(sorted(set(horizons)))
        self._saved_at = monotonic()
        self._is_changed = False
        self._begin()
        self._load()

    def _begin(self) -> None:
        is_percents = np.array([is_percent(metric) for metric in self._history.metrics], np.bool_)
        self._feedback = Feedback(is_percents, self._horizons)
        self._rows: dict[str, int] = {}
        self._version: str | None = None
        self._through_ms = -DAY_MS  # newest bin that taught

    def note_version(self, version: str) -> None:
        """Trust the evidence less when another version came into service."""
        if self._version not in (None, version):
            self._feedback.doubt_model()
        self._version = version

    def learn(self, rows: SettledForecasts) -> None:
        """Take in what one closed bin settled; a bin that is settled again after a kill is skipped."""
        rows = rows.where(np.asarray(rows.model_version == self._version, np.bool_))
        if self._version is None or not len(rows):
            return
        target_ms = int(rows.target_ms[0])
        if self._through_ms - DAY_MS < target_ms <= self._through_ms:  # further back: the clock stepped
            return
        for knot, horizon in enumerate(self._horizons):
            self._learn_horizon(knot, rows.where(rows.horizon == horizon), target_ms)
        self._through_ms = target_ms
        self._is_changed = True

    def correct(self, part: HistoryWindow, quantiles: Floats32, is_model: Flags) -> None:
        """Correct the model's forecasts of one part of the fleet in place.

        Args:
            quantiles: (server, metric, horizon, quantile)
            is_model: (server, metric) the others stay as they are.
        """
        n_server, n_metric, n_horizon, _ = quantiles.shape
        series = part.values.reshape(n_server * n_metric, -1)
        season = max(1, DAY_MS // part.bin_ms)
        last = last_known(series[:, -RECENT_BINS:]).reshape(n_server, n_metric)
        yesterday = same_time_yesterday(series, season, n_horizon).reshape(n_server, n_metric, n_horizon)
        corrected = self._feedback.apply(self._rows_of(part.server_names), quantiles, last, yesterday)
        quantiles[is_model] = corrected[is_model]

    def save(self, *, at_once: bool = False) -> None:
        """Keep what was learned, about once a minute.

        Raises:
            StorageFull, StorageBroken: the older file stands.
        """
        if not self._is_changed or (not at_once and monotonic() - self._saved_at < SAVE_S):
            return
        self._saved_at = monotonic()
        self._forget_the_gone()
        kept = KeptFeedback(
            tuple(self._rows), self._history.metrics, self._history.bin_ms, self._version, self._through_ms
        )
        self._feedback.reserve(len(self._rows))
        write_feedback(self._path, kept, self._feedback)
        self._is_changed = False

    def _learn_horizon(self, knot: int, rows: SettledForecasts, target_ms: int) -> None:
        if not len(rows):
            return
        horizon, bin_ms = self._horizons[knot], self._history.bin_ms
        names, servers = np.unique(rows.server_name, return_inverse=True)
        column_of = {metric: column for column, metric in enumerate(self._history.metrics)}
        columns = np.fromiter((column_of.get(metric, -1) for metric in rows.metric), np.int64)
        known = columns >= 0
        cells = (servers[known], columns[known])

        def table(values: Floats) -> Floats32:
            whole = np.full((len(names), len(column_of)), np.nan, np.float32)
            whole[cells] = values[known]
            return whole

        asked = names.tolist()
        season = max(1, DAY_MS // bin_ms)
        back = season * -(-horizon // season)
        before = self._history.recent(asked, target_ms - horizon * bin_ms, RECENT_BINS)
        self._feedback.learn(
            knot,
            self._rows_of(asked),
            np.stack([table(rows.p10), table(rows.p50), table(rows.p90)], axis=-1),
            table(rows.model_p50),
            last_known(before.reshape(-1, RECENT_BINS)).reshape(before.shape[:2]),
            self._history.recent(asked, target_ms - back * bin_ms, 1)[..., 0],
            table(rows.actual),
        )

    def _rows_of(self, server_names: Sequence[str]) -> Longs:
        rows = self._rows
        return np.fromiter((rows.setdefault(name, len(rows)) for name in server_names), np.int64)

    def _forget_the_gone(self) -> None:
        """Give up the rows of servers the history no longer knows."""
        gone = set(self._history.unknown(self._rows))
        if len(gone) < _FORGET_AT:
            return
        kept = [(name, row) for name, row in self._rows.items() if name not in gone]
        self._feedback.reserve(len(self._rows))
        self._feedback.keep_rows(np.array([row for _, row in kept], np.int64))
        self._rows = {name: row for row, (name, _) in enumerate(kept)}

    def _load(self) -> None:
        if not self._path.exists():
            return
        try:
            kept = read_feedback(self._path, self._feedback)
            if (kept.metrics, kept.bin_ms) != (self._history.metrics, self._history.bin_ms):
                raise CorruptFile(self._path, "made for other metrics or bins")
        except CorruptFile as error:
            logger.warning("feedback starts afresh: %s", error)
            self._begin()
            return
        self._rows = {name: row for row, name in enumerate(kept.server_names)}
        self._version, self._through_ms = kept.version, kept.through_ms


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
        servers=pack_lines(kept.server_names),
        metrics=pack_lines(kept.metrics),
        version=pack_lines([kept.version or ""]),
    )
    files.write_atomic(path, stream.getvalue())


def read_feedback(path: Path, feedback: Feedback) -> KeptFeedback:
    """Fill `feedback` with what `write_feedback` wrote, and return what it belongs to.

    Raises:
        CorruptFile: it is damaged, foreign, or for other horizons or metrics; `feedback` is as before.
    """
    with open_npz(path, "a file of feedback") as arrays:
        if int(arrays["format"]) != FORMAT:
            raise CorruptFile(path, f"format {int(arrays['format'])}, expected {FORMAT}")
        kept = KeptFeedback(
            unpack_lines(arrays["servers"]),
            unpack_lines(arrays["metrics"]),
            int(arrays["bin_ms"]),
            arrays["version"].tobytes().decode() or None,
            int(arrays["through_ms"]),
        )
        horizons = tuple(arrays["horizons"].tolist())
        loaded = {name: arrays[name] for name in ("losses", "counts", "widen", "fleet_widen")}
    _check_arrays(path, kept, horizons, loaded, feedback)
    for name, array in loaded.items():
        setattr(feedback, name, array)
    return kept


def _check_arrays(
    path: Path,
    kept: KeptFeedback,
    horizons: tuple[int, ...],
    loaded: dict[str, Floats32],
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
