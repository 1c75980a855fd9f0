"""What a training is made of: data enough, the export, the two commands, the list of what changed.

Owns: when a fleet has data enough for its first training, which stretch of the buffer is exported
(`--export`, a process of its own), the trainer's command line, and `training_context.json`: the
drifting series, and those near it, with the time each changed. Does not know: when to train,
processes, what a trainer does with the list.
"""

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetcast.bins import LIVE_DAYS, count_trainable, enough_to_train, most_servers, sample_servers
from fleetcast.clock import DAY_MS, SystemClock, from_ms, iso_z, to_ms
from fleetcast.drift.evidence import DriftEvidence, DriftSource
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.literal.series import change_times, series_drift
from fleetcast.drift.report import DriftReport, drifting_json, series_json
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.renewal import forget_in_references
from fleetcast.errors import CorruptFile
from fleetcast.exclusions import AllBut, Exclusions, note_forgotten
from fleetcast.files import read_json, remove_leftover
from fleetcast.retraining.attempts import Step
from fleetcast.retraining.decision import FOLLOW_UP, LEARNING
from fleetcast.schema import RecordBatch
from fleetcast.settings import CALIBRATED, PathSettings, RetrainingSettings, Settings

if TYPE_CHECKING:  # pyarrow and requests: --help and the drift report answer without them
    from fleetcast.retraining.report import RetrainingCheck
    from fleetcast.storage.store import DataBuffer

logger = logging.getLogger(__name__)

EXPORT_FILE = "training_data_incremental.parquet"
CONTEXT_FILE = "training_context.json"
_BUFFER_DIR = "FLEETCAST_PATHS_DATA_BUFFER_DIR"
MOST_SERIES = 500  # named to the trainer; the worst come first


