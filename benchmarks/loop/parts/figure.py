"""The figure of `loop_replay --plot`: each policy's error day by day, raw and served.

Owns: what is shown and where. matplotlib draws it; it is optional and is imported when a figure is
asked for. Does not know: how errors are made.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loop.parts.policies import ALL_POLICIES
from fleetcast.errors import FleetcastError
from fleetcast.schema import Floats

WIDTH, PANEL, DPI = 10.0, 3.0, 110  # inches
_COLOURS = ("#6b6b6b", "#8a56ac", "#d9822b", "#c8281e", "#1f5fa8", "#3a8f4d", "#45a5c4")
COLOURS = dict(zip(ALL_POLICIES, _COLOURS, strict=True))


def draw_errors(by_scene: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw a panel per scene: served errors as lines, raw ones dashed, changes of a lone run upright.

    Raises:
        FleetcastError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot it is Agg's: no display, no state
    except ImportError as error:
        raise FleetcastError("--plot needs matplotlib: pip install matplotlib") from error
    scenes = {name: runs for name, runs in by_scene.items() if runs}
    figure = Figure(figsize=(WIDTH, PANEL * len(scenes)), layout="constrained")
    panels = figure.subplots(len(scenes), 1, squeeze=False)[:, 0]
    for axes, (name, runs) in zip(panels, scenes.items(), strict=True):
        axes.set_title(f"{name}, {len(runs)} runs", loc="left", fontsize=9)
        for policy, colour in COLOURS.items():
            for side, style in (("served", "-"), ("raw", "--")):
                found = [run["policies"][policy][side] for run in runs if policy in run["policies"]]
                if found:
                    line = mean_by_day([item["daily"] for item in found])
                    axes.plot(np.arange(len(line)) + 0.5, line, style, color=colour, label=f"{policy} {side}")
        for day in runs[0]["changed_on_day"] if len(runs) == 1 else ():
            axes.axvline(day, color="#cccccc", linewidth=1, zorder=0)
        axes.set_ylabel("error / last value's", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("day of the replay", fontsize=8)
    panels[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)


def mean_by_day(daily: Sequence[Sequence[float | None]]) -> Floats:
    """Return the mean over runs of each day's error, NaN where no run knows it.

    >>> mean_by_day([[0.5, None], [0.7, 0.8]]).tolist()
    [0.6, 0.8]
    """
    values = np.array(daily, np.float64)
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)
