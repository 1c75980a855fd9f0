"""Which disks are full by when: what `GET /capacity/dates` says, days and weeks ahead.

Owns: the highest 5-minute mean of each server, metric and day, read from the stored days a little at a
time, newest first; which metrics count (those in percent, `disk_usage_pct` first, not CPU). Does not know:
what a trend is (`capacity/dates.py`), HTTP. Nothing is kept on disk: after a restart the days are read again.

`step` belongs to the daemon's main thread and reads one piece of a day; answers are safe from any thread.

`Soonest` is what `/metrics` says of it: one look at every server a day, a slice of time at a time. How near a
date is, is asked at each scrape, as the retraining daemon's alert asks it: from now to the early date.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fleetcast.capacity import dates
from fleetcast.clock import DAY_MS, HOUR_MS, Clock, from_ms, iso_z, monotonic, parse_plain_utc, to_ms
from fleetcast.forecast.encoding import is_percent
from fleetcast.schema import Floats, Floats32, Longs, RecordBatch
from fleetcast.serving.past import BadQuestion
from fleetcast.serving.roster import Fleet
from fleetcast.storage.store import DataBuffer

DAYS = 60
FIRST_METRIC = "disk_usage_pct"
DEFAULT_LIMIT = 95.0
_MOST_METRICS = 8
_RIPE_MS = HOUR_MS  # after midnight, records of the day before still come
WITHIN_DAYS = (7, 30)  # the first as in the retraining daemon's alert DiskFullSoon
MOST_NAMED = 100  # servers of a metric, whatever server.max_server_labels allows: they change every day
_SLICE_S = 0.05  # of the main thread, once a cycle: sweeps must not wait
_DAY_S = DAY_MS / 1000
_RETRY_S = 60.0  # after a look that failed


@dataclass(frozen=True, slots=True, eq=False)
class _Day:
    """One day's maxima."""

    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    values: Floats32  # (server, metric)


@dataclass(frozen=True)
class DatesQuestion:
    """Which disks are asked for."""

    metric: str = FIRST_METRIC
    limit: float = DEFAULT_LIMIT
    server: str = ""
    n_rows: int = 100


