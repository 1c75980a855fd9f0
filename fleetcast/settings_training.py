"""The settings of drift, decision, training and promotion: what the retraining daemon and the trainer read.

Owns: their names, defaults, units, bounds and help. Other modules import them from `settings`.
"""

from dataclasses import dataclass

from fleetcast.setting import setting

CALIBRATED, LITERAL = "calibrated", "literal"  # of drift.basis
# the numbers of the specification stand in these programs, to be edited there; each prints its own
IN_MONITOR = "overrides the number written in drift_monitor.py"
IN_RETRAINING = "overrides the number written in adaptive_retraining_daemon.py"


@dataclass(frozen=True)
class TrainerSettings:
    """How a model is trained."""

    epochs: int = setting(5, "epochs of an incremental training", low=1, high=1000)
    base_epochs: int = setting(
        16, "epochs of a fleet's first training, and of one from scratch", low=1, high=1000
    )
    patience_epochs: int = setting(
        4, "a training from scratch stops after this many epochs without a better one; 0: never", low=0
    )
    steps_per_epoch: int = setting(100, "batches sampled per epoch", low=1)
    batch_size: int = setting(128, "windows per batch", low=1)
    hidden_size: int = setting(32, "width of a network trained from scratch", low=4, high=512)
    learning_rate: float = setting(5e-3, "peak of the cosine schedule", low=1e-6, high=1.0)
    incremental_learning_rate: float = setting(
        4e-3, "peak of the cosine schedule in an incremental training", low=1e-6, high=1.0
    )
    incremental_batch_size: int = setting(64, "windows per batch of an incremental training", low=1)
    changed_share: float = setting(
        0.35, "share of a batch that is drawn from drifting series after their change", low=0.0, high=0.9
    )
    specialist_max_share: float = setting(
        0.5,
        "up to this share of the series, a specialist learns a change and leaves the forecasts of the "
        "others as they are; 0: never",
        low=0.0,
        high=1.0,
    )
    specialist_changed_share: float = setting(
        0.6, "changed_share in a training of a specialist", low=0.0, high=0.9
    )
    specialist_learning_rate: float = setting(
        8e-3,
        "the same peak in a training of a specialist, which changes only its own series",
        low=1e-6,
        high=1.0,
    )
    keep_weight: float = setting(
        1.0,
        "how much the loss counts each move away from the old model's answers to replayed windows",
        low=0.0,
    )
    recent_share: float = setting(
        0.5,
        "share of a batch that is drawn from the newest days, where no change is known",
        low=0.0,
        high=1.0,
    )
    recent_days: float = setting(3.0, "how many days count as the newest", unit="days", low=0.1)
    holdout_share: float = setting(
        0.1, "newest share of the data, kept out of training for the gate", low=0.02, high=0.5
    )
    holdout_max_s: float = setting(
        86_400.0, "longest tail that is kept out of training for the gate", unit="s", low=3600.0
    )
    max_cells: int = setting(
        70_000_000,
        "(server, metric, bin) cells of a training: 2,000 servers of 4 metrics and 30 days. Of a larger "
        "fleet the servers that drift are trained on, and a sample of the others",
        low=10_000,
        high=2_000_000_000,
    )
    keep_versions: int = setting(
        20, "newest versions kept, besides the one in service, the one before it and the baseline's", low=1
    )
    threads: int = setting(1, "torch threads of a training (2 on busy cores were slower)", low=1, high=64)
    seed: int = setting(7, "seed of weights and sampling", low=0)


