"""Would-be trainings: each alarm re-learns the reference, with the specification's safeguards.

Whole fleets under every rule: unchanged, changed everywhere, changed in a tenth of the servers.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift.parts.data import BIN_MS, DAY, RecordedFleet, interval
from benchmarks.drift.parts.ours import (
    AT_START,
    CHECKS_PER_DAY,
    LEAD,
    Block,
    fitted_block,
    fleet_verdict,
    held,
    proxy_errors,
    series_ratios,
    statistic_ratios,
)
from benchmarks.drift.parts.rules import (
    LITERAL_BINS,
    LITERAL_DAYS,
    STEP,
    Sketch,
    Stretch,
    evidently,
    ks_test,
    literal,
    nannyml,
    window_gaps_of,
    window_sums,
)
from benchmarks.drift.parts.trials import HOURS_PER_CHECK
from fleetcast.drift.seasonal.quorum import COMBINED_THRESHOLD, THRESHOLDS, WEIGHTS

Bools = NDArray[np.bool_]
Values = NDArray[np.float64]

FLEET_RULES = ("literal 1,000", "literal 24 h", "ours", "KS p < .05", "Evidently", "NannyML")
DRAWS = 200
CHANGE_DRAWS = 40
SERVER_SHARE = 0.7
SUBSET_SHARE = 0.1
PAIRS = 1000
FLEET_KINDS = ("fleet_level", "subset")


@dataclass
class FleetTally:
    """What one rule did on the sub-fleets of one data set."""

    shares: list[float] = field(default_factory=list)  # per draw
    alarms: list[int] = field(default_factory=list)
    days: list[float] = field(default_factory=list)
    delays: dict[str, list[float]] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Return shares and rates with their intervals over draws, and hits."""
        rates = np.array(self.alarms) / np.maximum(np.array(self.days), 1e-9) * 30
        out: dict[str, Any] = {
            "draws": len(self.shares),
            "checks_in_alarm_pct": 100 * float(np.mean(self.shares)),
            "interval_95_pct": [100 * bound for bound in interval(np.array(self.shares))],
            "false_alarms_per_month": float(sum(self.alarms) / max(sum(self.days), 1e-9) * 30),
            "false_alarms_interval_95": list(interval(rates)),
            "days": float(sum(self.days)),
        }
        for kind, delays in self.delays.items():
            found = np.isfinite(delays)
            middle = float(np.median(np.where(found, delays, np.inf))) if delays else np.inf
            median = middle if np.isfinite(middle) else None
            out[kind] = {"n": len(delays), "hit_pct": 100 * float(np.mean(found)), "median_delay_h": median}
        return out


@dataclass(frozen=True, eq=False)
class Member:
    """One stable series of a block, ready for every fleet rule."""

    server: int
    metric: int
    row: int
    reference: Values
    lead: Values  # from `begin - LEAD`


def members(fleet: RecordedFleet, block: Block) -> list[Member]:
    """Return the stable series a block can judge."""
    found = []
    for server, metric in fleet.stable:
        reference = np.asarray(fleet.grid[server, metric, block.first : block.begin], np.float64)
        row = block.row(server, metric)
        if block.reference.is_compared[row] and np.isfinite(reference).mean() >= 0.6:
            lead = np.asarray(block.admitted[server, metric], np.float64)
            found.append(Member(server, metric, row, reference, lead))
    return found


def fleet_trials(
    fleet: RecordedFleet, blocks: list[Block], rules: tuple[str, ...], tallies: dict[str, FleetTally]
) -> None:
    """Draw sub-fleets and blocks, and put them before every rule."""
    generator = np.random.default_rng(zlib.crc32(fleet.name.encode()))
    judged = [(block, members(fleet, block)) for block in blocks]
    blocks, groups = [block for block, group in judged if group], [group for _, group in judged if group]
    known = [_known_bits(fleet, block, group, rules) for block, group in zip(blocks, groups, strict=True)]
    for draw in range(DRAWS if blocks else 0):
        place = int(generator.integers(len(blocks)))
        block, group = blocks[place], groups[place]
        servers = sorted({member.server for member in group})
        count = max(1, round(SERVER_SHARE * len(servers)))
        chosen = set(generator.permutation(servers)[:count].tolist())
        picked = [index for index, member in enumerate(group) if member.server in chosen]
        own = [group[index] for index in picked]
        for rule in rules:
            alarms = _verdicts(rule, block, own, known[place].get(rule), picked)
            _count(tallies[rule], alarms[AT_START:])
        if draw < CHANGE_DRAWS:
            _change(fleet, block, own, rules, tallies, generator)