class Fullness:
    """Reads days, and answers by when a limit is reached."""

    def __init__(self, fleet: Fleet, buffer: DataBuffer) -> None:
        """Know nothing yet."""
        self._fleet = fleet
        self._buffer = buffer
        self._days: dict[int, _Day] = {}  # by days since 1970; replaced, never changed
        self._reading: Iterator[None] | None = None
        self._newest_day = self._begun_day = -1  # when everything was read last, and begun to be read
        self._lock = threading.Lock()
        self._ratios: dict[str, tuple[tuple[int, int], dates.Ratios]] = {}  # by metric, of which days

    def clear(self) -> None:
        """Forget every day, to read them again; on the thread of `step`."""
        self._days, self._reading, self._newest_day, self._begun_day = {}, None, -1, -1

    def step(self) -> None:
        """Read one piece of the newest day that is not known yet; do nothing where all are."""
        if self._reading is None:
            newest = self._last_whole_day()
            if newest == self._newest_day:
                return
            self._pass_over_days_without_records(newest)
            wanted = [day for day in range(newest, newest - DAYS, -1) if day not in self._days]
            if not wanted:
                self._newest_day = newest
                self._days = {day: one for day, one in self._days.items() if day > newest - DAYS}
                return
            self._reading = self._read(wanted[0])
        try:
            next(self._reading)
        except StopIteration:
            self._reading = None
        except BaseException:
            self._reading = None
            raise

    def answer(self, asked: DatesQuestion) -> dict[str, Any]:
        """Return each server's outlook, the earliest date first; then those without a date, by name.

        Raises:
            BadQuestion: with what would be right.
        """
        if asked.metric not in self.metrics():
            known = ", ".join(self.metrics()) or "none yet"
            raise BadQuestion(f"no day of {asked.metric[:80]!r} is known", hint=f"known: {known}")
        if not 0.0 < asked.limit <= 100.0:
            raise BadQuestion(f"limit must be over 0 and at most 100, got {asked.limit:g}")
        days = self._days  # one reference: the reader replaces it
        newest = max(days)
        names, maxima = _matrix(days, asked.metric, newest)
        ratios = self._compare(asked.metric, days, maxima)
        rows = [
            self._row(name, dates.look_ahead(series, asked.limit, ratios), newest)
            for name, series in zip(names, maxima, strict=True)
            if not asked.server or name == asked.server
        ]
        rows.sort(key=_rank)
        return {
            "metric": asked.metric,
            "limit": asked.limit,
            "days": sum(1 for day in days.values() if asked.metric in day.metrics),
            "newest_day": iso_z(from_ms(newest * DAY_MS)),
            "comparisons": len(ratios.values),
            "matching": len(rows),
            "with_date": sum(row["full_between"] is not None for row in rows),
            "rows": rows[: asked.n_rows],
        }

    @property
    def is_known(self) -> bool:
        """Return whether all days were read once and since then only new ones were added."""
        return self._newest_day >= 0

    def whole_days(self) -> object | None:
        """Return what changes when a day was added, None while days are still to be read."""
        is_whole = self._newest_day >= 0 and self._newest_day == self._last_whole_day()
        return self._days if is_whole else None

    def rows(self, metric: str) -> Iterator[dict[str, Any] | None]:
        """Yield the outlooks for the default limit, by name; None first, while the past is compared."""
        days = self._days
        newest = max(days)
        names, maxima = _matrix(days, metric, newest)
        made_of = (newest, len(days))
        found: list[dates.Judged] = []
        for series in dates.choose(maxima):
            found += dates.judge(series)
            yield None
        ratios = dates.gather(found)
        with self._lock:
            self._ratios[metric] = (made_of, ratios)
        for name, series in zip(names, maxima, strict=True):
            yield self._row(name, dates.look_ahead(series, DEFAULT_LIMIT, ratios), newest)

    def metrics(self) -> list[str]:
        """Return the metrics that any day holds, by name."""
        return sorted({metric for day in self._days.values() for metric in day.metrics})

    def _last_whole_day(self) -> int:
        return (to_ms(self._fleet.clock.now()) - _RIPE_MS) // DAY_MS - 1

    def _wanted_metrics(self) -> tuple[str, ...]:
        names = (name for name in self._fleet.roster.metric_names() if is_percent(name))
        others = sorted(name for name in names if not name.startswith("cpu") and name != FIRST_METRIC)
        return (FIRST_METRIC, *others[: _MOST_METRICS - 1])

    def _pass_over_days_without_records(self, newest: int) -> None:
        """Count the days before the oldest record as read, once a round: each read decodes the whole log."""
        if newest == self._begun_day:
            return
        self._begun_day = newest
        oldest = self._buffer.oldest_record_time()
        first = newest + 1 if oldest is None else to_ms(oldest) // DAY_MS
        nothing = _Day((), (), np.empty((0, 0), np.float32))
        absent = range(newest - DAYS + 1, min(first, newest + 1))
        self._days = dict.fromkeys((day for day in absent if day not in self._days), nothing) | self._days

    def _read(self, day: int) -> Iterator[None]:
        """Read a day piece by piece; one that cannot be read counts as empty, and is noted once."""
        metrics = self._wanted_metrics()
        tops: dict[str, Floats] = {}
        try:
            bin_ms = self._fleet.history.bin_ms
            for batch in self._buffer.iter_bins(day * DAY_MS, (day + 1) * DAY_MS, bin_ms, metrics):
                for name, top in _tops(batch, metrics):
                    tops[name] = np.fmax(tops.get(name, np.full(len(metrics), np.nan)), top)
                yield
        finally:
            values = np.array(list(tops.values()), np.float32).reshape(-1, len(metrics))
            used = [column for column in range(len(metrics)) if np.isfinite(values[:, column]).any()]
            one = _Day(tuple(tops), tuple(metrics[column] for column in used), values[:, used])
            self._days = {**self._days, day: one}

    def _compare(self, metric: str, days: dict[int, _Day], maxima: Sequence[Floats]) -> dates.Ratios:
        """Return the fleet's comparisons, made once for the same days."""
        made_of = (max(days), len(days))
        with self._lock:
            if metric not in self._ratios or self._ratios[metric][0] != made_of:
                self._ratios[metric] = (made_of, dates.compare(maxima))
            return self._ratios[metric][1]

    def _row(self, name: str, found: dates.Outlook, newest: int) -> dict[str, Any]:
        day = partial(_date, newest)
        early, late = found.early_days, found.late_days
        between = None if early is None or late is None else [day(early, up=False), day(late, up=True)]
        return {
            "server": name,
            "now": _round(found.now, 2),
            "per_day": _round(found.slope, 3),
            "basis_days": found.days,
            "full_between": between,
            "p_within": _round(found.p_within, 3),
            "within_days": found.within_days or None,
            "why_no_date": found.why_not or None,
        }


@dataclass(frozen=True, slots=True)
class DatesAhead:
    """The dates of one metric, in seconds since 1970; the earliest first."""

    early: tuple[tuple[float, str], ...]  # time and server
    late: dict[str, float]  # by server
    n_full: int  # servers that were at the limit on the newest day


@dataclass(frozen=True)
class FullnessGauges:
    """What a scrape reads; the labels are bounded."""

    within: dict[tuple[str, int], int]  # by metric and days
    full: dict[str, int]  # by metric
    earliest: dict[str, float]  # by metric that has a date
    early: dict[tuple[str, str], float]  # by server and metric
    late: dict[tuple[str, str], float]


