"""Single series under every rule: unchanged stretches, declared changes, real changes."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift.parts.data import BIN_MS, DAY, Change, RecordedFleet, interval, sub_fleet
from benchmarks.drift.parts.injections import (
    KINDS,
    PER_BLOCK,
    block_ms,
    injected,
    is_eligible,
    look_bins,
    room_bins,
    seeded,
)
from benchmarks.drift.parts.ours import (
    AT_START,
    LEAD,
    Block,
    fitted_block,
    held,
    proxy_errors,
    series_ratios,
)
from benchmarks.drift.parts.rules import (
    LITERAL_BINS,
    STEP,
    Stretch,
    evidently,
    ks_test,
    literal,
    nannyml,
)
from benchmarks.drift.parts.streams import Adwin, PageHinkley, streamed

Bools = NDArray[np.bool_]
BOOTSTRAPS = 1000
HOURS_PER_CHECK = STEP * 24 / DAY
MIN_CHANGE_DAYS = 5
CHANGE_COMPANY = 5

OTHERS: dict[str, Callable[[Stretch], Bools]] = {
    "literal 1,000": lambda stretch: literal(stretch, LITERAL_BINS),
    "literal 24 h": lambda stretch: literal(stretch, DAY),
    "KS p < .05": ks_test,
    "Evidently": evidently,
    "NannyML": nannyml,
    "ADWIN": lambda stretch: streamed(Adwin, stretch),
    "Page-Hinkley": lambda stretch: streamed(PageHinkley, stretch),
}


@dataclass
class Tally:
    """What one rule did on one data set."""

    alarm_shares: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by series
    episodes: int = 0
    series_days: float = 0.0
    delays: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # NaN = missed
    already: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    changes: list[tuple[str, bool, bool]] = field(default_factory=list)  # server; within 24 h, 72 h

    def share(self) -> dict[str, Any]:
        """Return the mean share of checks in alarm with its interval over series."""
        means = np.array([np.mean(values) for values in self.alarm_shares.values()])
        draws = np.random.default_rng(0).choice(means, (BOOTSTRAPS, len(means))).mean(axis=1)
        low, high = interval(draws)
        months = self.series_days / 30
        return {
            "series": len(means),
            "checks_in_alarm_pct": 100 * float(means.mean()),
            "interval_95_pct": [100 * low, 100 * high],
            "alarms_per_series_month": self.episodes / months if months else 0.0,
        }

    def hits(self, kind: str) -> dict[str, Any]:
        """Return hit rate, interval and median delay of one kind of change."""
        delays = np.array(self.delays.get(kind, []))
        if not len(delays):
            return {"n": 0}
        found = np.isfinite(delays)
        draws = np.random.default_rng(0).choice(found, (BOOTSTRAPS, len(found))).mean(axis=1)
        low, high = interval(draws)
        median = float(np.median(np.where(found, delays, np.inf)))
        return {
            "n": len(delays),
            "already_in_alarm": self.already.get(kind, 0),
            "hit_pct": 100 * float(found.mean()),
            "interval_95_pct": [100 * low, 100 * high],
            "median_delay_h": median if np.isfinite(median) else None,
        }


def block_starts(fleet: RecordedFleet, days: int, every_days: int, least_test_days: int = 3) -> Iterator[int]:
    """Yield the first bins of the rotated reference blocks."""
    yield from range(0, fleet.n_bins - (days + least_test_days) * DAY + 1, every_days * DAY)


def series_trials(
    fleet: RecordedFleet, block: Block, rules: tuple[str, ...], tallies: dict[str, Tally]
) -> None:
    """Put every stable series of one block before every rule."""
    for server, metric in fleet.stable:
        reference = np.asarray(fleet.grid[server, metric, block.first : block.begin], np.float64)
        row = block.row(server, metric)
        if not block.reference.is_compared[row] or np.isfinite(reference).mean() < 0.6:
            continue
        names = (fleet.server_names[server], fleet.metrics[metric])
        lead = np.asarray(block.admitted[server, metric], np.float64)
        for rule, alarms in _asked(block, row, names[1], reference, lead, block.begin - LEAD, rules):
            _count_unchanged(tallies[rule], "|".join(names), alarms[AT_START:])
        for kind in KINDS:
            if is_eligible(kind, reference):
                _inject(fleet, block, (row, *names), kind, reference, lead, rules, tallies)


def _count_unchanged(tally: Tally, series: str, alarms: Bools) -> None:
    tally.alarm_shares[series].append(float(alarms.mean()))
    starts = np.flatnonzero(alarms & ~np.concatenate([[False], alarms[:-1]]))
    tally.episodes += int((np.diff(starts, prepend=-DAY) > DAY // STEP).sum())
    tally.series_days += len(alarms) * STEP / DAY


def _inject(
    fleet: RecordedFleet,
    block: Block,
    series: tuple[int, str, str],
    kind: str,
    reference: NDArray[np.float64],
    lead: NDArray[np.float64],
    rules: tuple[str, ...],
    tallies: dict[str, Tally],
) -> None:
    row, server, metric = series
    generator = seeded(server, metric, block_ms(fleet.start_ms, block.first), kind)
    first, last = LEAD + DAY, len(lead) - room_bins(kind)
    for _ in range(PER_BLOCK if last > first else 0):
        start = int(generator.integers(first, last))
        changed = injected(kind, lead, start, reference, generator)
        part = changed[start - LEAD : start + look_bins(kind)]
        begin = block.begin - LEAD + start - LEAD
        for rule, alarms in _asked(block, row, metric, reference, part, begin, rules):
            tally = tallies[rule]
            if alarms[AT_START]:
                tally.already[kind] += 1
                continue
            after = alarms[AT_START + 1 :]
            delay = (int(after.argmax()) + 1) * HOURS_PER_CHECK if after.any() else np.nan
            tally.delays[kind].append(delay)


def _asked(
    block: Block,
    row: int,
    metric: str,
    reference: NDArray[np.float64],
    values: NDArray[np.float64],
    begin: int,
    rules: tuple[str, ...],
) -> Iterator[tuple[str, Bools]]:
    """Yield each rule's answers over a stretch that starts at bin `begin` with a day of history."""
    start_ms = block.reference.start_ms + (begin - block.first) * BIN_MS
    own = np.asarray(values, np.float32)
    for rule in rules:
        if rule == "ours":
            ratios = series_ratios(block.reference, np.array([row]), own[None], start_ms)
            yield rule, held(ratios).max(axis=0)[0] > 1
        else:
            errors = proxy_errors(block.reference, row, own, start_ms)
            yield rule, OTHERS[rule](Stretch(metric, reference, values, errors))


