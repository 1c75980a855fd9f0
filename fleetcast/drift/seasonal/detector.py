"""The seasonal drift detector: it follows a fleet bin by bin against its reference.

Owns: the newest day of every series as running sums, which series are in alarm and since when,
the fleet's verdict, and what the verdict says of a series in alarm: about when it changed, from
what to what, and why other series are not judged. One bin costs the same however long the
reference is. Does not know: where bins come from, what is done about a verdict, files.

A detector rebuilt from at least the last `memory_bins` bins gives the same scores as one that ran
through: sums are integers, everything else is a function of the bins. Only an alarm or standstill
that began before the first bin given has an unknown start.

    detector = SeasonalDetector(Reference.load(path))
    detector.update(values, bin_ms)          # (server, metric), in the reference's order; bin by bin
    verdict = detector.check()
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import DAY_MS, from_ms
from fleetcast.drift.seasonal.learning import MIN_DAYS
from fleetcast.drift.seasonal.quorum import (
    COMBINED_THRESHOLD,
    THRESHOLDS,
    WEIGHTS,
    QuorumRule,
    by_family,
    combined_ratio,
    common_ratios,
    fleet_ratios,
    held_fleet,
    limit_ratios,
    scale_scores,
)
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.season import ABSENT, innovations, moves, traits
from fleetcast.drift.seasonal.sensors import NEVER_STILL, DataQualityEvent, SensorWatch, measurements
from fleetcast.drift.seasonal.statistics import (
    FAMILIES,
    FAMILY_OF,
    INDEX,
    LONG_H,
    SHORT_H,
    STATISTICS,
    BinCodes,
    RunningSums,
    statistics,
)
from fleetcast.errors import BadData
from fleetcast.schema import Floats, Floats32, Longs

COLLECTING, READY = "collecting", "ready"
TOO_FEW_DAYS = "too few days in the reference"
_NEVER = -1
# Of its limit. While a fleet drifts, most series this near one have changed (docs/decisions/drift-fleets.md).
NEAR = 0.7
_BY_SIZE = tuple(INDEX[name] for name in ("wider_24h", "calmer_24h"))
_BY_MOVES = tuple(INDEX[name] for name in ("innovation_3h", "restless_24h", "rougher_24h", "smoother_24h"))


@dataclass(frozen=True, slots=True)
class DriftingSeries:
    """One series in alarm: since when, from what to what, and in which way."""

    server_name: str
    metric: str
    family: str  # per, dss, fds or anomaly_rate
    statistic: str
    says: str  # "has risen"
    ratio: float  # statistic over its limit, held; > 1
    since_ms: int  # start of the first bin of the alarm
    changed_ms: int  # estimated time of the change, at most a day before the alarm
    usual: float  # what the reference expects of the newest hours, native units
    actual: float  # what they are; NaN when nothing arrived

    def sentence(self) -> str:
        """Say it for people.

        >>> DriftingSeries("a", "cpu_pct", "fds", "higher_24h", "has risen", 2.0, 0, 0, 12.0, 31.5).sentence()
        'a cpu_pct has risen: usually about 12, now 31.5 (2.0 times the limit)'
        """
        where = f"usually about {self.usual:.4g}, now {self.actual:.4g}"
        return f"{self.server_name} {self.metric} {self.says}: {where} ({self.ratio:.1f} times the limit)"


@dataclass(frozen=True, slots=True)
class EnoughDays:
    """When series that have too few days will have enough, if they report on."""

    n_series: int
    first_ms: int  # the midnight at which the first of them has enough
    last_ms: int  # and the last

    def sentence(self) -> str:
        """Say it for people.

        >>> EnoughDays(2, 0, 86_400_000).sentence()
        'the first until about 1970-01-01 00:00Z, the last until about 1970-01-02 00:00Z'
        """
        if self.first_ms == self.last_ms:
            return until(self.first_ms)
        return f"the first {until(self.first_ms)}, the last {until(self.last_ms)}"


def until(at_ms: int) -> str:
    """Return until when a series is not judged, for people."""
    return f"until about {from_ms(at_ms):%Y-%m-%d %H:%M}Z"


@dataclass(frozen=True, eq=False)
class DriftVerdict:
    """The fleet at the end of one bin.

    `scores` are on the specification's scale: threshold x statistic / calibrated limit, so that
    the threshold is the level that unchanged data reach at the calibrated rate.
    """

    end_ms: int  # end of the newest bin
    status: str  # collecting: no series has a window yet
    scores: Mapping[str, float]  # per, dss, fds, anomaly_rate
    combined: float
    needs_retraining: bool
    alarm_share: float  # of the compared series
    sustained_share: float  # of the compared series, in alarm most of the last hours
    n_compared: int
    drifting: tuple[DriftingSeries, ...]  # all in alarm, worst first, whether or not the fleet is
    not_compared: Mapping[str, int]  # why -> how many series
    events: tuple[DataQualityEvent, ...]
    ratios: Floats32 = field(repr=False)  # (family, series) held ratios
    reference: Reference = field(repr=False)  # what was compared with
    min_days: int = MIN_DAYS  # a series needs to be judged

    @property
    def enough_days(self) -> EnoughDays | None:
        """Return when the series with too few days will have enough, None where there are none."""
        at_ms = self.reference.enough_days_ms(self.min_days, self.end_ms or self.reference.end_ms)
        waiting = at_ms[np.isfinite(at_ms) & ~self.reference.is_compared]
        return EnoughDays(len(waiting), int(waiting.min()), int(waiting.max())) if len(waiting) else None

    @property
    def new_server_ms(self) -> int:
        """Return the earliest midnight at which a server that began today has days enough."""
        return self.reference.clock.midnight(self.end_ms) + self.min_days * DAY_MS

    def drifting_servers(self) -> tuple[str, ...]:
        """Return the servers with a series in alarm, worst first."""
        return tuple(dict.fromkeys(series.server_name for series in self.drifting))


class SeasonalDetector:
    """Follows one fleet; not thread safe. Bins go in in time order, gaps are filled as absent."""

    def __init__(
        self, reference: Reference, rule: QuorumRule | None = None, min_days: int = MIN_DAYS
    ) -> None:
        self.reference, self.min_days = reference, min_days
        self.rule = rule or QuorumRule()
        self._clock = reference.clock
        per_day = self._clock.bins_per_day
        self._short, self._long = per_day * SHORT_H // 24, per_day * LONG_H // 24
        self._hold, self._sustained = self.rule.hold_bins(per_day), self.rule.sustained_bins(per_day)
        self._fleet_hold = self.rule.fleet_hold_bins(per_day)
        self._is_compared = reference.is_compared
        self._begin()

    def _begin(self) -> None:
        reference, n_series = self.reference, self.reference.n_series
        shape = (len(reference.server_names), len(reference.metrics))
        self._watch = SensorWatch(*shape, reference.still_limits, self._clock.bins_per_day)
        self._sums = RunningSums(reference.shape.template, self._short, self._long)
        self._last_scores = np.full((n_series, 2), np.nan, np.float32)  # oldest first
        self._recent = np.full((self._short, n_series), np.nan, np.float32)  # ring of native values
        self._ratios = np.zeros((self._hold, len(FAMILIES), n_series), np.float32)  # ring
        self._common = np.zeros((self._hold, len(STATISTICS)), np.float32)  # ring
        self._fleet = np.zeros((self._fleet_hold, len(FAMILIES)), np.float32)  # ring
        self._alarms = np.zeros((self._sustained, n_series), np.bool_)  # ring
        self._alarm_counts = np.zeros(n_series, np.int64)
        self._since = np.full(n_series, _NEVER, np.int64)
        self._changed = np.full(n_series, _NEVER, np.int64)
        self._n_bins = 0
        self._end_ms: int | None = None
        self._statistics = np.full((len(STATISTICS), n_series), np.nan, np.float32)

    @property
    def memory_bins(self) -> int:
        """Return how many of the newest bins the scores rest on."""
        still = self.reference.still_limits
        known = int(still[still < NEVER_STILL].max(initial=0))
        return self._long + self._hold + self._fleet_hold + self._sustained + known + 2

    @property
    def is_filling(self) -> bool:
        """Whether the short window has not been filled once."""
        return self._n_bins < self._short

    def update(self, values: Floats32, bin_ms: int, errors: Floats32 | None = None) -> None:
        """Take in one closed bin.

        Args:
            values: (server, metric) in native units and the reference's order, NaN = absent.
            bin_ms: start of the bin.
            errors: (server, metric) |forecast - actual| of the model in service, where known.
        Raises:
            BadData: not of that shape, not on the reference's bins, or not after the last bin.
        """
        expected = (len(self.reference.server_names), len(self.reference.metrics))
        for name, array in (("values", values), ("errors", errors)):
            if array is not None and array.shape != expected:
                raise BadData(f"{name} must be (server, metric) {expected}, got {array.shape}")
        if bin_ms % self.reference.bin_ms:
            raise BadData(f"bin_ms must be a multiple of {self.reference.bin_ms}, got {bin_ms}")
        if self._end_ms is not None:
            if bin_ms < self._end_ms:
                raise BadData(f"bins must come in time order: {bin_ms} starts before {self._end_ms}")
            self._fill(bin_ms)
        self._take(measurements(values).ravel(), bin_ms, errors)

    def _fill(self, until_ms: int) -> None:
        assert self._end_ms is not None, "called after a first bin"
        absent = np.full(self.reference.n_series, np.nan, np.float32)
        for start_ms in range(self._end_ms, until_ms, self.reference.bin_ms):
            self._take(absent, start_ms, None)

    def _take(self, values: Floats32, bin_ms: int, errors: Floats32 | None) -> None:
        reference = self.reference
        admitted = self._watch.admit(values)
        bins = self._clock.local_bins(bin_ms, 1)
        own = traits(reference.shape, self._clock, bins, admitted[:, None])
        novel = innovations(own.scores, self._last_scores[:, 1], reference.pull)
        moved = moves(own.scores, self._last_scores)
        self._last_scores = np.concatenate([self._last_scores[:, 1:], own.scores], axis=1)
        books = reference.books
        missed = self._error_scores(errors, admitted, bins)
        codes = (books.values.codes(own.scores), books.innovations.codes(novel), books.errors.codes(missed))
        self._sums.add(BinCodes(*codes, own, moved, bins % self._clock.bins_per_day))
        self._recent[self._n_bins % self._short] = admitted
        self._end_ms = bin_ms + reference.bin_ms
        self._judge()

    def _error_scores(self, errors: Floats32 | None, admitted: Floats32, bins: Longs) -> Floats32:
        if errors is None:
            return np.full((len(admitted), 1), np.nan, np.float32)
        spreads = self.reference.shape.spreads[:, self._clock.slots(bins)]
        size = np.abs(measurements(errors).reshape(-1, 1)) / spreads
        return np.asarray(np.where(np.isfinite(admitted)[:, None], size, np.nan), np.float32)

    def _judge(self) -> None:
        """Score the windows that end now and follow each series' alarm."""
        sums = self._sums.window_sums()
        self._statistics = statistics(sums, self.reference.books, self._short, self._long)[:, :, 0]
        ratios = limit_ratios(self._statistics, self.reference.limits)
        ratios[:, ~self._is_compared] = 0
        own = self._n_bins % self._hold
        self._ratios[own] = by_family(ratios)
        judged, n_metrics = self._is_judged(), len(self.reference.metrics)
        self._common[own] = common_ratios(ratios, self.reference.n_days, judged, n_metrics, self.rule)
        held = self.held_ratios()
        alarms = held.max(axis=0) > 1
        place = self._n_bins % self._sustained
        self._alarm_counts += alarms.astype(np.int64) - self._alarms[place]
        self._alarms[place] = alarms
        self._fleet[self._n_bins % self._fleet_hold] = self._newest_fleet_ratios(held, int(judged.sum()))
        self._n_bins += 1
        assert self._end_ms is not None, "a bin was taken"
        begins = alarms & (self._since == _NEVER)
        self._since[begins] = self._end_ms - self._hold * self.reference.bin_ms
        for series in np.flatnonzero(begins):
            self._changed[series] = self._change_ms(int(series), held)
        self._since[~alarms] = self._changed[~alarms] = _NEVER

    def _change_ms(self, series: int, held: Floats32) -> int:
        split = change_bin(self._sums, series, self._worst_statistic(series, held))
        return (self._end_ms or 0) - split * self.reference.bin_ms

    def _worst_statistic(self, series: int, held: Floats32) -> int:
        own = (self._statistics[:, series], self.reference.limits[series], held[:, series])
        return worst_statistic(*own)

    def held_ratios(self) -> Floats32:
        """Return (family, series): the smallest ratio of the last `hold_h`."""
        return np.asarray(self._ratios.min(axis=0), np.float32)

    def fleet_ratios(self) -> Floats32:
        """Return (family,): how near the fleet is to its limits, 1 = at them for `fleet_hold_h`."""
        order = np.arange(self._n_bins, self._n_bins + self._fleet_hold) % self._fleet_hold
        return np.asarray(held_fleet(self._fleet[order].T, self._fleet_hold)[:, -1], np.float32)

    def _newest_fleet_ratios(self, held: Floats32, n_judged: int) -> Floats32:
        common, n_metrics = by_family(self._common.min(axis=0)), len(self.reference.metrics)
        found = fleet_ratios(held, common, self._sustained_shares(), n_judged, n_metrics, self.rule)
        return np.asarray(found / self.reference.fleet.factor, np.float32)

    def _is_judged(self) -> NDArray[np.bool_]:
        return np.asarray(np.isfinite(self._statistics).any(axis=0) & self._is_compared)

    def _sustained_shares(self) -> Floats32:
        return (self._alarm_counts / self._sustained).astype(np.float32)

    def check(
        self,
        thresholds: Mapping[str, float] = THRESHOLDS,
        weights: Mapping[str, float] = WEIGHTS,
        combined_threshold: float = COMBINED_THRESHOLD,
    ) -> DriftVerdict:
        """Judge the fleet as of the newest bin; changes nothing.

        Args:
            thresholds, weights: by per, dss, fds, anomaly_rate.
        """
        reference, held = self.reference, self.held_ratios()
        judged = self._is_judged()
        n_judged = int(judged.sum())
        sustained, ratios = self._sustained_shares(), self.fleet_ratios()
        scores = scale_scores(ratios, thresholds)
        combined = float(combined_ratio(ratios, thresholds, weights, 1.0))
        alarms = held.max(axis=0) > 1
        drifts = bool((ratios > 1).any()) or combined > combined_threshold
        return DriftVerdict(
            end_ms=self._end_ms or 0,
            status=READY if n_judged else COLLECTING,
            scores=scores,
            combined=combined,
            needs_retraining=bool(n_judged) and drifts,
            alarm_share=float(alarms.sum() / max(n_judged, 1)),
            sustained_share=float((sustained >= self.rule.sustained_share).sum() / max(n_judged, 1)),
            n_compared=n_judged,
            drifting=self._describe(held, np.flatnonzero(alarms), self._since, self._changed),
            not_compared=why_not_compared(self, judged, self._watch),
            events=self._watch.events(
                reference.server_names, reference.metrics, self._end_ms or 0, reference.bin_ms
            ),
            ratios=held,
            reference=reference,
            min_days=self.min_days,
        )

    def near(self, most: int) -> tuple[DriftingSeries, ...]:
        """Return the series that are near an alarm without being in one, worst first; changes nothing.

        Near are those from `NEAR` of their limit on, by a statistic that also carries an alarm: what
        many series do is likelier to be a change than what one does. `since_ms` is the newest bin's end.

        Args:
            most: series at most.
        """
        held = self.held_ratios()
        worst = held.max(axis=0)
        carriers = {self._worst_statistic(int(series), held) for series in np.flatnonzero(worst > 1)}
        order = np.argsort(-worst, kind="stable")
        close = [int(series) for series in order if NEAR <= worst[series] <= 1]
        chosen = np.array([s for s in close if self._worst_statistic(s, held) in carriers][:most], np.int64)
        since = np.full(len(worst), self._end_ms or 0, np.int64)
        changed = self._changed.copy()
        for series in chosen:
            changed[series] = self._change_ms(int(series), held)
        return self._describe(held, chosen, since, changed)

    def _describe(
        self, held: Floats32, chosen: Longs, since: Longs, changed: Longs
    ) -> tuple[DriftingSeries, ...]:
        """Say of some series what the newest hours of them say, worst first."""
        found = []
        worst = held.max(axis=0)
        order = np.arange(max(0, self._n_bins - self._short), self._n_bins) % self._short
        newest = self._recent[order]
        usual, actual = newest_levels(self.reference, newest, self._end_ms or 0, chosen)
        for place, series in enumerate(chosen):
            statistic = STATISTICS[self._worst_statistic(int(series), held)]
            row, column = divmod(int(series), len(self.reference.metrics))
            found.append(
                DriftingSeries(
                    server_name=self.reference.server_names[row],
                    metric=self.reference.metrics[column],
                    family=statistic.family,
                    statistic=statistic.name,
                    says=statistic.says,
                    ratio=float(worst[series]),
                    since_ms=int(since[series]),
                    changed_ms=int(changed[series]),
                    usual=float(usual[place]),
                    actual=float(actual[place]),
                )
            )
        return tuple(sorted(found, key=lambda item: (-item.ratio, item.server_name, item.metric)))


