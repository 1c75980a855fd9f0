"""Does the loop close on a recorded fleet? Ingest, forecasts, trainings, reloads, errors per model.

    python -m benchmarks.loop.closed_loop --data FLEET.parquet --servers 20 --days 30

Both daemons run as real processes under the data clock, with the default settings but for the
ones printed in CONFIG. The recording is never copied into the repository.

The errors of each model while it served: mean absolute error and the spec's PER, by horizon.

Owns: which settled forecasts belong to which model's time. PER here is the contract's formula with
one fixed floor per metric (20 points for percents, else 20 % of the run's 95th percentile), so
that phases can be compared with each other.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results_file import write_results
from fleetcast.clock import iso_z, monotonic, sleep, to_ms
from fleetcast.demo.claims import Phase, in_phase, keys_of, last_values
from fleetcast.demo.harness import ROOT, Loop, LoopFailed, Reload, Seen, Watcher, ledger_counts, summary
from fleetcast.files import read_json
from fleetcast.schema import Floats, SettledForecasts
from fleetcast.sources.recording import Cut, Recording, load_recording, parse_formula

PERCENT_FLOOR, OTHER_FLOOR_SHARE = 20.0, 0.2


@dataclass(frozen=True)
class HorizonError:
    """One model at one horizon; each figure ours and that of repeating the last value."""

    horizon: int
    n: int
    per: float
    per_last_value: float
    mae_by_metric: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class ModelPhase:
    """The time in which one model answered."""

    version: str
    start: datetime
    end: datetime
    horizons: tuple[HorizonError, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the phase as JSON holds it."""
        return asdict(self) | {"start": iso_z(self.start), "end": iso_z(self.end)}


def phases_of(
    rows: SettledForecasts, reloads: Sequence[Reload], first: datetime, end: datetime
) -> list[ModelPhase]:
    """Return a phase per model, and one for the fallback before the first."""
    starts = [(None, first), *((reload.version, reload.data_time) for reload in reloads)]
    ends = [start for _, start in starts[1:]] + [end]
    floors, last = _floors(rows), last_values(rows)
    return [
        ModelPhase(version or "fallback", start, until, _horizons(rows, last, floors, version, start, until))
        for (version, start), until in zip(starts, ends, strict=True)
    ]


def _floors(rows: SettledForecasts) -> Floats:
    floors = np.full(len(rows), PERCENT_FLOOR)
    for metric in sorted(set(rows.metric.tolist())):
        if not metric.endswith("_pct"):
            chosen = rows.metric == metric
            floors[chosen] = max(OTHER_FLOOR_SHARE * float(np.percentile(rows.actual[chosen], 95)), 1e-6)
    return floors


def _horizons(
    rows: SettledForecasts,
    last: Floats,
    floors: Floats,
    version: str | None,
    start: datetime,
    end: datetime,
) -> tuple[HorizonError, ...]:
    inside = in_phase(rows, Phase("", start, end))
    if version is not None:
        inside &= np.asarray(rows.model_version == version, dtype=bool)
    if version is None:
        inside &= np.array([item is None for item in rows.model_version], dtype=bool)
    inside &= np.isfinite(rows.p50) & np.isfinite(last)
    found = []
    for horizon in sorted(set(rows.horizon[inside].tolist())):
        chosen = inside & (rows.horizon == horizon)
        actual, ours = rows.actual[chosen], np.abs(rows.p50[chosen] - rows.actual[chosen])
        naive = np.abs(last[chosen] - actual)
        divisor = np.maximum(np.abs(actual), floors[chosen])
        metric = rows.metric[chosen]
        found.append(
            HorizonError(
                int(horizon),
                int(chosen.sum()),
                round(float((ours / divisor).mean()), 4),
                round(float((naive / divisor).mean()), 4),
                {
                    name: (
                        round(float(ours[metric == name].mean()), 4),
                        round(float(naive[metric == name].mean()), 4),
                    )
                    for name in sorted(set(metric.tolist()))
                },
            )
        )
    return tuple(found)


def phases_table(phases: Sequence[dict[str, Any]]) -> str:
    """Return the phases as lines: PER by horizon, in brackets that of repeating the last value."""
    lines = [f"{'model':<22} {'from':<21} PER (last value) by bins ahead"]
    for phase in phases:
        cells = [f"{h['horizon']}: {h['per']:.3f} ({h['per_last_value']:.3f})" for h in phase["horizons"]]
        lines.append(f"{phase['version']:<22} {phase['start']:<21} {'   '.join(cells)}")
    return "\n".join(lines)


