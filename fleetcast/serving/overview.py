"""What the page of `/ui/` shows of the fleet: its strip, its table, one server, and what is wrong.

Owns: the states a server can be in (worst first), how a large fleet is sorted, filtered and paged, and
which problems are told to an operator, in words. Does not know: HTTP; how anything was forecast.
"""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import HOUR_MS, SystemClock, from_ms, iso_z
from fleetcast.errors import FleetcastError, quote
from fleetcast.forecast.encoding import is_percent
from fleetcast.schema import Floats
from fleetcast.serving.board import PredictionBoard
from fleetcast.serving.capacity import LIKELY, Capacity, Nearness
from fleetcast.serving.journal import Journal
from fleetcast.serving.past import Past, numbers
from fleetcast.serving.roster import Fleet, PresentServers, meant
from fleetcast.serving.status import StatusReport

PAGE_ROWS = 100
MOST_ROWS = 200
HIGH_PERCENT = 90.0  # a percent metric whose p90 gets here within the horizon is worth a look
SILENT, IS_HIGH, DRIFTS, GETS_HIGH = "silent", "is-high", "drifts", "gets-high"
WARMING_UP, NOT_FORECAST, CALM = "warming-up", "not-forecast", "calm"
GONE = "gone"  # no state of the fleet's table: only a server's own page has it
# the strip's bytes are places in it: worst last; the console has the same names
STATES = (CALM, NOT_FORECAST, WARMING_UP, GETS_HIGH, DRIFTS, IS_HIGH, SILENT)
_MOST_NAMES = 100  # of servers that are left out
_FAR_MS = 10**13  # beyond every horizon
_SILENT_S = 1800.0  # a retraining daemon checks every 300 s


class UnknownColumn(FleetcastError):
    """Raised when the fleet's table is to be sorted by something that it does not have."""


@dataclass(frozen=True, slots=True, eq=False)
class _Standing:
    """The fleet at one moment; a row per server, in order of names."""

    present: PresentServers
    metrics: tuple[str, ...]
    current: Floats  # (server, metric)
    peaks: Floats  # (server, metric) the highest p90 ahead
    states: NDArray[np.uint8]  # (server,) places in STATES
    near: Nearness  # to HIGH_PERCENT; of silent servers nothing
    order: NDArray[np.intp]  # rows by name


@dataclass(frozen=True)
class FleetQuery:
    """Which part of the fleet's table is wanted."""

    sort: str = "name"
    is_descending: bool = False
    text: str = ""  # part of a name
    state: str = ""
    offset: int = 0
    limit: int = PAGE_ROWS


