"""Does the loop close on a recorded fleet? Ingest, forecasts, trainings, reloads, errors per model.

    python -m benchmarks.closed_loop --data FLEET.parquet --servers 20 --days 30

Both daemons run as real processes under the data clock, with the default settings but for the
ones printed in CONFIG. The recording is never copied into the repository.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.loop_harness import ROOT, Loop, LoopFailed, Seen, Watcher, ledger_counts, summary
from benchmarks.model_phases import ModelPhase, phases_of, phases_table
from benchmarks.results_file import write_results
from benchmarks.settled_errors import keys_of
from fleetcast.clock import iso_z, monotonic, sleep, to_ms
from fleetcast.files import read_json
from fleetcast.sources.recording import Cut, Recording, load_recording, parse_formula

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
    return load_recording(options.data, formulas, Cut(servers=chosen, days=options.days)).compacted()


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
