"""Which series pass a limit within 8 hours: is the probability right, and who says it best?

    python -m benchmarks.forecast.capacity --data F [--days 24] [--servers 28] [--name NAME]

Two fleets: recorded VMs (`--data`, the last servers of the file), and made ones whose shapes an operator
knows by sight: leaks that end in a restart, memory that is freed every night, bursts, steps, sines and
flat lines, each with noise of 0, 0.5 and 2 points. Once an hour the shipped base model and the expert layer
forecast 8 hours, as clients get them, and `fleetcast.capacity.crossing` says P of passing 70, 80, 90 and
95 %. Each P is made of what had settled by then; windows that begin over the limit do not count.

Requirements, answered with figures for each fleet, metric and limit with at least 200 passing windows:

- reliability: in each tenth of P with at least 200 windows, the share that passed is within 5 points;
- sources: the Brier score is at most 1.05 times that of the best single source;
- alarms: P >= 0.5 beside `predict_linear` over 1, 4 and 12 hours: fewer false alarms at the same lead.

Days and weeks: on every day of 60 days of made disks (fills with and without noise, weekly backups,
clean-ups, rates that change, disks that only swing), `fleetcast.capacity.dates` is asked by when each
reaches 95 %. Required: 70 to 90 % of the ranges hold the day. Ranges that the record's end or a clean-up
cuts off are counted apart: a date says by when, unless room is made.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from benchmarks.results_file import write_results
from fleetcast.bins import DAY_BINS, HISTORY_BINS
from fleetcast.capacity import dates
from fleetcast.capacity.crossing import LIMITS, SOURCES, Calibration, Said, guess
from fleetcast.forecast.experts.layer import ExpertLayer
from fleetcast.forecast.predictor import Forecaster, set_threads
from fleetcast.schema import Flags, Floats, Floats32, HistoryWindow
from fleetcast.training.grid import TrainingGrid

ROOT = Path(__file__).resolve().parents[2]
BIN_MS, HORIZON, HOUR = 300_000, 96, 12
WARM_DAYS = 8
ALARM_P, ALARM_LIMIT = 0.5, 90.0
WINDOWS_H = (1, 4, 12)  # of predict_linear
FEWEST_IN_BIN, MOST_OFF, MOST_BRIER = 200, 0.05, 1.05
DISK_DAYS, DISK_LIMIT = 60, 95.0
NOISES = (0.0, 0.5, 2.0)


@dataclass(frozen=True, eq=False)
class World:
    """Series of one metric."""

    name: str
    metric: str
    values: Floats32  # (series, bin)


@dataclass(frozen=True, eq=False)
class Windows:
    """What was said and what came true; (origin, series, ...)."""

    told: Floats32  # (source, origin, series, limit)
    chosen: Floats32  # (origin, series, limit) by the source that was chosen then
    peaks: Floats32
    now: Floats32
    lines: Floats32  # (window, origin, series) predict_linear 8 h ahead


def main(argv: Sequence[str] | None = None) -> int:
    """Play both fleets, print the tables and the answers, write the JSON."""
    options = _parser().parse_args(argv)
    set_threads(1)
    begin = process_time()
    model = Forecaster.load(Path(options.model))
    figures: dict[str, Any] = {"days": options.days, "fleets": {}}
    for world in (*_recorded(options), *_made(options.days, options.series)):
        played = play(world, model)
        found = {f"{limit:g}": _judge(played, column) for column, limit in enumerate(LIMITS)}
        figures["fleets"][f"{world.name} {world.metric}"] = found | {"alarms": _alarms(played)}
        _show(world, figures["fleets"][f"{world.name} {world.metric}"])
    figures["dates"] = _judge_dates(np.stack([*_disks(options.disks)]))
    print(f"dates: {figures['dates']}")
    figures["cpu_s"] = round(process_time() - begin, 1)
    print(f"{figures['cpu_s']} CPU seconds")
    if not options.dry:
        print(write_results(options.name, figures))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="recorded 5-minute means (parquet); without it: made series alone")
    parser.add_argument("--days", type=int, default=24, help="days scored (default 24)")
    parser.add_argument("--servers", type=int, default=28, help="the last so many of --data (default 28)")
    parser.add_argument("--first", action="store_true", help="the first so many of --data instead")
    parser.add_argument("--series", type=int, default=54, help="made series (default 54)")
    parser.add_argument("--disks", type=int, default=48, help="made disks (default 48)")
    parser.add_argument("--model", default=str((ROOT / "models" / "last.ckpt").resolve()))
    parser.add_argument("--name", default="capacity")
    parser.add_argument("--dry", action="store_true", help="write no JSON")
    return parser


def _recorded(options: argparse.Namespace) -> Iterator[World]:
    if not options.data:
        return
    grid = TrainingGrid.read(Path(options.data), ("cpu_pct", "mem_pct"), BIN_MS)
    n_bins = (WARM_DAYS + options.days) * DAY_BINS
    rows = slice(options.servers) if options.first else slice(-options.servers, None)
    for column, metric in enumerate(grid.metrics):
        yield World(Path(options.data).stem, metric, grid.values[rows, column, :n_bins])


def _made(days: int, n_series: int) -> Iterator[World]:
    """Yield series of shapes, noises and paces in turn."""
    n_bins = (WARM_DAYS + days) * DAY_BINS
    rows = []
    for number in range(n_series):
        random = np.random.default_rng([15, number])
        shape = _SHAPES[number % len(_SHAPES)]
        path = shape(random, np.arange(n_bins, dtype=np.float64))
        noise = NOISES[number // len(_SHAPES) % len(NOISES)]
        rows.append(np.clip(path + noise * random.standard_normal(n_bins), 0, 100))
    yield World("shapes", "mem_pct", np.round(np.stack(rows), 2).astype(np.float32))


Random = np.random.Generator


def _leak(random: Random, time: Floats) -> Floats:
    """Return memory that grows from a base, crosses the limit, and is freed by a restart at 99 %."""
    base, pace = random.uniform(15, 40), random.uniform(0.4, 3.0) / HOUR
    period = (99.0 - base) / pace
    rest = random.uniform(0, 36) * HOUR  # after each restart, before it grows again
    since = (time + random.uniform(0, period + rest)) % (period + rest)
    return base + pace * np.maximum(0.0, since - rest)


def _nightly(random: Random, time: Floats) -> Floats:
    """Return memory that grows all day and is freed every night below the limit."""
    low, high = random.uniform(10, 40), random.uniform(70, 88)
    return low + (high - low) * ((time + random.integers(DAY_BINS)) % DAY_BINS) / DAY_BINS


def _bursts(random: Random, time: Floats) -> Floats:
    starts = random.uniform(size=len(time)) < 1.5 / DAY_BINS
    lengths = int(random.integers(2, 12))
    is_burst = np.convolve(starts, np.ones(lengths))[: len(time)] > 0
    return random.uniform(20, 60) + random.uniform(20, 45) * is_burst


def _steps(random: Random, time: Floats) -> Floats:
    return random.uniform(10, 92, len(time))[np.cumsum(random.uniform(size=len(time)) < 1 / DAY_BINS)]


def _sine(random: Random, time: Floats) -> Floats:
    angle = 2 * np.pi * (time / DAY_BINS + random.uniform())
    return random.uniform(50, 70) + random.uniform(10, 28) * np.sin(angle)


def _flat(random: Random, time: Floats) -> Floats:
    return np.full(len(time), random.uniform(20, 89))


_SHAPES = (_leak, _nightly, _bursts, _steps, _sine, _flat)


def _disks(n_disks: int) -> Iterator[Floats]:
    """Yield daily maxima of made disks: a pace of its own each, and one of four lives."""
    time = np.arange(DISK_DAYS)
    for number in range(n_disks):
        random = np.random.default_rng([16, number])
        pace = random.uniform(0.2, 2.5) * (number % 4 != 3)  # the last kind only swings
        paces = np.full(DISK_DAYS, pace)
        if number % 4 == 1:  # another pace from a day on
            paces[random.integers(15, 45) :] *= random.uniform(0.3, 2.0)
        values = random.uniform(20, 60) + np.cumsum(paces) + random.uniform(0, 3) * (time % 7 == 6)
        if number % 4 == 2:  # freed at 90 %, again and again
            values = 30 + (values - 30) % 60
        values = values + (0.1, 0.5, 1.5)[number % 3] * random.standard_normal(DISK_DAYS)
        yield np.clip(values, 0, 100)


def _judge_dates(maxima: Floats) -> dict[str, Any]:
    """Ask on every day, and hold each range against the day that came."""
    n_right = n_wrong = n_open = n_freed = n_withheld = 0
    for today in range(13, DISK_DAYS - 1):
        ratios = dates.compare(list(maxima[:, : today + 1]))
        for series in maxima:
            told = dates.look_ahead(series[: today + 1], DISK_LIMIT, ratios)
            over = np.flatnonzero(series[today + 1 :] >= DISK_LIMIT)
            end = DISK_DAYS if told.late_days is None else today + int(np.ceil(told.late_days)) + 1
            is_freed = bool((np.diff(series[today:end]) < -dates.CLEAN_UP).any())
            if told.early_days is None or told.late_days is None:
                n_withheld += bool(told.why_not) and told.now < DISK_LIMIT
            elif len(over):
                day = int(over[0]) + 1
                is_right = np.floor(told.early_days) <= day <= np.ceil(told.late_days)
                n_right, n_wrong = n_right + is_right, n_wrong + (not is_right)
            elif is_freed:
                n_freed += 1
            elif end <= DISK_DAYS:
                n_wrong += 1
            else:
                n_open += 1
    held = int(n_right) / max(1, int(n_right) + n_wrong)
    return {
        "ranges": int(n_right) + n_wrong,
        "held": round(held, 4),
        "cut_off": n_open,
        "freed_before": n_freed,
        "withheld": int(n_withheld),
        "is_met": 0.7 <= held <= 0.9,
    }


def play(world: World, model: Forecaster) -> Windows:
    """Forecast once an hour, say P, and settle what is 8 hours old."""
    values = world.values
    layer, calibration = ExpertLayer(np.array([True])), Calibration()
    rows, names = np.arange(len(values)), tuple(f"server-{row:03d}" for row in range(len(values)))
    origins = range(DAY_BINS, values.shape[1] - HORIZON, HOUR)
    opened: list[tuple[int, Said]] = []
    kept: list[tuple[Floats32, Floats32, Floats32, Floats32, Floats32]] = []
    closed = origins[0] - 1
    for origin in origins:
        for number in range(closed + 1, origin + 1):
            layer.settle(number, rows, values[:, None, number])
        closed = origin
        while opened and opened[0][0] + HORIZON <= origin:
            start, said = opened.pop(0)
            calibration.settle(said, _peaks(values, start))
        history = np.ascontiguousarray(values[:, None, max(0, origin + 1 - HISTORY_BINS) : origin + 1])
        window = HistoryWindow(names, (world.metric,), history, origin * BIN_MS, BIN_MS)
        served = layer.serve(rows, origin, layer.experts(history, DAY_BINS, HORIZON), model.predict(window))
        said = calibration.say(guess(served[:, 0], history[:, 0], HORIZON))
        opened.append((origin, said))
        if origin >= WARM_DAYS * DAY_BINS:
            by = [calibration.choose(column)[0] for column in range(len(LIMITS))]
            chosen = np.stack([said.told[by[column], :, column] for column in range(len(LIMITS))], axis=1)
            lines = np.stack([_line(history[:, 0], hours * HOUR) for hours in WINDOWS_H])
            kept.append((said.told, chosen, _peaks(values, origin), values[:, origin], lines))
    told, chosen, peaks, now, lines = (np.stack(column) for column in zip(*kept, strict=True))
    return Windows(np.moveaxis(told, 1, 0), chosen, peaks, now, np.moveaxis(lines, 1, 0))


def _peaks(values: Floats32, origin: int) -> Floats32:
    ahead = values[:, origin + 1 : origin + 1 + HORIZON]
    peaks = np.where(np.isfinite(ahead), ahead, -np.inf).max(axis=1)
    return np.where(np.isfinite(peaks), peaks, np.nan).astype(np.float32)


def _line(history: Floats32, n_bins: int) -> Floats32:
    """Return what `predict_linear(x[window], 8 h)` says: least squares, drawn on from the last bin."""
    values = history[:, -n_bins:].astype(np.float64)
    times = np.arange(values.shape[1]) - values.shape[1] + 1.0
    centred = times - times.mean()
    slopes = (values * centred).sum(axis=1) / (centred**2).sum()
    return (values.mean(axis=1) + slopes * (HORIZON - times.mean())).astype(np.float32)


def _judge(played: Windows, column: int) -> dict[str, Any]:
    limit = LIMITS[column]
    usable = np.isfinite(played.peaks) & (played.now < limit)
    usable &= np.isfinite(played.told[..., column]).all(axis=0)
    passed = (played.peaks >= limit)[usable]
    said = played.chosen[..., column][usable]
    brier = {
        name: _brier(played.told[place, ..., column][usable], passed) for place, name in enumerate(SOURCES)
    }
    own = _brier(said, passed)
    best = min(brier.values())
    bins = _reliability(said, passed)
    full = [cell for cell in bins if cell["windows"] >= FEWEST_IN_BIN]
    off = max((abs(cell["said"] - cell["passed"]) for cell in full), default=0.0)
    return {
        "windows": len(passed),
        "passed": int(passed.sum()),
        "brier": {"answer": own, **brier},
        "reliability": bins,
        "most_off": round(off, 4),
        "is_met": {"reliability": off <= MOST_OFF, "sources": own <= MOST_BRIER * best + 1e-9},
    }


def _brier(said: Floats32, passed: Flags) -> float:
    return round(float(((said - passed) ** 2).mean()), 5) if len(passed) else 0.0


def _reliability(said: Floats32, passed: Flags) -> list[dict[str, Any]]:
    bins = np.clip((said * 10).astype(int), 0, 9)
    return [
        {
            "from": number / 10,
            "windows": int((bins == number).sum()),
            "said": round(float(said[bins == number].mean()), 4),
            "passed": round(float(passed[bins == number].mean()), 4),
        }
        for number in range(10)
        if (bins == number).any()
    ]


def _alarms(played: Windows) -> dict[str, Any]:
    """Return lead and false alarms of P >= 0.5 and of three lines, at 90 %."""
    column = LIMITS.index(ALARM_LIMIT)
    rules = {"fleetcast": played.chosen[..., column] >= ALARM_P}
    rules |= {
        f"predict_linear {hours} h": played.lines[place] >= ALARM_LIMIT
        for place, hours in enumerate(WINDOWS_H)
    }
    return {name: _alarm(rule, played) for name, rule in rules.items()}


def _alarm(is_on: Flags, played: Windows) -> dict[str, Any]:
    """Judge one rule: an event is a window's passing after 8 hours below; a false alarm an onset without."""
    below = played.now < ALARM_LIMIT
    is_on = is_on & below
    onset = is_on.copy()
    onset[1:] &= ~is_on[:-1]
    passes = played.peaks >= ALARM_LIMIT
    leads, n_events = [], 0
    for series in range(is_on.shape[1]):
        over = np.flatnonzero(played.now[:, series] >= ALARM_LIMIT)
        for hour in over[(over >= 8)]:
            if not below[hour - 8 : hour, series].all():
                continue
            n_events += 1
            before = is_on[hour - 8 : hour, series]
            length = int(np.argmin(before[::-1])) if not before.all() else 8  # on until it passed
            if length:
                leads.append(length)
    days = is_on.shape[0] * is_on.shape[1] / 24
    return {
        "events": n_events,
        "caught": len(leads),
        "median_lead_h": float(np.median(leads)) if leads else None,
        "false_alarms": int((onset & ~passes).sum()),
        "false_per_server_month": round(float((onset & ~passes).sum()) / days * 30, 2),
    }


def _show(world: World, found: dict[str, Any]) -> None:
    print(f"{world.name} {world.metric}, {len(world.values)} series")
    for limit in LIMITS:
        cell = found[f"{limit:g}"]
        brier = ", ".join(f"{name} {value:.4f}" for name, value in cell["brier"].items())
        met = ", ".join(f"{name} {'yes' if is_met else 'NO'}" for name, is_met in cell["is_met"].items())
        n_passed, off = f"{cell['passed']}/{cell['windows']}", cell["most_off"]
        print(f"  {limit:g} %: {n_passed} passed; Brier {brier}; most off {off:.3f}; {met}")
    for name, rule in found["alarms"].items():
        caught = f"{rule['caught']} of {rule['events']} events, median lead {rule['median_lead_h']} h"
        false = f"{rule['false_alarms']} false alarms ({rule['false_per_server_month']} a server and month)"
        print(f"  {name:<20} {caught}, {false}")


if __name__ == "__main__":
    raise SystemExit(main())
