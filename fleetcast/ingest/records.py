"""Many raw records at once: which are accepted, rounded and in columns.

Owns: grouping records of one shape, checking those in columns, derived metrics and rounding.
Does not know: HTTP or storage. Whatever looks odd in a column is looked at again by
`recordrules.check_record`, one record at a time, so both ways give the same answer.
"""

from collections import Counter as Tally
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
    is_text,
    numbers,
    plain_metrics,
    server_codes,
    text_cells,
    times_ms,
)
from fleetcast.ingest.rules import (
    ALIASES,
    FIELDS_MAX,
    METRIC_NAME_MAX_CHARS,
    PERCENT_HIGH,
    REQUIRED,
    RecordFault,
    RecordRules,
    check_record,
    is_metric_name,
    round_rows,
    rule_of,
)
from fleetcast.schema import Codes, Floats, Longs, RecordBatch, RefusedField, Rejection

__all__ = ["METRICS_MAX", "Accepted", "CodedNames", "Column", "RecordRules", "accept", "accept_columns"]

REJECTIONS_KEPT = 1000  # of one call, with their words; of the others only the number by rule is kept
_CELLS_MAX = 2**22  # of the columns of one call: a few rows of each of many metrics make them wide
_OTHER_FIELDS = "(others)"
_IGNORED_NAMES_MAX = 20
METRICS_MAX = 512  # distinct metrics of one call: bounds the columns a sender can make us keep
_IDLE_HIGH = 101.0  # a point of rounding, as `_pct` values may go a point below 0
_CPU_PARTS = ("cpu_user_pct", "cpu_sys_pct", "cpu_iowait_pct")
_ANY: tuple[Any, ...] = ("a mapping of its own kind",)
_LAST_MS = int(np.iinfo(np.int64).max)
_GROUP_MIN = 4  # fewer records of one shape are faster one by one


@dataclass(frozen=True, slots=True, eq=False)
class Accepted:
    """The good records of one call, in their order, and why the others are not among them."""

    batch: RecordBatch
    rejections: tuple[Rejection, ...]  # at most as many as were asked for
    ignored_text_fields: int
    is_kept: Flags  # (record of the call,) whether it is in the batch
    faults: Mapping[str, int]  # all rejections, by rule
    refused_fields: tuple[RefusedField, ...] = ()  # left out, for want of room for another metric
    useless_fields: tuple[str, ...] = ()  # what was ignored, where a record holds no metric at all

    @property
    def is_curtailed(self) -> bool:
        """Whether there were more rejections than are listed."""
        return sum(self.faults.values()) > len(self.rejections)


def accept(raw: Sequence[object], rules: RecordRules, rejections_max: int = REJECTIONS_KEPT) -> Accepted:
    """Check raw records (mappings as in `POST /feed/data`, or columns seen as such).

    One bad record never costs the others: it is reported with index, field and reason, the first
    `rejections_max` of them.
    """
    if isinstance(raw, RowsOf):
        return accept_columns(raw.columns, rules, rejections_max)
    sheet = _Sheet(len(raw), rules, rejections_max)
    by_shape: dict[tuple[Any, ...] | None, list[int]] = defaultdict(list)
    for index, record in enumerate(raw):
        by_shape[_shape(record)].append(index)
    for names, indexes in by_shape.items():
        if names is not None and len(names) > FIELDS_MAX:
            for index in indexes:
                sheet.take_one(index, raw[index])
            continue
        if names is None or (names is not _ANY and "timestamp" not in names):
            sheet.take_faulty(raw, indexes)
            continue
        if len(indexes) >= _GROUP_MIN and set(REQUIRED) <= set(names):
            rows: Any = raw if len(indexes) == len(raw) else [raw[index] for index in indexes]
            columns = zip(*map(dict.values, rows), strict=True)
            sheet.take_columns(np.array(indexes), dict(zip(names, columns, strict=True)))
        else:
            for index in indexes:
                sheet.take_one(index, raw[index])
    return sheet.result()