def worst_statistic(statistics: Floats32, limits: Floats32, held: Floats32) -> int:
    """Return the index of the statistic that carries one series' alarm.

    Args:
        statistics, limits: (statistic,) of that series.
        held: (family,) its held ratios.
    """
    ratios = limit_ratios(statistics[:, None], limits[None])[:, 0]
    return int(np.where(held.argmax() == FAMILY_OF, ratios, -1.0).argmax())


def change_bin(sums: RunningSums, series: int, statistic: int) -> int:
    """Return how many bins before now the newest day of a series splits best into before and after.

    The largest excursion of the cumulated deviations from their mean (CUSUM), in standard errors
    of that place, of what the statistic looks at. 1 = only the newest bin is different.
    """
    ring: NDArray[Any] = sums.values
    if statistic in _BY_SIZE:
        ring = sums.size
    elif statistic in _BY_MOVES:
        ring = sums.innovations
    elif statistic == INDEX["error_3h"]:
        ring = sums.errors
    newest = sums.newest(ring[:, series], sums.long).astype(np.float64)
    known = sums.newest(sums.values[:, series], sums.long) != ABSENT
    if ring.dtype == np.uint8:
        known &= newest != ABSENT
    places = np.flatnonzero(known)
    if len(places) < 2:
        return 1
    kept = newest[places]
    n = np.arange(1, len(kept))
    path = np.abs(np.cumsum(kept - kept.mean())[:-1]) / np.sqrt(n * (len(kept) - n))
    return int(len(newest) - places[int(path.argmax()) + 1])