@dataclass(frozen=True)
class DriftSettings:
    """DriftMonitor. A threshold or weight left out keeps the literal in drift_monitor.py."""

    basis: str = setting(
        CALIBRATED,
        "which scores decide: matched by season and calibrated on the fleet's own days, or the literal four",
        choices=(CALIBRATED, LITERAL),
    )
    false_alarms_per_month: float = setting(
        1.0, "how often an unchanged fleet may ask for a training (calibrated)", low=0.01, high=30
    )
    quorum: float = setting(
        0.25, "share of the series that must be in alarm at once (calibrated)", low=0, high=1
    )
    sustained_quorum: float = setting(
        0.10, "share that is enough if it stays in alarm for most of a day (calibrated)", low=0, high=1
    )
    common_quorum: float = setting(
        0.08,
        "share of the servers, three at least, that is enough if they change alike; 1: never (calibrated)",
        low=0,
        high=1,
    )
    timezone: str = setting("UTC", "time zone of the fleet's day, for example Europe/Berlin (calibrated)")
    min_reference_days: int = setting(
        3,
        "days of a series before the detector judges it; below five with wider limits (calibrated)",
        unit="days",
        low=3,
        high=30,
    )
    reference_days: int = setting(
        30, "newest days that a reference learns from (calibrated)", unit="days", low=3, high=100
    )
    window_size: int = setting(1000, "newest (server, bin) pairs in the window, at least", low=1)
    window_bins_per_server: int = setting(12, "bins of every server in the window, at least", low=1)
    min_pairs: int = setting(300, "pairs of the version in service before a verdict", low=1)
    min_span_s: float = setting(7200.0, "span of those pairs before a verdict", unit="s", low=0)
    min_values: int = setting(50, "values that a metric needs in window and baseline", low=2)
    per_floor_points: float = setting(20.0, "PER's smallest divisor for percents", low=0.01)
    per_floor_share: float = setting(
        0.2, "PER's smallest divisor for other metrics, as a share of the baseline's p95", low=0.001
    )
    baseline_days: float = setting(7.0, "newest days of the training data that enter the baseline", low=0.1)
    per_threshold: float | None = setting(None, IN_MONITOR, low=0)
    dss_threshold: float | None = setting(None, IN_MONITOR, low=0)
    fds_threshold: float | None = setting(None, IN_MONITOR, low=0)
    anomaly_threshold: float | None = setting(None, IN_MONITOR, low=0)
    combined_threshold: float | None = setting(None, IN_MONITOR, low=0)
    per_weight: float | None = setting(None, IN_MONITOR, low=0)
    dss_weight: float | None = setting(None, IN_MONITOR, low=0)
    fds_weight: float | None = setting(None, IN_MONITOR, low=0)
    anomaly_weight: float | None = setting(None, IN_MONITOR, low=0)


@dataclass(frozen=True)
class DecisionSettings:
    """RetrainingDecisionEngine and the quiet period. A limit left out keeps the literal in
    adaptive_retraining_daemon.py."""

    min_hours_between_training: float | None = setting(None, IN_RETRAINING, unit="h", low=0)
    max_days_without_training: float | None = setting(None, IN_RETRAINING, unit="days", low=0)
    max_trainings_per_week: int | None = setting(None, IN_RETRAINING, low=0)
    quiet_cpu_percent: float | None = setting(None, IN_RETRAINING, low=0)
    quiet_mem_percent: float | None = setting(None, IN_RETRAINING, low=0)
    quiet_window: str = setting(
        "auto",
        "auto: a fleet over the fixed limits for a week is quiet in its own lowest quarter; fixed: never",
        choices=("auto", "fixed"),
    )
    quiet_deadline_hours: float = setting(
        24.0,
        "longest wait for a quiet fleet, where its own week decides, and for a quieter hour",
        unit="h",
        low=0,
    )
    quiet_ahead: str = setting(
        "on",
        "on: a training waits, once, for an hour of the next 8 that the forecast calls clearly quieter "
        "(calibrated; not with quiet_window = fixed)",
        choices=("on", "off"),
    )
    follow_up_hours: float = setting(
        24.0,
        "a training that saw less than half of this much of a change is followed by one that sees all; "
        "one that learned much is followed by one that sees three times as much; 0: never",
        unit="h",
        low=0,
        high=120,
    )
    learning: str = setting(
        "on",
        "on: after a week without trainings, train on what is new where that promises to pay (calibrated)",
        choices=("on", "off"),
    )
    host_load_per_core: float = setting(
        0.8, "1-minute load of others per core from which the host is busy", low=0
    )
    host_min_available_gb: float = setting(4.0, "memory the host must have free", unit="GB", low=0)
    initial_min_span_s: float = setting(172_800.0, "data span an initial training needs", unit="s", low=0)
    initial_min_windows: int = setting(200, "trainable windows that an initial training needs", low=1)


