"""Learning a reference by the settings, and the reference in force: renewed while servers are young.

    drift_reference/<version>.npz    servers learned again since that version's training

Owns: which file holds, how settings become a reference, learning a large fleet in parts, and once
a day learning young and new servers again from what was settled in the meantime. Servers whose
forecast errors the training could not know (a first model has made none) are learned again, too,
once there are days enough of them. Never relearn a server that is in alarm, nor any server while the
fleet drifts: the drift would become the new normal. Does not know: verdicts, trainings.

The folder has one writer, the daemon that owns the working directory.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fleetcast.clock import DAY_MS
from fleetcast.drift.seasonal.learning import DAY_COVERAGE
from fleetcast.drift.seasonal.limits import SURE_DAYS
from fleetcast.drift.seasonal.quorum import MATURE_DAYS, QuorumRule
from fleetcast.drift.seasonal.reference import (
    Reference,
    ReferenceOptions,
    immature_servers,
    merge,
    servers_without_errors,
)
from fleetcast.drift.seasonal.season import DayClock
from fleetcast.drift.seasonal.settled import FleetGrid, read_grid
from fleetcast.errors import CorruptFile
from fleetcast.files import remove_leftover
from fleetcast.forecast.registry import REFERENCE_FILE, Version
from fleetcast.schema import Floats, Floats32, Longs, ReadForecasts
from fleetcast.settings import DriftSettings

logger = logging.getLogger(__name__)

FOLDER = "drift_reference"
SERVERS_AT_ONCE = 500  # some 2 GB of passing arrays at 30 days of 4 metrics
SERVERS_A_DAY = 500  # learned again at once: some 15 ms for each series


def quorum_rule(settings: DriftSettings) -> QuorumRule:
    """Return how many series make a fleet's drift."""
    return QuorumRule(
        quorum=settings.quorum,
        sustained_quorum=settings.sustained_quorum,
        common_quorum=settings.common_quorum,
    )


def learn_reference(grid: FleetGrid, settings: DriftSettings, changed_ms: Floats | None = None) -> Reference:
    """Learn a reference from the newest `reference_days` of a grid.

    Args:
        changed_ms: (server, metric) when a series is known to have changed, NaN = never. Its days
            count from the next midnight on.
    """
    grid = grid.since(max(0, grid.values.shape[2] - settings.reference_days * DAY_MS // grid.bin_ms))
    options = ReferenceOptions(
        settings.timezone, quorum_rule(settings), settings.false_alarms_per_month, settings.min_reference_days
    )
    clock = DayClock(grid.bin_ms, settings.timezone)
    changes = np.full(grid.values.shape[:2], np.nan) if changed_ms is None else changed_ms
    first_days = clock.first_days(changes, grid.start_ms)
    n_servers, whole = len(grid.server_names), None
    step = max(1, -(-n_servers // SERVERS_AT_ONCE))
    for offset in range(step):  # every step-th server: each part is a fleet in small
        rows = np.arange(offset, n_servers, step)
        days = first_days[rows]
        part = Reference.fit(grid.servers(rows), options, clock.starts_ms(days, grid.start_ms))
        part = replace(part, start_days=np.maximum(part.start_days, days.ravel()))
        whole = part if whole is None else merge(whole, part)
    assert whole is not None, "there is at least one part"
    return whole


class ReferenceRenewal:
    """Finds and renews the reference of the version in force. Not thread safe."""

    def __init__(
        self,
        read: ReadForecasts,
        settings: DriftSettings,
        bin_ms: int,
        folder: Path,
        forgotten: Mapping[str, int] | None = None,
    ) -> None:
        """Prepare.

        Args:
            forgotten: servers that people wanted forgotten, and when (ms): what was learned of them before
                is passed over.
        """
        self._forgotten = forgotten or {}
        self._read = read
        self._settings = settings
        self._bin_ms = bin_ms
        self._folder = folder
        self._tried_ms = 0  # end of the data last looked at

    def load(self, version: Version) -> Reference | None:
        """Return the newest reference of a version, or None where it has none that can be used."""
        for path in (self._path(version.id), version.reference_path):
            try:
                reference = Reference.load(path).without(self._forgotten)
                if path == version.reference_path:
                    version.verify(REFERENCE_FILE)
            except FileNotFoundError:
                continue
            except CorruptFile as error:
                logger.warning("reference passed over reason=%s", error)
                continue
            if not reference.server_names:
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
        end_ms = DayClock(self._bin_ms, self._settings.timezone).midnight(newest_ms)
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
                _settled_days(grid.errors, per_day) >= max(SURE_DAYS, self._settings.min_reference_days)
            )
        rows = np.flatnonzero(is_worth_it)
        if not len(rows):
            return None
        chosen = grid.servers(rows)
        first = int(np.flatnonzero(np.isfinite(chosen.values).any(axis=(0, 1)))[0])
        changes = self._changes(known, chosen.server_names, len(metrics))
        return learn_reference(chosen.since(first), self._settings, changes)

    def _changes(self, known: Reference | None, names: tuple[str, ...], n_metrics: int) -> Floats:
        """Return (server, metric) the changes a reference knows of."""
        changes = np.full((len(names), n_metrics), np.nan)
        if known is not None:
            times = known.changed_ms()
            row_of = {name: row for row, name in enumerate(known.server_names)}
            for row, name in enumerate(names):
                if name in row_of:
                    changes[row] = times[row_of[name]]
        return changes

    def _path(self, version_id: str) -> Path:
        return self._folder / f"{version_id}.npz"

    def _save(self, version_id: str, reference: Reference) -> None:
        self._folder.mkdir(exist_ok=True)
        path = self._path(version_id)
        reference.save(path)
        for old in self._folder.glob("*.npz"):
            if old != path:
                remove_leftover(old)


def forget_in_references(folder: Path, forgotten: Mapping[str, int]) -> None:
    """Write the files of a working directory's references without forgotten servers.

    Raises:
        StorageFull, StorageBroken: call it again.
    """
    for path in (folder / FOLDER).glob("*.npz"):
        try:
            known = Reference.load(path)
        except (CorruptFile, FileNotFoundError):  # none that is used
            continue
        left = known.without(forgotten)
        if not left.server_names:
            remove_leftover(path)
        elif left is not known:
            left.save(path)


def _known_days(reference: Reference) -> dict[str, int]:
    """Return the days behind the best known series of each server."""
    days = reference.n_days.reshape(len(reference.server_names), -1).max(axis=1)
    return dict(zip(reference.server_names, days.tolist(), strict=True))


def _settled_days(values: Floats32, per_day: int) -> Longs:
    """Return (server,): whole days with enough bins, of (server, metric, bin) that ends at midnight."""
    by_day = np.isfinite(values).reshape(*values.shape[:2], -1, per_day).mean(axis=3)
    return np.asarray((by_day >= DAY_COVERAGE).sum(axis=2).max(axis=1), np.int64)
