"""What a server was, and what was said of it before: the answers to `GET /history` and `GET /accuracy`.

Owns: the shape of these answers (docs/page.md), where actuals come from (the daemon's memory as far as
it reaches, the buffer beyond), how much one question may ask for, and the accuracy of settled forecasts
beside that of repeating the last value. Does not know: HTTP; how bins close or forecasts settle.

One answer reads files: those who ask take turns (`api/page.py`), and nothing here waits for a sweep.
"""

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.bins import bin_means
from fleetcast.clock import DAY_MS, HOUR_MS, from_ms, iso_z, to_ms
from fleetcast.errors import FleetcastError, quote
from fleetcast.ingest.rules import parse_timestamp_ms, to_significant
from fleetcast.schema import Floats, Floats32, Longs, SettledForecasts
from fleetcast.serving.board import SIGNIFICANT_DIGITS, UnknownServer
from fleetcast.serving.roster import Fleet, meant
from fleetcast.setting import nearest
from fleetcast.storage.store import DataBuffer

logger = logging.getLogger(__name__)

DEFAULT_HOURS = 48
MOST_DAYS = 31
MOST_VALUES = 100_000  # bins x metrics of one answer
MOST_ROWS = 2_000_000  # settled forecasts that one answer about accuracy reads
MOST_HOURS = 168
_ROWS_AT_ONCE = 300_000  # settled forecasts read within an answer about the fleet: half a second
_FEWEST_BINS = 12  # settled forecasts of a series from which it is compared with others
_MEMORY, _BUFFER = "memory", "buffer"
_QUANTILES = ("p10", "p50", "p90")


class BadQuestion(FleetcastError):
    """Raised when a question names no time, asks for too much, or for metrics that no server sent."""


@dataclass(frozen=True)
class Question:
    """A stretch of one server's past, on whole bins."""

    server: str
    metrics: tuple[str, ...]
    start_ms: int
    end_ms: int
    bin_ms: int

    @property
    def n_bins(self) -> int:
        """Return how many bins it is about."""
        return (self.end_ms - self.start_ms) // self.bin_ms


@dataclass(frozen=True)
class AccuracyQuestion:
    """Whose forecasts are to be judged."""

    server: str = ""  # "" = every server
    metrics: tuple[str, ...] = ()  # none = those that are forecast
    hours: int = 24
    n_worst: int = 0


