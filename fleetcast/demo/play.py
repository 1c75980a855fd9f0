"""The whole loop runs on bundled real data, and no person helps it.

    python -m fleetcast.demo            (`make demo`)

Two daemons and a replay run as real processes in demo_run/. The daemons decide everything;
this program only feeds them, watches them, and checks each claim against what they left behind.
It exits 0 only if every claim is true.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fleetcast.clock import monotonic, sleep
from fleetcast.demo import splice
from fleetcast.demo.claims import Claim, Outcome, claims, table
from fleetcast.demo.harness import Loop, LoopFailed, Seen, Watcher
from fleetcast.demo.sabotage import Sabotage, put_in_bad_model
from fleetcast.files import read_json

FOLDER = Path("demo_run")
LIMIT_S = 900.0
RUNNING = "running"  # the outcome of an attempt that goes on
TELL_EVERY = timedelta(hours=12)
LAST_CHECKS_S = 4.0
CONFIG = """\
# Made by the demo. What differs from the defaults, and why.
[clock]
mode = "data"                 # "now" is the newest record: seven days pass in minutes

[paths]
models_dir = "no_models"      # the shipped base was trained on these machines: it would know the answers

[bins]
forecast_metrics = ["cpu_pct", "mem_pct", "disk_write_pct"]

[decision]
initial_min_span_s = 259200.0 # three whole days to compare with
quiet_ahead = "off"           # an hour and more pass between two checks here: too much to wait for one
host_load_per_core = 100.0    # the demo must not depend on what else this machine does
host_min_available_gb = 0.5

[retraining]
interval_s = 1.0              # wall time; a second is more than an hour of data here

[trainer]                     # a small network, seconds of training
hidden_size = 16
base_epochs = 5
steps_per_epoch = 60
batch_size = 64
"""


@dataclass
class Teller:
    """Prints each event when it happens."""

    folder: Path
    began_s: float
    told: datetime | None = None
    n_attempts: int = 0
    n_reloads: int = 0
    contexts: dict[str, Any] = field(default_factory=dict)  # why each training was started, by its id

    def say(self, text: str) -> None:
        """Print one line with the time since the start."""
        print(f"[{monotonic() - self.began_s:5.0f} s] {text}", flush=True)

    def look(self, seen: Seen, attempts: list[dict[str, Any]]) -> None:
        """Tell what is new."""
        for attempt in attempts[self.n_attempts :]:
            self.say(f"the retraining daemon starts a training ({attempt['reason']})")
            self.contexts[attempt["id"]] = read_json(self.folder / "training_context.json")
        self.n_attempts = len(attempts)
        for reload in seen.reloads[self.n_reloads :]:
            self.say(f"the inference daemon serves model {reload.version}")
        self.n_reloads = len(seen.reloads)
        if seen.newest and (self.told is None or seen.newest - self.told >= TELL_EVERY):
            self.told = seen.newest
            self.say(f"the data have reached {seen.newest:%Y-%m-%d %H:%M} {phase_name(seen.newest)}")


def phase_name(moment: datetime) -> str:
    """Return what the fleet sends at a data time."""
    return "(three servers have changed)" if moment >= splice.CHANGE else "(no server has changed)"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the demo; return the exit code."""
    about = (__doc__ or "").splitlines()[0]
    argparse.ArgumentParser(prog=prog or "python -m fleetcast.demo", description=about).parse_args(argv)
    began_s = monotonic()
    teller = Teller(FOLDER, began_s)
    loop = Loop(FOLDER.resolve(), CONFIG)
    splice.write_feed(FOLDER.resolve() / "feed.parquet")
    changed = ", ".join(splice.SPLICED)
    print(
        f"Eight real machines send one row a minute "
        f"from {splice.START:%Y-%m-%d} to {splice.FINISH:%Y-%m-%d %H:%M}."
    )
    print(
        f"From {splice.CHANGE:%Y-%m-%d %H:%M} on, {changed} send what another machine, {splice.DONOR}, sent."
    )
    print(f"At {splice.PUT_IN:%Y-%m-%d %H:%M} a bad model is put into service by hand.\n")
    try:
        outcome = run(loop, teller)
    except LoopFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    found = claims(outcome)
    print("\n" + table(outcome))
    for claim in found:
        print(f"{'yes' if claim.is_true else 'NO '}  {claim.text}: {claim.evidence}")
    print(f"\nThe demo took {monotonic() - began_s:.0f} s. Logs and state are in {FOLDER}/.")
    return 0 if all_true(found) else 1


def all_true(found: list[Claim]) -> bool:
    """Return whether everything that should have happened did."""
    return all(claim.is_true for claim in found)


def run(loop: Loop, teller: Teller) -> Outcome:
    """Let the loop run over the whole feed; return what it left behind."""
    feed = FOLDER.resolve() / "feed.parquet"
    with loop:
        teller.say("both daemons are running")
        watcher = Watcher(loop.url)
        watcher.start()
        try:
            follow(loop, loop.replay(feed, splice.MAPS), watcher, teller)
            wait_for_trainings(loop)
            follow(loop, loop.replay(splice.part(feed, 1), splice.MAPS, name="replay_1"), watcher, teller)
            sabotage = put_in(loop, watcher, teller)
            follow(loop, loop.replay(splice.part(feed, 2), splice.MAPS, name="replay_2"), watcher, teller)
            sabotage.wait(FOLDER)
            follow(loop, loop.replay(splice.part(feed, 3), splice.MAPS, name="replay_3"), watcher, teller)
        finally:
            seen = watcher.end()
        codes = loop.stop()
    outcome = Outcome.read(FOLDER, seen, codes, teller.contexts)
    return replace(outcome, sabotage=sabotage, taken_back=sabotage.outcome(FOLDER))


def wait_for_trainings(loop: Loop) -> None:
    """Wait until none runs; what it promoted comes into service with the next records."""
    end_s = monotonic() + LIMIT_S
    while any(attempt["outcome"] == RUNNING for attempt in loop.attempts()):
        if monotonic() > end_s:
            raise LoopFailed(f"a training does not end; see {FOLDER}")
        loop.check()
        sleep(0.5)


def put_in(loop: Loop, watcher: Watcher, teller: Teller) -> Sabotage:
    """Put the bad model in, once no training runs."""
    wait_for_trainings(loop)
    teller.look(watcher.seen, loop.attempts())
    sabotage = put_in_bad_model(FOLDER.resolve())
    teller.say(f"a person puts a bad model into service: {sabotage.bad}")
    return sabotage


def follow(loop: Loop, replay: subprocess.Popen[bytes], watcher: Watcher, teller: Teller) -> None:
    """Tell what happens until everything is sent and the last checks are made."""
    end_s = monotonic() + LIMIT_S
    while replay.poll() is None:
        if monotonic() > end_s:
            raise LoopFailed(f"not finished after {LIMIT_S:.0f} s; see {FOLDER}")
        loop.check()
        sleep(0.5)
        teller.look(watcher.seen, loop.attempts())
    loop.check()
    sleep(LAST_CHECKS_S)
    teller.look(watcher.seen, loop.attempts())


if __name__ == "__main__":
    raise SystemExit(main())
