"""Fleets of any size, made of recorded series: is a tenth that changed seen, and who is named to a training?

    python -m benchmarks.drift.made_fleets --data F --stable CSV --half develop|report [--servers 40]

The recorded sets are small fleets. Here a fleet is `--servers` servers of one stable series each, drawn
with replacement from all references of one half and moved by whole days against each other: so there is
no common cause but the one put in. Prints, for each data set:

- false alarms of fleets in which nothing changed;
- how often, and after how many hours, the fleet's verdict finds a share of changed servers;
- at that moment the shares of changed and of unchanged series that are named to a training, by how near
  to its limit a series has to be, if a statistic that carries an alarm carries it, too.

Kinds of changes and halves are those of docs/decisions/drift-quality-protocol.md. Forecast errors are not
known here. Every draw is seeded.
"""

import argparse
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift.parts.data import BIN_MS, DAY, RecordedFleet, load_fleet
from benchmarks.drift.parts.fleets import members
from benchmarks.drift.parts.injections import injected, is_eligible, seeded
from benchmarks.drift.parts.ours import (
    CHECKS_PER_DAY,
    LEAD,
    Block,
    fitted_block,
    fleet_verdict,
    held,
    statistic_ratios,
)
from benchmarks.drift.parts.trials import HOURS_PER_CHECK, block_starts
from benchmarks.results_file import write_results
from fleetcast.drift.seasonal.quorum import by_family
from fleetcast.errors import BadData
from fleetcast.schema import Floats32

KINDS = ("level", "std2", "phase")
SHARES = (0.1, 0.3)
MARGINS = (1.0, 0.9, 0.8, 0.7, 0.6)
PLACES = 3  # of a change, per series and block
BEFORE = DAY // 2  # bins a stretch shows before its change
DRAWS, QUIET_DRAWS = 100, 40
TEST_DAYS = 28

Bools = NDArray[np.bool_]


@dataclass
class Pool:
    """What made fleets are drawn from; ratios are (statistic, check) before they are held."""

    quiet: list[Floats32] = field(default_factory=list)  # weeks of unchanged series
    factors: list[float] = field(default_factory=list)  # of the references of `quiet`
    n_days: int = 21  # of a reference
    stretches: list[dict[str, Floats32]] = field(default_factory=list)  # "none" and kinds, at one place


def gather(fleet: RecordedFleet, days: int, every_days: int) -> Pool:
    """Judge every stable series of every block, unchanged and with each kind of change."""
    pool = Pool(n_days=days)
    for first in block_starts(fleet, days, every_days):
        block = fitted_block(fleet, first, days, TEST_DAYS)
        for member in members(fleet, block):
            pool.quiet.append(_ratios(block, member.row, member.lead, 0))
            pool.factors.append(block.reference.fleet.factor)
            name = f"{fleet.server_names[member.server]}|{fleet.metrics[member.metric]}"
            pool.stretches += _stretches(block, member.row, member.lead, member.reference, name)
    if not pool.stretches:
        raise BadData(f"{fleet.name}: no stable series with days enough")
    return pool


def _ratios(block: Block, row: int, values: NDArray[np.float64], place: int) -> Floats32:
    start_ms = block.reference.start_ms + (block.begin - LEAD + place - block.first) * BIN_MS
    own = np.asarray(values, np.float32)[None]
    return statistic_ratios(block.reference, np.array([row]), own, start_ms)[:, 0]


def _stretches(
    block: Block, row: int, lead: NDArray[np.float64], reference: NDArray[np.float64], name: str
) -> list[dict[str, Floats32]]:
    found = []
    lowest, highest = LEAD + DAY, len(lead) - DAY
    generator = seeded(name, "", block.first, "made")
    for _ in range(PLACES if highest > lowest else 0):
        start = int(generator.integers(lowest, highest))
        place, end = start - LEAD - BEFORE, start + DAY
        stretch = {"none": _ratios(block, row, lead[place:end], place)}
        for kind in KINDS:
            if is_eligible(kind, reference):
                changed = injected(kind, lead, start, reference, generator)
                stretch[kind] = _ratios(block, row, changed[place:end], place)
        found.append(stretch)
    return found


def verdict(ratios: Floats32, factor: float, n_days: int) -> Bools:
    """Return (check,): whether a fleet of servers of one series, (statistic, series, check), drifts."""
    n_series = ratios.shape[1]
    return fleet_verdict(ratios, np.full(n_series, n_days), np.ones(n_series, np.bool_), 1, factor)


def quiet_figures(pool: Pool, n_servers: int, generator: np.random.Generator) -> dict[str, float]:
    """Return how often fleets in which nothing changed are in alarm."""
    shares, episodes, days = [], 0, 0.0
    for _ in range(QUIET_DRAWS):
        picked = generator.integers(len(pool.quiet), size=n_servers)
        length = min(pool.quiet[index].shape[1] for index in picked)
        moved = [CHECKS_PER_DAY * int(days) for days in generator.integers(0, TEST_DAYS, size=n_servers)]
        series = [
            np.roll(pool.quiet[index], by, axis=1)[:, :length]
            for index, by in zip(picked, moved, strict=True)
        ]
        alarms = verdict(np.stack(series, axis=1), pool.factors[picked[0]], pool.n_days)
        starts = np.flatnonzero(alarms & ~np.concatenate([[False], alarms[:-1]]))
        episodes += int((np.diff(starts, prepend=-DAY) > CHECKS_PER_DAY).sum())
        days += length / CHECKS_PER_DAY
        shares.append(float(alarms.mean()))
    return {
        "false_alarms_per_month": episodes / days * 30,
        "checks_in_alarm_pct": 100 * float(np.mean(shares)),
    }