@dataclass(frozen=True)
class PromotionSettings:
    """How a new model is compared with the one before it: before it serves (a race), and after (the bake)."""

    mode: str = setting(
        "off",
        "what becomes of a model that the gate let through; off: it serves at once; advise, auto: it is "
        "first compared with the one in service, then a person or the proof decides",
        choices=("off", "advise", "auto"),
    )
    min_hours: int = setting(24, "whole hours of a race before a model may win", unit="h", low=1, high=168)
    max_hours: int = setting(168, "whole hours after which a race ends", unit="h", low=1, high=1000)
    alpha: float = setting(
        0.01, "how often a model that is no better may win a race, at most", low=0.0001, high=0.5
    )
    on_inconclusive: str = setting(
        "keep",
        "a race without a winner keeps the model in service, or goes by the gate (auto)",
        choices=("keep", "gate"),
    )
    approval_days: float = setting(
        7.0, "how long a model waits for a person (advise)", unit="days", low=0.04, high=90
    )
    bake: str = setting(
        "on",
        "on: the model before runs on beside a new one, and takes over again if the new one is proven worse",
        choices=("on", "off"),
    )
    bake_hours: int = setting(24, "whole hours that both are compared", unit="h", low=1, high=168)
    rollback_alpha: float = setting(
        0.05, "how often a model that is no worse may be taken back, at most", low=0.0001, high=0.5
    )
    max_harm: float = setting(
        0.01, "difference of the losses over their sum that is no harm yet (0.01: about 2 %)", low=0, high=0.5
    )
    min_pairs: int = setting(24, "forecasts of both models that an hour needs to count", low=1)
    shadow_max_servers: int = setting(
        2000, "most servers that the model before goes on forecasting; a larger fleet is sampled", low=1
    )
    cooldown_hours: float = setting(
        24.0,
        "after such a rollback no training puts a model into service for so long",
        unit="h",
        low=0,
        high=8760,
    )
    max_rollbacks_per_week: int = setting(
        2, "from so many such rollbacks in 7 days on, a person has to say `resume`", low=1
    )


@dataclass(frozen=True)
class RetrainingSettings:
    """The retraining daemon."""

    daemon_url: str = setting("http://localhost:8000", "where the inference daemon answers")
    interval_s: float = setting(300.0, "wall time between checks", unit="s", low=0.1)
    mode: str = setting("auto", "auto: decide and train; advise: only decide", choices=("auto", "advise"))
    training_script: str = setting("tft_trainer.py", "program that trains")
    engine: str = setting(
        "local",
        "where incremental trainings run: on this machine, or in the Ray cluster of `forecast.ray_address`",
        choices=("local", "ray"),
    )
    training_days: int = setting(30, "days of records exported for a training", unit="days", low=1)
    training_epochs: int = setting(5, "epochs asked of the trainer", low=1, high=1000)
    training_timeout_s: float = setting(7200.0, "the daemon kills a training after this", unit="s", low=1)
    training_nice: int = setting(10, "priority of the trainer (19 is lowest)", low=0, high=19)
    request_timeout_s: float = setting(10.0, "longest wait for the inference daemon", unit="s", low=0.1)
    max_failures: int = setting(10, "the daemon exits after this many failed checks in a row", low=1)
