"""The figure of `drift_monitor.py --plot`: scores over their limits, and the series that carry them.

Owns: what is shown and where. Does not know: how pixels become a file (`png_canvas`), how scores
are made.

A small canvas that becomes a PNG: lines, bars and plain text, with numpy and zlib alone.

Owns: pixels, a 5 x 7 font of printable ASCII, the PNG file format (RFC 2083, 8-bit RGB).
Does not know: what is drawn. A plotting library was left out for one figure: it would bring ten
packages and 60 MB into every installation (docs/decisions/drift-figure.md).
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import DAY_MS, from_ms
from fleetcast.drift.report import DriftReport
from fleetcast.drift.seasonal.detector import DriftingSeries, DriftVerdict
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.settled import ReadForecasts, read_grid
from fleetcast.errors import NotEnoughData
from fleetcast.schema import Floats, Floats32
from fleetcast.settings import LITERAL

Colour = tuple[int, int, int]
BLACK, GREY, PALE, RED, BLUE = (20, 20, 20), (130, 130, 130), (222, 228, 236), (200, 40, 30), (40, 90, 170)
WHITE = (255, 255, 255)
GLYPH_WIDTH, GLYPH_HEIGHT = 6, 9  # with the space around
# five columns of each character from the space to the tilde, lowest bit at the top
_FONT = bytes.fromhex(
    "000000000000005f00000007000700147f147f14242a7f2a12231308646236495620500008070300001c2241000041221c00"
    "14083e081408083e080800807030000808080808006060000020100804023e5149453e00427f400042615149462141454b31"
    "1814127f1027454545393c4a49493001710905033649494936064949291e0036360000005636000008142241001414141414"
    "00412214080201510906324979413e7e1111117e7f494949363e414141227f4141221c7f494949417f090909013e4149497a"
    "7f0808087f00417f41002040413f017f081422417f404040407f020c027f7f0408107f3e4141413e7f090909063e4151215e"
    "7f09192946464949493101017f01013f4040403f1f2040201f3f4038403f631408146307087008076151494543007f414100"
    "02040810200041417f0004020102044040404040000102040020545454787f484444383844444420384444487f3854545418"
    "087e0901020c5252523e7f0804047800447d40002040443d007f1028440000417f40007c041804787c080404783844444438"
    "7c14141408081414187c7c080404084854545420043f4440203c4040207c1c2040201c3c4030403c44281028440c5050503c"
    "4464544c44000836410000007f000000413608001008081008"
)


class PngCanvas:
    """Draws by pixel coordinates, x to the right, y down; what lies outside is cut off."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._pixels: NDArray[np.uint8] = np.full((height, width, 3), WHITE, np.uint8)

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fill a rectangle."""
        rows = slice(max(0, round(top)), max(0, round(bottom)))
        self._pixels[rows, max(0, round(left)) : max(0, round(right))] = colour

    def line(self, x: NDArray[np.floating], y: NDArray[np.floating], colour: Colour) -> None:
        """Join points; NaN interrupts the line."""
        for index in range(len(x) - 1):
            ends = np.array([x[index], x[index + 1], y[index], y[index + 1]], float)
            if np.isfinite(ends).all():
                n = int(max(abs(ends[1] - ends[0]), abs(ends[3] - ends[2]))) + 2
                columns = np.rint(np.linspace(ends[0], ends[1], n)).astype(np.int64)
                rows = np.rint(np.linspace(ends[2], ends[3], n)).astype(np.int64)
                self._dots(columns, rows, colour)

    def text(self, left: int, top: int, words: str, colour: Colour = BLACK) -> None:
        """Write one line; a character the font lacks becomes a question mark."""
        for place, letter in enumerate(words):
            code = ord(letter) - 32
            code = code if 0 <= code < len(_FONT) // 5 else ord("?") - 32
            columns = np.frombuffer(_FONT[5 * code : 5 * code + 5], np.uint8)
            rows, across = np.nonzero((columns[None] >> np.arange(8)[:, None]) & 1)
            self._dots(across + left + place * GLYPH_WIDTH, rows + top, colour)

    def png(self) -> bytes:
        """Return the file's content."""
        raw = np.concatenate(
            [np.zeros((self.height, 1), np.uint8), self._pixels.reshape(self.height, -1)], axis=1
        )
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw.tobytes(), 6)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)

    def _dots(self, columns: NDArray[np.int64], rows: NDArray[np.int64], colour: Colour) -> None:
        inside = (columns >= 0) & (columns < self.width) & (rows >= 0) & (rows < self.height)
        self._pixels[rows[inside], columns[inside]] = colour


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


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


def drift_figure(report: DriftReport, read: ReadForecasts) -> bytes:
    """Return a PNG of the fleet's scores and its worst series.

    Args:
        read: settled forecasts one bin ahead.
    Raises:
        NotEnoughData: there is no calibrated verdict to show.
    """
    if report.basis == LITERAL:
        raise NotEnoughData("the figure shows calibrated scores, drift.basis is literal")
    verdict = report.verdict
    if verdict is None:
        raise NotEnoughData(f"nothing to draw yet: {report.status_reason or report.waiting_for}")
    panels = [_panel(item, verdict.reference, verdict.end_ms, read) for item in _chosen(verdict)]
    canvas = PngCanvas(WIDTH, HEAD + PANEL * len(panels) + 10)
    _head(canvas, report, verdict)
    for place, panel in enumerate(panels):
        _draw(canvas, panel, HEAD + place * PANEL, verdict.reference.bin_ms)
    return canvas.png()


def _chosen(found: DriftVerdict) -> list[tuple[str, str, DriftingSeries | None, float]]:
    """Return the series in alarm, worst first; where there is none, those nearest to their limits."""
    if found.drifting:
        worst = found.drifting[:MOST_PANELS]
        return [(item.server_name, item.metric, item, item.ratio) for item in worst]
    ratios, metrics = found.ratios.max(axis=0), found.reference.metrics
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


def _head(canvas: PngCanvas, report: DriftReport, found: DriftVerdict) -> None:
    verdict = "RETRAIN NOW" if report.needs_retraining else "OK"
    end = f"{from_ms(found.end_ms):%Y-%m-%d %H:%M} UTC"
    canvas.text(MARGIN, 10, f"Drift at {end}: {verdict} (status {report.status})")
    canvas.text(
        MARGIN,
        24,
        f"{len(found.drifting)} of {found.n_compared} compared series in alarm; model {report.model_version}",
        GREY,
    )
    left, full = MARGIN + 110, 300
    for place, (name, value) in enumerate(report.metrics.items()):
        top, limit = 44 + place * 17, report.thresholds[name]
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
