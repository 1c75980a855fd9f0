"""The figure of `drift_monitor.py --plot`: scores over their limits, and the series that carry them.

Owns: what is shown and where. matplotlib draws it; it is optional and is imported when a figure
is asked for (docs/decisions/drift-figure.md). Does not know: how scores are made.
"""

import io
from typing import TYPE_CHECKING

import numpy as np

from fleetcast.clock import DAY_MS, from_ms
from fleetcast.drift.evidence import DriftEvidence
from fleetcast.drift.report import DriftReport
from fleetcast.drift.seasonal.detector import DriftingSeries, DriftVerdict
from fleetcast.drift.seasonal.quorum import THRESHOLDS, combined_ratio
from fleetcast.drift.seasonal.settled import read_grid
from fleetcast.drift.seasonal.statistics import FAMILIES
from fleetcast.errors import FleetcastError, NotEnoughData
from fleetcast.schema import Floats, Longs, ReadForecasts
from fleetcast.settings import LITERAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 6
DAYS = 3  # shown of each series
WIDTH, HEAD, PANEL, DPI = 11.0, 3.0, 1.5, 110  # inches
BLUE, GREY, BAND, RED = "#1f5fa8", "#6b6b6b", "#dfe5ee", "#c8281e"
SCORES = {  # the score -> its line
    "per": ("prediction error (PER)", "#1f5fa8"),
    "dss": ("distribution shift (DSS)", "#d9822b"),
    "fds": ("feature drift (FDS)", "#3a8f4d"),
    "anomaly_rate": ("anomaly rate", "#8a56ac"),
    "combined_score": ("combined score", "#1a1a1a"),
}


def drift_png(report: DriftReport, read: ReadForecasts) -> bytes:
    """Return the figure as a file; see `drift_figure`."""
    content = io.BytesIO()
    drift_figure(report, read).savefig(content, format="png", dpi=DPI)
    return content.getvalue()


