"""What the season-matched detector answers: scores, who carries the drift, what is not judged.

Owns: the shape of the answer and its words. Does not know: how it was computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fleetcast.drift.seasonal.sensors import DataQualityEvent
from fleetcast.schema import Floats32

COLLECTING, READY = "collecting", "ready"


@dataclass(frozen=True, slots=True)
class DriftingSeries:
    """One series in alarm: since when, from what to what, and in which way."""

    server_name: str
    metric: str
    family: str  # per, dss, fds or anomaly_rate
    statistic: str
    says: str  # "has risen"
    ratio: float  # statistic over its limit, held; > 1
    since_ms: int  # start of the first bin of the alarm
    changed_ms: int  # estimated time of the change, at most a day before the alarm
    usual: float  # what the reference expects of the newest hours, native units
    actual: float  # what they are; NaN when nothing arrived

    def sentence(self) -> str:
        """Say it for people.

        >>> DriftingSeries("a", "cpu_pct", "fds", "higher_24h", "has risen", 2.0, 0, 0, 12.0, 31.5).sentence()
        'a cpu_pct has risen: usually about 12, now 31.5 (2.0 times the limit)'
        """
        where = f"usually about {self.usual:.4g}, now {self.actual:.4g}"
        return f"{self.server_name} {self.metric} {self.says}: {where} ({self.ratio:.1f} times the limit)"


@dataclass(frozen=True, eq=False)
class DriftVerdict:
    """The fleet at the end of one bin.

    `scores` are on the specification's scale: threshold x statistic / calibrated limit, so that
    the threshold is the level that unchanged data reach at the calibrated rate.
    """

    end_ms: int  # end of the newest bin
    status: str  # collecting: no series has a window yet
    scores: Mapping[str, float]  # per, dss, fds, anomaly_rate
    combined: float
    needs_retraining: bool
    alarm_share: float  # of the compared series
    sustained_share: float  # of the compared series, in alarm most of the last hours
    n_compared: int
    drifting: tuple[DriftingSeries, ...]  # all in alarm, worst first, whether or not the fleet is
    not_compared: Mapping[str, int]  # why -> how many series
    events: tuple[DataQualityEvent, ...]
    ratios: Floats32 = field(repr=False)  # (family, series) held ratios
    is_alarm: NDArray[np.bool_] = field(repr=False)  # (series,)

    def drifting_servers(self) -> tuple[str, ...]:
        """Return the servers with a series in alarm, worst first."""
        return tuple(dict.fromkeys(series.server_name for series in self.drifting))