def _shape(record: object) -> tuple[Any, ...] | None:
    """Return the fields of a dict; None for what is no record at all."""
    if type(record) is dict:
        return tuple(record)
    return _ANY if isinstance(record, Mapping) else None


def accept_columns(
    columns: Mapping[str, Column], rules: RecordRules, rejections_max: int = REJECTIONS_KEPT
) -> Accepted:
    """Check records given in columns of one length.

    `timestamp` is text, datetimes or int64 ms; in a float array NaN means absent, as it does
    in a DataFrame.
    """
    n_rows = len(columns["timestamp"])
    sheet = _Sheet(n_rows, rules, rejections_max)
    sheet.take_columns(np.arange(n_rows), columns)
    return sheet.result()


class _Sheet:
    """The rows of one call while they are being checked; at first none is kept."""

    def __init__(self, n_rows: int, rules: RecordRules, rejections_max: int) -> None:
        self._rules = rules
        self._rejections_max = rejections_max
        self._metrics_max = min(METRICS_MAX, _CELLS_MAX // max(n_rows, 1))
        self._is_kept = np.zeros(n_rows, dtype=np.bool_)
        self._timestamps_ms = np.zeros(n_rows, dtype=np.int64)
        self._codes = np.zeros(n_rows, dtype=np.int32)
        self._names: dict[str, int] = {}
        self._metrics: dict[str, Floats] = {}
        self._rejections: list[Rejection] = []
        self._faults: Tally[str] = Tally()
        self._refused: Tally[str] = Tally()
        self._ignored = 0
        self._ignored_names: dict[str, None] = {}

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
        reason = f"is one of over {self._metrics_max} different metrics in a request"
        refused = tuple(RefusedField(name, n, reason) for name, n in self._refused.items())
        useless = tuple(self._ignored_names) if self._ignored_names and _has_bare_row(batch) else ()
        return Accepted(batch, rejections, self._ignored, self._is_kept, self._faults, refused, useless)

    def take_one(self, index: int, record: object) -> None:
        """Check one record exactly."""
        try:
            checked = check_record(record, self._rules)
        except RecordFault as fault:
            self._faults[rule_of(fault.reason)] += 1
            if self._n_free:
                self._rejections.append(Rejection(index, fault.field, fault.reason))
            return
        self._is_kept[index] = True
        self._timestamps_ms[index] = checked.timestamp_ms
        self._codes[index] = self._names.setdefault(checked.server_name, len(self._names))
        for name, value in checked.values.items():
            if name in self._metrics or len(self._metrics) < self._metrics_max:
                self._metric(name)[index] = value
            else:
                self._refuse_field(name, 1)
        self._ignored += len(checked.ignored_fields)
        for name in checked.ignored_fields:
            self._note_ignored(name)

    def take_faulty(self, raw: Sequence[object], indexes: Sequence[int]) -> None:
        """Refuse records that all break one rule (no time, or no record); list some and count the others."""
        n_listed = max(1, self._n_free)
        for index in indexes[:n_listed]:
            self.take_one(index, raw[index])
        if len(indexes) > n_listed:
            rule = "time_format" if isinstance(raw[indexes[0]], Mapping) else "not_an_object"
            self._faults[rule] += len(indexes) - n_listed

    def take_columns(self, rows: Longs, columns: Mapping[str, Column]) -> None:
        """Check records of one shape together; rows with anything odd are taken one by one."""
        times, is_good = self._times(columns["timestamp"])
        codes = server_codes(columns["server_name"], self._names, self._rules)
        is_good &= codes != NO_NAME
        n_ignored = np.zeros(len(rows), dtype=np.int64)
        metrics, are_usable = plain_metrics(columns, self._rules)
        is_good &= are_usable
        for name, column in columns.items():
            if name in REQUIRED or name in metrics:
                continue
            kinds = cell_kinds(column)
            if not is_metric_name(name):
                n_ignored += 1
                self._note_ignored(name)
            elif is_text(kinds):
                n_ignored += text_cells(column)
                self._note_ignored(name)
            else:
                metrics[name], is_number = numbers(column, kinds)
                is_good &= is_number & self._rules.in_range(name, metrics[name])
        metrics = _without_aliases({name: metrics[name] for name in columns if name in metrics})
        metrics = {name: values for name, values in metrics.items() if not _is_absent(values)}
        self._leave_out_fresh(metrics, is_good)
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
        for place in self._to_look_at(np.flatnonzero(~is_good), times, codes).tolist():
            self.take_one(
                int(rows[place]), {name: cell(name, cells, place) for name, cells in columns.items()}
            )

    def _note_ignored(self, name: str) -> None:
        if len(self._ignored_names) < _IGNORED_NAMES_MAX:
            told = str(name)  # of a long one the start: no metric's name, as the whole is none
            is_long = len(told) > METRIC_NAME_MAX_CHARS
            self._ignored_names.setdefault(f"{told[:METRIC_NAME_MAX_CHARS]}..." if is_long else told)

    def _metric(self, name: str) -> Floats:
        if name not in self._metrics:
            self._metrics[name] = np.full(len(self._is_kept), np.nan)
        return self._metrics[name]

    @property
    def _n_free(self) -> int:
        return max(0, self._rejections_max - len(self._rejections))

    def _leave_out_fresh(self, metrics: dict[str, Floats], is_good: Flags) -> None:
        """Drop the metrics that there is no room for; the rows keep their other fields."""
        fresh = [name for name in metrics if name not in self._metrics]
        for name in fresh[max(0, self._metrics_max - len(self._metrics)) :]:
            self._refuse_field(name, int((is_good & ~np.isnan(metrics.pop(name))).sum()))

    def _refuse_field(self, name: str, n_records: int) -> None:
        if n_records:
            is_listed = name in self._refused or len(self._refused) < METRICS_MAX
            self._refused[name if is_listed else _OTHER_FIELDS] += n_records

    def _to_look_at(self, places: Longs, times: Longs, codes: Codes) -> Longs:
        """Return the odd rows to look at one by one; others, whose rule is plain, are counted."""
        if len(places) <= self._n_free:
            return places
        listed, rest = np.split(places, [self._n_free])
        of_rest = times[rest]
        newest, oldest = self._rules.newest_ms, self._rules.oldest_ms
        is_left = np.ones(len(rest), dtype=np.bool_)
        for rule, is_broken in (
            ("time_format", of_rest == NO_TIME),
            ("time_in_future", of_rest > (_LAST_MS if newest is None else newest)),
            ("time_too_old", of_rest < (NO_TIME if oldest is None else oldest)),
            ("server_name", codes[rest] == NO_NAME),
        ):
            self._faults[rule] += int((is_left & is_broken).sum())
            is_left &= ~is_broken
        self._faults = +self._faults  # without zeros
        return np.concatenate([listed, rest[is_left]])

    def _times(self, column: Column) -> tuple[Longs, Flags]:
        """Return times and whether each is one within the bounds."""
        times = times_ms(column)
        is_good = times != NO_TIME
        if self._rules.newest_ms is not None:
            is_good &= times <= self._rules.newest_ms
        if self._rules.oldest_ms is not None:
            is_good &= times >= self._rules.oldest_ms
        return times, is_good


def _has_bare_row(batch: RecordBatch) -> bool:
    """Whether a record holds no value of any metric."""
    is_bare = np.ones(len(batch), dtype=np.bool_)
    for values in batch.metrics.values():
        is_bare &= np.isnan(values)
    return bool(is_bare.any())


def _is_absent(values: Floats) -> bool:
    """Whether there is no value in a column; the first cell alone tells it of most."""
    return not len(values) or bool(np.isnan(values[0]) and np.isnan(values).all())


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
        idle = metrics["cpu_idle_pct"]  # beyond 100 it is a sum over CPUs: of how many, it does not say
        ways.append(np.where(idle <= _IDLE_HIGH, 100.0 - idle, np.nan))
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