class Readiness:
    """Answers whether a fleet has data enough for its first training.

    The rule itself is `bins.enough_to_train`, which the trainer asks too. Once there was enough,
    nothing is read any more. Not thread safe.
    """

    def __init__(self, store: "DataBuffer", settings: Settings) -> None:
        self._store = store
        self._bins = settings.bins
        self._horizon_bins = settings.forecast.horizon_bins
        self._training_days = settings.retraining.training_days
        self._limits = settings.decision
        self._was_enough = False

    def why_not(self) -> str:
        """Return what is missing for a first training, or ""."""
        newest, oldest = self._store.newest_record_time(), self._store.oldest_record_time()
        if newest is None or oldest is None:
            return f"no records in {self._store.describe()}"
        if self._was_enough:
            return ""
        oldest = max(oldest, newest - timedelta(days=self._training_days))
        span_s = (newest - oldest).total_seconds()
        enough = self._limits.initial_min_windows
        missing = enough_to_train(span_s, enough, self._limits)  # the span alone, before any reading
        if missing:
            complete = oldest + timedelta(seconds=self._limits.initial_min_span_s)
            return f"{missing}, complete about {complete:%Y-%m-%d %H:%M}Z"
        n_windows = self._count(to_ms(oldest), to_ms(newest), enough)
        missing = enough_to_train(span_s, n_windows, self._limits)
        self._was_enough = not missing
        return missing

    def _count(self, oldest_ms: int, newest_ms: int, enough: int) -> int:
        """Count windows day by day, newest first, until there are `enough`.

        A window that spans midnight, or two batches, is not counted: a lower bound is enough.
        """
        found, bin_ms = 0, self._bins.bin_s * 1000
        for day in range(newest_ms // DAY_MS, oldest_ms // DAY_MS - 1, -1):
            start_ms, end_ms = day * DAY_MS, (day + 1) * DAY_MS
            for batch in self._store.iter_bins(start_ms, end_ms, bin_ms, self._bins.forecast_metrics):
                found += self._windows_of(batch, start_ms)
                if found >= enough:
                    return found
        return found

    def _windows_of(self, batch: RecordBatch, day_ms: int) -> int:
        if not len(batch) or not batch.metrics:
            return 0
        bin_ms = self._bins.bin_s * 1000
        means = np.stack(list(batch.metrics.values()), axis=1)
        shape = (len(batch.server_names), means.shape[1], DAY_MS // bin_ms)
        grid = np.full(shape, np.nan, np.float32)
        grid[batch.server_codes, :, (batch.timestamps_ms - day_ms) // bin_ms] = means
        return count_trainable(grid, self._horizon_bins)


def training_steps(settings: Settings, program: Path, config: Path | None) -> list[Step]:
    """Return the export and the training, as commands in the working directory.

    Args:
        program: the retraining daemon itself, which also exports.
        config: the settings file named on the command line, if any.
    """
    exported = {
        "FLEETCAST_PATHS_CHECKPOINT_DIR": settings.paths.checkpoint_dir,  # names the excluded servers
        "FLEETCAST_TRAINER_MAX_CELLS": str(settings.trainer.max_cells),
        _BUFFER_DIR: settings.paths.data_buffer_dir,
        "FLEETCAST_RETRAINING_TRAINING_DAYS": str(settings.retraining.training_days),
        "FLEETCAST_BINS_BIN_S": str(settings.bins.bin_s),
        "FLEETCAST_CLOCK_MODE": settings.clock.mode,
    }
    elsewhere = settings.paths.data_buffer_dir != PathSettings().data_buffer_dir
    settled = {name: exported[name] for name in (_BUFFER_DIR,) if elsewhere}  # for the drift reference
    if settings.retraining.engine != RetrainingSettings().engine:
        settled["FLEETCAST_RETRAINING_ENGINE"] = settings.retraining.engine
    named = [] if config is None else ["--config", str(config)]
    return [
        Step([sys.executable, str(program), "--export", EXPORT_FILE, *named], exported),
        Step(trainer_command(settings, program.parent, config), settled),
    ]


def trainer_command(settings: Settings, program_dir: Path, config: Path | None) -> list[str]:
    """Return the trainer's command line; beyond the documented flags only what is not the default."""
    script = _trainer_script(settings.retraining.training_script, program_dir)
    epochs = str(settings.retraining.training_epochs)
    command = [sys.executable, str(script), "--data", EXPORT_FILE, "--incremental", "--epochs", epochs]
    if settings.paths.checkpoint_dir != PathSettings().checkpoint_dir:
        command += ["--checkpoint-dir", settings.paths.checkpoint_dir]
    if config is not None:
        command += ["--config", str(config)]
    return command


def _trainer_script(named: str, program_dir: Path) -> Path:
    """Return the trainer: here, else beside the daemon, else (not renamed) wherever it is installed."""
    script = Path(named)
    if script.exists():
        return script
    if (program_dir / script).exists():
        return program_dir / script
    is_ours = named == RetrainingSettings().training_script
    module = find_spec(script.stem) if is_ours else None
    return Path(module.origin) if module and module.origin else script


def training_context(
    check: "RetrainingCheck",
    evidence: DriftEvidence,
    source: DriftSource,
    before: Path = Path(CONTEXT_FILE),
) -> dict[str, Any]:
    """Return what `training_context.json` says beside the attempt's id: what drifts, since when.

    A follow-up also names what the training before it named. A learning training names nothing: it is
    for the whole fleet. The few series in alarm then count as changes that are known, so that the next
    drift reference does not mix what they were and what they are.

    Args:
        before: the context of the training before.
    """
    drifting = [*_drifting(evidence, source, check.report)]
    known = known_changes(evidence.reference) if evidence.reference else []
    if check.decision.rule == FOLLOW_UP:
        drifting += drifting_before(before)
    if check.decision.rule == LEARNING:
        drifting, known = [], [*known, *_changes(drifting)]
    return {
        "rule": check.decision.rule,
        "made_at": iso_z(check.at),
        "model_version": evidence.model_version,
        "basis": check.report.basis,
        "drifting": drifting,
        "known_changes": known,
    }


def _changes(drifting: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return drifting series as changes that are known."""
    return [{name: item[name] for name in ("server", "metric", "changed_ms")} for item in drifting]


def known_changes(reference: Reference) -> list[dict[str, Any]]:
    """Return the changes that the reference in force knows of, so that the next one knows them too."""
    changes = reference.changed_ms()
    return [
        {
            "server": reference.server_names[row],
            "metric": reference.metrics[column],
            "changed_ms": int(changes[row, column]),
        }
        for row, column in np.argwhere(np.isfinite(changes)).tolist()
    ]


def _drifting(
    evidence: DriftEvidence, source: DriftSource, report: DriftReport
) -> Sequence[Mapping[str, Any]]:
    if report.basis == CALIBRATED:
        named = [drifting_json(item) for item in report.drifting[:MOST_SERIES]]
        return [*named, *_near(evidence, report, MOST_SERIES - len(named))]
    return _by_baseline(evidence, evidence.baseline, source) if evidence.baseline else []


def _near(evidence: DriftEvidence, report: DriftReport, most: int) -> list[Mapping[str, Any]]:
    """Return the series near an alarm while the fleet drifts: what changed them is not quite seen yet."""
    if evidence.detector is None or not report.needs_retraining:
        return []
    not_yet = {"is_drifting": False, "in_alarm_since": None}
    return [{**drifting_json(item), **not_yet} for item in evidence.detector.near(most)]


def _by_baseline(
    evidence: DriftEvidence, baseline: Baseline, source: DriftSource
) -> Sequence[Mapping[str, Any]]:
    found = [item for item in series_drift(evidence.window, baseline, MOST_SERIES) if item.is_drifting]
    if not found:
        return []
    newest_ms = int(evidence.window.target_ms[-1])
    bin_ms = evidence.window.bin_ms
    since = change_times(found, baseline, source.read, evidence.model_version, newest_ms, bin_ms)
    window_start_ms = int(evidence.window.target_ms[0])
    changed = [since.get((item.server, item.metric), window_start_ms) for item in found]
    return [
        {**series_json(item), "since": iso_z(from_ms(at_ms)), "changed_ms": at_ms}
        for item, at_ms in zip(found, changed, strict=True)
    ]


def drifting_before(context: Path, attempt_id: str | None = None) -> tuple[Mapping[str, Any], ...]:
    """Return what a context file names as drifting; nothing where it belongs to another attempt."""
    try:
        content = read_json(context)
    except (FileNotFoundError, CorruptFile):
        return ()
    entries = content.get("drifting")
    if attempt_id not in (None, content.get("attempt_id")) or not isinstance(entries, list):
        return ()
    return tuple(item for item in entries if isinstance(item, dict))


def export_end(clock_mode: str, newest: datetime | None) -> datetime | None:
    """Return where an export ends: None (now), or just after the newest record under the data clock."""
    if clock_mode != "data" or newest is None:
        return None
    return from_ms(to_ms(newest) + 1)


def export_for_training(settings: Settings, path: Path) -> str:
    """Write the newest days of records, in the model's bins; return what was done.

    Of a fleet too large to train on whole, the servers that drift are written, and a sample of the others.
    """
    from fleetcast.storage.store import DataBuffer  # pyarrow: see above

    buffer = DataBuffer(settings.paths.data_buffer_dir, settings=settings.buffer, expire=False)
    excluded = Exclusions(settings.paths.checkpoint_dir)
    buffer.leave_out(excluded)
    newest = buffer.newest_record_time()
    n_servers, chosen = _sample(buffer, newest, settings)
    if len(chosen) < n_servers:
        others = AllBut(chosen)
        buffer.leave_out(lambda: others)
    days, bin_s = settings.retraining.training_days, settings.bins.bin_s
    n_rows = buffer.export_training_data(path, days, bin_s, until=export_end(settings.clock.mode, newest))
    sample = f" of a sample of {len(chosen)} of {n_servers} servers" if len(chosen) < n_servers else ""
    return f"{n_rows} rows{sample} of the last {days} days written to {path}"


def _sample(buffer: "DataBuffer", newest: datetime | None, settings: Settings) -> tuple[int, frozenset[str]]:
    """Return how many servers have records to export, and the names of those to train on.

    Where they are too many, those that sent something in the newest days are trained on, or a sample of them.
    """
    oldest = buffer.oldest_record_time()
    if newest is None or oldest is None:
        return 0, frozenset()
    bins, bin_ms = settings.bins, settings.bins.bin_s * 1000
    days = min(float(settings.retraining.training_days), (newest - oldest) / timedelta(days=1))
    n_bins = math.ceil(days * DAY_MS / bin_ms) + 1
    most = most_servers(settings.trainer.max_cells, len(bins.forecast_metrics), n_bins)
    names = everyone = buffer.newest_names(LIVE_DAYS, bin_ms)
    if len(names) <= most:  # but with those that are silent since they may not fit
        everyone = buffer.newest_names(math.ceil(days) + 1, bin_ms)
        names = everyone if len(everyone) <= most else names
    wanted = (str(item.get("server")) for item in drifting_before(Path(CONTEXT_FILE)))
    return len(everyone), sample_servers(names, wanted, most, to_ms(newest) // DAY_MS)


def forget_servers(orders: Exclusions, *, is_training: bool) -> None:
    """Remove what this program keeps of servers that people wanted forgotten, once their records are gone.

    Args:
        is_training: a training reads these files at the moment; a later check removes them.
    Raises:
        AlreadyRunning: a command writes the list at this moment; call it again.
        StorageFull, StorageBroken: the same, once there is room.
    """
    gone = orders.forgotten().items()
    waiting = {name: one for name, one in gone if one.records_gone and not one.drift_gone}
    if not waiting or is_training:
        return
    forget_in_references(Path(), {name: one.before_ms for name, one in waiting.items()})
    for file in (EXPORT_FILE, CONTEXT_FILE):  # made again for the next training
        remove_leftover(Path(file))
    note_forgotten(orders.folder, waiting, drift_gone=iso_z(SystemClock().now()))
    logger.info("servers forgotten n=%d first=%s", len(waiting), ascii(next(iter(waiting))))
