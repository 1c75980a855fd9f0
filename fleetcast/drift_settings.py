"""The settings of drift detection: which scores decide, how rarely they may be wrong, and of whom.

Owns: names, defaults and bounds. They stand apart from `settings.py` only for their length.
"""

from dataclasses import dataclass

from fleetcast.setting import setting

CALIBRATED, LITERAL = "calibrated", "literal"


@dataclass(frozen=True)
class DriftSettings:
    """DriftMonitor. A threshold or weight left out keeps the literal in drift_monitor.py."""

    basis: str = setting(
        CALIBRATED,
        "which scores decide: season-matched and calibrated on the fleet's own days, or the literal four",
        choices=(CALIBRATED, LITERAL),
    )
    false_alarms_per_month: float = setting(
        1.0, "how often an unchanged fleet may ask for a training (calibrated)", low=0.01, high=30
    )
    quorum: float = setting(
        0.25, "share of the series that must be in alarm at once (calibrated)", low=0, high=1
    )
    sustained_quorum: float = setting(
        0.10, "share that is enough when in alarm most of a day (calibrated)", low=0, high=1
    )
    timezone: str = setting("UTC", "where the fleet's day begins, for example Europe/Berlin (calibrated)")
    min_reference_days: int = setting(
        5,
        "days a series is known before it is judged; fewer make false alarms likelier (calibrated)",
        unit="days",
        low=3,
        high=30,
    )
    reference_days: int = setting(
        30, "newest days a reference is learned from (calibrated)", unit="days", low=3, high=100
    )
    window_size: int = setting(1000, "newest (server, bin) pairs looked at, at least", low=1)
    window_bins_per_server: int = setting(12, "bins of every server the window holds, at least", low=1)
    min_pairs: int = setting(300, "pairs of the version in service before a verdict", low=1)
    min_span_s: float = setting(7200.0, "span of those pairs before a verdict", unit="s", low=0)
    min_values: int = setting(50, "values of a metric needed in window and baseline", low=2)
    per_floor_points: float = setting(20.0, "PER's smallest divisor for percents", low=0.01)
    per_floor_share: float = setting(
        0.2, "PER's smallest divisor for others, as a share of the baseline's p95", low=0.001
    )
    baseline_days: float = setting(7.0, "newest days of the training data in the baseline", low=0.1)
    per_threshold: float | None = setting(None, "overrides the literal", low=0)
    dss_threshold: float | None = setting(None, "overrides the literal", low=0)
    fds_threshold: float | None = setting(None, "overrides the literal", low=0)
    anomaly_threshold: float | None = setting(None, "overrides the literal", low=0)
    combined_threshold: float | None = setting(None, "overrides the literal", low=0)
    per_weight: float | None = setting(None, "overrides the literal", low=0)
    dss_weight: float | None = setting(None, "overrides the literal", low=0)
    fds_weight: float | None = setting(None, "overrides the literal", low=0)
    anomaly_weight: float | None = setting(None, "overrides the literal", low=0)