class Soonest:
    """Looks once a day; `step` belongs to the thread of `Fullness.step`, `gauges` is safe from any."""

    def __init__(self, fullness: Fullness, clock: Clock) -> None:
        """Know nothing yet."""
        self._fullness = fullness
        self._clock = clock
        self._waits_until = float("-inf")  # after a failure
        self._looking: Iterator[None] | None = None
        self._begun: object | None = None
        self._known: dict[str, DatesAhead] | None = None

    def step(self) -> None:
        """Look on for a slice of time; do nothing where days are still to be read, or nothing is new."""
        whole = self._fullness.whole_days()
        if whole is None:
            if not self._fullness.is_known:
                self._known, self._begun, self._looking = None, None, None
            return
        if monotonic() < self._waits_until:
            return
        if whole is not self._begun:
            self._begun, self._looking = whole, self._look()
        ends_at = monotonic() + _SLICE_S
        while self._looking is not None and monotonic() < ends_at:
            try:
                next(self._looking)
            except StopIteration:
                self._looking = None
            except BaseException:
                self._begun, self._looking = None, None
                self._waits_until = monotonic() + _RETRY_S
                raise

    def _look(self) -> Iterator[None]:
        """Ask for every server's dates, one after the other, and publish them at the end."""
        known = {}
        for metric in self._fullness.metrics():
            early, late, n_full = [], {}, 0
            for row in self._fullness.rows(metric):
                if row is None:
                    yield
                    continue
                n_full += row["why_no_date"] == dates.OVER
                if row["full_between"]:
                    first, last = (parse_plain_utc(day).timestamp() for day in row["full_between"])
                    early.append((first, row["server"]))
                    late[row["server"]] = last
                yield
            known[metric] = DatesAhead(tuple(sorted(early)), late, n_full)
        self._known = known

    def gauges(self, most_named: int) -> FullnessGauges | None:
        """Return what a scrape says now, None before every day was read and looked at.

        Args:
            most_named: servers of a metric that get a label of their own, at most `MOST_NAMED`.
        """
        known = self._known
        if known is None:
            return None
        now_s = self._clock.now().timestamp()
        told = FullnessGauges({}, {}, {}, {}, {})
        for metric, ahead in known.items():
            times = np.array([at for at, _server in ahead.early])
            for days in WITHIN_DAYS:
                told.within[metric, days] = int(np.searchsorted(times, now_s + days * _DAY_S))
            told.full[metric] = ahead.n_full
            if ahead.early:
                told.earliest[metric] = ahead.early[0][0]
            for at, server in ahead.early[: min(most_named, MOST_NAMED)]:
                told.early[server, metric] = at
                told.late[server, metric] = ahead.late[server]
        return told


def _tops(batch: RecordBatch, metrics: Sequence[str]) -> Iterator[tuple[str, Floats]]:
    """Yield each server's highest mean of a bin, by metric; a server's means stand together."""
    absent = np.full(len(batch), np.nan)
    means = np.array([batch.metrics.get(metric, absent) for metric in metrics]).T
    codes = batch.server_codes
    starts = np.flatnonzero(np.append(True, codes[1:] != codes[:-1]))
    for code, top in zip(codes[starts].tolist(), np.fmax.reduceat(means, starts), strict=True):
        yield batch.server_names[code], top


def _matrix(days: dict[int, _Day], metric: str, newest: int) -> tuple[list[str], list[Floats]]:
    """Return the servers by name, and of each the maxima of the days up to the newest; NaN = none."""
    held = {day: one for day, one in days.items() if metric in one.metrics}
    oldest = min(held, default=newest)
    names = sorted({name for one in held.values() for name in one.server_names})
    row_of = {name: row for row, name in enumerate(names)}
    maxima = np.full((len(names), newest - oldest + 1), np.nan)
    servers: tuple[str, ...] = ()
    rows: Longs = np.empty(0, np.int64)
    for day, one in sorted(held.items()):
        if one.server_names != servers:  # mostly those of the day before
            servers, rows = one.server_names, np.array([row_of[name] for name in one.server_names], np.int64)
        maxima[rows, day - oldest] = one.values[:, one.metrics.index(metric)]
    is_known = np.isfinite(maxima).any(axis=1)
    return [name for name, known in zip(names, is_known, strict=True) if known], list(maxima[is_known])


def _rank(row: dict[str, Any]) -> tuple[bool, str, float, str]:
    """Order rows: full ones, then the earliest date, then the highest P, then by name."""
    is_without = row["full_between"] is None and row["why_no_date"] != dates.OVER
    first = "" if row["full_between"] is None else row["full_between"][0]
    return is_without, first, -(row["p_within"] or 0.0), row["server"]


def _date(newest: int, days: float, *, up: bool) -> str:
    """Return the date so many days after the newest whole day."""
    ahead = int(np.ceil(days) if up else np.floor(days))
    return iso_z(from_ms((newest + max(1, ahead)) * DAY_MS))[:10]


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None or not np.isfinite(value) else round(value, digits)
