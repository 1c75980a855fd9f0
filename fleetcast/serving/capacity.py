"""Which servers pass a limit within the horizon: what `GET /capacity` and `/metrics` say of it.

Owns: the windows that wait for their end, one an hour; what is said of each series, by which source, and
how good that source was; `capacity.npz` in the buffer's folder, where that is kept. Does not know: how P
is made (`capacity/crossing.py`), how anything was forecast, dates (`fullness.py`).

`note` belongs to the thread that sweeps; answers read what it published last, from any thread. After a
restart the windows still open are lost, eight hours of them; what settled windows taught is kept.
"""

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast import files
from fleetcast.archive import open_arrays
from fleetcast.capacity.crossing import LIMITS, SOURCES, Calibration, Guess, Said, guess
from fleetcast.clock import from_ms, iso_z, to_ms
from fleetcast.errors import CorruptFile, quote
from fleetcast.forecast.encoding import is_percent
from fleetcast.schema import FleetForecast, Floats, Floats32, HistoryWindow, Longs
from fleetcast.serving.ledger import pack_lines, unpack_lines
from fleetcast.serving.past import BadQuestion
from fleetcast.serving.roster import Fleet

logger = logging.getLogger(__name__)

FILE = "capacity.npz"
FORMAT = 2  # format 1 had no scales; it is taken over
ALERT_LIMIT = 90.0  # of the gauges
LIKELY = 0.5
MOST_ROWS = 1000
_WINDOWS_A_HORIZON = 8  # windows begin so often within one
OVER, MAY_PASS, UNKNOWN = "over", "may pass", "not known yet"


@dataclass(frozen=True)
class CapacityQuestion:
    """Which servers are asked for."""

    metrics: tuple[str, ...] = ()  # none = every metric in percent that is forecast
    limit: float = ALERT_LIMIT
    min_p: float = 0.1
    server: str = ""
    n_rows: int = 100


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    """What was said at one origin; waits for its horizon to pass."""

    origin_ms: int
    server_names: tuple[str, ...]
    said: tuple[Said, ...]  # by percent metric


@dataclass(frozen=True, slots=True, eq=False)
class _Standing:
    """What is said now of one metric."""

    told: Floats32  # (limit, series) by the source that answers
    now: Floats32  # (series,) the newest mean that is known, also of a silent server
    possible: NDArray[np.uint16]  # (series, limit) steps until p90 is over, 0 = not within the horizon
    likely: NDArray[np.uint16]  # the same of p50
    records: tuple[dict[str, Any], ...]  # by limit: which source answers, and how good all were

    @property
    def is_sent(self) -> bool:
        """Whether a server sends the metric, or sent it in the time that is remembered."""
        is_known = np.isfinite(self.now).any() or np.isfinite(self.told).any()
        return bool(is_known or any(record["windows"] for record in self.records))


@dataclass(frozen=True, slots=True, eq=False)
class _Published:
    origin_ms: int
    server_names: tuple[str, ...]
    standings: dict[str, _Standing]  # by metric


@dataclass(frozen=True, slots=True, eq=False)
class Nearness:
    """How near servers are to `ALERT_LIMIT`, by that metric in percent which is the likeliest to pass it."""

    p: Floats  # (server,) the probability; NaN = not known, or over it already
    at_ms: Longs  # (server,) the bin in which p50 passes it, or else p90; 0 = not within the horizon


@dataclass(frozen=True)
class CapacityGauges:
    """What a scrape reads; the labels are bounded."""

    expected: dict[str, float]  # by metric: the sum of P, of servers below the limit
    likely: dict[str, int]  # servers below the limit whose P is `LIKELY` or more
    over: dict[str, int]
    brier: dict[tuple[str, str], float]  # by metric and source
    probability: dict[tuple[str, str], float]  # by server and metric


