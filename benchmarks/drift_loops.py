"""Would-be trainings: each alarm re-learns the reference, with the specification's safeguards."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift_data import BIN_MS, DAY, RecordedFleet
from benchmarks.drift_fleets import Member, members, our_verdict, pooled_literal
from benchmarks.drift_ours import AT_START, LEAD, Block, fitted_block, held, proxy_errors, series_ratios
from benchmarks.drift_rules import LITERAL_BINS, STEP, Stretch, literal

Bools = NDArray[np.bool_]

REST_BINS = DAY // 4  # 6 hours between trainings
WEEK_BINS, WEEK_TRAININGS = 7 * DAY, 3
MONTH_BINS = 30 * DAY  # a training is due anyway
LOOP_RULES = ("literal 1,000", "literal 24 h", "ours")

NextAlarm = Callable[[int, int], int | None]  # (reference end, earliest bin) -> bin of the first alarm


def trainings(first_alarm: NextAlarm, begin: int, end: int) -> int:
    """Count the trainings alarms start between two bins, under the safeguards."""
    done: list[int] = []
    learned, earliest = begin, begin
    while earliest < end:
        alarm = first_alarm(learned, earliest)
        if alarm is None or alarm >= end:
            break
        recent = [at for at in done if alarm - at < WEEK_BINS]
        if len(recent) >= WEEK_TRAININGS:
            earliest = recent[0] + WEEK_BINS
            continue
        done.append(alarm)
        learned, earliest = alarm, alarm + REST_BINS
    return len(done)


def fleet_loop(fleet: RecordedFleet, rule: str, days: int) -> float:
    """Return trainings per week of the fleet of stable series."""
    begin, end = days * DAY, fleet.n_bins
    blocks: dict[int, tuple[Block, list[Member]]] = {}

    def first_alarm(learned: int, earliest: int) -> int | None:
        if learned not in blocks:
            blocks.clear()
            block = fitted_block(fleet, learned - days * DAY, days, MONTH_BINS // DAY)
            blocks[learned] = (block, members(fleet, block))
        block, group = blocks[learned]
        alarms = _fleet_alarms(rule, fleet, block, group)
        return _first(alarms, block.begin, earliest)

    return trainings(first_alarm, begin, end) / ((end - begin) / WEEK_BINS)


def _first(alarms: Bools, begin: int, earliest: int) -> int | None:
    ends = begin + (np.arange(len(alarms)) - AT_START) * STEP  # that check ends where the test begins
    found = np.flatnonzero(alarms & (ends >= earliest))
    return int(ends[found[0]]) if len(found) else None


def _fleet_alarms(rule: str, fleet: RecordedFleet, block: Block, group: list[Member]) -> Bools:
    if not group:
        return np.zeros(1, np.bool_)
    start_ms = block.reference.start_ms + (block.begin - LEAD - block.first) * BIN_MS
    if rule == "ours":
        rows = np.array([member.row for member in group])
        values = np.asarray([member.lead for member in group], np.float32)
        return our_verdict(block, group, held(series_ratios(block.reference, rows, values, start_ms)))
    stretches = [
        Stretch(fleet.metrics[m.metric], m.reference, m.lead, _errors(block, m, start_ms)) for m in group
    ]
    return pooled_literal(stretches, group, DAY if rule == "literal 24 h" else None)


def _errors(block: Block, member: Member, start_ms: int) -> NDArray[np.float64]:
    return proxy_errors(block.reference, member.row, np.asarray(member.lead, np.float32), start_ms)


def series_loops(fleet: RecordedFleet, rules: tuple[str, ...], days: int) -> dict[str, float]:
    """Return trainings per week and stable series, each series a fleet of its own."""
    totals = dict.fromkeys(rules, 0.0)
    for server, metric in fleet.stable:
        alone = only_series(fleet, server, metric)
        for rule in rules:
            totals[rule] += _series_loop(alone, 0, rule, days)
    return {rule: total / max(len(fleet.stable), 1) for rule, total in totals.items()}


def only_series(fleet: RecordedFleet, server: int, metric: int) -> RecordedFleet:
    """Return a fleet of one series: its limits lean on what recorded fleets showed."""
    grid = fleet.grid[server : server + 1, metric : metric + 1]
    names = ((fleet.server_names[server],), (fleet.metrics[metric],))
    return RecordedFleet(fleet.name, *names, grid, fleet.start_ms, ((0, 0),), ())


def _series_loop(alone: RecordedFleet, metric: int, rule: str, days: int) -> float:
    begin, end = days * DAY, alone.n_bins
    known: dict[int, tuple[Block, np.typing.NDArray[np.bool_]]] = {}

    def first_alarm(learned: int, earliest: int) -> int | None:
        if learned not in known:
            known.clear()
            block = fitted_block(alone, learned - days * DAY, days, MONTH_BINS // DAY)
            known[learned] = (block, _series_alarms(alone, block, metric, rule))
        block, alarms = known[learned]
        return _first(alarms, block.begin, earliest)

    return trainings(first_alarm, begin, end) / ((end - begin) / WEEK_BINS)


def _series_alarms(alone: RecordedFleet, block: Block, metric: int, rule: str) -> Bools:
    values = block.admitted[0, metric]
    start_ms = block.reference.start_ms + (block.begin - LEAD - block.first) * BIN_MS
    if not block.reference.is_compared[metric]:
        return np.zeros(1, np.bool_)
    if rule == "ours":
        ratios = series_ratios(block.reference, np.array([metric]), values[None], start_ms)
        return np.asarray(held(ratios).max(axis=0)[0] > 1)
    reference = np.asarray(alone.grid[0, metric, block.first : block.begin], np.float64)
    errors = proxy_errors(block.reference, metric, values, start_ms)
    stretch = Stretch(alone.metrics[metric], reference, np.asarray(values, np.float64), errors)
    return literal(stretch, DAY if rule == "literal 24 h" else LITERAL_BINS)
