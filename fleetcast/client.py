"""`Fleetcast`: a running daemon from Python, in DataFrames.

    from fleetcast.client import Fleetcast
    with Fleetcast("http://127.0.0.1:8000") as fleet:
        fleet.feed(frame)                  # timestamp, server_name, and a column for each metric
        fleet.forecast("web-01")           # timestamp, metric, p10, p50, p90, source
        fleet.forecasts()                  # of every server, with server_name

Owns: the shapes of these frames, and in which pieces a frame is sent and a long past is asked for.
Does not know: HTTP and when to try again (`sources/client.py`), what an answer means (docs/python.md).
Every error is of the tree in `errors.py`: `BadData` for what the caller gave, `DaemonAway` for a daemon
that does not answer or refuses; each says what would be right.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import pandas as pd

from fleetcast.clock import iso_z, parse_plain_utc
from fleetcast.errors import BadData, quote
from fleetcast.ingest.rules import is_metric_name
from fleetcast.loop import Stop
from fleetcast.sources.client import DaemonClient, FeedAnswer, Patience, RecordSender, RequestRefused

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FeedAnswer", "Fleetcast"]
DEFAULT_URL = "http://127.0.0.1:8000"
TIME, SERVER = "timestamp", "server_name"
_PIECE_ROWS, _PIECE_VALUES = 50_000, 1_000_000  # of one request; the daemon takes about twice as many values
_JSON_ROWS = 5_000  # some 1 MB
_SHARE_SERVERS = 5_000  # of one question about the whole fleet: some 25 MB
_MOST_DAYS, _MOST_BINS = 31, 90_000  # of one question about the past
_MOST_ROWS = 1000  # of one answer about capacity
_NUMBERS = ("floating", "integer", "mixed-integer-float", "decimal", "integer-na")
_NO_VALUES = ("string", "empty", "categorical")  # text, or nothing at all
_QUANTILES = ("p10", "p50", "p90")
Moment = datetime | str
T = TypeVar("T")


class Fleetcast:
    """One daemon. Not thread safe: give each thread its own.

    A request that a daemon does not answer, or answers with 5xx (503: after its Retry-After), is sent
    again until `give_up_s` have passed; so is a 429, by which it holds its feeders. No other 4xx is.
    Records are delivered at least once: the daemon keeps one row for a server and a time, so that rows
    sent twice are one.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        give_up_s: float = 60.0,
    ) -> None:
        """Remember where the daemon is; nothing is asked yet.

        Args:
            api_key: what the daemon's TFT_API_KEY is; None reads that variable here.
            timeout_s: of one request.
            give_up_s: how long a daemon may fail, or not answer.
        Raises:
            BadData: the address is none.
        """
        self._client = DaemonClient(url, api_key=api_key, timeout_s=timeout_s)
        stop = Stop()  # never requested: Ctrl+C raises KeyboardInterrupt as in any other library
        self._sender = RecordSender(self._client, stop, give_up_s=give_up_s)
        self._patience = Patience(stop, give_up_s, waits_while_busy=False)

    def feed(self, records: pd.DataFrame) -> FeedAnswer:
        """Send records: a row each, `timestamp`, `server_name`, and a column of numbers for each metric.

        Times without a zone are UTC. NaN means absent. Columns of text and columns whose names are no
        metric's stay here. While the daemon asks for patience (429, 503), this waits.

        Returns:
            how many rows the daemon made durable, how many it refused, and the first refusals of each
            request with the places of their rows (`rows`).
        Raises:
            BadData: the frame cannot be records; the message names the column.
            DaemonAway: the daemon took no more; what went before is durable, and all may be sent again.
        """
        frame, metrics = _check(records)
        n_rows, pack = _packing(len(metrics))
        answer = FeedAnswer(0, 0)
        for start in range(0, len(frame), n_rows):
            piece = pack(frame.iloc[start : start + n_rows], metrics)
            try:
                part = self._sender.send(piece)
            except RequestRefused as error:
                if error.is_about_the_question:
                    raise BadData(error.detail) from error
                raise
            assert part is not None, "no stop is ever requested"
            answer = answer.then(part, start)
        return answer

    def forecast(self, server: str) -> pd.DataFrame:
        """Return the newest forecast of one server, a row for each metric and bin ahead.

        Returns:
            columns timestamp (start of the bin, UTC), metric, p10, p50, p90 in the metric's unit, and source
            (`model` or `fallback`); no rows while the server's first bin is open.
        Raises:
            BadData: the daemon does not know the server; the message names the nearest.
        """
        document = self._ask("/predictions/current", server=_name("server", server))
        ((_, told),) = document["predictions"].items()
        times = pd.to_datetime(pd.Series(told["timestamps"], dtype="str"), utc=True)
        sources = told.get("sources") or {}
        parts = [
            pd.DataFrame({TIME: times, "metric": metric} | {name: said[name] for name in _QUANTILES}).assign(
                source=sources.get(metric, told["source"])
            )
            for metric, said in (told["forecast"] or {}).items()
        ]
        columns = [TIME, "metric", *_QUANTILES, "source"]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

    def forecasts(self) -> pd.DataFrame:
        """Return the newest forecasts of the whole fleet, asked for share by share; needs pyarrow.

        Returns:
            a row for each server, metric and bin ahead: the columns of `forecast`, and server_name; names and
            sources are categories. 10,000 servers of 4 metrics, 8 hours ahead, are 3.8 million rows.
        Raises:
            DaemonAway: the daemon does not answer, or refuses.
        """
        n_shares = -(-max(1, self._ask("/status")["servers"]) // _SHARE_SERVERS)
        paths = [f"/predictions/current?shard={which}/{n_shares}" for which in range(n_shares)]
        return _long([self._answer(partial(self._client.table, path)) for path in paths])

    def history(
        self, server: str, metric: str, start: Moment | None = None, end: Moment | None = None
    ) -> pd.DataFrame:
        """Return one metric of one server as it was, and as it was forecast; any length, piece by piece.

        Args:
            start, end: ISO 8601 or datetimes, without a zone UTC; 48 hours up to the newest closed bin.
        Returns:
            index: start of each bin (UTC); `actual`, the bin's mean, NaN without a record; and for each
            settled horizon, such as 12, `p10_12`, `p50_12`, `p90_12`: what was said of it 12 bins before.
        Raises:
            BadData: no such server or metric, no such time, or no closed bin between the two.
        """
        parts, refusal = [], None
        server, metric = _name("server", server), _name("metric", metric)
        for first, last in self._pieces(start, end):
            try:
                document = self._ask("/history", server=server, metric=metric, start=first, end=last)
            except BadData as error:  # it sent nothing in this piece; in others it may have
                refusal = error
            else:
                parts.append(_past(document, metric))
        if not parts and refusal is not None:
            raise refusal
        return pd.concat(parts)

    def accuracy(
        self,
        server: str | None = None,
        metric: str | Sequence[str] = (),
        hours: int = 24,
        worst: int = 0,
    ) -> pd.DataFrame:
        """Return how good settled forecasts were beside repeating the last value.

        Args:
            server: one server; None is the fleet.
            hours: how far back, at most 168.
            worst: instead of the means, the series with the highest ratios, so many of them.
        Returns:
            columns server (None = the fleet), metric, horizon (bins ahead), bins (how many forecasts), error
            (mean |p50 - actual|), last_value_error, ratio of the two (below 1 is better), inside (share of
            actuals from p10 to p90).
        Raises:
            BadData: no such server or metric.
        """
        document = self._ask("/accuracy", server=server, metric=metric, hours=hours, worst=worst)
        means = [
            {"server": document["server"], "metric": name, "horizon": int(horizon), **told}
            for name, by_horizon in document["metrics"].items()
            for horizon, told in by_horizon.items()
        ]
        columns = ["server", "metric", "horizon", "bins", "error", "last_value_error", "ratio", "inside"]
        return pd.DataFrame(document["worst"] if worst else means, columns=columns)

    def capacity(
        self,
        server: str | None = None,
        metric: str | Sequence[str] = (),
        limit: float = 90.0,
        min_p: float = 0.1,
    ) -> pd.DataFrame:
        """Return which servers pass a limit within the horizon (8 hours), those that are over first.

        Args:
            metric: in percent; none means every one that is forecast.
            limit: 70, 80, 90 or 95 percent.
            min_p: from which probability on; with a server named, it is told whatever its probability.
        Returns:
            at most 1,000 rows; columns server, metric, state, now, p, first_possible, likely, since,
            silent_since, since_or_before (docs/capacity.md), and of the source that answers its name
            (`by`) and Brier score (`brier`). Silent servers come last.
        Raises:
            BadData: no such server, metric or limit.
        """
        asked = {"server": server, "metric": metric, "limit": limit, "min_p": min_p, "rows": _MOST_ROWS}
        document = self._ask("/capacity", **asked)
        times = ["first_possible", "likely", "since", "silent_since"]
        names = ["server", "metric", "state", "now", "p", *times, "since_or_before"]
        frame = pd.DataFrame(document["rows"], columns=names)
        for name in times:
            frame[name] = pd.to_datetime(frame[name], utc=True)
        records = document["metrics"]
        by = {name: record["by"] for name, record in records.items()}
        scores = {name: (record["brier"] or {}).get(record["by"]) for name, record in records.items()}
        return frame.assign(by=frame.metric.map(by), brier=frame.metric.map(scores).astype("float64"))

    def full_by(
        self, metric: str = "disk_usage_pct", limit: float = 95.0, server: str | None = None
    ) -> pd.DataFrame:
        """Return by when servers reach a limit, days and weeks ahead, the earliest first.

        Returns:
            at most 1,000 rows; columns server, now, per_day, basis_days, full_from and full_to (NaT: no
            date), p_within, within_days, why_no_date, silent_since (docs/capacity.md). `now` is the highest
            5-minute mean of the newest whole day.
        Raises:
            BadData: no such server, or no whole day of such a metric is known.
        """
        document = self._ask("/capacity/dates", metric=metric, limit=limit, server=server, rows=_MOST_ROWS)
        rows = document["rows"]
        ranges = [row["full_between"] or (None, None) for row in rows]
        names = ["server", "now", "per_day", "basis_days", "p_within", "within_days", "why_no_date"]
        frame = pd.DataFrame(rows, columns=[*names, "silent_since"])
        frame["silent_since"] = pd.to_datetime(frame["silent_since"], utc=True)
        for place, name in enumerate(("full_from", "full_to")):
            frame.insert(
                4 + place, name, pd.to_datetime(pd.Series([one[place] for one in ranges], dtype="str"))
            )
        return frame

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, path: str, **fields: Any) -> dict[str, Any]:
        """Return the answer to a question.

        Raises:
            BadData: it names something that the daemon does not know.
            DaemonAway: the daemon does not answer, or refuses.
        """
        return self._answer(partial(self._client.get, path, **fields))

    def _answer(self, request: Callable[[], T]) -> T:
        """Return the answer to a request that is repeated as long as it can pass; raises as `_ask` does."""
        try:
            answer = self._patience.ask(request)
        except RequestRefused as error:
            if error.is_about_the_question:
                raise BadData(error.detail) from error
            raise
        assert answer is not None, "no stop is ever requested"
        return answer

    def _pieces(self, start: Moment | None, end: Moment | None) -> Iterator[tuple[str | None, str | None]]:
        """Yield the questions that a stretch of the past takes, oldest first."""
        last = None if end is None else _time("end", end)
        if start is None:
            yield None, None if last is None else iso_z(last)
            return
        first = _time("start", start)
        bins = self._ask("/status")["bins"]
        length = timedelta(seconds=min(_MOST_DAYS * 86_400, _MOST_BINS * bins["bin_s"]))
        if bins["newest_closed"] is not None:
            newest = parse_plain_utc(bins["newest_closed"]) + timedelta(seconds=bins["bin_s"])
            last = newest if last is None else min(last, newest)
        if last is None or last <= first:  # the daemon says what is wrong with that
            yield iso_z(first), None if end is None else iso_z(_time("end", end))
            return
        while first < last:
            yield iso_z(first), iso_z(min(first + length, last))
            first += length