def newest_levels(
    reference: Reference, newest: Floats32, end_ms: int, chosen: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Return what is usual for the newest hours of some series and what they were, native units.

    Args:
        newest: (bin, series) values up to `end_ms`, oldest first, NaN = absent.
        chosen: rows of the series asked for.
    """
    if not len(chosen):
        return np.empty(0), np.empty(0)
    clock, bins = reference.clock, len(newest)
    local_bins = clock.local_bins(end_ms - bins * reference.bin_ms, bins)
    usual = reference.shape.rows(chosen).usual_values(clock, local_bins).astype(np.float64)
    own = newest[:, chosen].astype(np.float64)
    known = np.isfinite(own)
    n = known.sum(axis=0)
    actual = np.where(known, own, 0).sum(axis=0) / np.maximum(n, 1)
    return usual.mean(axis=1), np.where(n > 0, actual, np.nan)


def why_not_compared(
    detector: SeasonalDetector, judged: NDArray[np.bool_], watch: SensorWatch
) -> dict[str, int]:
    """Return why -> how many series are not judged; no entry where there is none."""
    reference = detector.reference
    unjudged = ~reference.is_compared
    short = unjudged & (reference.n_days < detector.min_days)
    unknown = unjudged & ~short
    out = np.repeat(watch.is_out, len(reference.metrics))
    rest = ~judged & ~short & ~unknown
    reasons = {
        TOO_FEW_DAYS: short,
        "reference without limits": unknown,
        "server is silent": rest & out,
        "sensor stands still": rest & ~out & watch.is_frozen,
    }
    last = "window not full yet" if detector.is_filling else "too few values in the window"
    reasons[last] = rest & ~out & ~watch.is_frozen
    return {reason: int(mask.sum()) for reason, mask in reasons.items() if mask.any()}
