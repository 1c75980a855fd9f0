"""Every setting of every part: one frozen dataclass each, the only source of defaults.

    python -m fleetcast.settings > docs/settings.md

Owns: names, defaults, units, bounds and help of the settings, in the order of `Settings` (those of drift,
decision, training and promotion stand in `settings_training`); the order of their sources (TOML, then
the environment, then flags); the report of all problems at once.
Does not know: what a part does with its settings.
"""

import dataclasses
import os
import re
import typing
import zoneinfo
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetcast.clock import DAY_MS
from fleetcast.errors import SettingsError, quote
from fleetcast.schema import ALERT_RULES, NODE_EXPORTER_RULES
from fleetcast.setting import PAGE_HEAD, SettingInfo, check, from_environment, from_file, setting, table
from fleetcast.settings_training import (
    CALIBRATED,
    LITERAL,
    DecisionSettings,
    DriftSettings,
    PromotionSettings,
    RetrainingSettings,
    TrainerSettings,
)

# fmt: off
__all__ = [
    "CALIBRATED", "LITERAL", "AlertSettings", "BinSettings", "BufferSettings", "ClockSettings",
    "DecisionSettings", "DriftSettings", "ExportSettings", "ForecastSettings", "LoggingSettings",
    "PathSettings", "PromotionSettings", "RemoteWriteSettings", "RetrainingSettings", "ServerSettings",
    "Settings", "TrainerSettings", "every_setting", "load_settings", "page",
]
# fmt: on

DAY_S = DAY_MS // 1000


@dataclass(frozen=True)
class PathSettings:
    """Folders that the two daemons share, relative to the working directory."""

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
        ("localhost",), "names in `Host` that the daemon answers without a key, besides addresses"
    )
    max_body_bytes: int = setting(32 * 2**20, "largest accepted request body", low=1024)
    max_server_names: int = setting(20_000, "most distinct servers accepted", low=1)
    max_metric_names: int = setting(512, "most distinct metrics accepted", low=1)
    max_server_labels: int = setting(50, "most servers with a label of their own in /metrics", low=0)
    max_answer_bytes: int = setting(
        64 * 2**20, "most bytes of answers that clients have not read yet; further ones get 503", low=2**20
    )
    max_document_servers: int = setting(
        20_000,
        "most servers with forecasts in one answer; `?shard=` asks for a share of a larger fleet",
        low=1,
    )
    max_query_servers: int = setting(500, "most servers that one query may name", low=1)
    max_pending_posts: int = setting(64, "POSTs at work at once; further ones get 503", low=1)
    hold_s: float = setting(
        1.0, "how long a POST waits for a due sweep before 429 (data clock)", unit="s", low=0, high=60
    )
    quarantine_max_bytes: int = setting(5_000_000, "bound of the quarantine file", low=10_000)


@dataclass(frozen=True)
class RemoteWriteSettings:
    """Prometheus remote-write. Set `rules` in the TOML file: the environment splits lists at commas."""

    path: str = setting("/api/v1/write", "path that takes remote-write")
    server_label: str = setting("instance", "label that names the server")
    server_pattern: str = setting(
        r"([^:]+|.*\]|.+)(?::\d+)?",
        "regular expression for that label; its first group is the server's name (a port goes after `]` or "
        "where there is no other colon)",
    )
    ignored_labels: tuple[str, ...] = setting(
        ("job", "prometheus", "prometheus_replica", "__replica__", "replica", "receive_replica"),
        "labels that do not tell two series apart, so that two scrapers of one host count once",
    )
    own_labels: tuple[str, ...] = setting(
        ("le", "quantile"),
        "labels of single series beside those that a known exporter sets; any other label tells scrape "
        "targets apart",
    )
    rules: tuple[str, ...] = setting(
        NODE_EXPORTER_RULES,
        "rules that make metrics of series; yours join these, or replace the rule for the same metric",
    )
    max_unpacked_bytes: int = setting(
        16 * 2**20, "largest request, unpacked (senders make them of 0.1 to 8 MB)", low=1024
    )
    max_request_samples: int = setting(
        100_000, "most samples, and most series, of one request (senders put 500 to 10,000 into it)", low=1
    )
    max_series_bytes: int = setting(
        256 * 2**10, "largest series of a request: its labels and samples", low=1024
    )
    max_gap_s: float = setting(
        300.0,
        "longest time between two samples of a counter that still makes a rate, and how long a scrape "
        "target is heard without one of its series before that counts as gone",
        unit="s",
        low=1,
    )
    reorder_window_s: float = setting(
        1800.0,
        "how far behind the newest scrape of its target a sample may come, and how long a scrape waits "
        "for its missing series",
        unit="s",
        low=60,
        high=86_400,
    )
    max_series: int = setting(
        200_000, "most series kept in memory, about 2 KB each at 15 s; the daemon refuses further ones", low=1
    )


