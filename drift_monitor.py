"""Has the fleet drifted away from what its model was trained on? `DriftMonitor` judges and reports.

    python drift_monitor.py [--data-buffer-dir DIR] [--plot PNG]     print the report of the present state

Owns: thresholds and weights (literals below, to be edited; settings override them), the combined
rule, and which scores decide: those of the seasonal detector where the evidence has one, else the
literal four. Does not know: the formulas (`fleetcast/drift/literal`, `fleetcast/drift/seasonal`),
what is done about drift (`adaptive_retraining_daemon.py`).
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fleetcast.clock import HOUR_MS, Clock, SystemClock
from fleetcast.drift.evidence import DriftEvidence, DriftSource
from fleetcast.drift.figure import drift_png
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.literal.scores import (
    Columns,
    MetricBaseline,
    MetricScores,
    baseline_of,
    baselines_from,
    error_rate,
    extend,
    float_columns,
    n_rows,
    score_window,
    trend,
)
from fleetcast.drift.literal.series import RelativeErrors, SeriesDrift, relative_to_last, series_drift
from fleetcast.drift.literal.window import PairWindow
from fleetcast.drift.report import DriftReport
from fleetcast.drift.seasonal.detector import COLLECTING, READY, DriftVerdict, until
from fleetcast.drift.seasonal.quorum import THRESHOLDS
from fleetcast.drift.seasonal.statistics import FAMILIES
from fleetcast.errors import BadData, ExitCode
from fleetcast.exclusions import Exclusions
from fleetcast.files import write_atomic, write_json
from fleetcast.forecast.registry import Registry
from fleetcast.program import buffer_folder, models_dir, run_program
from fleetcast.setting import override
from fleetcast.settings import CALIBRATED, LITERAL, DriftSettings, load_settings

METRICS_FILE = "drift_metrics.json"
TOP_SERIES = 10
TREND_H = 6  # the newer half is compared with the older
# the metrics as reports name them, and as thresholds and weights do
_SPELLED = {"per": "per", "dss": "dss", "fds": "fds", "anomaly_rate": "anomaly"}


class DriftMonitor:
    """Keeps a window of predictions, actuals and features, and scores it.

    Feed it by `update`, or beside a buffer give it all the evidence at once by `observe`.
    Not thread safe.

    >>> monitor = DriftMonitor(baseline={"cpu_pct": list(range(100))})
    >>> monitor.update({"cpu_pct": list(range(100))}, {"cpu_pct": list(range(100))})
    >>> monitor.calculate_drift_metrics()["needs_retraining"]
    False
    """

    def __init__(
        self,
        window_size: int = 1000,
        baseline: Any = None,
        *,
        settings: DriftSettings | None = None,
        clock: Clock | None = None,
    ) -> None:
        if isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
            raise BadData(f"window_size must be a whole number >= 1, got {window_size!r}")
        self.window_size = window_size
        self._settings = settings or DriftSettings()
        self._clock = clock or SystemClock()
        # as the specification prints them, to be edited here; settings override them
        # fmt: off
        self.thresholds = {
            'per_threshold': 0.10,      # 10%
            'dss_threshold': 0.20,      # 20%
            'fds_threshold': 0.15,      # 15%
            'anomaly_threshold': 0.05   # 5%
        }
        self.weights = {
            'per_weight': 0.40,   # Prediction accuracy
            'dss_weight': 0.30,   # Distribution shift
            'fds_weight': 0.20,   # Feature drift
            'anomaly_weight': 0.10  # Anomalies
        }
        # fmt: on
        self.thresholds = override(self.thresholds, self._settings)
        self.weights = override(self.weights, self._settings)
        combined = override({"combined_threshold": 0.12}, self._settings)
        self.combined_threshold = combined["combined_threshold"]
        self._predictions: Columns = {}
        self._actuals: Columns = {}
        self._features: Columns = {}
        self._n_rows = 0
        self._evidence: DriftEvidence | None = None  # None: fed by update()
        self._model_version: str | None = None
        self._is_seasonal = False  # whether the seasonal detector decides
        self._baseline: Baseline | None = None
        self._metric_baselines: Mapping[str, MetricBaseline] = {}
        self.set_baseline(baseline)

    def set_baseline(self, baseline: Any) -> None:
        """Compare with `baseline` from now on: a `Baseline`, a DataFrame, a mapping of arrays, or None."""
        if isinstance(baseline, Baseline):
            self._baseline, self._metric_baselines = baseline, baselines_from(baseline)
            return
        columns = {} if baseline is None else float_columns(baseline, "baseline")
        self._baseline = None
        self._metric_baselines = {name: baseline_of(values) for name, values in columns.items()}

    def update(self, predictions: Any, actuals: Any = None, features: Any = None) -> None:
        """Add rows to the window, which keeps the newest `window_size`.

        Args:
            predictions, actuals, features: mappings of metric to number or equal-length arrays,
                or DataFrames. Without features the actuals stand in; without actuals the rows
                leave PER untouched.
        Raises:
            BadData: says which of them is not of this shape; the window is as it was.
        """
        new = [
            {} if given is None else float_columns(given, what)
            for given, what in ((predictions, "predictions"), (actuals, "actuals"), (features, "features"))
        ]
        if features is None:
            new[2] = new[1]
        n_new = n_rows(*new)
        old = (self._predictions, self._actuals, self._features)
        self._predictions, self._actuals, self._features = (
            extend(have, self._n_rows, more, n_new, self.window_size)
            for have, more in zip(old, new, strict=True)
        )
        self._n_rows = min(self._n_rows + n_new, self.window_size)
        self._evidence, self._is_seasonal = None, False

    def observe(self, evidence: DriftEvidence) -> None:
        """Look at evidence read from the buffer instead; its actuals are the features.

        With the basis `calibrated` the seasonal detector in it decides.
        """
        pairs = evidence.window
        self.set_baseline(evidence.baseline)
        self._predictions, self._actuals, self._features = pairs.one_ahead, pairs.actuals, pairs.actuals
        self._n_rows, self._evidence, self._model_version = len(pairs), evidence, evidence.model_version
        self._is_seasonal = evidence.is_seasonal and self._settings.basis == CALIBRATED

    def calculate_drift_metrics(self) -> dict[str, Any]:
        """Return per, dss, fds, anomaly_rate, combined_score and needs_retraining."""
        return self.report().current_metrics()

    def generate_report(self) -> str:
        """Return the present state as text for people."""
        return self.report().as_text()

    def save_metrics(self, path: str | Path = METRICS_FILE) -> None:
        """Write the present state to `drift_metrics.json`, atomically."""
        write_json(Path(path), self.report().as_json(self._clock.now()))

    def report(self) -> DriftReport:
        """Score the window as it is now."""
        limits, scores, is_seasonal = self._limits(), self._scores(slice(None)), self._is_seasonal
        literal = {**scores.by_name(), "combined_score": self._combined_score(scores)}
        verdict = self._verdict(limits)
        metrics = _seasonal_metrics(verdict) if is_seasonal else literal
        exceeded = tuple(name for name, limit in limits.items() if (metrics[name] or 0.0) > limit)
        waiting_for = self._why_no_verdict(verdict)
        collecting = self._why_collecting(scores, waiting_for)
        return DriftReport(
            metrics=metrics,
            needs_retraining=bool(exceeded) and not collecting,
            exceeded=exceeded,
            thresholds=limits,
            weights=dict(self.weights),
            trends=self._seasonal_trends(limits) if is_seasonal else self._literal_trends(limits),
            status=COLLECTING if collecting else READY,
            status_reason=collecting,
            n_pairs=self._n_rows,
            window_size=self.window_size,
            model_version=self._model_version,
            has_baseline=bool(self._metric_baselines),
            baseline=self._baseline,
            evidence=self._evidence,
            not_compared=scores.not_compared,
            per_by_horizon=self._per_by_horizon(),
            relative_errors=self._relative_errors(),
            top=() if is_seasonal else self._top_series(),
            literal=literal,
            basis=CALIBRATED if is_seasonal else LITERAL,
            verdict=verdict,
            waiting_for=waiting_for,
        )

    def _limits(self) -> dict[str, float]:
        return {
            **{name: _entry(self.thresholds, f"{short}_threshold") for name, short in _SPELLED.items()},
            "combined_score": self.combined_threshold,
        }

    def _weights(self) -> dict[str, float]:
        return {name: _entry(self.weights, f"{short}_weight") for name, short in _SPELLED.items()}

    def _combined_score(self, scores: MetricScores) -> float | None:
        known = {name: value for name, value in scores.by_name().items() if value is not None}
        if not known:
            return None
        return sum(weight * known.get(name, 0.0) for name, weight in self._weights().items())

    def _scores(self, rows: slice) -> MetricScores:
        tables = (self._predictions, self._actuals, self._features)
        cut = [{name: column[rows] for name, column in table.items()} for table in tables]
        return score_window(cut[0], cut[1], cut[2], self._metric_baselines, self._settings)

    def _literal_trends(self, limits: Mapping[str, float]) -> dict[str, str | None]:
        """Compare the older half of the window with the newer: a restart sees the same trend."""
        middle = self._n_rows // 2
        older, newer = self._scores(slice(0, middle)), self._scores(slice(middle, None))
        before, after = older.by_name(), newer.by_name()
        trends: dict[str, str | None] = {}
        for name in before:
            was, is_now = before[name], after[name]
            trends[name] = None if was is None or is_now is None else trend(was, is_now, limits[name])
        return trends

    def _per_by_horizon(self) -> dict[int, float]:
        found = {
            horizon: error_rate(columns, self._actuals, self._metric_baselines, self._settings)
            for horizon, columns in (self._evidence.window.forecasts.items() if self._evidence else ())
        }
        return {horizon: per for horizon, per in found.items() if per is not None}

    def _relative_errors(self) -> dict[int, RelativeErrors]:
        if self._evidence is None:
            return {}
        window = self._evidence.window
        return {horizon: relative_to_last(window, horizon) for horizon in window.served}

    def _top_series(self) -> tuple[SeriesDrift, ...]:
        if self._evidence is None or self._baseline is None:
            return ()
        return tuple(series_drift(self._evidence.window, self._baseline, TOP_SERIES))

    def _verdict(self, limits: Mapping[str, float]) -> DriftVerdict | None:
        """Let the seasonal detector judge, where it decides and has a reference.

        The scale stays the specification's when a threshold is edited, so that a threshold twice
        as high asks for twice the calibrated limit.
        """
        if not self._is_seasonal or self._evidence is None or self._evidence.detector is None:
            return None
        return self._evidence.detector.check(THRESHOLDS, self._weights(), limits["combined_score"])

    def _seasonal_trends(self, limits: Mapping[str, float]) -> dict[str, str | None]:
        """Compare the older half of the last hours with the newer."""
        evidence = self._evidence
        n_bins = max(2, TREND_H * HOUR_MS // evidence.window.bin_ms) if evidence else 0
        ratios = evidence.fleet_ratios[-n_bins:] if evidence else ()
        middle = len(ratios) // 2
        if not middle:
            return dict.fromkeys(FAMILIES)
        older, newer = (np.mean(half, axis=0) for half in (ratios[:middle], ratios[middle:]))
        return {
            name: trend(
                THRESHOLDS[name] * float(older[row]), THRESHOLDS[name] * float(newer[row]), limits[name]
            )
            for row, name in enumerate(FAMILIES)
        }

    def _why_no_verdict(self, verdict: DriftVerdict | None) -> str:
        """Return what the seasonal detector lacks for a verdict, or "" (also where it is not asked)."""
        if not self._is_seasonal or self._evidence is None:
            return ""
        if verdict is None:
            return self._evidence.missing
        if verdict.status == READY:
            return ""
        if verdict.reference.is_compared.any():
            return "not enough bins of the newest hours yet"
        days = int(verdict.reference.n_days.max(initial=0))
        waiting = verdict.enough_days
        when = f", {until(waiting.first_ms)}" if waiting else ""
        return f"{days} of {self._settings.min_reference_days} days known of any series{when}"

    def _why_collecting(self, scores: MetricScores, waiting_for: str) -> str:
        """Return what is missing for a verdict by the scores that decide, or ""."""
        evidence = self._evidence
        if self._is_seasonal and evidence is not None and evidence.missing:
            return evidence.missing  # what takes longest
        if evidence is not None and evidence.model_version is None:
            return "no model in service yet"
        if not self._is_seasonal and not self._metric_baselines:
            return "no baseline"
        if evidence is not None and (too_short := self._why_too_short(evidence.window)):
            return too_short
        if self._is_seasonal:
            return waiting_for
        return "" if scores.compared else "no metric has enough values in both window and baseline"

    def _why_too_short(self, window: PairWindow) -> str:
        needed = min(self._settings.min_pairs, window.size)
        if len(window) < needed:
            found = f"{len(window)} of {needed} (server, bin) pairs of the model in service"
            if not window.n_servers:
                return found
            more_h = (needed - len(window)) / window.n_servers * window.bin_ms / HOUR_MS
            return f"{found}, about {more_h:.1f} h more"
        span_s, needed_s = window.span_ms / 1000, self._settings.min_span_s
        if span_s < needed_s:
            return f"{span_s / 3600:.1f} of {needed_s / 3600:g} h of the model in service"
        return ""


def _entry(table: Mapping[str, float], key: str) -> float:
    if key not in table:
        raise BadData(f"{key} is missing, got only {', '.join(table) or 'nothing'}")
    return float(table[key])


def _seasonal_metrics(verdict: DriftVerdict | None) -> dict[str, float | None]:
    """Return a verdict's scores, all None where there is none."""
    if verdict is None or verdict.status != READY:
        return dict.fromkeys((*FAMILIES, "combined_score"))
    return {**verdict.scores, "combined_score": verdict.combined}


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Print the report of the present state, read from the buffer and the model's baseline."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print the drift report of the present state.",
        epilog="exit codes: 0 printed, 1 failed, 2 bad settings, 6 no such folder",
    )
    parser.add_argument("--data-buffer-dir", help="folder of the buffer (default: ./data_buffer)")
    parser.add_argument("--checkpoint-dir", help="folder of the models (default: ./checkpoints)")
    parser.add_argument("--config", type=Path, help="settings file (default: ./fleetcast.toml, if present)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the scores and the worst series, too")
    options = parser.parse_args(argv)
    return run_program("drift_monitor", lambda: _print_report(options))


def _print_report(options: argparse.Namespace) -> int:
    folders = {
        "paths.data_buffer_dir": options.data_buffer_dir,
        "paths.checkpoint_dir": options.checkpoint_dir,
    }
    settings = load_settings(options.config, folders)
    folder = buffer_folder(settings)
    # pyarrow: nothing else of this file needs the buffer
    from fleetcast.retraining.order import Readiness
    from fleetcast.storage.store import DataBuffer

    store = DataBuffer(folder, settings.buffer.retention_days)
    store.leave_out(Exclusions(settings.paths.checkpoint_dir))
    registry = Registry(Path(settings.paths.checkpoint_dir), models_dir(settings))
    source = DriftSource.of(settings, store, registry)
    monitor = DriftMonitor(settings.drift.window_size, settings=settings.drift)
    waits = Readiness(store, settings).why_not() if registry.current_id() is None else ""
    monitor.observe(source.evidence(first_training=waits))
    print(f"Buffer: {store.describe()}")
    print(monitor.generate_report())
    if options.plot:
        write_atomic(options.plot, drift_png(monitor.report(), source.one_ahead))
    return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(main())