def _name(what: str, value: object) -> str:
    """Return a name; raises BadData where it is none, since without one the daemon answers about all."""
    if not isinstance(value, str) or not value:
        raise BadData(f"{what} must be a name, got {quote(value)}")
    return value


def _long(tables: Sequence["pa.Table"]) -> pd.DataFrame:
    """Return the shares of an answer of `GET /predictions/current`, a row for each bin ahead."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = pa.concat_tables(tables)
    table = table.filter(table["p50"].is_valid())
    n_bins = table["p50"].combine_chunks().value_lengths().to_numpy()
    starts_ms = np.repeat(table["start"].cast("int64").to_numpy(), n_bins)
    ahead = np.arange(len(starts_ms)) - np.repeat(np.cumsum(n_bins) - n_bins, n_bins)
    times = starts_ms + ahead * np.repeat(1000 * table["step_s"].to_numpy(), n_bins).astype(np.int64)
    kinds = {
        name: table[name]
        .dictionary_encode()
        .combine_chunks()
        .to_pandas()
        .repeat(n_bins)
        .reset_index(drop=True)
        for name in (SERVER, "metric", "source")
    }
    said = {name: pc.list_flatten(table[name]).to_numpy() for name in _QUANTILES}
    frame = pd.DataFrame({TIME: pd.to_datetime(times, unit="ms", utc=True), **kinds, **said})
    return frame[[TIME, SERVER, "metric", *_QUANTILES, "source"]]


def _past(document: Mapping[str, Any], metric: str) -> pd.DataFrame:
    """Return one answer to `GET /history` as a frame."""
    told = document["metrics"][metric]
    step = pd.Timedelta(seconds=document["bin_s"])
    index = pd.date_range(document["start"], periods=len(told["actual"]), freq=step, name=TIME)
    columns = {"actual": told["actual"]} | {
        f"{name}_{horizon}": said[name] for horizon, said in told["said"].items() for name in _QUANTILES
    }
    return pd.DataFrame(columns, index=index, dtype="float64")


def _time(name: str, moment: Moment) -> datetime:
    """Return an aware time.

    Raises:
        BadData: it is none.
    """
    try:
        return parse_plain_utc(moment if isinstance(moment, str) else moment.isoformat())
    except (ValueError, AttributeError):
        example = "ISO 8601 such as 2026-01-15T10:00:00Z, or a datetime"
        raise BadData(f"{name} must be {example}, got {quote(moment)}") from None


def _check(records: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return a frame of records and the names of its metrics.

    Raises:
        BadData: it cannot be records.
    """
    if not isinstance(records, pd.DataFrame):
        raise BadData(
            f"feed takes a DataFrame, got {type(records).__name__}",
            hint="pd.DataFrame(...) makes one of lists and dicts",
        )
    frame = records.reset_index() if TIME in records.index.names else records
    have = ", ".join(map(str, frame.columns)) or "none"
    twice = frame.columns[frame.columns.duplicated()].tolist()
    if twice:
        raise BadData(f"the DataFrame has the column {quote(twice[0])} twice", hint="drop or rename one")
    for name in (TIME, SERVER):
        if name not in frame.columns:
            raise BadData(f"the DataFrame has no column {name!r}", hint=f"it has {have}; rename one of them")
    times, names = frame[TIME].dtype, frame[SERVER].dtype
    if not (pd.api.types.is_datetime64_any_dtype(times) or _may_be_text(times)):
        raise BadData(
            f"timestamp must be times or ISO 8601 text, got {times}", hint="pd.to_datetime(..., unit='s')"
        )
    if not _may_be_text(names):
        raise BadData(f"server_name must be text, got {names}", hint="frame.server_name.astype(str)")
    metrics = [name for name in frame.columns if name not in (TIME, SERVER) and _is_metric(name, frame[name])]
    if not metrics:
        hint = f"a metric's name is of the form [a-z][a-z0-9_]*; there are {have}"
        raise BadData("the DataFrame has no column of numbers with a metric's name", hint=hint)
    return frame, metrics