def change_trials(fleet: RecordedFleet, rules: tuple[str, ...], days: int, tallies: dict[str, Tally]) -> None:
    """Put every real change before every rule, with the days before it as reference.

    The reference is learned on the changed server and five others: strength is shared as in a
    small fleet, at a bearable cost.
    """
    for place, change in enumerate(fleet.changes):
        end = change.bin - DAY
        known = min(days, end // DAY)
        if known < MIN_CHANGE_DAYS or change.bin + DAY > fleet.n_bins:
            continue
        others = [row for row in range(len(fleet.server_names)) if row != change.server]
        chosen = np.random.default_rng(place).permutation(others)[:CHANGE_COMPANY].tolist()
        small = sub_fleet(fleet, [change.server, *chosen])
        own = Change(0, change.metric, change.bin)
        block = fitted_block(small, end - known * DAY, known, 5)
        series = small.grid[0, change.metric]
        reference = np.asarray(series[block.first : block.begin], np.float64)
        if block.reference.is_compared[block.row(0, change.metric)]:
            _ask_change(small, block, own, reference, rules, tallies)


def _ask_change(
    fleet: RecordedFleet,
    block: Block,
    change: Change,
    reference: NDArray[np.float64],
    rules: tuple[str, ...],
    tallies: dict[str, Tally],
) -> None:
    """Count an alarm in the day before the labelled time as early, and as a hit."""
    lead = np.asarray(block.admitted[change.server, change.metric], np.float64)
    row, metric = block.row(change.server, change.metric), fleet.metrics[change.metric]
    for rule, alarms in _asked(block, row, metric, reference, lead, block.begin - LEAD, rules):
        checks = alarms[AT_START:]  # from the reference's end, a day before the change
        day, four = 2 * DAY // STEP, 4 * DAY // STEP
        found = (bool(checks[: day + 1].any()), bool(checks[: four + 1].any()))
        tallies[rule].changes.append((fleet.server_names[change.server], *found))


def change_hits(changes: Sequence[tuple[str, bool, bool]]) -> dict[str, Any]:
    """Return the shares of real changes found; the interval draws servers: changes of one come together."""
    hits = np.array([found[1:] for found in changes], np.float64)
    servers = sorted({found[0] for found in changes})
    rows = [np.flatnonzero([found[0] == server for found in changes]) for server in servers]
    generator = np.random.default_rng(0)
    drawn = (generator.integers(len(rows), size=len(rows)) for _ in range(BOOTSTRAPS))
    draws = [hits[np.concatenate([rows[place] for place in places]), 0].mean() for places in drawn]
    low, high = interval(np.array(draws))
    day, three = 100 * hits.mean(axis=0)
    out = {"n": len(hits), "servers": len(servers), "within_24_h_pct": float(day)}
    return out | {"interval_95_pct": [100 * low, 100 * high], "within_72_h_pct": float(three)}
