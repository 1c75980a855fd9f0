"""How good is the drift detector? False alarms and detection on recorded fleets, beside other rules.

    python -m benchmarks.drift.drift_quality --data F --stable CSV --regimes CSV [--data F2 ...]

Paths are free: it runs on any servers in the long form of the protocol. Every definition is in
docs/decisions/drift-quality-protocol.md. Prints a table per data set and writes a dated JSON with
every figure. Recorded fleets carry no forecasts: errors come from a one-step autoregression.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.drift.parts.data import DAY, RecordedFleet, load_fleet
from benchmarks.drift.parts.fleets import (
    FLEET_KINDS,
    FLEET_RULES,
    LOOP_RULES,
    FleetTally,
    fleet_loop,
    fleet_trials,
    series_loops,
)
from benchmarks.drift.parts.injections import KINDS
from benchmarks.drift.parts.ours import fitted_block
from benchmarks.drift.parts.rules import RULES
from benchmarks.drift.parts.trials import Tally, block_starts, change_hits, change_trials, series_trials
from benchmarks.results_file import write_results
from fleetcast.errors import BadData

TEST_DAYS = 28
PARTS = ("series", "changes", "fleets", "loops")
NOTE = "errors: one-step autoregression of each reference, no model in service"


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, metavar="PARQUET")
    parser.add_argument("--stable", type=Path, action="append", required=True, metavar="CSV")
    parser.add_argument("--regimes", type=Path, action="append", metavar="CSV")
    parser.add_argument("--half", choices=("develop", "report", "all"), default="all")
    parser.add_argument("--days", type=int, default=21, help="days of a reference")
    parser.add_argument("--test-days", type=int, default=TEST_DAYS, help="days judged after it")
    parser.add_argument("--every-days", type=int, default=7, help="distance of reference blocks")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES, metavar="RULE", help=str(RULES))
    parser.add_argument("--parts", default=",".join(PARTS), help="comma separated")
    options = parser.parse_args(argv)
    options.parts = tuple(options.parts.split(","))
    if len(options.stable) != len(options.data) or len(options.regimes or options.data) != len(options.data):
        parser.error("give one --stable (and one --regimes) for each --data")
    if not set(options.parts) <= set(PARTS):
        parser.error(f"--parts are {', '.join(PARTS)}")
    return options


def measure(fleet: RecordedFleet, options: argparse.Namespace) -> dict[str, Any]:
    """Return every figure of one data set."""
    rules, parts = tuple(options.rules), options.parts
    starts = list(block_starts(fleet, options.days, options.every_days))
    if not starts:
        raise BadData(
            f"{fleet.name}: {fleet.n_bins / DAY:.1f} days are too few for --days {options.days} and 3 more"
        )
    out: dict[str, Any] = {"servers": len(fleet.server_names), "stable_series": len(fleet.stable)}
    tallies = {rule: Tally() for rule in rules}
    blocks = [fitted_block(fleet, first, options.days, options.test_days) for first in starts]
    out["blocks"] = len(blocks)
    out["calibration"] = [_calibration(block.reference.fleet) for block in blocks]
    if "series" in parts:
        for block in blocks:
            series_trials(fleet, block, rules, tallies)
        if not any(tally.series_days for tally in tallies.values()):
            raise BadData(f"{fleet.name}: no stable series has values enough in any reference to be judged")
        out["series"] = {rule: _series_figures(tally) for rule, tally in tallies.items()}
    if "changes" in parts and fleet.changes:
        change_trials(fleet, rules, options.days, tallies)
        out["changes"] = {rule: change_hits(item.changes) for rule, item in tallies.items() if item.changes}
        found = {rule: tally.changes for rule, tally in tallies.items()}
        out["found_changes"] = {rule: found[rule] for rule in out["changes"]}
    if "fleets" in parts:
        own = tuple(rule for rule in FLEET_RULES if rule in rules)
        fleet_tallies = {rule: FleetTally() for rule in own}
        fleet_trials(fleet, blocks, own, fleet_tallies)
        out["fleets"] = {rule: tally.figures() for rule, tally in fleet_tallies.items() if tally.days}
    if "loops" in parts:
        looped = tuple(rule for rule in LOOP_RULES if rule in rules)
        per_series = series_loops(fleet, looped, options.days)
        out["trainings_per_week"] = {
            rule: {"series": per_series[rule], "fleet": fleet_loop(fleet, rule, options.days)}
            for rule in looped
        }
    return out


def _calibration(found: Any) -> dict[str, float]:
    return {
        "target_per_month": found.false_alarms_per_month,
        "shown_per_month": found.shown_per_month,
        "factor": found.factor,
        "series_alarm_share_pct": 100 * found.series_alarm_share,
    }


def _series_figures(tally: Tally) -> dict[str, Any]:
    return {"unchanged": tally.share(), "injected": {kind: tally.hits(kind) for kind in KINDS}}


def pooled(sets: dict[str, Any], rules: Sequence[str]) -> dict[str, Any]:
    """Return each rule's fleet false alarms per month over all sets, weighted by time, and real changes."""
    out: dict[str, Any] = {}
    for rule in rules:
        own = [item["fleets"][rule] for item in sets.values() if rule in item.get("fleets", {})]
        days = sum(item["days"] for item in own)
        if days:
            alarms = sum(item["false_alarms_per_month"] * item["days"] for item in own)
            out[rule] = {"fleet_false_alarms_per_month": alarms / days}
        changes = [found for item in sets.values() for found in item.get("found_changes", {}).get(rule, ())]
        if changes:
            out[rule] = out.get(rule, {}) | {"changes": change_hits(changes)}
    return out


