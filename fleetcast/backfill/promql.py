"""History out of a Prometheus: the mapping rules as PromQL, asked for in bounded pieces, as tables.

Owns: how a rule of `fleetcast/prometheus/rules.py` reads in PromQL, how long a piece is, and how answers of
several rules become records. Does not know: where the records go.

A record stands for one step (a bin, unless asked otherwise): counters by `rate` over it, gauges by their mean
in it, in the middle of the step. The server computes both, so that a month of a fleet is some megabytes and
not the raw samples, and both use the scrapes of their step alone. Series are grouped by scrape target as in
remote-write: the labels that an exporter itself sets are summed over, all others tell targets apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlencode

import numpy as np

from fleetcast.errors import DaemonAway, SettingsError, quote
from fleetcast.ingest.rules import RecordRules
from fleetcast.loop import Stop
from fleetcast.prometheus.rules import (
    Aggregate,
    Clamp,
    Expression,
    Matcher,
    MetricRule,
    Number,
    RuleFault,
    Term,
    parse_rule,
    parse_rules,
)
from fleetcast.prometheus.series import ExporterSeries, own_labels
from fleetcast.schema import NODE_EXPORTER_RULES, Floats
from fleetcast.settings import RemoteWriteSettings
from fleetcast.sources.client import JsonClient, Patience, RequestRefused

if TYPE_CHECKING:
    import pyarrow as pa

_FORM = "application/x-www-form-urlencoded"
_FIRST_STEPS = 72  # of the first piece, while the number of servers is not known
_MOST_STEPS = 288  # a day of usual bins; servers refuse over 11,000 points a series
_PIECE_CELLS = 250_000  # servers x steps of one piece
_TIMEOUT_S = 150.0  # servers give up after 120 s themselves
_TOO_MUCH = ("too many samples", "timed out", "timeout", "maximum resolution", "too large", "limit")
_TOO_MUCH_STATUS = (400, 413, 422, 503, 504)
_SELECTOR = 'a selector looks like {job="node",env=~"prod|live"}'


class Prometheus(JsonClient):
    """A server of the Prometheus HTTP API: Prometheus, Thanos, Mimir, VictoriaMetrics."""

    hints: ClassVar[Mapping[int, str]] = {
        401: "--header 'Authorization: Bearer ...', or http://user:password@host",
        403: "--header 'Authorization: Bearer ...'",
        404: "the address goes up to where /api/v1 begins, such as http://host:9090 or http://host/prometheus",
        405: "the address must lead to the server itself, not to a page",
    }

    def __init__(self, url: str, headers: Mapping[str, str], stop: Stop, give_up_s: float) -> None:
        whose, example = "the Prometheus's", "http://127.0.0.1:9090"
        super().__init__(url, whose=whose, example=example, headers=headers, timeout_s=_TIMEOUT_S)
        self._patience = Patience(stop, give_up_s, waits_while_busy=False)

    def query_range(self, query: str, first_s: float, last_s: float, step_s: int) -> list[Any] | None:
        """Return the series of a range query; None when the stop was requested.

        Raises:
            TooMuch: the server says that the stretch is too long for it.
            DaemonAway: it does not answer, or refuses.
        """
        form = urlencode({"query": query, "start": first_s, "end": last_s, "step": step_s}).encode()
        answer = self._patience.ask(lambda: self._ask_once(form))
        if answer is None:
            return None
        data = answer.get("data")
        if not isinstance(data, dict) or data.get("resultType") != "matrix":
            raise DaemonAway(f"{self.url} is no Prometheus: its answer to query_range has no matrix")
        found: list[Any] = data["result"]
        return found

    def _ask_once(self, form: bytes) -> dict[str, Any]:
        try:
            return self.request("POST", "/api/v1/query_range", form, _FORM)
        except RequestRefused as error:
            is_too_much = any(words in error.detail.lower() for words in _TOO_MUCH)
            if error.status in _TOO_MUCH_STATUS and is_too_much:
                raise TooMuch(error.status, str(error), detail=error.detail, hint="") from error
            raise


class TooMuch(RequestRefused):
    """Raised when a server refuses a question for its size; a shorter stretch may pass."""

    @property
    def can_pass(self) -> bool:
        """Whether the same request can succeed later: no shorter wait makes it smaller."""
        return False


def parse_selector(text: str) -> tuple[Matcher, ...]:
    """Return the conditions of a selector.

    >>> [matcher.label for matcher in parse_selector('{job="node", env=~"a|b"}')]
    ['job', 'env']

    Raises:
        SettingsError: it is none.
    """
    if not text.lstrip().startswith("{"):  # the rules name the series
        raise SettingsError([f"--match {quote(text)} begins with a name, not with {{"], hint=_SELECTOR)
    try:
        matchers = parse_rule(f"x = sum(x{text})").terms[0].matchers
    except RuleFault as fault:
        raise SettingsError([f"--match {quote(text)}: {fault}"], hint=_SELECTOR) from fault
    if not matchers:
        raise SettingsError([f"--match {quote(text)} selects nothing in particular"], hint=_SELECTOR)
    return matchers


class RuleQueries:
    """The queries of the mapping rules, and whose series an answer's are."""

    def __init__(self, settings: RemoteWriteSettings, step_s: int) -> None:
        """Raises SettingsError where a rule or a pattern cannot be read."""
        self.rules = parse_rules((*NODE_EXPORTER_RULES, *settings.rules))
        self._settings = settings
        self._step_s = step_s
        self._series = ExporterSeries((), settings)

    def query(self, rule: MetricRule, matchers: Sequence[Matcher] = ()) -> str:
        """Return a rule in PromQL; `matchers` narrow all of its series."""
        return self._render(rule.expression, tuple(matchers))

    def server_name(self, labels: Mapping[str, str]) -> str | None:
        """Return the server that a series of an answer is of."""
        return self._series.server_name(labels)

    def _render(self, expression: Expression, matchers: tuple[Matcher, ...]) -> str:
        match expression:
            case Number(value):
                return repr(value)
            case Aggregate(term):
                return self._render_term(term, matchers)
            case Clamp(inner, low, high):
                return f"clamp_max(clamp_min({self._render(inner, matchers)}, {low!r}), {high!r})"
        left, right = self._render(expression.left, matchers), self._render(expression.right, matchers)
        return f"({left} {expression.operator} {right})"

    def _render_term(self, term: Term, matchers: tuple[Matcher, ...]) -> str:
        chosen = ",".join(map(_render_matcher, (*term.matchers, *matchers)))
        function = "rate" if term.is_rate else "avg_over_time"
        always = {"instance", self._settings.server_label}
        own = own_labels(term.series_name)
        if own is None:  # its labels are not known: all may be its own
            grouped = f"by ({', '.join(sorted(always))})"
        else:
            grouped = f"without ({', '.join(sorted({*own, *self._settings.own_labels} - always))})"
        return f"{term.aggregate} {grouped} ({function}({term.series_name}{{{chosen}}}[{self._step_s}s]))"


