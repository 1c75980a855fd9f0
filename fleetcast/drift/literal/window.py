"""The drift window: the newest settled forecasts with their actuals, 1,000 rows by default.

Owns: which settled rows are in the window, and the cursor from which the next check reads.
Does not know: how drift is scored; files (its caller gives it `read`).

The window is a function of the stored rows alone. The cursor only bounds the read: it is the
start of the last window, every later window starts there or after, and whatever is missing
(a growing fleet) is read further back. So a restarted process finds the same window exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fleetcast.clock import HOUR_MS
from fleetcast.schema import Codes, Floats, Longs, ReadForecasts, SettledForecasts
from fleetcast.settings import DriftSettings

_FIRST_LOOK_MS = 6 * HOUR_MS
_WIDEN = 4  # each further look back is this much longer


@dataclass(frozen=True, slots=True, eq=False)
class PairWindow:
    """The newest pairs, oldest first; within a bin by server name."""

    server_names: tuple[str, ...] = ()
    servers: Codes = field(default_factory=lambda: np.empty(0, np.int32))  # (pair,) index of the name
    target_ms: Longs = field(default_factory=lambda: np.empty(0, np.int64))  # (pair,) start of the bin
    actuals: Mapping[str, Floats] = field(default_factory=dict)  # metric -> (pair,) NaN = absent
    # horizon -> metric -> (pair,): medians of the version itself, and those that clients got
    forecasts: Mapping[int, Mapping[str, Floats]] = field(default_factory=dict)
    served: Mapping[int, Mapping[str, Floats]] = field(default_factory=dict)
    size: int = 0  # pairs a full window holds
    bin_ms: int = 1
    span_ms: int = 0  # from the first pair of the version (as far back as it matters) to the last

    def __len__(self) -> int:
        return len(self.target_ms)

    @property
    def n_servers(self) -> int:
        """Return how many servers have a pair."""
        return len(np.unique(self.servers))

    @property
    def times_ms(self) -> tuple[int, int]:
        """Return the start of the first pair's bin and the end of the last's; there is a pair."""
        return int(self.target_ms[0]), int(self.target_ms[-1]) + self.bin_ms

    @property
    def one_ahead(self) -> Mapping[str, Floats]:
        """Return the forecasts made one bin ahead, by metric."""
        return self.forecasts.get(1, {})


class DriftWindow:
    """Keeps the window of one version, reading no more than it needs. Not thread safe."""

    def __init__(self, read: ReadForecasts, settings: DriftSettings, bin_ms: int) -> None:
        self._read = read
        self._settings = settings
        self._bin_ms = bin_ms
        self._cursor_ms: int | None = None
        self._key: tuple[str, int] | None = None

    def refresh(self, version: str | None, floor_ms: int, newest_ms: int | None) -> PairWindow:
        """Return the window as the store has it now.

        Args:
            version: the model in service; rows of others, and of the fallback, do not count.
            floor_ms: rows of bins before it are known to the baseline and do not count.
            newest_ms: time of the newest record; no settled bin is later.
        """
        if version is None or newest_ms is None or newest_ms < floor_ms:
            return PairWindow(size=self._settings.window_size, bin_ms=self._bin_ms)
        if self._key != (version, floor_ms):
            self._key, self._cursor_ms = (version, floor_ms), None
        end_ms = newest_ms + self._bin_ms
        start_ms = max(floor_ms, end_ms - _FIRST_LOOK_MS if self._cursor_ms is None else self._cursor_ms)
        while True:
            rows = _of_version(self._read(start_ms, end_ms), version)
            window, needed_from_ms = self._build(rows)
            is_complete = needed_from_ms is not None and start_ms <= needed_from_ms
            if is_complete or start_ms <= floor_ms:
                self._cursor_ms = needed_from_ms if is_complete else start_ms
                return window
            start_ms = max(floor_ms, end_ms - _WIDEN * (end_ms - start_ms))

    def _build(self, rows: SettledForecasts) -> tuple[PairWindow, int | None]:
        """Return the window, and the bin from which rows must have been read for it to be final."""
        is_pair = rows.horizon == 1
        if not is_pair.any():
            return PairWindow(size=self._settings.window_size, bin_ms=self._bin_ms), None
        names = sorted(set(rows.server_name.tolist()))
        code_of = {name: code for code, name in enumerate(names)}
        codes = np.fromiter((code_of[name] for name in rows.server_name), np.int64, len(rows))
        keys = rows.target_ms // self._bin_ms * len(names) + codes
        pairs = np.unique(keys[is_pair])  # by bin, then by server name
        newest_bin = int(pairs[-1]) // len(names)
        recent_from = newest_bin - self._settings.window_bins_per_server + 1
        n_live = len(np.unique(pairs[pairs // len(names) >= recent_from] % len(names)))
        size = max(self._settings.window_size, self._settings.window_bins_per_server * n_live)
        kept = pairs[-size:]
        oldest_bin = int(kept[0]) // len(names)
        served_from = min(oldest_bin, newest_bin - self._bins(self._settings.min_span_s))
        first_bin = int(pairs[np.searchsorted(pairs, served_from * len(names))]) // len(names)
        window = PairWindow(
            server_names=tuple(names),
            servers=(kept % len(names)).astype(np.int32),
            target_ms=kept // len(names) * self._bin_ms,
            actuals=_pivot(rows, keys, kept, is_pair, rows.actual),
            forecasts=_by_horizon(rows, keys, kept, rows.model_p50),
            served=_by_horizon(rows, keys, kept, rows.p50),
            size=size,
            bin_ms=self._bin_ms,
            span_ms=(newest_bin + 1 - first_bin) * self._bin_ms,
        )
        is_full = len(kept) == size
        return window, min(served_from, recent_from) * self._bin_ms if is_full else None

    def _bins(self, seconds: float) -> int:
        return int(np.ceil(seconds * 1000 / self._bin_ms))


def _of_version(rows: SettledForecasts, version: str) -> SettledForecasts:
    mask = np.asarray(rows.model_version == version, bool)
    return rows if mask.all() else rows.where(mask)


def _by_horizon(
    rows: SettledForecasts, keys: Longs, kept: Longs, values: Floats
) -> dict[int, dict[str, Floats]]:
    """Return one column per horizon and metric, aligned with the kept pairs."""
    return {
        int(horizon): columns
        for horizon in np.unique(rows.horizon)
        if (columns := _pivot(rows, keys, kept, rows.horizon == horizon, values))
    }


def _pivot(
    rows: SettledForecasts, keys: Longs, kept: Longs, mask: np.ndarray, values: Floats
) -> dict[str, Floats]:
    """Return one column per metric, aligned with the kept pairs."""
    chosen = np.flatnonzero(mask & (keys >= kept[0]))
    position = np.searchsorted(kept, keys[chosen])
    position = np.minimum(position, len(kept) - 1)
    is_kept = kept[position] == keys[chosen]
    chosen, position = chosen[is_kept], position[is_kept]
    metric_of = rows.metric[chosen]
    columns = {}
    for metric in sorted(set(metric_of.tolist())):
        of_metric = np.asarray(metric_of == metric, bool)
        column = np.full(len(kept), np.nan)
        column[position[of_metric]] = values[chosen[of_metric]]
        columns[metric] = column
    return columns