FOLDER = ROOT / "bench_run" / "closed_loop"
BITBRAINS_MAPS = ("cpu_pct", "mem_pct", "disk_io_mb_s=disk_read_mb_s+disk_write_mb_s")
LAST_CHECKS_S = 5.0
CONFIG = """\
[clock]
mode = "data"
[decision]                    # the figures must not depend on what else the machine does
host_load_per_core = 100.0
host_min_available_gb = 0.5
[retraining]
interval_s = {interval_s}     # wall time between checks
[trainer]
steps_per_epoch = {steps}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the loop over a recording; print and write the figures."""
    options = _parser().parse_args(argv)
    recording = _recording(options)
    loop = Loop(FOLDER, CONFIG.format(interval_s=options.interval_s, steps=options.steps_per_epoch))
    began_s = monotonic()
    try:
        seen, codes = _run(loop, recording, options)
    except LoopFailed as error:
        print(f"closed_loop: {error}", file=sys.stderr)
        return 1
    figures = _figures(recording, seen, codes) | {"wall_s": round(monotonic() - began_s)}
    figures["asked"] = {
        "data": options.data.name,
        "servers": len(recording.server_names),
        "days": options.days,
    }
    print(json.dumps({key: value for key, value in figures.items() if key != "phases"}, indent=2))
    print(phases_table(figures["phases"]))
    print(write_results(f"closed_loop_{options.data.stem}", figures).relative_to(ROOT))
    return 0 if figures["is_exact"] and figures["replay"].get("rejected") == "0" else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the closed loop on a recorded fleet.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--servers", type=int, default=20, help="how many, in the order of their names")
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--map", nargs="+", default=list(BITBRAINS_MAPS))
    parser.add_argument("--interval-s", type=float, default=1.0, help="wall time between drift checks")
    parser.add_argument("--steps-per-epoch", type=int, default=100)
    return parser


def _recording(options: argparse.Namespace) -> Recording:
    """Read what will be sent: the errors need to know its servers and times."""
    formulas = [parse_formula(text) for text in options.map]
    everyone = load_recording(options.data, formulas)
    chosen = frozenset(everyone.server_names[: options.servers])
    return load_recording(options.data, formulas, Cut(servers=chosen, days=options.days)).compact()


def _run(loop: Loop, recording: Recording, options: argparse.Namespace) -> tuple[Seen, dict[str, int]]:
    cut = ["--servers", ",".join(recording.server_names), "--days", str(options.days)]
    with loop:
        watcher = Watcher(loop.url)
        watcher.start()
        replay = loop.replay(options.data, options.map, *cut)
        try:
            while replay.poll() is None:
                loop.check()
                sleep(1.0)
            sleep(LAST_CHECKS_S)
            loop.check()
        finally:
            seen = watcher.end()
        codes = loop.stop()
    return seen, codes


def _figures(recording: Recording, seen: Seen, codes: dict[str, int]) -> dict[str, Any]:
    from data_buffer import DataBuffer

    buffer = DataBuffer(str(FOLDER / "data_buffer"), expire=False)
    end = recording.last + timedelta(days=1)
    rows = buffer.read_predictions(to_ms(recording.first), to_ms(end))
    state, ledger = read_json(FOLDER / "retraining_state.json"), ledger_counts(FOLDER)
    doubled = len(rows) - len(keys_of(rows))
    phases: list[ModelPhase] = phases_of(rows, seen.reloads, recording.first, end)
    return {
        "replay": summary((FOLDER / "replay.out").read_text()),
        "exit_codes": codes,
        "watcher": {"requests": seen.requests, "failed": seen.failed},
        "ledger": ledger,
        "stored_forecasts": len(rows),
        "doubled": doubled,
        "is_exact": not doubled
        and ledger["due"] == ledger["settled"] + ledger["expired"]
        and ledger["settled"] == len(rows),
        "trainings": [
            {key: attempt[key] for key in ("rule", "reason", "started_at", "outcome", "version", "why")}
            for attempt in reversed(state["attempts"])
        ],
        "reloads": [
            {"version": reload.version, "data_time": iso_z(reload.data_time), "wall_s": round(reload.wall_s)}
            for reload in seen.reloads
        ],
        "training_wall_s": round(seen.training_s),
        "phases": [phase.as_dict() for phase in phases],
    }


if __name__ == "__main__":
    raise SystemExit(main())