def _count(tally: FleetTally, alarms: Bools) -> None:
    starts = np.flatnonzero(alarms & ~np.concatenate([[False], alarms[:-1]]))
    tally.shares.append(float(alarms.mean()))
    tally.alarms.append(int((np.diff(starts, prepend=-DAY) > CHECKS_PER_DAY).sum()))
    tally.days.append(len(alarms) / CHECKS_PER_DAY)


def _known_bits(
    fleet: RecordedFleet, block: Block, group: list[Member], rules: tuple[str, ...]
) -> dict[str, NDArray[Any]]:
    """Return what each rule says of every series of a block, once for all draws."""
    out: dict[str, NDArray[Any]] = {}
    if "ours" in rules:
        out["ours"] = _our_ratios(block, group, [member.lead for member in group], block.begin - LEAD)
    stretches = [_stretch(fleet, block, member, member.lead, block.begin - LEAD) for member in group]
    for rule, function in (("KS p < .05", ks_test), ("Evidently", evidently), ("NannyML", nannyml)):
        if rule in rules:
            out[rule] = np.array([function(stretch) for stretch in stretches])
    for rule in ("literal 1,000", "literal 24 h"):
        out[rule] = np.array(stretches, np.object_)
    return out


def _stretch(fleet: RecordedFleet, block: Block, member: Member, values: Values, begin: int) -> Stretch:
    start_ms = block.reference.start_ms + (begin - block.first) * BIN_MS
    errors = proxy_errors(block.reference, member.row, np.asarray(values, np.float32), start_ms)
    return Stretch(fleet.metrics[member.metric], member.reference, values, errors)


def _our_ratios(block: Block, group: list[Member], values: list[Values], begin: int) -> NDArray[np.float32]:
    rows = np.array([member.row for member in group])
    start_ms = block.reference.start_ms + (begin - block.first) * BIN_MS
    return statistic_ratios(block.reference, rows, np.asarray(values, np.float32), start_ms)


def _verdicts(rule: str, block: Block, own: list[Member], known: Any, picked: list[int]) -> Bools:
    if rule.startswith("literal"):
        return pooled_literal(list(known[picked]), own, DAY if rule == "literal 24 h" else None)
    if rule == "ours":
        return our_verdict(block, own, known[:, picked])
    return peer_verdict(rule, known[picked])


def peer_verdict(rule: str, alarms: Bools) -> Bools:
    """Return what a peer says of a fleet: NannyML any column, the others half of the columns."""
    share = alarms.mean(axis=0)
    return np.asarray(share > 0 if rule == "NannyML" else share >= 0.5)


def our_verdict(block: Block, own: list[Member], ratios: NDArray[np.float32]) -> Bools:
    """Return the quorum's verdict on (statistic, series, check) ratios before they are held."""
    servers = sorted({member.server for member in own})
    metrics = sorted({member.metric for member in own})
    full = np.zeros((ratios.shape[0], len(servers) * len(metrics), ratios.shape[2]), np.float32)
    rows = [servers.index(m.server) * len(metrics) + metrics.index(m.metric) for m in own]
    full[:, rows] = ratios
    is_compared, n_days = np.zeros(full.shape[1], np.bool_), np.ones(full.shape[1], np.int64)
    is_compared[rows], n_days[rows] = True, block.reference.n_days[[member.row for member in own]]
    return fleet_verdict(full, n_days, is_compared, len(metrics), block.reference.fleet.factor)