@dataclass(frozen=True)
class BufferSettings:
    """The DataBuffer."""

    retention_days: int = setting(
        60, "days of records kept; less holds a day later", unit="days", low=1, high=3650
    )
    retention_max_mb: int = setting(
        0, "from this size of records (or forecasts) on, the oldest days go; 0: no limit", unit="MB", low=0
    )
    archive_after_days: int = setting(
        0,
        "a month becomes one smaller file when its newest day is this old; 0: none does",
        unit="days",
        low=0,
        high=3650,
    )
    publish_records: int = setting(10_000, "records in the log that become a part at once", low=1)
    publish_s: float = setting(
        300.0,
        "longest time that an accepted record stays outside its day file; a fleet that sends 1,000 records "
        "a minute never waits longer than 60 s",
        unit="s",
        low=0.05,
        high=600,
    )
    percent_decimals: int = setting(2, "decimals of `_pct` metrics", low=0, high=12)
    significant_digits: int = setting(4, "significant digits of other metrics", low=1, high=17)
    rate_max: float = setting(1e7, "largest `_mb_s` value; a counter that wrapped makes more", low=1)
    value_max: float = setting(1e18, "largest value of metrics but `_pct` and `_mb_s`", low=1)
    name_case: str = setting("as_sent", "letter case of server names", choices=("as_sent", "lower"))
    name_domain: str = setting("as_sent", "the domain in server names", choices=("as_sent", "cut"))


@dataclass(frozen=True)
class BinSettings:
    """How records become the bins a model sees."""

    bin_s: int = setting(300, "length of a bin; must divide a day", unit="s", low=1, high=3600)
    close_grace_s: float = setting(
        30.0, "a bin closes this long after its end, and rows of several senders meet in it", unit="s", low=0
    )
    correct_within_s: float = setting(
        600.0,
        "rows that arrive up to this long after their bin's end correct its settled forecasts; later ones "
        "are stored and counted",
        unit="s",
        low=0,
        high=21_600,
    )
    forecast_metrics: tuple[str, ...] = setting(
        ("cpu_pct", "mem_pct", "disk_io_mb_s", "latency_ms"),
        "metrics to forecast, if they arrive; any name will do, `_pct` means percent",
    )


@dataclass(frozen=True)
class ForecastSettings:
    """What the inference daemon forecasts, and when a server counts as gone."""

    horizon_bins: int = setting(96, "bins ahead", low=1, high=2016)
    settle_horizons: tuple[int, ...] = setting((1, 12, 96), "horizons of the forecasts to settle, in bins")
    stale_after_s: float = setting(1800.0, "silence after which a server is stale", unit="s", low=1)
    gone_after_s: float = setting(86_400.0, "silence after which a server is gone", unit="s", low=1)
    model_min_history_s: float = setting(
        3600.0, "history that a server needs before the model forecasts it", unit="s", low=0
    )
    feedback: str = setting("on", "settled forecasts correct the model's next ones", choices=("on", "off"))
    torch_threads: int = setting(
        1,
        "threads of a matrix product in a sweep (more gain nothing)",
        low=1,
        high=64,
    )
    shards: int = setting(
        1,
        "processes that forecast the servers of a sweep, some 300 MB each; 1 and local: the daemon itself",
        low=1,
        high=256,
    )
    engine: str = setting(
        "local", "where shards run: on this machine, or as actors of a Ray cluster", choices=("local", "ray")
    )
    ray_address: str = setting("auto", "of the Ray cluster; auto: the one that this machine belongs to")


@dataclass(frozen=True)
class ExportSettings:
    """Forecasts as series for Prometheus (`GET /metrics/forecasts`). docs/dashboards.md has their names."""

    enabled: str = setting("off", "forecasts can be scraped", choices=("on", "off"))
    remote_write_url: str = setting(
        "", "address that takes them by Prometheus remote-write (empty: none)", is_secret=True
    )
    remote_write_token: str = setting("", "key there, sent as `Authorization: Bearer`", is_secret=True)
    servers: str = setting(".*", "regular expression that a server's whole name must match")
    max_series: int = setting(
        20_000, "most series of forecasts; the first servers by name have them, the others are counted", low=1
    )
    names: str = setting(
        "fleetcast",
        "vmanomaly: forecasts that are due are called yhat, yhat_lower and yhat_upper",
        choices=("fleetcast", "vmanomaly"),
    )


