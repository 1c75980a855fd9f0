"""Which disks are full by when: what `GET /capacity/dates` says, days and weeks ahead.

Owns: the highest 5-minute mean of each server, metric and day, read from the stored days a little at a
time, newest first; which metrics count (those in percent, `disk_usage_pct` first, not CPU). Does not know:
what a trend is (`capacity/dates.py`), HTTP. Nothing is kept on disk: after a restart the days are read again.

`step` belongs to the daemon's main thread and reads one piece of a day; answers are safe from any thread. The
outlook of every server of a large fleet takes seconds and changes once a day, so the answers to the newest
questions about the whole fleet are kept. A day that gets records after it was read
(an import, an agent that was cut off) is read again.

`Soonest` is what `/metrics` says of it: one look at every server a day, a slice of time at a time. What it
finds also answers the retraining daemon's alert, which asks at each check: until the look at the next day is
done. How near a date is, is asked at each scrape, as the alert asks it: from now to the early date.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fleetcast.capacity import dates
from fleetcast.clock import DAY_MS, HOUR_MS, Clock, from_ms, iso_z, monotonic, parse_plain_utc, to_ms
from fleetcast.errors import quote
from fleetcast.forecast.encoding import is_percent
from fleetcast.ingest.rules import is_metric_name
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
_MOST_LOOKS = 4  # of 3 MB each where 10,000 servers send the metric
_RETRY_S = 60.0  # after a look that failed
_PAUSE_S = 60.0  # without a record of a day that was read before: an import is over, or is at other days
_PAUSE_MAX_S = 3600.0  # from the first such record on: a clock may lie a day behind for good


@dataclass(frozen=True, slots=True, eq=False)
class _Day:
    """One day's maxima."""

    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    values: Floats32  # (server, metric)


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """The outlook of every server that sent a metric."""

    days: dict[int, _Day]  # that it rests on
    metric: str
    n_comparisons: int
    found: tuple[tuple[str, dates.Outlook], ...]  # servers in the order of an answer

    @classmethod
    def of(
        cls,
        days: dict[int, _Day],
        metric: str,
        ratios: dates.Ratios,
        found: Iterable[tuple[str, dates.Outlook]],
    ) -> Self:
        """Return a look whose servers are in order."""
        return cls(days, metric, len(ratios.values), tuple(sorted(found, key=_rank)))

    @property
    def newest(self) -> int:
        """Return the newest of its days."""
        return max(self.days)

    @property
    def n_days(self) -> int:
        """Return how many of its days hold the metric."""
        return sum(self.metric in day.metrics for day in self.days.values())


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
        self._ratios: dict[str, tuple[dict[int, _Day], dates.Ratios]] = {}  # by metric, of which days
        self._looks: dict[tuple[str, float], _Look] = {}  # by metric and limit; the newest asked for last
        self._asking = threading.Lock()  # held for seconds, the other one for moments
        self._changed: dict[int, tuple[float, float]] = {}  # by day: the first and last moment records came
        self._again: list[int] = []  # days to be read again now, the newest last

    def clear(self) -> None:
        """Forget every day, to read them again; on the thread of `step`."""
        self._days, self._reading, self._newest_day, self._begun_day = {}, None, -1, -1
        self._again = []
        with self._lock:
            self._looks.clear()
            self._changed.clear()

    def note(self, timestamps_ms: Longs) -> None:
        """Note when records came: days that count as read are read again. Safe from any thread."""
        if not len(timestamps_ms) or timestamps_ms.min() // DAY_MS > self._begun_day:
            return  # as live records are: of the day that is open
        now = monotonic()
        with self._lock:
            for day in np.unique(timestamps_ms // DAY_MS).tolist():
                if day <= self._begun_day:
                    self._changed[day] = (self._changed.get(day, (now, now))[0], now)

    def step(self) -> None:
        """Read one piece of the newest day that is not known yet or has changed; do nothing where all are."""
        if self._reading is None:
            day = self._next_day()
            if day is None:
                return
            self._reading = self._read(day)
        try:
            next(self._reading)
        except StopIteration:
            self._reading = None
        except BaseException:
            self._reading = None
            raise

    def _next_day(self) -> int | None:
        newest = self._last_whole_day()
        if newest != self._newest_day:
            self._pass_over_days_without_records(newest)
            wanted = [day for day in range(newest, newest - DAYS, -1) if day not in self._days]
            if wanted:
                return wanted[0]
            self._newest_day = newest
            self._days = {day: one for day, one in self._days.items() if day > newest - DAYS}
            return None
        if not self._again:
            self._again = self._find_changed(newest - DAYS)
        return self._again.pop() if self._again else None

    def _find_changed(self, oldest: int) -> list[int]:
        """Return the days that records came for and have ceased to come for, all after `oldest`, in order."""
        now = monotonic()
        with self._lock:
            due = [
                day
                for day, (first, last) in self._changed.items()
                if now - last >= _PAUSE_S or now - first >= _PAUSE_MAX_S
            ]
            for day in due:
                del self._changed[day]
        return sorted(day for day in due if day > oldest)

    def answer(self, asked: DatesQuestion) -> dict[str, Any]:
        """Return each server's outlook, the earliest date first; then those without a date, by name.

        Raises:
            BadQuestion: with what would be right.
        """
        if asked.metric not in self.metrics():
            known = ", ".join(self.metrics()) or "none yet"
            when = "" if self.metrics() else ": a day counts from an hour after its end on"
            raise BadQuestion(f"no day of {quote(asked.metric)} is known", hint=f"known: {known}{when}")
        if not 0.0 < asked.limit <= 100.0:
            raise BadQuestion(f"limit must be over 0 and at most 100, got {asked.limit:g}")
        look = self._look(asked)
        found = [item for item in look.found if asked.server in ("", item[0])]
        silent = self._fleet.servers().silent_since()
        return {
            "metric": asked.metric,
            "limit": asked.limit,
            "days": look.n_days,
            "newest_day": iso_z(from_ms(look.newest * DAY_MS)),
            "comparisons": look.n_comparisons,
            "matching": len(found),
            "with_date": sum(outlook.has_date for _name, outlook in found),
            "rows": [
                {**_row(name, outlook, look.newest), "silent_since": silent.get(name)}
                for name, outlook in found[: asked.n_rows]
            ],
        }

    def tell(self, asked: DatesQuestion) -> dict[str, Any]:
        """Return the same, with the metrics that have days; where this one has none, what it waits for.

        Raises:
            BadQuestion: the limit is none, or the metric has no metric's name.
        """
        known = self.metrics()
        if not is_metric_name(asked.metric):
            raise BadQuestion(f"{quote(asked.metric)} is no name of a metric")
        if asked.metric in known:
            return {**self.answer(asked), "known": known}
        first_ms = (self._last_whole_day() + 2) * DAY_MS + _RIPE_MS  # the open day counts then
        waits = {
            "is_reading": self._newest_day != self._last_whole_day() or self._reading is not None,
            "is_sent": asked.metric in self._fleet.roster.metric_names(),
            "first": iso_z(from_ms(first_ms)),
        }
        return {"metric": asked.metric, "limit": asked.limit, "known": known, "waits": waits}

    def _look(self, asked: DatesQuestion) -> _Look:
        """Return the outlook of all servers, or of the one that is asked for."""
        days = self._days  # one reference: the reader replaces it
        if (kept := self._kept(asked, days)) is not None:
            return kept
        names, maxima = _matrix(days, asked.metric, max(days))
        if asked.server:
            ratios = self._compare(asked.metric, days, maxima)
            own = [place for place, name in enumerate(names) if name == asked.server]
            found = [(asked.server, dates.look_ahead(maxima[place], asked.limit, ratios)) for place in own]
            return _Look(days, asked.metric, len(ratios.values), tuple(found))
        with self._asking:  # others who ask the same wait for one answer
            if (kept := self._kept(asked, days)) is None:
                ratios = self._compare(asked.metric, days, maxima)
                outlooks = [dates.look_ahead(series, asked.limit, ratios) for series in maxima]
                kept = _Look.of(days, asked.metric, ratios, zip(names, outlooks, strict=True))
                self._keep(asked.limit, kept)
        return kept

    def _kept(self, asked: DatesQuestion, days: dict[int, _Day]) -> _Look | None:
        """Return a look that still holds; that of `Soonest` does until the next day's is done."""
        key = asked.metric, asked.limit
        with self._lock:
            if (look := self._looks.get(key)) is None:
                return None
            self._looks[key] = self._looks.pop(key)
        is_followed = key == (FIRST_METRIC, DEFAULT_LIMIT) and self.is_known
        is_near = look.newest <= max(days) <= look.newest + 1
        return look if look.days is days or (is_followed and is_near) else None

    def _keep(self, limit: float, look: _Look) -> None:
        with self._lock:
            if look.days is self._days:
                self._looks.pop((look.metric, limit), None)
                self._looks[look.metric, limit] = look
            while len(self._looks) > _MOST_LOOKS:
                del self._looks[next(iter(self._looks))]

    @property
    def is_known(self) -> bool:
        """Return whether all days were read once and since then only new ones were added."""
        return self._newest_day >= 0

    def whole_days(self) -> object | None:
        """Return what changes when a day was added, None while days are still to be read."""
        is_whole = self._newest_day >= 0 and self._newest_day == self._last_whole_day()
        return self._days if is_whole and not self._again and self._reading is None else None

    def rows(self, metric: str) -> Iterator[dict[str, Any] | None]:
        """Yield the rows for the default limit, by name; None first, while the past is compared."""
        days = self._days
        newest = max(days)
        names, maxima = _matrix(days, metric, newest)
        found: list[dates.Judged] = []
        for series in dates.choose(maxima):
            found += dates.judge(series)
            yield None
        ratios = dates.gather(found)
        with self._lock:
            self._ratios[metric] = (days, ratios)
        outlooks: list[dates.Outlook] = []
        for name, series in zip(names, maxima, strict=True):
            outlooks.append(dates.look_ahead(series, DEFAULT_LIMIT, ratios))
            yield _row(name, outlooks[-1], newest)
        if metric == FIRST_METRIC:  # what the retraining daemon's alert asks for, at each check
            self._keep(DEFAULT_LIMIT, _Look.of(days, metric, ratios, zip(names, outlooks, strict=True)))

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
        with self._lock:
            if metric not in self._ratios or self._ratios[metric][0] is not days:
                self._ratios[metric] = (days, dates.compare(maxima))
            return self._ratios[metric][1]


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


def _rank(item: tuple[str, dates.Outlook]) -> tuple[bool, int, float, str]:
    """Order servers: full ones, then the earliest date, then the highest P, then by name."""
    name, found = item
    first = 0 if found.early_days is None else _whole_days(found.early_days, up=False)
    is_without = not found.has_date and found.why_not != dates.OVER
    return is_without, first, -(_round(found.p_within, 3) or 0.0), name


def _row(name: str, found: dates.Outlook, newest: int) -> dict[str, Any]:
    """Return what is said of a server whose newest whole day is `newest`."""
    between = None
    if found.early_days is not None and found.late_days is not None:
        ahead = (_whole_days(found.early_days, up=False), _whole_days(found.late_days, up=True))
        between = [iso_z(from_ms((newest + days) * DAY_MS))[:10] for days in ahead]
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


def _whole_days(days: float, *, up: bool) -> int:
    """Return how many days after the newest whole day a date is."""
    return max(1, int(np.ceil(days) if up else np.floor(days)))


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None or not np.isfinite(value) else round(value, digits)