class Past:
    """Answers about servers' pasts; safe from any thread."""

    def __init__(self, fleet: Fleet, buffer: DataBuffer, settle_horizons: Sequence[int]) -> None:
        self._fleet = fleet
        self._history = fleet.history
        self._buffer = buffer
        self._horizons = tuple(sorted(set(settle_horizons)))
        self._ratios: tuple[int, dict[str, float]] = (-1, {})  # of which closed bin; by server
        self._aside = ThreadPoolExecutor(1, "ratios")  # begins a thread at its first work
        self._is_counting = False
        self._oldest: tuple[int, int | None] = (-1, None)  # of which closed bin; milliseconds

    def answer(
        self, server: str, metrics: Sequence[str] = (), start: str | None = None, end: str | None = None
    ) -> dict[str, Any]:
        """Return the document of one server's past.

        Args:
            metrics: none means those that are forecast.
            start: ISO 8601; None is `DEFAULT_HOURS` before the end.
            end: ISO 8601; None is the end of the newest closed bin.
        Raises:
            BadQuestion: with what would be right.
            UnknownServer: nothing is known of it in this stretch.
        """
        return self.tell(self.question(server, metrics, start, end))

    def question(self, server: str, metrics: Sequence[str], start: str | None, end: str | None) -> Question:
        """Return what is asked for, on whole bins and within bounds.

        Raises:
            BadQuestion: with what would be right.
        """
        bin_ms = self._history.bin_ms
        closed_ms = self._closed_end_ms()
        last = closed_ms if end is None else _time("end", end)
        end_ms = min(_up(last, bin_ms), closed_ms)
        first = end_ms - DEFAULT_HOURS * HOUR_MS if start is None else _time("start", start)
        if start is not None and end is not None and first >= last:
            what = f"end must be after start, got end {quote(end)} and start {quote(start)}"
            raise BadQuestion(what)
        start_ms = first // bin_ms * bin_ms
        names = tuple(dict.fromkeys(metrics)) or self._history.metrics
        unknown = [name for name in names if name not in self._known_metrics()]
        if unknown:
            what = f"no server sent a metric {quote(unknown[0])}"
            raise BadQuestion(what, hint="see /predictions/current")
        if end_ms <= start_ms and start is not None:
            newest = iso_z(from_ms(closed_ms))
            raise BadQuestion(
                "there is no closed bin between start and end", hint=f"the newest ends at {newest}"
            )
        if end_ms - start_ms > MOST_DAYS * DAY_MS:
            raise BadQuestion(f"one question is about at most {MOST_DAYS} days", hint="ask piece by piece")
        start_ms, end_ms = max(start_ms, 0), max(end_ms, 0)  # no record is older than 1970
        asked = Question(meant(server), names, start_ms, end_ms, bin_ms)
        if asked.n_bins * len(names) > MOST_VALUES:
            raise BadQuestion(
                f"{asked.n_bins} bins of {len(names)} metrics are over the limit of {MOST_VALUES} values",
                hint="name fewer metrics, or a shorter stretch",
            )
        return asked

    def tell(self, asked: Question) -> dict[str, Any]:
        """Return the answer to a question.

        Raises:
            UnknownServer: nothing is known of the server in this stretch.
        """
        oldest_ms = self.oldest_ms()
        if oldest_ms is not None and asked.end_ms <= oldest_ms:
            oldest = f"the oldest record of any server is of {iso_z(from_ms(oldest_ms))}"
            what = f"{quote(asked.server)} sent nothing between start and end"
            raise UnknownServer(what, hint=oldest)
        reach = max(self._horizons, default=0) * asked.bin_ms  # a forecast's last value lies so far back
        actuals, source = self._actuals(asked, asked.start_ms - reach)
        settled = self._buffer.read_server_predictions(asked.server, asked.start_ms, asked.end_ms)
        if np.isnan(actuals).all() and not len(settled) and self._is_unknown(asked.server):
            raise self._unknown_server(asked.server, "it sent nothing between start and end")
        forecast = set(self._history.metrics)
        horizons = {metric: self._horizons if metric in forecast else () for metric in asked.metrics}
        return {
            "server": asked.server,
            "bin_s": asked.bin_ms // 1000,
            "start": iso_z(from_ms(asked.start_ms)),
            "end": iso_z(from_ms(asked.end_ms)),
            "source": source,
            "metrics": {
                metric: _metric_json(
                    asked, horizons[metric], actuals[row], settled.where(settled.metric == metric)
                )
                for row, metric in enumerate(asked.metrics)
            },
        }

    def oldest_ms(self) -> int | None:
        """Return when the oldest stored record is of, None before the first; looked up once a bin."""
        end_ms = self._closed_end_ms()
        if self._oldest[0] != end_ms or self._oldest[1] is None:
            oldest = self._buffer.oldest_record_time()
            self._oldest = (end_ms, None if oldest is None else to_ms(oldest))
        return self._oldest[1]

    def stored_span(self, server: str) -> tuple[int, int] | None:
        """Return when the oldest and the newest stored record of a server are of; None: there is none."""
        batch = self._buffer.read_server(meant(server), 0, self._closed_end_ms(), ())
        return (int(batch.timestamps_ms[0]), int(batch.timestamps_ms[-1])) if len(batch) else None

    def accuracy(self, asked: "AccuracyQuestion") -> dict[str, Any]:
        """Return how good settled forecasts were, over the fleet or one server, and where they were worst.

        A large fleet's stretch is shortened to `MOST_ROWS` settled forecasts; the answer says which it is.

        Raises:
            BadQuestion, UnknownServer: with what would be right.
        """
        metrics = tuple(dict.fromkeys(asked.metrics)) or self._history.metrics
        unknown = [name for name in metrics if name not in self._history.metrics]
        if unknown:
            known = ", ".join(self._history.metrics)
            raise BadQuestion(f"{quote(unknown[0])} is not forecast", hint=f"one of {known}")
        server = self.require(asked.server) if asked.server else None
        names = (server,) if server else self._fleet.servers().server_names
        bin_ms, end_ms = self._history.bin_ms, self._closed_end_ms()
        a_bin = max(1, len(names) * len(metrics) * len(self._horizons))
        n_bins = max(1, min(asked.hours * HOUR_MS // bin_ms, MOST_ROWS // a_bin))
        start_ms = end_ms - n_bins * bin_ms
        sums = self._sum_errors(names, metrics, start_ms, end_ms)
        worst = np.argsort(-sums.ratios().ravel(), kind="stable")[: asked.n_worst]
        told = [sums.one(names, metrics, self._horizons, int(place)) for place in worst]
        return {
            "server": server,
            "servers": len(names),
            "bin_s": bin_ms // 1000,
            "start": iso_z(from_ms(start_ms)),
            "end": iso_z(from_ms(end_ms)),
            "metrics": sums.by_metric(metrics, self._horizons),
            "worst": [item for item in told if item["ratio"] is not None and item["bins"] >= _FEWEST_BINS],
        }

    def ratios(self, server_names: Sequence[str]) -> Floats:
        """Return each server's error over that of repeating the last value: the mean of its series of a day.

        Of a large fleet it is a shorter time, as in `accuracy`, and it is counted beside the answers: until
        then the ratios are those of the bin before. One thread asks at a time. NaN = too few settled.
        """
        end_ms = self._closed_end_ms()
        if self._ratios[0] != end_ms and not self._is_counting:
            metrics, bin_ms = self._history.metrics, self._history.bin_ms
            a_bin = max(1, len(server_names) * len(metrics) * len(self._horizons))
            n_bins = max(1, min(DAY_MS // bin_ms, MOST_ROWS // a_bin))
            asked = tuple(server_names), end_ms - n_bins * bin_ms, end_ms
            if n_bins * a_bin <= _ROWS_AT_ONCE:
                self._count_ratios(*asked)
            else:
                self._is_counting = True
                self._aside.submit(self._count_aside, *asked)
        return np.array([self._ratios[1].get(name, np.nan) for name in server_names], dtype=np.float64)

    def _count_aside(self, names: Sequence[str], start_ms: int, end_ms: int) -> None:
        try:
            self._count_ratios(names, start_ms, end_ms)
        except Exception as error:  # the table says it without this column
            logger.warning("how good forecasts were is not known for the fleet's table: %s", error)
        finally:
            self._is_counting = False

    def _count_ratios(self, names: Sequence[str], start_ms: int, end_ms: int) -> None:
        found = self._sum_errors(names, self._history.metrics, start_ms, end_ms).ratios()
        n_known = (found >= 0.0).sum(axis=(1, 2))
        sums = np.where(found >= 0.0, found, 0.0).sum(axis=(1, 2))
        means = np.where(n_known > 0, sums / np.maximum(n_known, 1), np.nan)
        self._ratios = (end_ms, dict(zip(names, means.tolist(), strict=True)))

    def require(self, server: str) -> str:
        """Return the name of a server that is known.

        Raises:
            UnknownServer: it is not; the message names the nearest.
        """
        name = meant(server)
        if self._is_unknown(name):
            raise self._unknown_server(server, "it sent nothing within 8 days")
        return name

    def _sum_errors(
        self, names: Sequence[str], metrics: Sequence[str], start_ms: int, end_ms: int
    ) -> "_ErrorSums":
        """Add up the errors of the settled forecasts of these series."""
        bin_ms = self._history.bin_ms
        reach = max(self._horizons, default=0)
        n_bins = (end_ms - start_ms) // bin_ms + reach
        columns = [self._history.metrics.index(metric) for metric in metrics]
        actuals = np.full((len(names), len(metrics), n_bins), np.nan, dtype=np.float32)
        for row, name in enumerate(names):
            kept = self._history.past(name, end_ms - bin_ms, n_bins)
            if kept is not None:
                actuals[row] = kept[columns]
        if len(names) == 1:
            settled = self._buffer.read_server_predictions(names[0], start_ms, end_ms)
        else:
            settled = self._buffer.read_predictions(start_ms, end_ms)
        codes = (
            _codes(settled.server_name, names),
            _codes(settled.metric, metrics),
            _codes(settled.horizon.tolist(), self._horizons),
        )
        is_ours = settled.target_ms - settled.origin_ms == settled.horizon.astype(np.int64) * bin_ms
        is_chosen = is_ours & (np.minimum.reduce(codes) >= 0)
        rows, columns_of, horizons = (code[is_chosen] for code in codes)
        of = (settled.origin_ms[is_chosen] - start_ms) // bin_ms + reach
        last_values = actuals[rows, columns_of, of]
        shape = (len(names), len(metrics), len(self._horizons))
        places = np.ravel_multi_index((rows, columns_of, horizons), shape)
        return _ErrorSums.of(settled.where(is_chosen), places, last_values, shape)

    def _unknown_server(self, server: str, hint: str) -> UnknownServer:
        close = nearest(server, list(self._fleet.servers().server_names))
        return UnknownServer(f"unknown server {quote(server)}{close}", hint=hint)

    def _actuals(self, asked: Question, first_ms: int) -> tuple[Floats, str]:
        """Return (metric, bin) from `first_ms` to the question's end, and where they come from."""
        history = self._history
        n_bins = (asked.end_ms - first_ms) // asked.bin_ms
        oldest_ms = history.oldest_kept_ms
        is_kept = oldest_ms is not None and asked.start_ms >= oldest_ms
        if is_kept and set(asked.metrics) <= set(history.metrics):
            kept = history.past(asked.server, asked.end_ms - asked.bin_ms, n_bins)
            if kept is not None:
                rows = [history.metrics.index(metric) for metric in asked.metrics]
                return kept[rows].astype(np.float64), _MEMORY
        return self._read_means(asked, first_ms, n_bins), _BUFFER

    def _read_means(self, asked: Question, first_ms: int, n_bins: int) -> Floats:
        """Return the same from the buffer's files."""
        means = np.full((len(asked.metrics), n_bins), np.nan)
        batch = self._buffer.read_server(asked.server, first_ms, asked.end_ms, asked.metrics)
        if len(batch):
            absent = np.full(len(batch), np.nan)
            values = np.array([batch.metrics.get(metric, absent) for metric in asked.metrics]).T
            _, starts, of_bin = bin_means(batch.server_codes, batch.timestamps_ms, values, asked.bin_ms)
            means[:, (starts - first_ms) // asked.bin_ms] = of_bin.T
        return means

    def _closed_end_ms(self) -> int:
        taken_ms = self._history.taken_bin_ms
        if taken_ms is None:
            return to_ms(self._fleet.clock.now()) // self._history.bin_ms * self._history.bin_ms
        return taken_ms + self._history.bin_ms

    def _known_metrics(self) -> set[str]:
        return {*self._history.metrics, *self._fleet.roster.metric_names()}

    def _is_unknown(self, server: str) -> bool:
        return bool(self._history.unknown([server]))


def numbers(values: Floats) -> list[float | None]:
    """Return values as JSON has them: as exact as a forecast, null for NaN.

    >>> numbers(np.array([1.234567, np.nan]))
    [1.2346, None]
    """
    rounded = to_significant(np.asarray(values, dtype=np.float64), SIGNIFICANT_DIGITS).tolist()
    return [None if math.isnan(value) else value for value in rounded]


def _metric_json(
    asked: Question, horizons: Sequence[int], actuals: Floats, settled: SettledForecasts
) -> dict[str, Any]:
    """Return one metric's part.

    Args:
        horizons: those that settle; none for a metric that is not forecast.
        actuals: the bins asked for, after those that a forecast's last value may lie in.
    """
    said, accuracy = {}, {}
    for horizon in horizons:
        is_ours = (
            settled.target_ms - settled.origin_ms == horizon * asked.bin_ms
        )  # not bins of another length
        rows = settled.where((settled.horizon == horizon) & is_ours)
        said[str(horizon)] = _quantiles(asked, rows)
        if len(rows):
            accuracy[str(horizon)] = _accuracy(asked, rows, actuals)
    return {"actual": numbers(actuals[len(actuals) - asked.n_bins :]), "said": said, "accuracy": accuracy}


def _quantiles(asked: Question, rows: SettledForecasts) -> dict[str, list[float | None]]:
    """Return what was forecast for each bin, by quantile."""
    places = (rows.target_ms - asked.start_ms) // asked.bin_ms
    told = {}
    for name in _QUANTILES:
        values = np.full(asked.n_bins, np.nan)
        values[places] = getattr(rows, name)
        told[name] = numbers(values)
    return told


def _accuracy(asked: Question, rows: SettledForecasts, actuals: Floats) -> dict[str, Any]:
    """Return how far forecasts of one horizon were off, beside repeating the last value, on the same bins."""
    first_ms = asked.end_ms - len(actuals) * asked.bin_ms
    last_values = actuals[(rows.origin_ms - first_ms) // asked.bin_ms]
    is_known = np.isfinite(last_values)
    actual, said = rows.actual[is_known], rows.p50[is_known]
    is_inside = (actual >= rows.p10[is_known]) & (actual <= rows.p90[is_known])
    repeated = np.abs(actual - last_values[is_known]).sum()
    return _means(
        int(is_known.sum()), float(np.abs(actual - said).sum()), float(repeated), float(is_inside.sum())
    )


@dataclass(frozen=True, slots=True, eq=False)
class _ErrorSums:
    """Sums over settled forecasts whose last value is known; each (server, metric, horizon)."""

    counts: Floats
    errors: Floats
    repeated: Floats  # of repeating the last value
    inside: Floats  # actuals from p10 to p90

    @classmethod
    def of(
        cls, rows: SettledForecasts, places: Longs, last_values: Floats32, shape: tuple[int, int, int]
    ) -> "_ErrorSums":
        """Add up rows, each at its place in the flattened shape."""
        is_known = np.isfinite(last_values)
        places, size = places[is_known], int(np.prod(shape))
        actual = rows.actual[is_known]
        is_inside = (actual >= rows.p10[is_known]) & (actual <= rows.p90[is_known])
        weights = (
            None,
            np.abs(actual - rows.p50[is_known]),
            np.abs(actual - last_values[is_known]),
            is_inside.astype(np.float64),
        )
        return cls(*(np.bincount(places, weight, size).astype(float).reshape(shape) for weight in weights))

    def ratios(self) -> Floats:
        """Return each series' error over that of the last value; -1 where there is too little to compare."""
        is_enough = (self.counts >= _FEWEST_BINS) & (self.repeated > 0)
        return np.where(is_enough, self.errors / np.where(is_enough, self.repeated, 1.0), -1.0)

    def by_metric(self, metrics: Sequence[str], horizons: Sequence[int]) -> dict[str, Any]:
        """Return what all servers have together, by metric and bins ahead."""
        sums = [part.sum(axis=0) for part in (self.counts, self.errors, self.repeated, self.inside)]
        return {
            metric: {
                str(horizon): _means(*(float(part[row, column]) for part in sums))
                for column, horizon in enumerate(horizons)
                if sums[0][row, column]
            }
            for row, metric in enumerate(metrics)
        }

    def one(
        self, names: Sequence[str], metrics: Sequence[str], horizons: Sequence[int], place: int
    ) -> dict[str, Any]:
        """Return one series at one horizon."""
        row, column, step = (int(index) for index in np.unravel_index(place, self.counts.shape))
        sums = (self.counts, self.errors, self.repeated, self.inside)
        means = _means(*(float(part[row, column, step]) for part in sums))
        return {"server": names[row], "metric": metrics[column], "horizon": horizons[step], **means}


def _codes(values: Sequence[Any] | NDArray[np.object_], known: Sequence[Any]) -> Longs:
    """Return the place of each value in `known`, -1 where it is not there."""
    places = {value: place for place, value in enumerate(known)}
    return np.fromiter((places.get(value, -1) for value in values), np.int64, len(values))


def _means(n_bins: float, errors: float, repeated: float, inside: float) -> dict[str, Any]:
    """Return the accuracy that sums over `n_bins` forecasts make."""
    if not n_bins:
        return {"bins": 0, "error": None, "last_value_error": None, "ratio": None, "inside": None}
    return {
        "bins": int(n_bins),
        "error": round(errors / n_bins, 4),
        "last_value_error": round(repeated / n_bins, 4),
        "ratio": round(errors / repeated, 4) if repeated else None,
        "inside": round(inside / n_bins, 4),
    }


def _time(field: str, text: str) -> int:
    """Return milliseconds of a time in a query.

    Raises:
        BadQuestion: it is none.
    """
    try:  # an unencoded "+" of an offset arrives as a space
        return parse_timestamp_ms(text.replace(" ", "+") if "T" in text else text)
    except (ValueError, OverflowError) as error:
        what = f"{field} must be ISO 8601 such as 2026-01-15T10:00:00Z, got {quote(text)}"
        raise BadQuestion(what) from error


def _up(moment_ms: int, bin_ms: int) -> int:
    return -(-moment_ms // bin_ms) * bin_ms