def _render_matcher(matcher: Matcher) -> str:
    text = matcher.text.replace("\\", "\\\\").replace('"', '\\"')
    return f'{matcher.label}{matcher.operator}"{text}"'


@dataclass(frozen=True)
class Piece:
    """The records of a stretch of time."""

    done_to_ms: int
    table: "pa.Table | None"  # None: there are none


class PrometheusHistory:
    """A stretch of a Prometheus as pieces, oldest first."""

    def __init__(
        self, server: Prometheus, queries: RuleQueries, selectors: Sequence[tuple[Matcher, ...]], step_s: int
    ) -> None:
        self._server = server
        self._queries = queries
        self._selectors = tuple(selectors) or ((),)
        self._step_ms = step_s * 1000
        self._in_range = RecordRules(None).in_range

    def pieces(self, start_ms: int, end_ms: int) -> Iterator[Piece]:
        """Yield what lies between two times, both on whole steps; a requested stop ends it early.

        Raises:
            DaemonAway: the server does not answer, or refuses one step alone.
        """
        n_steps, most = _FIRST_STEPS, _MOST_STEPS
        while start_ms < end_ms:
            stop_ms = min(start_ms + n_steps * self._step_ms, end_ms)
            try:
                grids = self._ask(start_ms, stop_ms)
            except TooMuch:
                if stop_ms - start_ms <= self._step_ms:
                    raise
                n_steps = most = max(1, (stop_ms - start_ms) // self._step_ms // 2)
                continue
            if grids is None:
                return
            yield Piece(stop_ms, self._table(start_ms, grids))
            n_steps = max(1, min(most, _PIECE_CELLS // max(1, grids.n_servers)))
            start_ms = stop_ms

    def _ask(self, start_ms: int, stop_ms: int) -> "_Grids | None":
        """Return every rule's values, None when the stop was requested."""
        grids = _Grids((stop_ms - start_ms) // self._step_ms)
        step_s = self._step_ms // 1000
        first_s = start_ms // 1000 + step_s  # a value stands at the end of its step
        for rule in self._queries.rules:
            for matchers in self._selectors:
                query = self._queries.query(rule, matchers)
                found = self._server.query_range(query, first_s, stop_ms // 1000, step_s)
                if found is None:
                    return None
                for series in found:
                    name = self._queries.server_name(series["metric"])
                    if name is not None:
                        grids.put(rule.metric, name, *self._values(series, first_s, grids.n_steps))
        return grids

    def _values(self, series: Mapping[str, Any], first_s: int, n_steps: int) -> tuple[list[int], Floats]:
        """Return a series' values and at which steps they are; raises DaemonAway where it is neither."""
        try:
            points = series["values"]
            steps = [round((float(at_s) - first_s) * 1000 / self._step_ms) for at_s, _ in points]
            values = np.array([float(text) for _, text in points])
        except (KeyError, TypeError, ValueError, OverflowError):
            steps, values = [-1], np.empty(0)
        if not all(0 <= step < n_steps for step in steps):
            raise DaemonAway(
                f"{self._server.url} is no Prometheus: its samples are not those that were asked for"
            )
        return steps, values

    def _table(self, start_ms: int, grids: "_Grids") -> "pa.Table | None":
        """Return the records, in the order of time, then server."""
        import pyarrow as pa

        names = sorted(grids.of_server)
        metrics: dict[str, Floats] = {}
        for rule in self._queries.rules:
            rows = [grids.of_server[name].get(rule.metric, grids.absent) for name in names]
            values = np.array(rows).reshape(len(names), grids.n_steps).T.ravel()  # (step, server)
            is_usable = np.isfinite(values) & self._in_range(rule.metric, values)
            if is_usable.any():
                metrics[rule.metric] = np.where(is_usable, values, np.nan)
        if not metrics:
            return None
        is_told = np.any([np.isfinite(values) for values in metrics.values()], axis=0)
        middles = start_ms + self._step_ms // 2 + np.arange(grids.n_steps) * self._step_ms
        codes = np.tile(np.arange(len(names), dtype=np.int32), grids.n_steps)[is_told]
        columns = {
            "timestamp": pa.array(np.repeat(middles, len(names))[is_told]).cast(pa.timestamp("ms", "UTC")),
            "server_name": pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names, pa.string())),
        }
        return pa.table(
            columns | {name: pa.array(v[is_told], from_pandas=True) for name, v in metrics.items()}
        )


class _Grids:
    """Values by server and metric, each (step,)."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps
        self.absent: Floats = np.full(n_steps, np.nan)
        self.of_server: dict[str, dict[str, Floats]] = {}

    @property
    def n_servers(self) -> int:
        """Return how many servers have a value."""
        return len(self.of_server)

    def put(self, metric: str, server: str, steps: Sequence[int], values: Floats) -> None:
        """Note values of one scrape target; a server's second target fills its gaps, and wins elsewhere."""
        grid = self.of_server.setdefault(server, {}).setdefault(metric, self.absent.copy())
        grid[np.asarray(steps, dtype=np.int64)] = values
