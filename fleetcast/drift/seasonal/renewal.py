"""The reference in force: what a training left, brought up to date while servers are young.

    drift_reference/<version>.npz    servers learned again since that version's training

Owns: which file holds, and learning young and new servers again, once a day, from what was
settled in the meantime; likewise those whose forecast errors the training could not know (a first
model has made none), once there are days enough of them. A server in alarm is not learned again,
nobody is while the fleet drifts: what is being judged must not become the measure. Does not know:
verdicts, trainings.

Its folder has one writer, the daemon that owns the working directory.

A reference by the settings: of a fleet of any size, minding when single series changed.

Owns: how settings become a reference, learning large fleets in parts, and what a known change
leaves of a series. Does not know: where bins come from, files.
"""

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from fleetcast.clock import DAY_MS
from fleetcast.drift.seasonal.learning import DAY_COVERAGE, MATURE_DAYS
from fleetcast.drift.seasonal.quorum import QuorumRule
from fleetcast.drift.seasonal.reference import Reference, immature_servers, merge, servers_without_errors
from fleetcast.drift.seasonal.season import DayClock
from fleetcast.drift.seasonal.settled import ReadForecasts, read_grid
from fleetcast.errors import CorruptFile
from fleetcast.forecast.registry import REFERENCE_FILE, Version
from fleetcast.schema import Floats, Floats32, Longs
from fleetcast.settings import DriftSettings

SERVERS_AT_ONCE = 500  # some 2 GB of passing arrays at 30 days of 4 metrics


def quorum_rule(settings: DriftSettings) -> QuorumRule:
    """Return how many series make a fleet's drift."""
    return QuorumRule(quorum=settings.quorum, sustained_quorum=settings.sustained_quorum)


