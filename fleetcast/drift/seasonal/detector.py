"""The season-matched drift detector: a fleet followed bin by bin against its reference.

Owns: the newest day of every series as running sums, which series are in alarm and since when,
the fleet's verdict. One bin costs the same however long the reference is. Does not know: where
bins come from, what is done about a verdict, files.

A detector rebuilt from the bins of at least the last `memory_bins` gives the same scores as one
that ran through: sums are integers, everything else is a function of the bins. Only the start of
an alarm or standstill that is older than the first bin given is not known.

    drift = SeasonalDrift(Reference.load(path))
    drift.replay(grid, start_ms)          # (server, metric, bin), in the reference's order
    verdict = drift.check()
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.drift_explanation import (
    change_bin,
    newest_levels,
    why_not_compared,
    worst_statistic,
)
from fleetcast.drift.seasonal.drift_verdict import COLLECTING, READY, DriftingSeries, DriftVerdict
from fleetcast.drift.seasonal.quorum import (
    COMBINED_THRESHOLD,
    THRESHOLDS,
    WEIGHTS,
    QuorumRule,
    combined_ratio,
    family_ratios,
    fleet_ratios,
    scaled_scores,
)
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.residuals import innovations, moves, traits
from fleetcast.drift.seasonal.running_sums import RunningSums
from fleetcast.drift.seasonal.sensors import NEVER_STILL, SensorWatch, measured
from fleetcast.drift.seasonal.statistics import (
    FAMILIES,
    LONG_H,
    SHORT_H,
    STATISTICS,
    BinCodes,
    statistics,
)
from fleetcast.errors import BadData
from fleetcast.schema import Floats32, Longs

_NEVER = -1


class SeasonalDrift:
    """Follows one fleet; not thread safe. Bins go in in time order, gaps are filled as absent."""

    def __init__(self, reference: Reference, rule: QuorumRule | None = None) -> None:
        self.reference = reference
        self.rule = rule or QuorumRule()
        self._clock = reference.clock
        per_day = self._clock.bins_per_day
        self._short, self._long = per_day * SHORT_H // 24, per_day * LONG_H // 24
        self._hold, self._sustained = self.rule.hold_bins(per_day), self.rule.sustained_bins(per_day)
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
        return self._long + self._hold + self._sustained + known + 2

    def replay(self, grid: Floats32, start_ms: int, errors: Floats32 | None = None) -> None:
        """Take in a stretch of bins, (server, metric, bin) in the reference's order."""
        for index in range(grid.shape[2]):
            missed = None if errors is None else errors[:, :, index]
            self.update(grid[:, :, index], start_ms + index * self.reference.bin_ms, missed)

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
        self._take(measured(values).ravel(), bin_ms, errors)

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
        size = np.abs(measured(errors).reshape(-1, 1)) / spreads
        return np.asarray(np.where(np.isfinite(admitted)[:, None], size, np.nan), np.float32)

    def _judge(self) -> None:
        """Score the windows that end now and follow each series' alarm."""
        sums = self._sums.window_sums()
        self._statistics = statistics(sums, self.reference.books, self._short, self._long)[:, :, 0]
        ratios = family_ratios(self._statistics, self.reference.limits)
        self._ratios[self._n_bins % self._hold] = np.where(self._is_compared, ratios, 0)
        held = self.held_ratios()
        alarms = held.max(axis=0) > 1
        place = self._n_bins % self._sustained
        self._alarm_counts += alarms.astype(np.int64) - self._alarms[place]
        self._alarms[place] = alarms
        self._n_bins += 1
        assert self._end_ms is not None, "a bin was taken"
        begins = alarms & (self._since == _NEVER)
        self._since[begins] = self._end_ms - self._hold * self.reference.bin_ms
        for series in np.flatnonzero(begins):
            own = (self._statistics[:, series], self.reference.limits[series], held[:, series])
            split = change_bin(self._sums, int(series), worst_statistic(*own))
            self._changed[series] = self._end_ms - split * self.reference.bin_ms
        self._since[~alarms] = self._changed[~alarms] = _NEVER

    def held_ratios(self) -> Floats32:
        """Return (family, series): the smallest ratio of the last `hold_h`."""
        return np.asarray(self._ratios.min(axis=0), np.float32)

    def fleet_ratios(self) -> Floats32:
        """Return (family,): how near the fleet is to its limits, 1 = at them."""
        found = fleet_ratios(
            self.held_ratios(),
            self._sustained_shares(),
            int(self._judged().sum()),
            len(self.reference.metrics),
            self.rule,
        )
        return np.asarray(found / self.reference.fleet.factor, np.float32)

    def _judged(self) -> NDArray[np.bool_]:
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
        judged = self._judged()
        n_judged = int(judged.sum())
        sustained, ratios = self._sustained_shares(), self.fleet_ratios()
        scores = scaled_scores(ratios, thresholds)
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
            drifting=self._drifting(held, alarms),
            not_compared=why_not_compared(reference, judged, self._watch, self._n_bins < self._short),
            events=self._watch.events(
                reference.server_names, reference.metrics, self._end_ms or 0, reference.bin_ms
            ),
            ratios=held,
            is_alarm=alarms,
        )

    def _drifting(self, held: Floats32, alarms: NDArray[np.bool_]) -> tuple[DriftingSeries, ...]:
        found = []
        worst = held.max(axis=0)
        order = np.arange(max(0, self._n_bins - self._short), self._n_bins) % self._short
        newest = self._recent[order]
        usual, actual = newest_levels(self.reference, newest, self._end_ms or 0, np.flatnonzero(alarms))
        for place, series in enumerate(np.flatnonzero(alarms)):
            own = (self._statistics[:, series], self.reference.limits[series], held[:, series])
            statistic = STATISTICS[worst_statistic(*own)]
            row, column = divmod(int(series), len(self.reference.metrics))
            found.append(
                DriftingSeries(
                    server_name=self.reference.server_names[row],
                    metric=self.reference.metrics[column],
                    family=statistic.family,
                    statistic=statistic.name,
                    says=statistic.says,
                    ratio=float(worst[series]),
                    since_ms=int(self._since[series]),
                    changed_ms=int(self._changed[series]),
                    usual=float(usual[place]),
                    actual=float(actual[place]),
                )
            )
        return tuple(sorted(found, key=lambda item: (-item.ratio, item.server_name, item.metric)))