@dataclass(frozen=True)
class AlertSettings:
    """Alerts that the retraining daemon sends; off while no channel is set. docs/alerts.md explains rules
    and channels. Keep what is secret in the environment, or in a file that only the daemon may read."""

    rules: tuple[str, ...] = setting(
        ALERT_RULES,
        "what fires; yours join these, or replace or end (`NAME: off`) the rule of their name",
    )
    fleet: str = setting("fleetcast", "this installation's name, in messages and in keys of incidents")
    repeat_hours: float = setting(4.0, "what still fires is sent again after this", unit="h", low=0.1)
    messages_per_hour: int = setting(20, "most messages of a channel; then one sums up", low=1, high=1000)
    timeout_s: float = setting(10.0, "longest wait for a channel", unit="s", low=0.1, high=60)
    page_url: str = setting("", "address of the page, as readers of a message reach it")
    title_template: str = setting("", "first line of messages, for example `{fleet}: {rule} is {state}`")
    text_template: str = setting(
        "", "their other lines, for example `{lines}` (docs/alerts.md lists the fields)"
    )
    alertmanager_urls: tuple[str, ...] = setting(
        (), "Alertmanagers; where one is set, the channels below get nothing", is_secret=True
    )
    slack_url: str = setting("", "incoming webhook of Slack or Mattermost", is_secret=True)
    webhook_url: str = setting("", "address that takes messages as JSON", is_secret=True)
    webhook_secret: str = setting("", "key of `X-Fleetcast-Signature`", is_secret=True)
    pagerduty_key: str = setting("", "integration key of PagerDuty (Events API v2)", is_secret=True)
    pagerduty_url: str = setting("https://events.pagerduty.com/v2/enqueue", "where PagerDuty takes events")
    email_to: tuple[str, ...] = setting((), "e-mail addresses")
    email_from: str = setting("", "sender of e-mails (empty: the first of email_to)")
    smtp_host: str = setting("localhost", "server that takes e-mails")
    smtp_port: int = setting(587, "its TCP port (465 with tls)", low=1, high=65535)
    smtp_security: str = setting("starttls", "encryption towards it", choices=("starttls", "tls", "none"))
    smtp_user: str = setting("", "account there (empty: none)")
    smtp_password: str = setting("", "password of that account", is_secret=True)
    apprise_urls: tuple[str, ...] = setting(
        (), "addresses of apprise, for a hundred other services (pip install apprise)", is_secret=True
    )
    heartbeat_url: str = setting(
        "", "address to fetch after each good check: its silence is an alert", is_secret=True
    )


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
    export: ExportSettings = field(default_factory=ExportSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    drift: DriftSettings = field(default_factory=DriftSettings)
    decision: DecisionSettings = field(default_factory=DecisionSettings)
    promotion: PromotionSettings = field(default_factory=PromotionSettings)
    retraining: RetrainingSettings = field(default_factory=RetrainingSettings)
    alerts: AlertSettings = field(default_factory=AlertSettings)


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
            values[key] = check(known[key], raw)
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
    if DAY_S % bin_s:
        yield f"bins.bin_s must divide a day ({DAY_S} s), got {bin_s}"
    metrics = values.get("bins.forecast_metrics", BinSettings.forecast_metrics)
    if odd := [name for name in metrics if not re.fullmatch("[a-z][a-z0-9_]{0,63}", name)]:
        yield f"bins.forecast_metrics must be names of the form [a-z][a-z0-9_]*, got {quote(odd[0])}"
    if len(set(metrics)) < len(metrics):
        yield f"bins.forecast_metrics must name each metric once, got {list(metrics)}"
    horizon = values.get("forecast.horizon_bins", ForecastSettings.horizon_bins)
    settle = values.get("forecast.settle_horizons", ForecastSettings.settle_horizons)
    if any(not 1 <= item <= horizon for item in settle):
        yield f"forecast.settle_horizons must be in 1..{horizon}, got {list(settle)}"
    least = values.get("promotion.min_hours", PromotionSettings.min_hours)
    most = values.get("promotion.max_hours", PromotionSettings.max_hours)
    if least > most:
        yield f"promotion.min_hours must be at most max_hours ({most}), got {least}: no model would ever win"
    path = values.get("remote_write.path", RemoteWriteSettings.path)
    if not re.fullmatch(r"/[^\s{}?#]*", path):
        yield f"remote_write.path must be a path such as /api/v1/write, got {quote(path)}"
    if not re.match(r"https?://.|$", values.get("export.remote_write_url", "")):
        yield "export.remote_write_url must begin with http:// or https://"
    servers = values.get("export.servers", ExportSettings.servers)
    try:
        re.compile(servers)
    except re.error as error:
        yield f"export.servers must be a regular expression, got {quote(servers)}: {error}"
    timezone = values.get("drift.timezone", DriftSettings.timezone)
    try:
        zoneinfo.ZoneInfo(timezone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        yield f"drift.timezone must name a time zone like Europe/Berlin, got {quote(timezone)}"


def page() -> str:
    """Return the whole page."""
    lines = [PAGE_HEAD]
    for part, part_class in typing.get_type_hints(Settings).items():
        intro = " ".join((part_class.__doc__ or "").split())
        lines += table(part, intro, [info for info in every_setting() if info.part == part])
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
