"""The figure of `drift_monitor.py --plot`: scores over their limits, and the series that carry them.

Owns: what is shown and where. Does not know: how pixels become a file (`png_canvas`), how scores
are made.
"""

from dataclasses import dataclass

import numpy as np

from fleetcast.clock import from_ms
from fleetcast.drift.calibrated_reading import CalibratedReading
from fleetcast.drift.png_canvas import BLACK, BLUE, GREY, PALE, RED, PngCanvas
from fleetcast.drift.report import DriftReading
from fleetcast.drift.seasonal.drift_verdict import DriftingSeries
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.season import DAY_MS
from fleetcast.drift.seasonal.settled import ReadForecasts, read_grid
from fleetcast.errors import NotEnoughData
from fleetcast.schema import Floats, Floats32

WIDTH, MARGIN = 980, 60
HEAD, PANEL = 150, 150  # pixels
MOST_PANELS = 6
DAYS = 3  # shown of each series
_FULL_BAR = 3.0  # times the limit


@dataclass(frozen=True, slots=True, eq=False)
class _Panel:
    """One series as it is drawn."""

    title: str
    actual: Floats32  # (bin,)
    usual: Floats32
    spread: Floats32
    start_ms: int
    changed_ms: int | None


def drift_figure(reading: DriftReading, read: ReadForecasts) -> bytes:
    """Return a PNG of the fleet's scores and its worst series.

    Args:
        read: settled forecasts one bin ahead.
    Raises:
        NotEnoughData: there is no calibrated verdict to show.
    """
    found = reading.calibrated
    if found is None:
        raise NotEnoughData("the figure shows calibrated scores, drift.basis is literal")
    if found.verdict is None or found.reference is None:
        raise NotEnoughData(f"nothing to draw yet: {reading.status_reason or found.waiting_for}")
    panels = [_panel(item, found.reference, found.verdict.end_ms, read) for item in _chosen(found)]
    canvas = PngCanvas(WIDTH, HEAD + PANEL * len(panels) + 10)
    _head(canvas, reading)
    for place, panel in enumerate(panels):
        _draw(canvas, panel, HEAD + place * PANEL, found.reference.bin_ms)
    return canvas.png()


def _chosen(found: CalibratedReading) -> list[tuple[str, str, DriftingSeries | None, float]]:
    """Return the series in alarm, worst first; where there is none, those nearest to their limits."""
    if found.drifting:
        worst = found.drifting[:MOST_PANELS]
        return [(item.server_name, item.metric, item, item.ratio) for item in worst]
    assert found.verdict is not None and found.reference is not None, "the caller has looked"
    ratios, metrics = found.verdict.ratios.max(axis=0), found.reference.metrics
    chosen: list[tuple[str, str, DriftingSeries | None, float]] = []
    for series in np.argsort(-ratios, kind="stable")[:3].tolist():
        row, column = divmod(series, len(metrics))
        chosen.append((found.reference.server_names[row], metrics[column], None, float(ratios[series])))
    return chosen


def _panel(
    chosen: tuple[str, str, DriftingSeries | None, float],
    reference: Reference,
    end_ms: int,
    read: ReadForecasts,
) -> _Panel:
    server, metric, item, ratio = chosen
    start_ms = end_ms - DAYS * DAY_MS
    grid = read_grid(read, (server,), (metric,), (start_ms, end_ms), reference.bin_ms)
    row = reference.server_names.index(server) * len(reference.metrics) + reference.metrics.index(metric)
    clock = reference.clock
    bins = clock.local_bins(start_ms, grid.values.shape[2])
    shape = reference.shape.rows(np.array([row]))
    title = item.sentence() if item else f"{server} {metric}: {ratio:.2f} times its limit"
    return _Panel(
        title,
        grid.values[0, 0],
        shape.expected(clock, bins)[0],
        shape.spreads[0, clock.slots(bins)],
        start_ms,
        item.changed_ms if item else None,
    )


def _head(canvas: PngCanvas, reading: DriftReading) -> None:
    found = reading.calibrated
    assert found is not None and found.verdict is not None, "the caller has looked"
    verdict = "RETRAIN NOW" if reading.needs_retraining else "OK"
    end = f"{from_ms(found.verdict.end_ms):%Y-%m-%d %H:%M} UTC"
    canvas.text(MARGIN, 10, f"Drift at {end}: {verdict} (status {reading.status})")
    canvas.text(
        MARGIN,
        24,
        f"{len(found.drifting)} of {found.verdict.n_compared} compared series in alarm; "
        f"model {reading.model_version}",
        GREY,
    )
    left, full = MARGIN + 110, 300
    for place, (name, value) in enumerate(reading.metrics.items()):
        top, limit = 44 + place * 17, reading.thresholds[name]
        share = min(value / limit if limit else 0.0, _FULL_BAR) / _FULL_BAR
        canvas.text(MARGIN, top + 3, name)
        canvas.rectangle(left, top, left + full, top + 13, PALE)
        colour = RED if value > limit else BLUE
        canvas.rectangle(left, top, left + share * full, top + 13, colour)
        canvas.text(left + full + 10, top + 3, f"{value:.3f}, limit {limit:g}")
    at_limit = left + full / _FULL_BAR
    canvas.line(np.array([at_limit, at_limit]), np.array([42.0, 130.0]), BLACK)
    canvas.text(round(at_limit) - 24, 134, "at limit")
    canvas.text(left + full + 180, 47, "blue: what was   grey: usual at that hour", GREY)
    canvas.text(left + full + 180, 64, "pale: usual scatter   red: change", GREY)


def _draw(canvas: PngCanvas, panel: _Panel, top: int, bin_ms: int) -> None:
    left, right, low, high = MARGIN, WIDTH - 20, top + PANEL - 22, top + 18
    n = len(panel.actual)
    x = np.linspace(left, right, n)
    span = np.concatenate([panel.actual, panel.usual - panel.spread, panel.usual + panel.spread])
    span = span[np.isfinite(span)]
    floor, ceiling = float(span.min()), float(span.max())
    scale = (low - high) / max(ceiling - floor, 1e-9)

    def y(values: Floats32) -> Floats:
        return np.asarray(low - (values.astype(float) - floor) * scale)

    upper, lower = y(panel.usual + panel.spread), y(panel.usual - panel.spread)
    for index in range(n):
        canvas.rectangle(x[index] - 1, upper[index], x[index] + 1, lower[index] + 1, PALE)
    canvas.line(x, y(panel.usual), GREY)
    canvas.line(x, y(panel.actual), BLUE)
    canvas.text(left, top + 4, panel.title)
    for value, row in ((ceiling, high), (floor, low - 7)):
        canvas.text(2, row, f"{value:9.4g}", GREY)
    if panel.changed_ms is not None and panel.changed_ms >= panel.start_ms:
        at = left + (panel.changed_ms - panel.start_ms) / bin_ms / max(n - 1, 1) * (right - left)
        canvas.line(np.array([at, at]), np.array([float(high), float(low)]), RED)
    for day in range(DAYS + 1):
        moment = from_ms(panel.start_ms + day * DAY_MS)
        place = left + day / DAYS * (right - left)
        canvas.text(round(min(place, right - 66)), low + 6, f"{moment:%m-%d %H:%M}", GREY)
