"""Every setting of every part: one frozen dataclass each, the only source of defaults.

Owns: names, defaults, units, bounds and help of settings; the order of their sources (TOML, then
the environment, then flags); reporting all problems at once. Does not know: what a part does
with its settings. `docs/settings.md` is made from here.
"""

import dataclasses
import os
import typing
import zoneinfo
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetcast.drift_settings import DriftSettings
from fleetcast.errors import SettingsError
from fleetcast.remote_write_settings import RemoteWriteSettings
from fleetcast.setting import SettingInfo, checked, setting
from fleetcast.setting_sources import from_environment, from_file
from fleetcast.trainer_settings import TrainerSettings


@dataclass(frozen=True)
class PathSettings:
    """Folders shared by the two daemons, relative to the working directory."""

    data_buffer_dir: str = setting("./data_buffer", "folder of the DataBuffer")
    checkpoint_dir: str = setting("./checkpoints", "folder of the model versions")
    models_dir: str = setting("", "folder of the shipped base model (empty: beside the program)")


@dataclass(frozen=True)
class ClockSettings:
    """What "now" means to safeguards and bins."""

    mode: str = setting(
        "system", "system: the host's clock; data: the newest record", choices=("system", "data")
    )


@dataclass(frozen=True)
class LoggingSettings:
    """The daemons' log files."""

    level: str = setting("INFO", "least severe level logged", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    file_max_bytes: int = setting(10_000_000, "size at which a log file rotates", low=10_000)
    file_count: int = setting(5, "log files kept, the current one included", low=1, high=100)


@dataclass(frozen=True)
class ServerSettings:
    """The HTTP interface of the inference daemon."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "TCP port to listen on", low=1, high=65535)
    allowed_hosts: tuple[str, ...] = setting(
        ("localhost",), "names in `Host` that are answered without a key, beside addresses"
    )
    max_body_bytes: int = setting(32 * 2**20, "largest accepted request body", low=1024)
    max_server_names: int = setting(20_000, "most distinct servers accepted", low=1)
    max_metric_names: int = setting(512, "most distinct metrics accepted", low=1)
    max_server_labels: int = setting(50, "most servers given a label of their own in /metrics", low=0)
    max_pending_posts: int = setting(64, "POSTs at work at once before 503", low=1)
    hold_s: float = setting(
        1.0, "how long a POST waits for a due sweep before 429 (data clock)", unit="s", low=0, high=60
    )
    quarantine_max_bytes: int = setting(5_000_000, "bound of the quarantine file", low=10_000)


@dataclass(frozen=True)
class BufferSettings:
    """The DataBuffer."""

    retention_days: int = setting(60, "days of records kept", unit="days", low=1, high=3650)
    retention_max_mb: int = setting(
        0, "size of records (or forecasts) beyond which the oldest days go; 0: no limit", unit="MB", low=0
    )
    flush_records: int = setting(10_000, "records after which the log becomes a part", low=1)
    flush_interval_s: float = setting(
        45.0, "longest time an accepted record stays outside its day file", unit="s", low=0.05, high=60
    )
    percent_decimals: int = setting(2, "decimals kept of `_pct` metrics", low=0, high=12)
    significant_digits: int = setting(4, "significant digits kept of other metrics", low=1, high=17)


@dataclass(frozen=True)
class BinSettings:
    """How records become the bins a model sees."""

    bin_s: int = setting(300, "length of a bin; must divide a day", unit="s", low=1, high=3600)
    close_grace_s: float = setting(30.0, "wait for stragglers after a bin's end", unit="s", low=0)
    forecast_metrics: tuple[str, ...] = setting(
        ("cpu_pct", "mem_pct", "disk_io_mb_s", "latency_ms"), "metrics that are forecast, if they arrive"
    )


@dataclass(frozen=True)
class ForecastSettings:
    """What the inference daemon forecasts, and when a server counts as gone."""

    horizon_bins: int = setting(96, "bins ahead", low=1, high=2016)
    settle_horizons: tuple[int, ...] = setting((1, 12, 96), "horizons that are settled, in bins")
    stale_after_s: float = setting(1800.0, "silence after which a server is stale", unit="s", low=1)
    gone_after_s: float = setting(86_400.0, "silence after which a server is gone", unit="s", low=1)
    model_min_history_s: float = setting(
        3600.0, "history a server needs before the model forecasts it", unit="s", low=0
    )
    feedback: str = setting("on", "correct the model's forecasts by settled ones", choices=("on", "off"))
    torch_threads: int = setting(1, "threads of a sweep (2 on busy cores were slower)", low=1, high=64)


@dataclass(frozen=True)
class DecisionSettings:
    """RetrainingDecisionEngine and the quiet period; left out, the literals in
    adaptive_retraining_daemon.py hold."""

    min_hours_between_training: float | None = setting(None, "overrides the literal", unit="h", low=0)
    max_days_without_training: float | None = setting(None, "overrides the literal", unit="days", low=0)
    max_trainings_per_week: int | None = setting(None, "overrides the literal", low=0)
    quiet_cpu_percent: float | None = setting(None, "overrides the literal", low=0)
    quiet_mem_percent: float | None = setting(None, "overrides the literal", low=0)
    quiet_window: str = setting(
        "auto",
        "auto: a fleet over the fixed limits for a week is quiet in its own lowest quarter; fixed: never",
        choices=("auto", "fixed"),
    )
    quiet_deadline_hours: float = setting(
        24.0, "longest wait for a quiet fleet, where its own week decides", unit="h", low=0
    )
    follow_up_hours: float = setting(
        24.0,
        "a training for drift that saw less than half of this is followed by one that sees all, and one that "
        "learned much by one that sees three times as much; 0: never",
        unit="h",
        low=0,
        high=120,
    )
    host_load_per_core: float = setting(
        0.8, "1-minute load of others per core at which the host is busy", low=0
    )
    host_min_available_gb: float = setting(4.0, "memory the host must have free", unit="GB", low=0)
    initial_min_span_s: float = setting(172_800.0, "data span an initial training needs", unit="s", low=0)
    initial_min_windows: int = setting(200, "trainable windows an initial training needs", low=1)


@dataclass(frozen=True)
class RetrainingSettings:
    """The retraining daemon."""

    daemon_url: str = setting("http://localhost:8000", "where the inference daemon answers")
    interval_s: float = setting(300.0, "wall time between checks", unit="s", low=0.1)
    mode: str = setting("auto", "auto: decide and train; advise: only decide", choices=("auto", "advise"))
    training_script: str = setting("tft_trainer.py", "program started to train")
    training_days: int = setting(30, "days of records exported for a training", unit="days", low=1)
    training_epochs: int = setting(5, "epochs asked of the trainer", low=1, high=1000)
    training_timeout_s: float = setting(7200.0, "a training is killed after this", unit="s", low=1)
    training_nice: int = setting(10, "priority of the trainer (19 is lowest)", low=0, high=19)
    request_timeout_s: float = setting(10.0, "wait for the inference daemon", unit="s", low=0.1)
    max_failures: int = setting(10, "failed checks in a row after which the daemon exits", low=1)


@dataclass(frozen=True)
class Settings:
    """All parts; a program passes each object its own part only."""

    paths: PathSettings = field(default_factory=PathSettings)
    clock: ClockSettings = field(default_factory=ClockSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    remote_write: RemoteWriteSettings = field(default_factory=RemoteWriteSettings)
    buffer: BufferSettings = field(default_factory=BufferSettings)
    bins: BinSettings = field(default_factory=BinSettings)
    forecast: ForecastSettings = field(default_factory=ForecastSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    drift: DriftSettings = field(default_factory=DriftSettings)
    decision: DecisionSettings = field(default_factory=DecisionSettings)
    retraining: RetrainingSettings = field(default_factory=RetrainingSettings)


def every_setting() -> Iterator[SettingInfo]:
    """Yield each setting of each part, in order."""
    for part, part_class in typing.get_type_hints(Settings).items():
        hints = typing.get_type_hints(part_class)
        for item in dataclasses.fields(part_class):
            yield SettingInfo(part, item.name, hints[item.name], item.default, item.metadata)


def load_settings(
    config: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Return the settings: defaults < file < environment < flags.

    Args:
        config: the TOML file; None reads `./fleetcast.toml` where there is one.
        flags: values by `part.name`; None values are flags not given.
        environ: defaults to the process's environment.
    Raises:
        SettingsError: names every problem found, each with what would be right.
    """
    known = {info.key: info for info in every_setting()}
    problems: list[str] = []
    values: dict[str, Any] = {}
    given = [
        *from_file(config, known, problems),
        *from_environment(os.environ if environ is None else environ, known, problems),
        *((key, value, "flag") for key, value in (flags or {}).items() if value is not None),
    ]
    for key, raw, source in given:
        try:
            values[key] = checked(known[key], raw)
        except ValueError as error:
            problems.append(f"{key} {error} ({source})")
    problems += _cross_checks(values)
    if problems:
        raise SettingsError(problems)
    parts: dict[str, Any] = {}
    for part, part_class in typing.get_type_hints(Settings).items():
        own = {key.split(".")[1]: value for key, value in values.items() if key.split(".")[0] == part}
        parts[part] = part_class(**own)
    return Settings(**parts)


def _cross_checks(values: Mapping[str, Any]) -> Iterator[str]:
    bin_s = values.get("bins.bin_s", BinSettings.bin_s)
    if 86_400 % bin_s:
        yield f"bins.bin_s must divide a day (86400 s), got {bin_s}"
    horizon = values.get("forecast.horizon_bins", ForecastSettings.horizon_bins)
    settle = values.get("forecast.settle_horizons", ForecastSettings.settle_horizons)
    if any(not 1 <= item <= horizon for item in settle):
        yield f"forecast.settle_horizons must be in 1..{horizon}, got {list(settle)}"
    timezone = values.get("drift.timezone", DriftSettings.timezone)
    try:
        zoneinfo.ZoneInfo(timezone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        yield f"drift.timezone must name a time zone like Europe/Berlin, got {timezone!r}"