def change_figures(
    pool: Pool, kind: str, share: float, n_servers: int, generator: np.random.Generator
) -> dict[str, Any]:
    """Return hits, delays, and at the time of a verdict who is named by each margin."""
    able = [stretch for stretch in pool.stretches if kind in stretch]
    n_changed = max(1, round(share * n_servers))
    if not able:
        return {"n": 0}
    delays: list[float] = []
    named: list[list[tuple[float, float]]] = []
    for _ in range(DRAWS):
        series = [able[index][kind] for index in generator.integers(len(able), size=n_changed)]
        others = generator.integers(len(pool.stretches), size=n_servers - n_changed)
        ratios = np.stack(series + [pool.stretches[index]["none"] for index in others], axis=1)
        alarms = verdict(ratios, pool.factors[int(generator.integers(len(pool.factors)))], pool.n_days)
        start = len(alarms) - CHECKS_PER_DAY  # the first check after the change
        if alarms[start - 1]:
            continue
        found = np.flatnonzero(alarms[start:])
        delays.append((int(found[0]) + 1) * HOURS_PER_CHECK if len(found) else np.inf)
        if len(found):
            named.append(_named(ratios, start + int(found[0]), n_changed))
    figures: dict[str, Any] = {"n": len(delays), "hit_pct": 100 * float(np.isfinite(delays).mean())}
    figures["median_delay_h"] = float(np.median(delays)) if np.isfinite(np.median(delays)) else None
    if named:
        means = 100 * np.mean(named, axis=0)
        figures["named_pct"] = {
            str(margin): {"changed": float(means[row, 0]), "unchanged": float(means[row, 1])}
            for row, margin in enumerate(MARGINS)
        }
    return figures


def _named(ratios: Floats32, check: int, n_changed: int) -> list[tuple[float, float]]:
    worst = held(by_family(ratios))[:, :, check].max(axis=0)
    carrier = ratios[:, :, check].argmax(axis=0)
    is_common = np.isin(carrier, carrier[worst > 1])
    found = []
    for margin in MARGINS:
        is_named = (worst > 1) | ((worst >= margin) & is_common)
        found.append((float(is_named[:n_changed].mean()), float(is_named[n_changed:].mean())))
    return found


def table(name: str, found: dict[str, Any]) -> str:
    """Return one data set's figures for people."""
    quiet = found["unchanged"]
    rate, share = quiet["false_alarms_per_month"], quiet["checks_in_alarm_pct"]
    lines = [f"\n{name}: unchanged {rate:.2f} false alarms a month, {share:.2f} % of checks"]
    for key, item in found["changes"].items():
        if not item["n"]:
            lines.append(f"  {key:<10} n/a")
            continue
        delay = item["median_delay_h"]
        hit = (
            f"hit {item['hit_pct']:.0f} % of {item['n']}, median {'-' if delay is None else f'{delay:.1f}'} h"
        )
        pairs = [f"{m} {v['changed']:.0f}/{v['unchanged']:.1f}" for m, v in item.get("named_pct", {}).items()]
        lines.append(f"  {key:<10} {hit}; named of the changed/unchanged, %, from {', '.join(pairs) or '-'}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 2 where the files do not fit each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, metavar="PARQUET")
    parser.add_argument("--stable", type=Path, action="append", required=True, metavar="CSV")
    parser.add_argument("--half", choices=("develop", "report", "all"), default="all")
    parser.add_argument("--days", type=int, default=21, help="days of a reference")
    parser.add_argument("--every-days", type=int, default=14, help="distance of reference blocks")
    parser.add_argument("--servers", type=int, default=40, help="of a made fleet")
    options = parser.parse_args(argv)
    if len(options.stable) != len(options.data):
        parser.error("give one --stable for each --data")
    try:
        return measured(options)
    except (BadData, OSError) as error:
        print(f"made_fleets: {error}", file=sys.stderr)
        return 2


def measured(options: argparse.Namespace) -> int:
    """Measure every data set, print, write."""
    sets: dict[str, Any] = {}
    began = time.process_time()
    for data, stable in zip(options.data, options.stable, strict=True):
        fleet = load_fleet(data, stable, None, options.half)
        pool = gather(fleet, options.days, options.every_days)
        generator = np.random.default_rng(zlib.crc32(fleet.name.encode()))
        sets[fleet.name] = {
            "unchanged": quiet_figures(pool, options.servers, generator),
            "changes": {
                f"{kind} {share:g}": change_figures(pool, kind, share, options.servers, generator)
                for kind in KINDS
                for share in SHARES
            },
        }
        print(table(fleet.name, sets[fleet.name]), flush=True)
    figures = {"half": options.half, "days": options.days, "servers": options.servers, "sets": sets}
    figures["cpu_s"] = round(time.process_time() - began, 1)
    print(f"figures in {write_results(f'made_fleets_{options.half}_{options.servers}', figures)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