def learn_reference(
    values: Floats32,
    server_names: tuple[str, ...],
    metrics: tuple[str, ...],
    start_ms: int,
    bin_ms: int,
    settings: DriftSettings,
    *,
    errors: Floats32 | None = None,
    changed_ms: Floats | None = None,
) -> Reference:
    """Learn a reference from the newest `reference_days` of a grid.

    Args:
        values, errors: (server, metric, bin) as `Reference.fit` takes them.
        changed_ms: (server, metric) when a series is known to have changed, NaN = never. Its days
            count from the next midnight on.
    """
    n_bins = values.shape[2]
    first = max(0, n_bins - settings.reference_days * DAY_MS // bin_ms)
    start_ms += first * bin_ms
    values = values[:, :, first:]
    errors = None if errors is None else errors[:, :, first:]
    changes = np.full(values.shape[:2], np.nan) if changed_ms is None else changed_ms
    clock = DayClock(bin_ms, settings.timezone)
    starts = start_days(changes, start_ms, clock)
    learned: Reference | None = None
    step = max(1, -(-len(server_names) // SERVERS_AT_ONCE))
    for offset in range(step):  # every step-th server: each part is a fleet in small
        rows = slice(offset, None, step)
        part = Reference.fit(
            values[rows],
            server_names[rows],
            metrics,
            start_ms,
            bin_ms,
            errors=None if errors is None else errors[rows],
            changed_ms=_midnights(starts[rows], start_ms, clock),
            timezone=settings.timezone,
            rule=quorum_rule(settings),
            false_alarms_per_month=settings.false_alarms_per_month,
            min_days=settings.min_reference_days,
        )
        part = replace(part, start_days=np.maximum(part.start_days, starts[rows].ravel()))
        learned = part if learned is None else merge(learned, part)
    assert learned is not None, "there is at least one part"
    return learned


def start_days(changed_ms: Floats, start_ms: int, clock: DayClock) -> Longs:
    """Return the first whole local day after each change, counted from that of `start_ms`; 0 = never.

    >>> clock = DayClock(300_000)
    >>> start_days(np.array([np.nan, -5.0, 1.0, DAY_MS * 2.0]), 0, clock).tolist()
    [0, 0, 1, 2]
    """
    since = (changed_ms - start_ms + _into_day(start_ms, clock)) / DAY_MS
    days = np.where(np.nan_to_num(changed_ms, nan=-np.inf) <= start_ms, 0.0, np.ceil(since))
    return np.asarray(np.nan_to_num(days, nan=0.0), np.int64)


def change_times(reference: Reference) -> Floats:
    """Return (server, metric): the midnight before which a series was another, NaN = never."""
    starts = reference.start_days.reshape(len(reference.server_names), -1)
    return _midnights(starts, reference.start_ms, reference.clock)


def _midnights(starts: Longs, start_ms: int, clock: DayClock) -> Floats:
    first_ms = start_ms - _into_day(start_ms, clock)
    return np.asarray(np.where(starts > 0, first_ms + starts * float(DAY_MS), np.nan))


def _into_day(start_ms: int, clock: DayClock) -> int:
    """Return how far into its local day a time is."""
    return int(clock.local_bins(start_ms, 1)[0]) % clock.bins_per_day * clock.bin_ms


logger = logging.getLogger(__name__)

FOLDER = "drift_reference"
SERVERS_A_DAY = 500  # learned again at once: some 15 ms for each series


class ReferenceRenewal:
    """Finds and renews the reference of the version in force. Not thread safe."""

    def __init__(self, read: ReadForecasts, settings: DriftSettings, bin_ms: int, folder: Path) -> None:
        self._read = read
        self._settings = settings
        self._bin_ms = bin_ms
        self._folder = folder
        self._tried_ms = 0  # end of the data last looked at

    def load(self, version: Version) -> Reference | None:
        """Return the newest reference of a version, or None where it has none that can be used."""
        for path in (self._path(version.id), version.reference_path):
            try:
                reference = Reference.load(path)
                if path == version.reference_path:
                    version.verify(REFERENCE_FILE)
            except FileNotFoundError:
                continue
            except CorruptFile as error:
                logger.warning("reference passed over reason=%s", error)
                continue
            if (reference.bin_ms, reference.timezone) == (self._bin_ms, self._settings.timezone):
                return reference
            logger.warning("reference passed over file=%s reason=other bins or time zone", path)
        return None

    def renew(
        self,
        version: Version,
        known: Reference | None,
        live: Collection[str],
        metrics: Collection[str],
        newest_ms: int,
        in_alarm: Collection[str],
    ) -> Reference | None:
        """Learn again, and save, what is young; None where there is nothing to do today.

        Args:
            live, metrics: the servers and metrics with newly settled bins.
            newest_ms: end of what is settled; learned is up to its last midnight.
            in_alarm: servers that are left as they are.
        """
        end_ms = self._midnight(newest_ms)
        if end_ms <= max(self._tried_ms, known.end_ms if known else 0):
            return None
        self._tried_ms = end_ms
        young = [name for name in self._young(known, sorted(live)) if name not in in_alarm]
        if not young or not metrics:
            return None
        newer = self._learn(known, tuple(young), known.metrics if known else tuple(sorted(metrics)), end_ms)
        if newer is None:
            return None
        is_whole = known is None or set(known.server_names) <= set(newer.server_names)
        reference = newer if is_whole or known is None else merge(known, newer)
        self._save(version.id, reference)
        logger.info(
            "drift reference renewed version=%s servers=%d of=%d compared_series=%d",
            *(
                version.id,
                len(newer.server_names),
                len(reference.server_names),
                int(reference.is_compared.sum()),
            ),
        )
        return reference

    def _young(self, known: Reference | None, live: list[str]) -> list[str]:
        """Return whom to learn again, those known for the shortest first."""
        if known is None:
            return live[:SERVERS_A_DAY]
        days_of = _known_days(known)
        young = immature_servers(known, tuple(live))
        unjudged = set(servers_without_errors(known)).intersection(live) - set(young)
        young = (*young, *sorted(unjudged))
        return sorted(young, key=lambda name: days_of.get(name, 0))[:SERVERS_A_DAY]

    def _learn(
        self, known: Reference | None, names: tuple[str, ...], metrics: tuple[str, ...], end_ms: int
    ) -> Reference | None:
        """Learn the servers of which more days are settled than their reference knows, if any."""
        span_ms = (end_ms - self._settings.reference_days * DAY_MS, end_ms)
        grid = read_grid(self._read, names, metrics, span_ms, self._bin_ms)
        days_of, per_day = _known_days(known) if known else {}, DAY_MS // self._bin_ms
        least = np.array([min(days_of.get(name, 1), MATURE_DAYS) for name in names])
        is_worth_it = _settled_days(grid.values, per_day) >= least
        if known:  # nothing is new about a server of full age but its errors, once there are enough
            is_old = np.isin(names, immature_servers(known, names), invert=True)
            is_worth_it &= ~is_old | (
                _settled_days(grid.errors, per_day) >= self._settings.min_reference_days
            )
        rows = np.flatnonzero(is_worth_it)
        if not len(rows):
            return None
        chosen = tuple(names[row] for row in rows)
        first = int(np.flatnonzero(np.isfinite(grid.values[rows]).any(axis=(0, 1)))[0])
        return learn_reference(
            grid.values[rows, :, first:],
            chosen,
            metrics,
            span_ms[0] + first * self._bin_ms,
            self._bin_ms,
            self._settings,
            errors=grid.errors[rows, :, first:],
            changed_ms=self._changes(known, chosen, len(metrics)),
        )

    def _changes(self, known: Reference | None, names: tuple[str, ...], n_metrics: int) -> Floats:
        """Return (server, metric) the changes a reference knows of."""
        changes = np.full((len(names), n_metrics), np.nan)
        if known is not None:
            times = change_times(known)
            row_of = {name: row for row, name in enumerate(known.server_names)}
            for row, name in enumerate(names):
                if name in row_of:
                    changes[row] = times[row_of[name]]
        return changes

    def _midnight(self, moment_ms: int) -> int:
        clock = DayClock(self._bin_ms, self._settings.timezone)
        return moment_ms - int(clock.local_bins(moment_ms, 1)[0]) % clock.bins_per_day * self._bin_ms

    def _path(self, version_id: str) -> Path:
        return self._folder / f"{version_id}.npz"

    def _save(self, version_id: str, reference: Reference) -> None:
        self._folder.mkdir(exist_ok=True)
        path = self._path(version_id)
        reference.save(path)
        for old in self._folder.glob("*.npz"):
            if old != path:
                old.unlink(missing_ok=True)


def _known_days(reference: Reference) -> dict[str, int]:
    """Return the days behind the best known series of each server."""
    days = reference.n_days.reshape(len(reference.server_names), -1).max(axis=1)
    return dict(zip(reference.server_names, days.tolist(), strict=True))


def _settled_days(values: Floats32, per_day: int) -> Longs:
    """Return (server,): whole days with enough bins, of (server, metric, bin) that ends at midnight."""
    by_day = np.isfinite(values).reshape(*values.shape[:2], -1, per_day).mean(axis=3)
    return np.asarray((by_day >= DAY_COVERAGE).sum(axis=2).max(axis=1), np.int64)