class Capacity:
    """Keeps what is said until it is true or false, and learns from that."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        """Take up what was kept, or begin anew."""
        self._path = folder / FILE
        self._fleet = fleet
        self._history = history = fleet.history
        self._horizon_bins = fleet.settings.horizon_bins
        self._bin_ms = history.bin_ms
        self._gone_bins = max(1, int(fleet.settings.gone_after_s * 1000) // history.bin_ms)
        self._columns = [place for place, metric in enumerate(history.metrics) if is_percent(metric)]
        self._metrics = tuple(history.metrics[place] for place in self._columns)
        self._calibrations = [Calibration() for _ in self._columns]
        self._open: list[_Window] = []
        self._published = _Published(0, (), {})
        try:
            self._take_up()
        except FileNotFoundError:
            return
        except CorruptFile as error:
            logger.warning("capacity starts afresh: %s", error)
            self._calibrations = [Calibration() for _ in self._columns]

    def note(self, forecast: FleetForecast, parts: Iterable[HistoryWindow]) -> None:
        """Take a sweep in: settle windows that ended, say anew, open a window once an hour.

        Args:
            parts: the fleet's means up to the forecast's origin, in its order.
        """
        due = [window for window in self._open if window.origin_ms + self._reach_ms <= forecast.origin_ms]
        guesses: list[list[Guess]] = [[] for _ in self._columns]
        newest: list[list[Floats32]] = [[] for _ in self._columns]
        peaks: list[list[Floats32]] = [[] for _ in due]
        names: list[str] = []
        for part in parts:
            rows = slice(len(names), len(names) + len(part.server_names))
            for place, column in enumerate(self._columns):
                quantiles = forecast.quantiles[rows, column]
                guesses[place].append(guess(quantiles, part.values[:, column], self._horizon_bins))
                newest[place].append(_newest(part.values[:, column, -self._gone_bins :]))
            for place, window in enumerate(due):
                peaks[place].append(self._peaks(part, window.origin_ms))
            names += part.server_names
        if tuple(names) != forecast.server_names or not names or not self._columns:
            return  # a server came or went between the two
        for window, found in zip(due, peaks, strict=True):
            self._settle(window, names, np.concatenate(found))
        self._open = [window for window in self._open if window not in due]
        now = [np.concatenate(found) for found in newest]
        self._publish(forecast, [_join(found) for found in guesses], now)
        if due:
            self.save()

    def save(self) -> None:
        """Keep what settled windows taught.

        Raises:
            StorageFull, StorageBroken: the older file stands.
        """
        stream = io.BytesIO()
        arrays: dict[str, Any] = {
            name: np.stack([getattr(calibration, name) for calibration in self._calibrations])
            for name in _ARRAYS
        }
        np.savez_compressed(
            stream,
            format=np.int64(FORMAT),
            bin_ms=np.int64(self._bin_ms),
            horizon_bins=np.int64(self._horizon_bins),
            metrics=pack_lines(self._metrics),
            **arrays,
        )
        files.write_atomic(self._path, stream.getvalue())

    def answer(self, asked: CapacityQuestion) -> dict[str, Any]:
        """Return who may pass the limit, the likeliest first, and how good such answers were.

        Silent servers come last: what is said of them rests on old values.

        Raises:
            BadQuestion: with what would be right.
        """
        if asked.limit not in LIMITS:
            known = ", ".join(f"{limit:g}" for limit in LIMITS)
            raise BadQuestion(f"limit must be one of {known}, got {asked.limit:g}")
        metrics = asked.metrics or self._metrics
        unknown = [metric for metric in metrics if metric not in self._metrics]
        if unknown:
            known = ", ".join(self._metrics) or "none"
            raise BadQuestion(f"{quote(unknown[0])} is no metric in percent that is forecast: {known} are")
        published, column = self._published, LIMITS.index(asked.limit)
        standings = {name: published.standings[name] for name in metrics if name in published.standings}
        silent = self._fleet.servers().silent_since()
        rows = [
            {**row, "silent_since": silent.get(row["server"])}
            for name in standings
            for row in self._rows(published, name, column, asked, silent)
        ]
        rows.sort(key=_rank)
        return {
            "origin": iso_z(from_ms(published.origin_ms)) if standings else None,
            "horizon_s": self._horizon_bins * self._bin_ms // 1000,
            "limit": asked.limit,
            "servers": len(published.server_names),
            "metrics": {name: standing.records[column] for name, standing in standings.items()},
            "not_sent": [name for name, standing in standings.items() if not standing.is_sent],
            "matching": len(rows),
            "silent": sum(row["silent_since"] is not None for row in rows),
            "bins_waiting": self._count_waiting(published),
            "rows": [self._with_since(row, asked.limit) for row in rows[: asked.n_rows]],
        }

    def _count_waiting(self, published: _Published) -> int:
        """Return how many closed bins are newer than what is published."""
        closed = {*self._fleet.due_bins(), self._history.taken_bin_ms or 0}
        return sum(bin_ms > published.origin_ms for bin_ms in closed)

    def nearness(self, server_names: Sequence[str]) -> Nearness:
        """Return how near these servers are to the limit, as the newest sweep says it."""
        published, column = self._published, LIMITS.index(ALERT_LIMIT)
        n_published = len(published.server_names)
        p = np.full(n_published + 1, np.nan)  # the last place: of a server that is not known
        steps = np.zeros(n_published + 1, np.int64)
        for standing in published.standings.values():
            told = np.where(standing.now < ALERT_LIMIT, standing.told[column], np.nan)
            likely, possible = standing.likely[:, column], standing.possible[:, column]
            is_nearer = told > np.nan_to_num(p[:-1], nan=-1.0)
            p[:-1][is_nearer] = told[is_nearer]
            steps[:-1][is_nearer] = np.where(likely > 0, likely, possible)[is_nearer]
        places = {name: place for place, name in enumerate(published.server_names)}
        rows = np.fromiter((places.get(name, -1) for name in server_names), np.int64, len(server_names))
        at_ms = np.where(steps > 0, published.origin_ms + steps * self._bin_ms, 0)
        return Nearness(p[rows], at_ms[rows])

    def gauges(self, n_servers: int) -> CapacityGauges:
        """Return what a scrape reads, without silent servers; labels for the first `n_servers` at most."""
        published, column = self._published, LIMITS.index(ALERT_LIMIT)
        silent = self._fleet.servers().silent_since()
        is_silent = np.array([name in silent for name in published.server_names], np.bool_)
        found = CapacityGauges({}, {}, {}, {}, {})
        for metric, standing in published.standings.items():
            below = (standing.now < ALERT_LIMIT) & ~is_silent
            told = np.where(is_silent, np.nan, standing.told[column])
            found.over[metric] = int(((standing.now >= ALERT_LIMIT) & ~is_silent).sum())
            found.likely[metric] = int((told[below] >= LIKELY).sum())  # NaN is not
            if np.isfinite(told).any():
                found.expected[metric] = float(np.nansum(told[below]))
            for source, score in (standing.records[column]["brier"] or {}).items():
                found.brier[metric, source] = score
            for row in range(min(n_servers, len(told))):
                if np.isfinite(told[row]):
                    found.probability[published.server_names[row], metric] = float(told[row])
        return found

    @property
    def _reach_ms(self) -> int:
        return self._horizon_bins * self._bin_ms

    def _peaks(self, part: HistoryWindow, origin_ms: int) -> Floats32:
        """Return (server, percent metric): the highest bin of the horizon after an origin."""
        stop = part.values.shape[2] - ((part.end_bin_ms - origin_ms) // self._bin_ms - self._horizon_bins)
        ahead = part.values[:, self._columns, max(0, stop - self._horizon_bins) : max(0, stop)]
        is_known = np.isfinite(ahead)
        peaks = np.where(is_known, ahead, -np.inf).max(axis=2, initial=-np.inf)
        is_enough = 2 * is_known.sum(axis=2) >= self._horizon_bins  # a silent server did not stay below
        return np.where(is_enough, peaks, np.nan).astype(np.float32)

    def _settle(self, window: _Window, names: Sequence[str], peaks: Floats32) -> None:
        places = {name: place for place, name in enumerate(names)}
        rows = np.array([places.get(name, -1) for name in window.server_names], np.int64)
        for place, said in enumerate(window.said):
            of_series = np.where(rows >= 0, peaks[rows, place], np.nan).astype(np.float32)
            self._calibrations[place].settle(said, of_series)

    def _publish(self, forecast: FleetForecast, guesses: Sequence[Guess], newest: Sequence[Floats32]) -> None:
        said = tuple(
            calibration.say(found) for calibration, found in zip(self._calibrations, guesses, strict=True)
        )
        standings = {
            metric: _stand(calibration, one, now, forecast.quantiles[:, column])
            for metric, column, calibration, one, now in zip(
                self._metrics, self._columns, self._calibrations, said, newest, strict=True
            )
        }
        self._published = _Published(forecast.origin_ms, forecast.server_names, standings)
        newest_ms = self._open[-1].origin_ms if self._open else None
        if newest_ms is None or forecast.origin_ms - newest_ms >= self._reach_ms // _WINDOWS_A_HORIZON:
            self._open.append(_Window(forecast.origin_ms, forecast.server_names, said))

    def _rows(
        self,
        published: _Published,
        metric: str,
        column: int,
        asked: CapacityQuestion,
        silent: Mapping[str, str],
    ) -> Iterable[dict[str, Any]]:
        """Yield a row of each chosen server: one that is over has no times, a silent one no past ones."""
        standing = published.standings[metric]
        told, now, possible = standing.told[column], standing.now, standing.possible[:, column]
        is_over = now >= asked.limit
        is_unknown = np.isnan(told) & ~is_over
        with np.errstate(invalid="ignore"):
            chosen = is_over | (told >= asked.min_p) | (is_unknown & (possible > 0))
        chosen |= (asked.min_p <= 0.0) & np.isfinite(now)
        if asked.server:
            chosen &= np.array([name == asked.server for name in published.server_names])
        now_ms = to_ms(self._fleet.clock.now())
        for row in np.flatnonzero(chosen).tolist():
            state = OVER if is_over[row] else UNKNOWN if is_unknown[row] else MAY_PASS
            name = published.server_names[row]
            steps = (0, 0) if is_over[row] else (possible[row], standing.likely[row, column])
            first, likely = (self._when(published, int(one), now_ms * (name in silent)) for one in steps)
            yield {
                "server": name,
                "metric": metric,
                "state": state,
                "now": _round(now[row], 2),
                "p": _round(told[row], 3) if state == MAY_PASS else None,
                "first_possible": first,
                "likely": likely,
            }

    def _when(self, published: _Published, steps: int, oldest_ms: int) -> str | None:
        at_ms = published.origin_ms + steps * self._bin_ms
        return iso_z(from_ms(at_ms)) if steps and at_ms >= oldest_ms else None

    def _with_since(self, row: dict[str, Any], limit: float) -> dict[str, Any]:
        """Return a row with the bin since which its server is over the limit, None where it is not.

        `since_or_before` is true where no bin in memory lies below the limit: who knows what was before.
        """
        since_ms, is_open = None, False
        end_ms, oldest_ms = self._history.taken_bin_ms, self._history.oldest_kept_ms
        if row["state"] == OVER and end_ms is not None and oldest_ms is not None:
            n_kept = (end_ms - oldest_ms) // self._bin_ms + 1
            for n_bins in (min(self._horizon_bins, n_kept), n_kept):  # most have not been over for long
                since_ms, is_open = self._find_since(row, limit, end_ms, n_bins)
                if not is_open:
                    break
        since = None if since_ms is None else iso_z(from_ms(since_ms))
        return {**row, "since": since, "since_or_before": since is not None and is_open}

    def _find_since(
        self, row: Mapping[str, Any], limit: float, end_ms: int, n_bins: int
    ) -> tuple[int | None, bool]:
        """Return the first bin after the newest one below the limit, and whether there was none below."""
        past = self._history.past(row["server"], end_ms, n_bins)
        if past is None:
            return None, False
        values = past[self._history.metrics.index(row["metric"])]
        below = np.flatnonzero(values < limit)  # bins without a record end nothing
        known = np.flatnonzero(np.isfinite(values))
        after = known[known > (below[-1] if len(below) else -1)]
        since_ms = end_ms - (n_bins - 1 - int(after[0])) * self._bin_ms if len(after) else None
        return since_ms, not len(below)

    def _take_up(self) -> None:
        with open_arrays(self._path, "a file of capacity") as archive:
            made_for = tuple(int(archive[name]) for name in ("format", "bin_ms", "horizon_bins"))
            if made_for[0] not in (1, FORMAT) or made_for[1:] != (self._bin_ms, self._horizon_bins):
                raise CorruptFile(self._path, f"made for format, bins and horizon {made_for}")
            kept = unpack_lines(archive["metrics"])
            names = _ARRAYS if made_for[0] == FORMAT else [name for name in _ARRAYS if name != "scales"]
            arrays = {name: archive[name] for name in names}
        for place, metric in enumerate(self._metrics):
            if metric not in kept:
                continue
            for name, stack in arrays.items():
                own, found = getattr(self._calibrations[place], name), stack[kept.index(metric)]
                if own.shape != found.shape or own.dtype != found.dtype:
                    raise CorruptFile(self._path, f"{name} is not {own.dtype} of shape {own.shape}")
                if name == "scales" and not (np.isnan(found) | (np.isfinite(found) & (found > 0))).all():
                    raise CorruptFile(self._path, "scales holds other than numbers above 0")
                if name in _SUMS and not (np.isfinite(found) & (found >= 0)).all():
                    raise CorruptFile(self._path, f"{name} holds other than sums from 0 on")
                own[...] = found


_ARRAYS = tuple(item.name for item in fields(Calibration))
_SUMS = ("tallies", "brier", "n_settled")


def _join(guesses: Sequence[Guess]) -> Guess:
    """Return one guess of those of several parts of the fleet."""
    return Guess(
        np.concatenate([found.centres for found in guesses], axis=1),
        np.concatenate([found.scales for found in guesses], axis=1),
        np.concatenate([found.shares for found in guesses]),
        np.concatenate([found.now for found in guesses]),
    )


def _newest(values: Floats32) -> Floats32:
    """Return (series,): the newest known one of means (series, bin); NaN = none is known.

    >>> _newest(np.array([[1.0, 2.0], [3.0, np.nan], [np.nan, np.nan]], np.float32)).tolist()
    [2.0, 3.0, nan]
    """
    newest = values[:, -1].copy()
    rows = np.flatnonzero(np.isnan(newest))
    past = values[rows, ::-1]
    newest[rows] = past[np.arange(len(rows)), np.isfinite(past).argmax(axis=1)]
    return newest


def _stand(calibration: Calibration, said: Said, now: Floats32, quantiles: Floats32) -> _Standing:
    """Return what one metric's answers need."""
    choices = [calibration.choose(column) for column in range(len(LIMITS))]
    told = np.stack([said.told[source, :, column] for column, (source, _why) in enumerate(choices)])
    first = []
    for quantile in (2, 1):
        reached = quantiles[..., quantile, None] >= np.array(LIMITS, np.float32)  # (series, step, limit)
        first.append(np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, 0).astype(np.uint16))
    records = tuple(_record(calibration, column, *choice) for column, choice in enumerate(choices))
    return _Standing(told, now, first[0], first[1], records)


def _record(calibration: Calibration, column: int, source: int, why: str) -> dict[str, Any]:
    """Return which source answers for a limit, and how good all were."""
    n_windows, scores = calibration.brier_scores(column)
    kept = calibration.reliability(source, column)
    return {
        "by": SOURCES[source],
        "why": why,
        "windows": n_windows,
        "brier": dict(zip(SOURCES, np.round(scores, 4).tolist(), strict=True)) if n_windows else None,
        "reliability": [
            {"windows": int(n), "said": round(float(p), 3), "passed": round(float(share), 3)}
            for n, p, share in kept
            if n
        ],
    }


def _rank(row: Mapping[str, Any]) -> tuple[bool, bool, float, str]:
    """Return what rows are sorted by: silent servers last, those over the limit first, then the likeliest."""
    return row["silent_since"] is not None, row["state"] != OVER, -(row["p"] or 0.0), row["server"]


def _round(value: Any, digits: int) -> float | None:
    return round(float(value), digits) if np.isfinite(value) else None