def _may_be_text(kind: Any) -> bool:
    if isinstance(kind, pd.CategoricalDtype):
        kind = kind.categories.dtype
    return bool(pd.api.types.is_string_dtype(kind))  # `object` is one: its cells decide


def _is_metric(name: object, column: "pd.Series[Any]") -> bool:
    """Return whether a column is a metric; one of text is none.

    Raises:
        BadData: its name is a metric's, and its values are neither numbers nor text.
    """
    if not is_metric_name(name):
        return False
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind in _NUMBERS:
        return True
    if kind in _NO_VALUES:
        return bool(pd.api.types.is_numeric_dtype(column.dtype))
    hint = f"frame.{name}.astype(int)" if kind == "boolean" else "pd.to_numeric, or drop it"
    raise BadData(f"column {quote(name)} must be numbers, it holds {kind}", hint=hint)


def _packing(n_metrics: int) -> tuple[int, Any]:
    """Return how many rows one request takes, and what makes its records of a frame."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return _JSON_ROWS, _rows_of
    return max(1, min(_PIECE_ROWS, _PIECE_VALUES // n_metrics)), _table_of


def _table_of(frame: pd.DataFrame, metrics: Sequence[str]) -> "pa.Table":
    import pyarrow as pa

    columns = {}
    for name in (TIME, SERVER, *metrics):
        try:
            columns[name] = pa.array(frame[name], from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError) as error:
            says = f"column {quote(name)} cannot be sent: {error}"
            raise BadData(says, hint="one type a column") from error
    return pa.table(columns)


def _rows_of(frame: pd.DataFrame, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return the same without pyarrow: what is absent is left out."""
    times = frame[TIME].map(lambda at: at.isoformat() if isinstance(at, datetime) else at, na_action="ignore")
    columns = [times, frame[SERVER], *(frame[name] for name in metrics)]
    cells = zip(*(column.astype(object).tolist() for column in columns), strict=True)
    names = (TIME, SERVER, *metrics)
    found = [
        {name: cell for name, cell in zip(names, row, strict=True) if not pd.isna(cell)} for row in cells
    ]
    for name in metrics:
        if any(abs(record.get(name, 0.0)) == math.inf for record in found):
            raise BadData(f"column {quote(name)} holds infinity", hint="NaN means absent")
    return found