def drift_figure(report: DriftReport, read: ReadForecasts) -> "Figure":
    """Draw the fleet's scores of the last day and the newest days of its worst series.

    Args:
        read: settled forecasts one bin ahead.
    Raises:
        NotEnoughData: there is no calibrated verdict to show.
        FleetcastError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot it is Agg's: no display, no state
    except ImportError as error:
        raise FleetcastError("--plot needs matplotlib: pip install matplotlib") from error
    verdict, evidence = report.verdict, report.evidence
    if report.basis == LITERAL:
        raise NotEnoughData("the figure shows calibrated scores, drift.basis is literal")
    if verdict is None or evidence is None:
        raise NotEnoughData(f"nothing to draw yet: {report.status_reason or report.waiting_for}")
    chosen = _choose(verdict)
    heights = [HEAD, *[PANEL] * len(chosen)]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    top, *panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    state = report.recommendation or report.status
    figure.suptitle(
        f"Drift at {from_ms(verdict.end_ms):%Y-%m-%d %H:%M} UTC: {state} (status {report.status})\n"
        f"{len(verdict.drifting)} of {verdict.n_compared} compared series in alarm, "
        f"model {report.model_version}",
        fontsize=11,
        parse_math=False,
    )
    _draw_scores(top, report, verdict, evidence)
    for axes, (server, metric, item, ratio) in zip(panels, chosen, strict=True):
        title = item.sentence() if item else f"{server} {metric}: {ratio:.2f} times its limit"
        axes.set_title(title, loc="left", fontsize=9, parse_math=False)  # a name may hold a $
        _draw_series(axes, server, metric, verdict, read)
        axes.sharex(panels[0])
        axes.tick_params(labelbottom=axes is panels[-1])
        if item and item.changed_ms > verdict.end_ms - DAYS * DAY_MS:
            axes.axvline(from_ms(item.changed_ms), color=RED, linewidth=1.4, label="change")
    _add_legend(panels[0])
    figure.align_ylabels([top, *panels])
    return figure


def _choose(verdict: DriftVerdict) -> list[tuple[str, str, DriftingSeries | None, float]]:
    """Return the series in alarm, worst first; where there is none, those nearest to their limits."""
    if verdict.drifting:
        worst = verdict.drifting[:MOST_PANELS]
        return [(item.server_name, item.metric, item, item.ratio) for item in worst]
    ratios, reference = verdict.ratios.max(axis=0), verdict.reference
    chosen: list[tuple[str, str, DriftingSeries | None, float]] = []
    for series in np.argsort(-ratios, kind="stable")[:3].tolist():
        row, column = divmod(series, len(reference.metrics))
        chosen.append((reference.server_names[row], reference.metrics[column], None, float(ratios[series])))
    return chosen


def _draw_scores(axes: "Axes", report: DriftReport, verdict: DriftVerdict, evidence: DriftEvidence) -> None:
    """Draw each score of the last day over its own limit, so that one line is the limit of all."""
    ratios = np.array(evidence.fleet_ratios, float).reshape(-1, len(FAMILIES)).T  # (family, bin)
    weights = {name: report.weights[f"{name.removesuffix('_rate')}_weight"] for name in FAMILIES}
    scores = {name: THRESHOLDS[name] * ratios[row] for row, name in enumerate(FAMILIES)}
    scores["combined_score"] = combined_ratio(ratios.astype(np.float32), THRESHOLDS, weights, 1.0)
    ends_ms = verdict.end_ms - np.arange(ratios.shape[1])[::-1] * verdict.reference.bin_ms
    for name, (title, colour) in SCORES.items():
        limit, width = report.thresholds[name], 2.2 if name == "combined_score" else 1.4
        label = f"{title}: {report.metrics[name] or 0.0:.3f}, limit {limit:g}"
        _line(axes, ends_ms, scores[name] / max(limit, 1e-9), colour, label, width)
    axes.axhline(1.0, color=RED, linewidth=1.2, linestyle="--", label="limit")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("times its limit", fontsize=8)
    axes.set_title("Scores of the last day (times in UTC)", loc="left", fontsize=9)
    _add_legend(axes)
    _label_times(axes)


def _draw_series(axes: "Axes", server: str, metric: str, verdict: DriftVerdict, read: ReadForecasts) -> None:
    """Draw the newest days of a series over what is usual at that hour."""
    reference, start_ms = verdict.reference, verdict.end_ms - DAYS * DAY_MS
    span_ms = (start_ms, verdict.end_ms)
    actual = read_grid(read, (server,), (metric,), span_ms, reference.bin_ms).values[0, 0]
    row = reference.server_names.index(server) * len(reference.metrics) + reference.metrics.index(metric)
    bins = reference.clock.local_bins(start_ms, len(actual))
    shape = reference.shape.rows(np.array([row]))
    usual = shape.usual_values(reference.clock, bins)[0]
    spread = shape.spreads[0, reference.clock.slots(bins)]
    starts_ms = start_ms + np.arange(len(actual), dtype=np.int64) * reference.bin_ms
    times = [from_ms(int(moment)) for moment in starts_ms]
    axes.fill_between(times, usual - spread, usual + spread, color=BAND, label="usual scatter")  # type: ignore[arg-type]
    _line(axes, starts_ms, usual.astype(float), GREY, "usual at that hour", 1.2)
    _line(axes, starts_ms, actual.astype(float), BLUE, "what was", 1.2)
    axes.set_ylabel(metric, fontsize=8, parse_math=False)
    _label_times(axes)


def _line(axes: "Axes", times_ms: Longs, values: Floats, colour: str, label: str, width: float) -> None:
    times = [from_ms(int(moment)) for moment in times_ms]
    axes.plot(times, values, color=colour, linewidth=width, label=label)  # type: ignore[arg-type]


def _add_legend(axes: "Axes") -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _label_times(axes: "Axes") -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=4, maxticks=9)  # type: ignore[no-untyped-call]
    formatter = ConciseDateFormatter(locator, show_offset=False)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(formatter)
    axes.margins(x=0, y=0.1)
    axes.tick_params(labelsize=8)
    axes.grid(color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
