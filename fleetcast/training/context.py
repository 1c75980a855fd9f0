"""Why a training runs: `training_context.json`, beside its data.

    {"attempt_id": str, "drifting": [{"server": str, "metric": str,
                                      "changed_ms": int or "since": ISO 8601}, ...],
     "known_changes": [the same, ...]}   what changed before, and is no news to the model

`changed_ms` (ms since 1970, when the series changed) goes before `since` (when it was noticed);
an entry with neither is assumed to have changed a day before the data end.

Owns: reading it. The file is optional, and advice only: wrong entries are skipped with a warning.
Does not know: who writes it, how windows are drawn.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetcast import files
from fleetcast.clock import DAY_MS, parse_plain_utc, to_ms
from fleetcast.errors import CorruptFile
from fleetcast.schema import ChangedSeries
from fleetcast.training.grid import TrainingGrid

logger = logging.getLogger(__name__)

CONTEXT_FILE = "training_context.json"
# how long ago a series changed that is named without a time: drift is noticed within a day
_UNKNOWN_AGE_MS = DAY_MS


@dataclass(frozen=True)
class TrainingContext:
    """The attempt a training belongs to, and what drifted; empty without a file."""

    attempt_id: str | None = None
    drifting: tuple[Mapping[str, Any], ...] = ()
    known: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def find(cls, data: Path, attempt_id: str | None) -> "TrainingContext":
        """Return the context beside the data or in the working directory.

        Args:
            attempt_id: the attempt this process was started for; a context of another one is
                a leftover and says nothing about this data.
        """
        for path in (data.parent / CONTEXT_FILE, Path(CONTEXT_FILE)):
            try:
                content = files.read_json(path)
            except FileNotFoundError:
                continue
            except (CorruptFile, OSError) as error:
                logger.warning("training context ignored reason=%s", error)
                continue
            return cls._parse(content, attempt_id, path)
        return cls(attempt_id)

    @classmethod
    def _parse(cls, content: Mapping[str, Any], attempt_id: str | None, path: Path) -> "TrainingContext":
        own_id = content.get("attempt_id")
        if attempt_id is not None and own_id is not None and own_id != attempt_id:
            logger.warning("training context ignored file=%s is of attempt=%s", path, own_id)
            return cls(attempt_id)
        drifting, known = (_entries(content.get(name)) for name in ("drifting", "known_changes"))
        return cls(attempt_id or (own_id if isinstance(own_id, str) else None), drifting, known)

    def wanted_servers(self) -> list[str]:
        """Return the servers that must be in a sample of the fleet, the worst first."""
        return [str(item.get("server")) for item in self.drifting]

    def changed_series(self, grid: TrainingGrid) -> tuple[ChangedSeries, ...]:
        """Return the drifting series of a grid, each once, with the bin of its (first) change."""
        oldest: dict[tuple[int, int], ChangedSeries] = {}
        for item in _find_changes(self.drifting, grid):
            known = oldest.get((item.server, item.metric))
            if known is None or item.since_bin < known.since_bin:
                oldest[item.server, item.metric] = item
        return tuple(oldest.values())

    def all_changes(self, grid: TrainingGrid) -> tuple[ChangedSeries, ...]:
        """Return every change known of a grid's series, each series with its newest."""
        newest = {(item.server, item.metric): item for item in _find_changes(self.known, grid)}
        newest |= {(item.server, item.metric): item for item in self.changed_series(grid)}
        return tuple(newest.values())


def _entries(content: object) -> tuple[Mapping[str, Any], ...]:
    return tuple(item for item in content if isinstance(item, dict)) if isinstance(content, list) else ()


def _find_changes(entries: Iterable[Mapping[str, Any]], grid: TrainingGrid) -> Iterator[ChangedSeries]:
    servers = {name: index for index, name in enumerate(grid.server_names)}
    metrics = {name: index for index, name in enumerate(grid.metrics)}
    absent = []
    for item in entries:
        server, metric = servers.get(str(item.get("server"))), metrics.get(str(item.get("metric")))
        since_bin = _since_bin(item, grid)
        if server is None or metric is None or since_bin is None:
            absent.append(item)
            continue
        yield ChangedSeries(server, metric, since_bin)
    if absent:
        logger.warning(
            "changed series ignored: not in the data count=%d first=%.200s", len(absent), absent[0]
        )


def _since_bin(item: Mapping[str, Any], grid: TrainingGrid) -> int | None:
    """Return the bin a change began in, None where that is no time before the data's end."""
    try:
        since_bin = grid.bin_of(_changed_ms(item, grid))
    except (ValueError, OverflowError):
        return None
    return max(0, since_bin) if since_bin < grid.n_bins else None


def _changed_ms(item: Mapping[str, Any], grid: TrainingGrid) -> int:
    """Return when a series changed; ValueError where the entry holds no time."""
    changed_ms, since = item.get("changed_ms"), item.get("since")
    if changed_ms is not None:
        if isinstance(changed_ms, bool) or not isinstance(changed_ms, int | float):
            raise ValueError(f"changed_ms {changed_ms!r} is no number")
        return int(changed_ms)
    return grid.end_ms - _UNKNOWN_AGE_MS if since is None else to_ms(parse_plain_utc(str(since)))