def table(name: str, found: dict[str, Any]) -> str:
    """Return one data set's figures for people."""
    lines = [f"\n{name}: {found['servers']} servers, {found['stable_series']} stable series"]
    if "series" in found:
        lines.append(f"{'series: % in alarm [95 %]; hit % / delay h':<16}")
        for rule, item in found["series"].items():
            flat = item["unchanged"]
            low, high = flat["interval_95_pct"]
            hits = "  ".join(f"{kind} {_hit(item['injected'][kind])}" for kind in KINDS)
            lines.append(f"  {rule:<14} {flat['checks_in_alarm_pct']:5.1f} [{low:.1f}-{high:.1f}]  {hits}")
    for rule, item in found.get("changes", {}).items():
        day, three = item["within_24_h_pct"], item["within_72_h_pct"]
        lines.append(f"  {rule:<14} real changes {day:.0f} % in 24 h, {three:.0f} % in 72 h (n {item['n']})")
    for rule, item in found.get("fleets", {}).items():
        rate, share = item["false_alarms_per_month"], item["checks_in_alarm_pct"]
        hits = "  ".join(f"{kind} {_hit(item[kind])}" for kind in FLEET_KINDS if kind in item)
        lines.append(f"  {rule:<14} fleet: {share:.1f} % in alarm, {rate:.2f} a month  {hits}")
    for rule, item in found.get("trainings_per_week", {}).items():
        per_series, per_fleet = item["series"], item["fleet"]
        lines.append(f"  {rule:<14} trainings a week: {per_series:.2f} per series, {per_fleet:.2f} per fleet")
    return "\n".join(lines)


def _overall(item: dict[str, Any]) -> str:
    parts = []
    if "fleet_false_alarms_per_month" in item:
        parts.append(f"{item['fleet_false_alarms_per_month']:.2f} fleet false alarms a month")
    if "changes" in item:
        found = item["changes"]
        low, high = found["interval_95_pct"]
        parts.append(
            f"real changes {found['within_24_h_pct']:.0f} % [{low:.0f}-{high:.0f}] in 24 h (n {found['n']})"
        )
    return "; ".join(parts)


def _hit(item: dict[str, Any]) -> str:
    if not item.get("n"):
        return "n/a"
    delay = item["median_delay_h"]
    return f"{item['hit_pct']:.0f}/{'-' if delay is None else f'{delay:.1f}'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 2 where the files do not fit each other."""
    options = parsed(argv)
    try:
        return measured(options)
    except (BadData, OSError) as error:
        print(f"drift_quality: {error}", file=sys.stderr)
        return 2


def measured(options: argparse.Namespace) -> int:
    """Measure every data set, print, write."""
    sets: dict[str, Any] = {}
    began = time.process_time()
    for place, data in enumerate(options.data):
        regimes = options.regimes[place] if options.regimes else None
        fleet = load_fleet(data, options.stable[place], regimes, options.half)
        sets[fleet.name] = measure(fleet, options)
        print(table(fleet.name, sets[fleet.name]), flush=True)
    overall = pooled(sets, options.rules)
    for rule, item in overall.items():
        print(f"all sets: {rule:<14} {_overall(item)}")
    print(NOTE)
    figures = {"half": options.half, "days": options.days, "note": NOTE, "sets": sets, "pooled": overall}
    figures["cpu_s"] = round(time.process_time() - began, 1)
    path = write_results(f"drift_quality_{options.half}_{options.days}d_{'_'.join(sets)}"[:80], figures)
    print(f"figures in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
