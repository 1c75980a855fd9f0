"""The reference: what unchanged data of every server and metric look like, season by season.

Owns: learning it from some weeks of bins, its file, and bringing single servers of it up to date
without learning the whole fleet again. It lives beside the baseline of a model version. Does not
know: the newest values (`SeasonalDetector`), when to renew it (`renewal`).

File: `reference.npz`, format 3, one array per field of `Reference` (`fleetcast/archive.py`), their
shapes checked against each other when read. Format 2 has no `books.order`: `smoother_24h` is not judged.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fleetcast.archive import check_shapes, pack, unpack
from fleetcast.clock import DAY_MS
from fleetcast.drift.seasonal.learning import DAY_COVERAGE, MIN_DAYS, fit_all, sample, value_ranges
from fleetcast.drift.seasonal.limits import (
    FleetCalibration,
    calibrate,
    growth,
    own_quantiles,
    series_limits,
    shared_growth,
)
from fleetcast.drift.seasonal.quorum import MATURE_DAYS, QuorumRule
from fleetcast.drift.seasonal.season import LAGS_H, N_CODES, N_EDGES, WEEKDAYS, DayClock, Shape
from fleetcast.drift.seasonal.sensors import clean_reference, measurements
from fleetcast.drift.seasonal.settled import FleetGrid
from fleetcast.drift.seasonal.statistics import N_STATISTICS, Books
from fleetcast.errors import BadData, CorruptFile
from fleetcast.files import write_atomic
from fleetcast.schema import Floats, Floats32, Longs

logger = logging.getLogger(__name__)

FORMAT = 3
_ROW_ARRAYS = ("pull", "n_days", "start_days", "still_limits", "limits")  # a row for each series
RANGE_FLOOR = 0.02  # of the metric's usual range in this fleet


@dataclass(frozen=True)
class ReferenceOptions:
    """What a fleet wishes of its reference."""

    timezone: str = "UTC"
    rule: QuorumRule = field(default_factory=QuorumRule)
    false_alarms_per_month: float = 1.0  # how often an unchanged fleet may call for a training
    min_days: int = MIN_DAYS  # a series needs to be judged


@dataclass(frozen=True, eq=False, kw_only=True)
class Reference:
    """Rhythm, spread and limits of every series; series run server by server.

    Guarantees: every limit of a compared series is finite and > 0, or NaN where that statistic
    cannot be judged (no forecast errors known).
    """

    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    bin_ms: int
    timezone: str
    start_ms: int
    end_ms: int  # end of the newest bin
    shape: Shape
    books: Books
    pull: Floats32  # (series,)
    n_days: Longs  # (series,) days behind it
    start_days: Longs  # (series,) first day used: later than 0 where an older regime was cut away
    still_limits: Longs  # (series,) equal bins in a row that mean a frozen sensor
    limits: Floats32  # (series, statistic)
    shared_growth: Floats32  # (statistic,)
    fleet: FleetCalibration

    @property
    def clock(self) -> DayClock:
        """Return how bins fall on the local day."""
        return DayClock(self.bin_ms, self.timezone)

    @property
    def n_series(self) -> int:
        """Return the number of (server, metric) pairs."""
        return len(self.server_names) * len(self.metrics)

    @property
    def is_compared(self) -> NDArray[np.bool_]:
        """Return which series (series,) have days enough to be judged."""
        return np.asarray(np.isfinite(self.limits).any(axis=1))

    def changed_ms(self) -> Floats:
        """Return (server, metric): the midnight before which a series was another, NaN = never."""
        days = self.start_days.reshape(len(self.server_names), -1)
        return self.clock.starts_ms(days, self.start_ms)

    def enough_days_ms(self, min_days: int, now_ms: int) -> Floats:
        """Return (series,): the midnight from which a series will have days enough to be judged.

        NaN where it has them, and where its server never sent that metric. The series has to report on.
        Learning young servers again is due at the first check after a midnight; while the fleet drifts
        nothing is learned, and the next midnight holds.

        Args:
            now_ms: end of the newest bin.
        """
        clock = self.clock
        today = (clock.midnight(self.end_ms) - clock.midnight(self.start_ms)) // DAY_MS
        is_today_known = self.end_ms - clock.midnight(self.end_ms) >= DAY_COVERAGE * DAY_MS
        whole = self.n_days - (is_today_known & (self.n_days > 0))  # days before that of the newest bin
        missing = np.maximum(self.start_days, today) + np.maximum(min_days - whole, 0)
        at_ms = clock.midnight(self.start_ms) + missing * float(DAY_MS)
        at_ms = np.maximum(at_ms, clock.midnight(now_ms) + DAY_MS)
        is_known = (self.n_days > 0) | (self.start_days > 0)
        has_server = np.repeat(is_known.reshape(len(self.server_names), -1).any(axis=1), len(self.metrics))
        never_sent = ~is_known & has_server
        return np.asarray(np.where((self.n_days >= min_days) | never_sent, np.nan, at_ms))

    @classmethod
    def fit(
        cls, grid: FleetGrid, options: ReferenceOptions | None = None, changed_ms: Floats | None = None
    ) -> Self:
        """Learn a reference; three weeks are good, three days the least (with wider limits until five).

        Args:
            grid: bin means; errors are those of the models that were in service.
            changed_ms: (server, metric) when a series is known to have changed, NaN = never;
                what came before does not count.
        Raises:
            BadData: shapes that do not fit each other.
        """
        options = options or ReferenceOptions()
        values, errors = _check_grid(grid)
        clock, n_bins, n_metrics = DayClock(grid.bin_ms, options.timezone), values.shape[2], len(grid.metrics)
        if changed_ms is not None:
            starts = grid.start_ms + np.arange(n_bins, dtype=np.int64) * grid.bin_ms
            values = np.where(starts < np.nan_to_num(changed_ms, nan=-np.inf)[..., None], np.nan, values)
        cleaned, still_limits = clean_reference(values, clock.bins_per_day)
        flat = cleaned.reshape(-1, n_bins)
        local_bins = clock.local_bins(grid.start_ms, n_bins)
        floors = _range_floors(flat, n_metrics)
        chunks = fit_all(flat, errors.reshape(flat.shape), local_bins, floors, clock)
        shared = shared_growth(np.concatenate([growth(part.left_out, part.folds) for part in chunks]))
        own = np.concatenate([own_quantiles(part.left_out) for part in chunks])
        n_days = np.concatenate([part.n_days for part in chunks])
        limits = series_limits(own, shared, n_days)
        limits[n_days < options.min_days] = np.nan
        rule, rate = options.rule, options.false_alarms_per_month
        return cls(
            server_names=grid.server_names,
            metrics=grid.metrics,
            bin_ms=grid.bin_ms,
            timezone=options.timezone,
            start_ms=grid.start_ms,
            end_ms=grid.end_ms,
            shape=Shape.stack([part.shape for part in chunks]),
            books=Books.stack([part.books for part in chunks]),
            pull=np.concatenate([part.pull for part in chunks]),
            n_days=n_days,
            start_days=np.concatenate([part.start_days for part in chunks]),
            still_limits=still_limits,
            limits=limits,
            shared_growth=shared,
            fleet=calibrate(*sample(chunks, n_metrics), limits, n_metrics, rule, rate, n_days),
        )

    def servers(self, places: Sequence[int]) -> Self:
        """Return the same of some servers, in this order; the fleet's calibration stays."""
        n_metrics = len(self.metrics)
        rows = (np.array(places, np.int64)[:, None] * n_metrics + np.arange(n_metrics)).ravel()
        return replace(
            self,
            server_names=tuple(self.server_names[place] for place in places),
            shape=self.shape.rows(rows),
            books=self.books.rows(rows),
            **{name: getattr(self, name)[rows] for name in _ROW_ARRAYS},
        )

    def without(self, forgotten: Mapping[str, int]) -> Self:
        """Return the same without servers that people wanted forgotten since it was learned (ms, by name)."""
        kept = [
            place for place, name in enumerate(self.server_names) if forgotten.get(name, 0) <= self.end_ms
        ]
        return self if len(kept) == len(self.server_names) else self.servers(kept)

    def to_bytes(self) -> bytes:
        """Return the content of a reference file."""
        return pack(self, FORMAT)

    def save(self, path: Path) -> None:
        """Write the file in one durable step."""
        write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a reference file.

        Raises:
            FileNotFoundError: there is none.
            UnknownFormat: another format version wrote it.
            CorruptFile: it is not a reference.
        """
        loaded = unpack(path, cls, "reference", FORMAT, {2: _add_order})
        try:
            _check_rows(path, loaded)
        except (AttributeError, TypeError, ValueError, IndexError, BadData) as error:
            raise CorruptFile(path, f"reference field of the wrong kind: {error}") from error
        return loaded


def _add_order(arrays: dict[str, Any]) -> None:
    arrays["books.order"] = np.full_like(arrays["books.log_size"], np.nan)
    logger.info("drift reference of format 2: smoother_24h is not judged until it is learned again")


def _check_grid(grid: FleetGrid) -> tuple[Floats32, Floats32]:
    values, n_servers, n_metrics = grid.values, len(grid.server_names), len(grid.metrics)
    if values.ndim != 3 or values.shape[:2] != (n_servers, n_metrics) or 0 in values.shape:
        expected = f"({n_servers}, {n_metrics}, bins)"
        raise BadData(f"grid must be (server, metric, bin) {expected}, none of them 0, got {values.shape}")
    if grid.errors.shape != values.shape:
        raise BadData(f"errors must have the grid's shape {values.shape}, got {grid.errors.shape}")
    return measurements(values), measurements(grid.errors)


def _range_floors(flat: Floats32, n_metrics: int) -> Floats32:
    """Return (series,): the smallest range worth measuring by, from the same metric elsewhere."""
    ranges, lows, highs = value_ranges(flat)
    size = np.fmax(np.abs(lows), np.abs(highs))
    by_metric = ranges.reshape(-1, n_metrics)
    moving = np.where(by_metric > 0, by_metric, np.nan)
    usual = np.array([np.nanmedian(column) if np.isfinite(column).any() else 0.0 for column in moving.T])
    floors = np.fmax(RANGE_FLOOR * np.tile(usual, len(by_metric)), 1e-6 * np.nan_to_num(size))
    return np.asarray(np.maximum(floors, 1e-30), np.float32)


def immature_servers(reference: Reference, live: tuple[str, ...]) -> tuple[str, ...]:
    """Return the live servers that are unknown to a reference or have few days behind them.

    A metric that a server never sent in those days does not count.
    """
    n_metrics = len(reference.metrics)
    days = reference.n_days.reshape(-1, n_metrics)
    young = ((days > 0) & (days < MATURE_DAYS)).any(axis=1) | (days == 0).all(axis=1)
    known = dict(zip(reference.server_names, young.tolist(), strict=True))
    return tuple(name for name in live if known.get(name, True))


def servers_without_errors(reference: Reference) -> tuple[str, ...]:
    """Return the servers of which a judged series' usual forecast errors are unknown."""
    unknown = reference.is_compared & np.isnan(reference.books.errors.edges[:, 0])
    rows = np.flatnonzero(unknown.reshape(len(reference.server_names), -1).any(axis=1))
    return tuple(reference.server_names[row] for row in rows)