def pooled_literal(stretches: list[Stretch], own: list[Member], length: int | None) -> Bools:
    """Apply the specification to the pooled newest pairs of a fleet; None = the newest 1,000."""
    n_servers = len({member.server for member in own})
    bins = length or max(1, round(PAIRS / n_servers))
    ends = stretches[0].ends
    window = min(bins, DAY)
    parts = []
    for metric in sorted({member.metric for member in own}):
        mine = [s for s, member in zip(stretches, own, strict=True) if member.metric == metric]
        parts.append(_metric_scores(mine, ends, window))
    mean = {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}
    over = sum(WEIGHTS[name] * mean[name] for name in mean) > COMBINED_THRESHOLD
    for name, score in mean.items():
        over |= score > THRESHOLDS[name]
    return np.asarray(over)


def _metric_scores(stretches: list[Stretch], ends: NDArray[np.int64], window: int) -> dict[str, Values]:
    base = np.concatenate([s.reference[-LITERAL_DAYS * DAY :] for s in stretches])
    base = base[np.isfinite(base)]
    if len(base) < 50:
        return {name: np.zeros(len(ends)) for name in THRESHOLDS}
    p95 = abs(float(np.quantile(base, 0.95)))
    percent = stretches[0].metric.endswith("_pct")
    std = max(float(base.std()), 0.5 if percent else max(0.01 * p95, 1e-9))
    floor = 20.0 if percent else max(0.2 * p95, 1e-9)
    mean, n, far, missed = (np.zeros(len(ends)) for _ in range(4))
    for s in stretches:
        seen = np.isfinite(s.values)
        values = np.where(seen, s.values, 0.0)
        n += window_sums(seen, ends, window)
        mean += window_sums(values, ends, window)
        far += window_sums(seen & (np.abs(values - base.mean()) > 3 * std), ends, window)
        relative = np.nan_to_num(s.errors / np.maximum(np.abs(s.values), floor))
        missed += window_sums(relative, ends, window)
    n = np.maximum(n, 1)
    return {
        "per": missed / n,
        "dss": window_gaps_of(Sketch.of(base), [s.values for s in stretches], ends, window),
        "fds": np.minimum(np.abs(mean / n - base.mean()) / std / 3, 1),
        "anomaly_rate": far / n,
    }


def _change(
    fleet: RecordedFleet,
    block: Block,
    own: list[Member],
    rules: tuple[str, ...],
    tallies: dict[str, FleetTally],
    generator: np.random.Generator,
) -> None:
    """Raise every server, then a tenth of them, by 20 % of each series' range."""
    servers = sorted({member.server for member in own})
    few = set(generator.permutation(servers)[: max(1, round(SUBSET_SHARE * len(servers)))].tolist())
    start = int(generator.integers(LEAD + DAY, block.end - block.begin + LEAD - DAY))
    for kind, changed in (("fleet_level", set(servers)), ("subset", few)):
        parts = []
        for member in own:
            part = member.lead[start - LEAD - DAY // 2 : start + DAY].copy()
            if member.server in changed:
                part[LEAD + DAY // 2 :] += 0.2 * (np.nanmax(member.reference) - np.nanmin(member.reference))
            parts.append(part)
        begin = block.begin - LEAD + start - LEAD - DAY // 2
        for rule in rules:
            alarms = _changed_verdicts(rule, fleet, block, own, parts, begin)
            before = DAY // 2 // STEP + AT_START  # the check at the start of the change
            after = alarms[before + 1 :]
            if not alarms[before]:
                delay = (int(after.argmax()) + 1) * HOURS_PER_CHECK if after.any() else np.nan
                tallies[rule].delays.setdefault(kind, []).append(delay)


def _changed_verdicts(
    rule: str, fleet: RecordedFleet, block: Block, own: list[Member], parts: list[Values], begin: int
) -> Bools:
    if rule == "ours":
        return our_verdict(block, own, _our_ratios(block, own, parts, begin))
    stretches = [_stretch(fleet, block, m, part, begin) for m, part in zip(own, parts, strict=True)]
    if rule.startswith("literal"):
        return pooled_literal(stretches, own, DAY if rule == "literal 24 h" else None)
    function = {"KS p < .05": ks_test, "Evidently": evidently, "NannyML": nannyml}[rule]
    return peer_verdict(rule, np.array([function(stretch) for stretch in stretches]))


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
        return our_verdict(block, group, statistic_ratios(block.reference, rows, values, start_ms))
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