class Overview:
    """Answers for the page; one thread asks at a time."""

    def __init__(
        self,
        fleet: Fleet,
        board: PredictionBoard,
        past: Past,
        report: StatusReport,
        journal: Journal,
        capacity: Capacity,
    ) -> None:
        self._fleet = fleet
        self._board = board
        self._past = past
        self._report = report
        self._journal = journal
        self._capacity = capacity

    def pulse(self) -> dict[str, Any]:
        """Return what tells a page whether to ask again for the rest."""
        check = self._journal.newest_check()
        return {
            "origin": self._report.origin,
            "model": self._board.model.version if self._board.model else None,
            "check": check.get("made_at"),
            "trainings": self._journal.trainings_mark(),
            "problems": len(self.problems()),
            "bins_waiting": self._report.backlog,
        }

    def strip(self) -> dict[str, Any]:
        """Return one byte a server, in order of names: its state as a place in `states`."""
        standing = self._standing()
        ordered = standing.states[standing.order]
        counts = np.bincount(ordered, minlength=len(STATES)).tolist()
        return {
            "servers": len(ordered),
            "states": list(STATES),
            "counts": dict(zip(STATES, counts, strict=True)),
            "bytes": base64.b64encode(ordered.tobytes()).decode(),
            "left_out": self._left_out(),
        }

    def _left_out(self) -> dict[str, Any]:
        """Return who is in none of these: excluded servers, and those being forgotten; the first by name."""
        going = set(self._report.being_forgotten())
        names = {"excluded": sorted(set(self._fleet.left_out()) - going), "being_forgotten": sorted(going)}
        return {word: {"servers": len(some), "names": some[:_MOST_NAMES]} for word, some in names.items()}

    def table(self, query: FleetQuery) -> dict[str, Any]:
        """Return one page of the fleet's table.

        Raises:
            UnknownColumn: it cannot be sorted by that.
        """
        standing = self._standing()
        rows = self._choose(standing, query)
        rows = self._sort(standing, rows, query)
        shown = rows[query.offset : query.offset + query.limit]
        ratios = self._past.ratios(standing.present.server_names)
        return {
            "servers": len(standing.order),
            "matching": len(rows),
            "offset": query.offset,
            "horizon_s": self._fleet.settings.horizon_bins * self._fleet.history.bin_ms // 1000,
            "metrics": list(standing.metrics),
            "unsent": _unsent(standing),
            "limit": HIGH_PERCENT,
            "origin": self._report.origin,
            "bins_waiting": self._report.backlog,
            "now": iso_z(self._fleet.clock.now()),
            "rows": [
                {**self._row_json(standing, int(row)), "error": error}
                for row, error in zip(shown, numbers(ratios[shown]), strict=True)
            ],
        }

    def server(self, name: str, hours: int) -> dict[str, Any]:
        """Return everything that the page of one server shows; of a gone one what is stored.

        Raises:
            UnknownServer: it is neither in the fleet nor stored, or it is left out.
        """
        present = self._fleet.servers().server_names
        known = meant(name, present)
        if known not in present and known not in self._fleet.left_out():
            stored = self._past.stored_span(known)
            if stored is not None:
                return self._gone_server(known, hours, *stored)
        document = msgspec.json.decode(b"".join(self._board.document([name])))
        ((name, entry),) = document["predictions"].items()
        standing = self._standing()
        row = standing.present.server_names.index(name)
        end_ms = self._fleet.history.taken_bin_ms
        start = None if end_ms is None else self._hours_before(end_ms, hours)
        oldest_ms = self._past.oldest_ms()
        return {
            **self._row_json(standing, row),
            "now": document["timestamp"],
            "model": document["model"],
            "values": entry["current"],
            "forecast": entry["forecast"] or {},
            "sources": entry["sources"],
            "timestamps": entry["timestamps"],
            "past": self._past.answer(name, start=start),
            "oldest": None if oldest_ms is None else iso_z(from_ms(oldest_ms)),
            "drifting": [item for item in self._journal.drifting() if item.get("server") == name],
        }

    def _gone_server(self, name: str, hours: int, oldest_ms: int, newest_ms: int) -> dict[str, Any]:
        """Return the same of a gone server: the hours up to its newest record, and no forecast."""
        bin_ms = self._fleet.history.bin_ms
        end_ms = newest_ms // bin_ms * bin_ms + bin_ms
        start, end = (iso_z(from_ms(time_ms)) for time_ms in (end_ms - hours * HOUR_MS, end_ms))
        past = self._past.answer(name, start=start, end=end)
        told = {metric: part["actual"] for metric, part in past["metrics"].items()}
        newest = {metric: [value for value in told[metric] if value is not None][-1:] for metric in told}
        return {
            "server": name,
            "state": GONE,
            "source": GONE,
            "seen": iso_z(from_ms(newest_ms)),
            "current": {metric: values[0] if values else None for metric, values in newest.items()},
            "now": iso_z(self._fleet.clock.now()),
            "model": None,
            "values": {},
            "forecast": {},
            "sources": {},
            "timestamps": [],
            "past": past,
            "oldest": iso_z(from_ms(oldest_ms)),
            "drifting": [],
        }

    def drift(self, days: float) -> dict[str, Any]:
        """Return the newest drift check and the scores of the days before it."""
        found, silent = self._journal.drift(days), self._fleet.servers().silent_since()
        named = [{**item, "silent_since": silent.get(item.get("server", ""))} for item in found["drifting"]]
        return {**found, "drifting": named}

    def trainings(self) -> dict[str, Any]:
        """Return the trainings with their verdicts in words."""
        return self._journal.trainings()

    def health(self) -> dict[str, Any]:
        """Return the summary of `/status` with the problems in words, and what fires."""
        alerts = self._journal.alerts(SystemClock().now())
        return {"problems": self.problems(), "alerts": alerts, "status": self._report.status()}

    def problems(self) -> list[dict[str, str]]:
        """Return what an operator has to know, worst first."""
        found = [
            {"severity": severity, "text": text}
            for severity, text in (*self._fleet_problems(), *self._retraining_problems())
        ]
        return sorted(found, key=lambda problem: problem["severity"] != "error")

    def _fleet_problems(self) -> list[tuple[str, str]]:
        found = self._report.problems()
        n_stale = int(self._fleet.servers().is_stale.sum())
        if n_stale:
            minutes = round(self._fleet.settings.stale_after_s / 60)
            verb = "server has" if n_stale == 1 else "servers have"
            found.append(("warning", f"{n_stale} {verb} sent nothing for {minutes} minutes."))
        for error in self._report.newest_errors():
            found.append(("warning", f"{error['time']} {error['part']}: {error['error']}"))
        return found

    def _retraining_problems(self) -> list[tuple[str, str]]:
        age_s = self._journal.check_age_s(self._fleet.clock.now())
        if age_s is None:
            return [
                ("warning", "No drift check was made yet: is the retraining daemon running in this folder?")
            ]
        found = []
        if age_s > _SILENT_S:
            found.append(("warning", f"The newest drift check was written {_span(age_s)} ago."))
        return found + [("warning", text) for text in self._journal.complaints()]

    def _standing(self) -> _Standing:
        present, outlook = self._fleet.servers(), self._board.outlook
        metrics = self._fleet.history.metrics
        n_servers = len(present.server_names)
        current, peaks = (np.full((n_servers, len(metrics)), np.nan) for _ in range(2))
        for column, metric in enumerate(metrics):
            if metric in present.metrics:
                current[:, column] = present.values[:, present.metrics.index(metric)]
        places = np.fromiter(
            (outlook.rows.get(name, -1) for name in present.server_names), np.int64, n_servers
        )
        if outlook.metrics == metrics:
            peaks[places >= 0] = outlook.peaks[places[places >= 0]]
        near = self._capacity.nearness(present.server_names)
        near = replace(near, p=np.where(present.is_stale, np.nan, near.p))
        states = self._judge(present, places, current, peaks, near.p)
        order = np.array(sorted(range(n_servers), key=present.server_names.__getitem__), dtype=np.intp)
        return _Standing(present, metrics, current, peaks, states, near, order)

    def _judge(
        self,
        present: PresentServers,
        places: NDArray[np.int64],
        current: Floats,
        peaks: Floats,
        p: Floats,
    ) -> NDArray[np.uint8]:
        """Return each server's worst state; `p` is its probability to pass the limit, NaN = not known."""
        are_percents = np.array([is_percent(metric) for metric in self._fleet.history.metrics], np.bool_)
        drifting = {item.get("server") for item in self._journal.drifting()}
        is_drifting = np.fromiter((name in drifting for name in present.server_names), np.bool_, len(places))
        states = np.full(len(places), STATES.index(CALM), dtype=np.uint8)
        is_sent = np.isfinite(current).any(axis=1)  # any of the metrics that are forecast
        states[places < 0] = STATES.index(WARMING_UP)
        states[~is_sent & np.isnan(peaks).all(axis=1)] = STATES.index(NOT_FORECAST)
        gets_high = (peaks[:, are_percents] >= HIGH_PERCENT).any(axis=1) | (p >= LIKELY)  # NaN is not
        states[gets_high] = STATES.index(GETS_HIGH)
        states[is_drifting] = STATES.index(DRIFTS)
        states[(current[:, are_percents] >= HIGH_PERCENT).any(axis=1)] = STATES.index(IS_HIGH)
        states[present.is_stale] = STATES.index(SILENT)
        return states

    def _choose(self, standing: _Standing, query: FleetQuery) -> NDArray[np.intp]:
        rows, names = standing.order, standing.present.server_names
        if query.state:
            rows = rows[standing.states[rows] == STATES.index(query.state)]
        if query.text:
            wanted = query.text.casefold()
            rows = rows[[wanted in names[row].casefold() for row in rows]] if len(rows) else rows
        return rows

    def _sort(self, standing: _Standing, rows: NDArray[np.intp], query: FleetQuery) -> NDArray[np.intp]:
        """Return rows sorted by one column; equal ones by name, unknown values last."""
        if query.sort == "name":
            return rows[::-1] if query.is_descending else rows
        keys = self._columns(standing).get(query.sort)
        if keys is None:
            raise UnknownColumn(
                f"cannot sort by {quote(query.sort)}",
                hint=f"one of {', '.join(self._columns(standing))}, name",
            )
        values = keys()[rows].astype(np.float64)
        places = np.argsort(-values if query.is_descending else values, kind="stable")
        return rows[places]

    def _columns(self, standing: _Standing) -> Mapping[str, Callable[[], NDArray[Any]]]:
        columns: dict[str, Callable[[], NDArray[Any]]] = {
            "state": lambda: _attention(standing),
            "limit": lambda: _limit_keys(standing),
            "error": lambda: self._past.ratios(standing.present.server_names),
            "seen": lambda: standing.present.last_seen_ms,
        }
        for column, metric in enumerate(standing.metrics):
            columns[metric] = lambda column=column: standing.current[:, column]  # type: ignore[misc]
            columns[f"{metric}.peak"] = lambda column=column: standing.peaks[:, column]  # type: ignore[misc]
        return columns

    def _row_json(self, standing: _Standing, row: int) -> dict[str, Any]:
        name = standing.present.server_names[row]
        return {
            "server": name,
            "state": STATES[standing.states[row]],
            "limit": _limit_json(standing, row),
            "source": self._board.source(name, self._sent(standing.present, row)),
            "seen": iso_z(from_ms(int(standing.present.last_seen_ms[row]))),
            "current": dict(zip(standing.metrics, numbers(standing.current[row]), strict=True)),
            "peak": dict(zip(standing.metrics, numbers(standing.peaks[row]), strict=True)),
        }

    def _sent(self, present: PresentServers, row: int) -> list[str]:
        return [present.metrics[column] for column in np.flatnonzero(np.isfinite(present.values[row]))]

    def _hours_before(self, taken_ms: int, hours: int) -> str:
        bin_ms = self._fleet.history.bin_ms
        return iso_z(from_ms(taken_ms + bin_ms - hours * HOUR_MS))