def merge(old: Reference, newer: Reference) -> Reference:
    """Return `old` with the servers of `newer` in place of its own, new ones behind.

    The fleet's calibration stays that of `old`.

    Raises:
        BadData: other metrics, bins or time zone.
    """
    for name in ("metrics", "bin_ms", "timezone"):
        if getattr(old, name) != getattr(newer, name):
            raise BadData(f"{name} differ: {getattr(old, name)} and {getattr(newer, name)}")
    place = {server: row for row, server in enumerate(old.server_names)}
    place |= {server: len(old.server_names) + row for row, server in enumerate(newer.server_names)}
    start_ms = min(old.start_ms, newer.start_ms)
    starts = [item.start_days + (item.start_ms - start_ms) // DAY_MS for item in (old, newer)]
    both = replace(
        old,
        server_names=(*old.server_names, *newer.server_names),
        start_ms=start_ms,
        end_ms=max(old.end_ms, newer.end_ms),
        shape=Shape.stack([old.shape, newer.shape]),
        books=Books.stack([old.books, newer.books]),
        pull=np.concatenate([old.pull, newer.pull]),
        n_days=np.concatenate([old.n_days, newer.n_days]),
        start_days=np.concatenate(starts),
        still_limits=np.concatenate([old.still_limits, newer.still_limits]),
        limits=np.concatenate([old.limits, newer.limits]),
    )
    return both.servers(list(place.values()))


def _check_rows(path: Path, loaded: Reference) -> None:
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
        (books, ("log_size", "rhythm_power", "rhythm_noise", "order")),
        (loaded, ("pull", "n_days", "start_days", "still_limits")),
    ):
        expected += [(name, getattr(owner, name), (n_series,)) for name in names]
    check_shapes(path, expected)
    if n_weekly and int(loaded.shape.weekly_rows.max()) >= n_weekly:
        raise CorruptFile(path, "shape.weekly_rows points past the weekday profiles")
    if books.tails.size and not (books.tails.min() >= 0 and books.tails.max() < N_CODES):
        raise CorruptFile(path, f"books.tails must be within 0..{N_CODES - 1}")
