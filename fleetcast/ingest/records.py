"""Many raw records at once: which are accepted, rounded and in columns.

Owns: grouping records of one shape, checking those in columns, derived metrics and rounding.
Does not know: HTTP or storage. Whatever looks odd in a column is looked at again by
`recordrules.check_record`, one record at a time, so both ways give the same answer.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetcast.ingest.columns import (
    NO_NAME,
    NO_TIME,
    CodedNames,
    Column,
    Flags,
    RowsOf,
    cell,
    cell_kinds,
    in_range,
    is_text,
    numbers,
    plain_metrics,
    server_codes,
    text_cells,
    times_ms,
)
from fleetcast.ingest.rules import (
    ALIASES,
    PERCENT_HIGH,
    REQUIRED,
    RecordFault,
    RecordRules,
    check_record,
    is_metric_name,
    round_rows,
)
from fleetcast.schema import Codes, Floats, Longs, RecordBatch, Rejection

__all__ = ["METRICS_MAX", "Accepted", "CodedNames", "Column", "RecordRules", "accept", "accept_columns"]

METRICS_MAX = 512  # distinct metrics of one call: bounds the columns a sender can make us keep
_CPU_PARTS = ("cpu_user_pct", "cpu_sys_pct", "cpu_iowait_pct")
_GROUP_MIN = 4  # fewer records of one shape are faster one by one


@dataclass(frozen=True, slots=True, eq=False)
class Accepted:
    """The good records of one call, in their order, and why the others are not among them."""

    batch: RecordBatch
    rejections: tuple[Rejection, ...]
    ignored_text_fields: int
    is_crowded: bool = False  # some were refused because of METRICS_MAX


def accept(raw: Sequence[object], rules: RecordRules) -> Accepted:
    """Check raw records (mappings as in `POST /feed/data`, or columns seen as such).

    One bad record never costs the others: it is reported with index, field and reason.
    """
    if isinstance(raw, RowsOf):
        return accept_columns(raw.columns, rules)
    sheet = _Sheet(len(raw), rules)
    by_shape: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, record in enumerate(raw):
        by_shape[tuple(record) if type(record) is dict else ()].append(index)
    for names, indexes in by_shape.items():
        if len(indexes) >= _GROUP_MIN and set(REQUIRED) <= set(names):
            rows: Any = raw if len(indexes) == len(raw) else [raw[index] for index in indexes]
            columns = zip(*map(dict.values, rows), strict=True)
            sheet.take_columns(np.array(indexes), dict(zip(names, columns, strict=True)))
        else:
            for index in indexes:
                sheet.take_one(index, raw[index])
    return sheet.result()


def accept_columns(columns: Mapping[str, Column], rules: RecordRules) -> Accepted:
    """Check records given in columns of one length.

    `timestamp` is text, datetimes or int64 ms; in a float array NaN means absent, as it does
    in a DataFrame.
    """
    n_rows = len(columns["timestamp"])
    sheet = _Sheet(n_rows, rules)
    sheet.take_columns(np.arange(n_rows), columns)
    return sheet.result()


class _Sheet:
    """The rows of one call while they are being checked; at first none is kept."""

    def __init__(self, n_rows: int, rules: RecordRules) -> None:
        self._rules = rules
        self._is_kept = np.zeros(n_rows, dtype=np.bool_)
        self._timestamps_ms = np.zeros(n_rows, dtype=np.int64)
        self._codes = np.zeros(n_rows, dtype=np.int32)
        self._names: dict[str, int] = {}
        self._metrics: dict[str, Floats] = {}
        self._rejections: list[Rejection] = []
        self._ignored = 0
        self._is_crowded = False

    def result(self) -> Accepted:
        """Return what was kept, derived metrics added, rounded."""
        kept: Flags | slice = slice(None) if self._is_kept.all() else self._is_kept
        metrics = {name: values[kept] for name, values in self._metrics.items()}
        _derive_cpu(metrics)
        if metrics:
            digits = self._rules.percent_decimals, self._rules.significant_digits
            rows = round_rows(tuple(metrics), np.array(list(metrics.values())), *digits)
            metrics = dict(zip(metrics, rows, strict=True))
        names, codes = _without_unused(tuple(self._names), self._codes[kept])
        batch = RecordBatch(names, codes, self._timestamps_ms[kept], metrics)
        rejections = tuple(sorted(self._rejections, key=_index_of))
        return Accepted(batch, rejections, self._ignored, self._is_crowded)

    def take_one(self, index: int, record: object) -> None:
        """Check one record exactly."""
        try:
            checked = check_record(record, self._rules)
            self._check_room(checked.values)
        except RecordFault as fault:
            self._rejections.append(Rejection(index, fault.field, fault.reason))
            return
        self._is_kept[index] = True
        self._timestamps_ms[index] = checked.timestamp_ms
        self._codes[index] = self._names.setdefault(checked.server_name, len(self._names))
        for name, value in checked.values.items():
            self._metric(name)[index] = value
        self._ignored += checked.ignored_fields

    def take_columns(self, rows: Longs, columns: Mapping[str, Column]) -> None:
        """Check records of one shape together; rows with anything odd are taken one by one."""
        times, is_good = self._times(columns["timestamp"])
        codes = server_codes(columns["server_name"], self._names)
        is_good &= codes != NO_NAME
        n_ignored = np.zeros(len(rows), dtype=np.int64)
        metrics, are_usable = plain_metrics(columns)
        is_good &= are_usable
        for name, column in columns.items():
            if name in REQUIRED or name in metrics:
                continue
            kinds = cell_kinds(column)
            if not is_metric_name(name):
                n_ignored += 1
            elif is_text(kinds):
                n_ignored += text_cells(column)
            else:
                metrics[name], is_number = numbers(column, kinds)
                is_good &= is_number & in_range(name, metrics[name])
        metrics = _without_aliases({name: metrics[name] for name in columns if name in metrics})
        metrics = {name: values for name, values in metrics.items() if not np.isnan(values).all()}
        if len(self._metrics.keys() | metrics.keys()) > METRICS_MAX:
            is_good[:] = False
        self._ignored += int(n_ignored[is_good].sum())
        if is_good.all() and len(rows) == len(self._is_kept):  # all of the call, which is the usual case
            self._is_kept[:] = True
            self._timestamps_ms, self._codes, self._metrics = times, codes, metrics
            return
        kept = rows[is_good]
        self._is_kept[kept] = True
        self._timestamps_ms[kept] = times[is_good]
        self._codes[kept] = codes[is_good]
        for name, values in metrics.items():
            self._metric(name)[kept] = values[is_good]
        for place in np.flatnonzero(~is_good).tolist():
            self.take_one(
                int(rows[place]), {name: cell(name, cells, place) for name, cells in columns.items()}
            )

    def _metric(self, name: str) -> Floats:
        if name not in self._metrics:
            self._metrics[name] = np.full(len(self._is_kept), np.nan)
        return self._metrics[name]

    def _check_room(self, values: Mapping[str, float]) -> None:
        fresh = values.keys() - self._metrics.keys()
        if fresh and len(self._metrics) + len(fresh) > METRICS_MAX:
            self._is_crowded = True
            raise RecordFault(min(fresh), f"is one of over {METRICS_MAX} different metrics in a request")

    def _times(self, column: Column) -> tuple[Longs, Flags]:
        """Return times and whether each is one within the bounds."""
        times = times_ms(column)
        is_good = times != NO_TIME
        if self._rules.newest_ms is not None:
            is_good &= times <= self._rules.newest_ms
        if self._rules.oldest_ms is not None:
            is_good &= times >= self._rules.oldest_ms
        return times, is_good


def _index_of(rejection: Rejection) -> int:
    return rejection.index


def _without_aliases(metrics: dict[str, Floats]) -> dict[str, Floats]:
    for alias, name in ALIASES.items():
        if alias in metrics:
            values = metrics.pop(alias)
            own = metrics.get(name)
            metrics[name] = values if own is None else np.where(np.isnan(own), values, own)
    return metrics


def _derive_cpu(metrics: dict[str, Floats]) -> None:
    """Fill absent `cpu_pct` from the idle share, else from user + system + waiting, all present."""
    ways = []
    if "cpu_idle_pct" in metrics:
        ways.append(100.0 - metrics["cpu_idle_pct"])
    if all(part in metrics for part in _CPU_PARTS):
        user, system, waiting = (metrics[part] for part in _CPU_PARTS)
        ways.append(user + system + waiting)
    for derived in ways:
        if "cpu_pct" in metrics and not np.isnan(metrics["cpu_pct"]).any():
            return
        bounded = np.clip(derived, 0.0, PERCENT_HIGH)
        own = metrics.get("cpu_pct")
        metrics["cpu_pct"] = bounded if own is None else np.where(np.isnan(own), bounded, own)


def _without_unused(names: tuple[str, ...], codes: Codes) -> tuple[tuple[str, ...], Codes]:
    """Return the names that occur, and codes into them."""
    used = np.bincount(codes, minlength=len(names)).astype(np.bool_)
    if used.all():
        return names, codes
    place = (np.cumsum(used) - 1).astype(np.int32)
    return tuple(name for name, is_used in zip(names, used, strict=True) if is_used), place[codes]