def _attention(standing: _Standing) -> Floats:
    """Return what to sort by: the states; in one, the higher over the limit, or the likelier to pass it."""
    are_percents = np.array([is_percent(metric) for metric in standing.metrics], dtype=np.bool_)
    highest = np.nan_to_num(standing.current[:, are_percents]).max(axis=1, initial=0.0)
    keys = np.where(standing.states == STATES.index(IS_HIGH), np.minimum(highest / 2000.0, 0.5), 0.0)
    is_near = (standing.states >= STATES.index(GETS_HIGH)) & (keys == 0.0)
    return np.asarray(standing.states + np.where(is_near, np.nan_to_num(standing.near.p) / 2, keys))


def _limit_keys(standing: _Standing) -> Floats:
    """Return what to sort by: who is over the limit, then the likelier, the sooner; NaN = unknown."""
    at_ms = np.where(standing.near.at_ms > 0, standing.near.at_ms, _FAR_MS)
    is_over = standing.states == STATES.index(IS_HIGH)
    return np.where(is_over, 2.0, standing.near.p - at_ms * 1e-16)  # sooner by a minute weighs 6e-12


def _limit_json(standing: _Standing, row: int) -> dict[str, Any]:
    p, at_ms = float(standing.near.p[row]), int(standing.near.at_ms[row])
    is_over = bool(standing.states[row] == STATES.index(IS_HIGH))
    is_known = not is_over and not np.isnan(p)
    return {
        "is_over": is_over,
        "p": round(p, 3) if is_known else None,
        "at": iso_z(from_ms(at_ms)) if is_known and at_ms else None,
    }


def _unsent(standing: _Standing) -> list[str]:
    """Return the metrics that no server ever sent: a table without their columns is easier to read."""
    is_known = np.asarray(np.isfinite(np.concatenate((standing.current, standing.peaks))).any(axis=0))
    return [metric for column, metric in enumerate(standing.metrics) if not is_known[column]]


def _span(seconds: float) -> str:
    """Return a length of time as people say it.

    >>> _span(7200.0), _span(200_000.0)
    ('2 hours', '2 days')
    """
    for length, name in ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * length or name == "minutes":
            return f"{seconds / length:.0f} {name}"
    raise AssertionError(seconds)
