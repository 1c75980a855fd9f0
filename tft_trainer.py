"""Train a model and let the gate decide whether it goes into service.

    python tft_trainer.py --data training_data.parquet                    a base, from scratch
    python tft_trainer.py --data FILE --incremental --epochs 5            continue the model in service
    python tft_trainer.py --rollback                                      back to the version before

Owns: flags, the lock, the order of writing: audit → version → last.ckpt → baseline.npz → old versions
deleted → attempt. Each step is one rename, so a kill leaves the old state or the new one. A training
from scratch notes each epoch: started again with the same data and settings, a killed one resumes.
With `retraining.engine = "ray"` another machine makes the weights of an incremental training
(`training/elsewhere`); this process holds the lock meanwhile, judges and writes.
Does not know: when to train, how a version is put into service (`promotion/desk`). While a person holds
new models back, a version that passed the gate waits.

Without a model of this fleet, --incremental trains the fleet's first for `trainer.base_epochs`; it
continues the shipped base, or fresh weights where there is none. Exit codes: 0 reached a verdict,
promoted or not; 1 failed; 2 bad settings or usage; 4 another trainer is at work; 5 not enough data.
The verdict is in checkpoints/attempts/<id>.json and in the manifest.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetcast import files
from fleetcast.clock import SystemClock, iso_z, monotonic
from fleetcast.errors import ClusterAway, ExitCode, FleetcastError, OrderRefused, SettingsError
from fleetcast.exclusions import AllBut, Exclusions
from fleetcast.forecast.registry import (
    ATTEMPTS_FOLDER,
    BASELINE_FILE,
    MODEL_FILE,
    PROMOTED_BASELINE_FILE,
    REFERENCE_FILE,
    TRAINER_LOCK,
    Registry,
    lock_of,
    new_version_id,
)
from fleetcast.locks import OwnerLock
from fleetcast.loop import configure_logging
from fleetcast.program import models_dir, run_program
from fleetcast.promotion.audit import REFUSED, ROLLBACK, TRAINING, VERDICT
from fleetcast.promotion.bake import OFF
from fleetcast.promotion.desk import Desk
from fleetcast.promotion.orders import new_order, this_user
from fleetcast.settings import Settings, load_settings

if TYPE_CHECKING:
    from fleetcast.drift.seasonal.reference import Reference
    from fleetcast.forecast.predictor import Forecaster
    from fleetcast.schema import ChangedSeries
    from fleetcast.storage.store import DataBuffer
    from fleetcast.training.challenger import Training
    from fleetcast.training.elsewhere import Job
    from fleetcast.training.grid import TrainingContext, TrainingGrid
    from fleetcast.training.verdict import Challenger, Champion

logger = logging.getLogger("tft_trainer")

ATTEMPT_ID_VARIABLE = "TFT_ATTEMPT_ID"
BASE_STATE_FILE = "base_training.state"  # after each epoch of a training from scratch; gone at its end
_ATTEMPT_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one training, or one rollback; return the exit code."""
    options = _parser(prog).parse_args(argv)

    def work() -> int:
        settings = _settings(options)
        configure_logging(None, settings.logging)
        folder = Path(settings.paths.checkpoint_dir)
        registry = Registry(folder, models_dir(settings))
        with lock_of(folder, TRAINER_LOCK, f"the trainer's lock {folder / TRAINER_LOCK}") as lock:
            if options.rollback:
                return _roll_back(registry)
            return Attempt(options, settings, registry, lock).run()

    return run_program("tft_trainer", work)


class Attempt:
    """One training from its data to its verdict; the caller holds the trainer's lock."""

    def __init__(
        self, options: argparse.Namespace, settings: Settings, registry: Registry, lock: OwnerLock
    ) -> None:
        self._options, self._settings, self._registry, self._lock = options, settings, registry, lock
        self._desk = Desk(registry, bakes=settings.promotion.bake == "on")
        self._clock = SystemClock()
        self._started_at = self._clock.now()
        self._started = monotonic()
        told = _safe_id(os.environ.get(ATTEMPT_ID_VARIABLE))
        self._id = told or new_version_id(self._started_at)
        self._by = "the retraining daemon" if told else this_user()
        self._champion_before: str | None = None

    def run(self) -> int:
        """Load, train, judge, write; the attempt's file is written whatever the outcome.

        Raises:
            FleetcastError: after the attempt's file says so.
        """
        try:
            grid, context = self._load()
            training, challenger = self._train(grid, context.changed_series(grid))
            held = self._keep(training, challenger, self._reference(grid, context.all_changes(grid)))
        except FleetcastError as error:
            self._note_failure(error)
            self._report({"why": str(error)}, error.exit_code)
            raise
        version_id, verdict = challenger.model.version, challenger.verdict
        promoted, why = verdict.promoted and not held, verdict.why + (f"; {held}" if held else "")
        outcome = {"promoted": promoted, "passed_gate": verdict.promoted, "version": version_id}
        outcome |= {"parent": training.parent_id, "why": why, "figures": verdict.figures}
        self._report(outcome, ExitCode.OK)
        logger.info(
            "verdict version=%s promoted=%s why=%s took_s=%.0f",
            *(version_id, promoted, why, monotonic() - self._started),
        )
        return int(ExitCode.OK)

    def _load(self) -> "tuple[TrainingGrid, TrainingContext]":
        """Read the data, and what the daemon says about the attempt."""
        # torch, lightning, pyarrow: seconds that --help and a refused lock do not pay
        from fleetcast.training.grid import TrainingContext, TrainingGrid

        bins, data = self._settings.bins, Path(self._options.data)
        context = TrainingContext.find(data, os.environ.get(ATTEMPT_ID_VARIABLE))
        most, wanted = self._settings.trainer.max_cells, context.wanted_servers()
        grid = TrainingGrid.read(data, bins.forecast_metrics, bins.bin_s * 1000, most, wanted)
        self._id = _safe_id(context.attempt_id) or self._id
        return grid, context

    def _train(
        self, grid: "TrainingGrid", changed: "tuple[ChangedSeries, ...]"
    ) -> "tuple[Training, Challenger]":
        """Train a challenger and judge it by what the training did not see."""
        from fleetcast.training.challenger import Training, find_champion
        from fleetcast.training.elsewhere import Job

        settings = self._settings
        self._champion_before = self._registry.current_id()
        champion = find_champion(self._registry, grid.bin_ms, settings.forecast.horizon_bins)
        start = champion if self._options.incremental else None
        epochs = self._epochs(start)
        training = Training(grid, changed, settings, start, epochs, shows_progress_bar=sys.stderr.isatty())
        version_id = new_version_id(self._clock.now())
        logger.info(
            "training begins attempt=%s version=%s start=%s compared_with=%s epochs=%d steps_per_epoch=%d",
            *(self._id, version_id, training.parent_id or "fresh weights"),
            *(champion.version.id if champion else "fallback", epochs, settings.trainer.steps_per_epoch),
        )
        job = Job(grid, changed, settings, start, epochs, version_id, iso_z(self._clock.now()))
        return training, training.judge(self._carry_out(training, job), champion)

    def _carry_out(self, training: "Training", job: "Job") -> "Forecaster":
        """Return the trained model: of another machine where the settings say so and one is there."""
        from fleetcast.training.elsewhere import train_elsewhere

        if self._options.incremental and self._settings.retraining.engine == "ray":
            try:
                return train_elsewhere(job)
            except ClusterAway as error:
                logger.warning("trained on this machine instead reason=%s", error)
        return training.train(job.version_id, job.trained_at, self._registry.folder / BASE_STATE_FILE)

    def _epochs(self, start: "Champion | None") -> int:
        """Return how long to train: --epochs adds to a model of this fleet; its first takes a base's."""
        trainer, asked = self._settings.trainer, int(self._options.epochs or 0)
        if start and not start.version.is_base:
            return asked or trainer.epochs
        if self._options.incremental:
            return max(asked, trainer.base_epochs)
        return asked or trainer.base_epochs

    def _reference(self, grid: "TrainingGrid", changed: "Sequence[ChangedSeries]") -> dict[str, bytes]:
        """Return the drift reference of this training's data; it holds whatever the verdict is.

        Without a readable buffer there is none, and the daemon learns one day by day.
        """
        from fleetcast.storage.store import DataBuffer
        from fleetcast.training.verdict import training_reference

        buffer = DataBuffer(self._settings.paths.data_buffer_dir, settings=self._settings.buffer)
        excluded = Exclusions(self._settings.paths.checkpoint_dir)
        others = AllBut(set(grid.server_names).difference(excluded()))
        buffer.leave_out(lambda: others)
        try:
            reference = training_reference(
                grid, changed, lambda start, end: buffer.read_predictions(start, end, 1), self._settings.drift
            )
        except FleetcastError as error:
            logger.warning("no drift reference made reason=%s", error)
            return {}
        whole = self._with_unread(reference, grid, buffer.leave_out(excluded))
        return {REFERENCE_FILE: whole.to_bytes()}

    def _with_unread(self, reference: "Reference", grid: "TrainingGrid", buffer: "DataBuffer") -> "Reference":
        """Return a reference with what was known of live servers that this training did not read."""
        from fleetcast.bins import LIVE_DAYS
        from fleetcast.drift.evidence import DriftSource
        from fleetcast.drift.seasonal.reference import merge

        try:
            known = DriftSource.of(self._settings, buffer, self._registry).reference_in_force()
            unread = set(known.server_names).difference(grid.server_names) if known else set()
            if known is None or not unread:
                return reference
            live = unread.intersection(buffer.newest_names(LIVE_DAYS, grid.bin_ms))
            rows = [row for row, name in enumerate(known.server_names) if name in live]
            return merge(reference, known.servers(rows)) if rows else reference
        except FleetcastError as error:
            logger.warning("the drift reference holds the servers of the training alone reason=%s", error)
            return reference

    def _keep(self, training: "Training", challenger: "Challenger", reference: Mapping[str, bytes]) -> str:
        """Write the verdict down, then the version; then put it into service if the gate let it through.

        Returns:
            what holds a version back that passed the gate, or "".
        Raises:
            OwnershipLost: the folder of the versions was moved or deleted meanwhile.
            StorageFull: the audit cannot be written, so nothing goes into service.
        """
        self._lock.check()
        registry, desk, version_id = self._registry, self._desk, challenger.model.version
        with desk.lock():
            desk.settle()  # what a person ordered meanwhile goes first
            held = self._what_holds() if challenger.verdict.promoted else ""
            self._note_verdict(challenger, held)
            manifest = training.manifest(challenger, self._id, monotonic() - self._started)
            manifest |= {"promoted": challenger.verdict.promoted and not held}
            registry.add(version_id, {**_contents(challenger, is_held=bool(held)), **reference}, manifest)
            if challenger.verdict.promoted and not held:
                desk.promote(version_id, self._by, challenger.verdict.why, attempt=self._id)
            elif held and (registry.current_id() == self._champion_before or desk.standing().held):
                desk.keep_waiting(version_id, self._by, held, attempt=self._id)
            registry.set_baseline(version_id)
            pruned = registry.prune(self._settings.trainer.keep_versions, desk.standing().protects)
        if pruned:
            logger.info("old versions deleted count=%d newest=%s", len(pruned), pruned[-1])
        return held

    def _what_holds(self) -> str:
        """Return why a version that passed the gate does not go into service by itself, or ""."""
        standing, current = self._desk.standing(), self._registry.current_id()
        hold, cooldown = standing.held, standing.cooldown_at(self._desk.clock)
        if hold:
            return f"it waits: {hold.by} holds new models back since {hold.since}: {hold.why}"
        if cooldown:
            return f"it waits until {cooldown.until}, since a model was taken back: {cooldown.why}"
        if self._settings.promotion.mode != OFF and current is not None and current == self._champion_before:
            return f"it is compared with {current} first (promotion.mode {self._settings.promotion.mode})"
        if current != self._champion_before:
            return f"not put into service: it was compared with {self._champion_before}, now {current} serves"
        return ""

    def _note_verdict(self, challenger: "Challenger", held: str) -> None:
        verdict, attempt = challenger.verdict, self._id
        about = {"source": self._champion_before, "target": challenger.model.version, "attempt": attempt}
        passed = "it passed" if verdict.promoted else "it did not pass"
        why = f"{passed}: {verdict.why}" + (f"; {held}" if held else "")
        self._desk.note(VERDICT, self._by, why, figures=verdict.figures, **about)

    def _note_failure(self, error: FleetcastError) -> None:
        try:
            self._desk.note(TRAINING, self._by, str(error), attempt=self._id)
        except FleetcastError as unwritten:  # the error itself is what counts
            logger.error("the end of the training is not in the audit error=%s", unwritten)

    def _report(self, outcome: Mapping[str, Any], exit_code: ExitCode) -> None:
        """Write the attempt's file, which the daemon reads."""
        folder = self._registry.folder / ATTEMPTS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "attempt_id": self._id,
            "exit_code": int(exit_code),
            **outcome,
            "started_at": iso_z(self._started_at),
            "finished_at": iso_z(self._clock.now()),
        }
        files.write_json(folder / f"{self._id}.json", content)


def _contents(challenger: "Challenger", *, is_held: bool) -> dict[str, bytes]:
    """Return the files of a version; one that is held back leaves the errors to expect as they are."""
    own = challenger.baseline.to_bytes()
    held = {BASELINE_FILE: challenger.baseline_if_held.to_bytes(), PROMOTED_BASELINE_FILE: own}
    baselines = held if is_held else {BASELINE_FILE: own}
    return {MODEL_FILE: challenger.model.to_bytes(), **baselines}


def _roll_back(registry: Registry) -> int:
    """Give the order and carry it out; one that cannot be done leaves none waiting."""
    order = new_order(ROLLBACK, "tft_trainer.py --rollback", this_user(), SystemClock().now())
    ended = Desk(registry).give(order)
    if ended is None:
        raise OrderRefused("another process moves models just now; the order waits")
    if ended.phase == REFUSED:
        raise OrderRefused(ended.why)
    print(f"rolled back from {ended.source} to {ended.target}; the daemon reloads at its next forecast")
    return int(ExitCode.OK)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train a forecasting model; a gate decides whether it goes into service.",
        epilog="exit codes: 0 done, 1 failed, 2 bad settings, 4 already running, 5 not enough data",
    )
    parser.add_argument("--data", metavar="FILE", help="parquet of timestamp, server_name and metrics")
    parser.add_argument("--incremental", action="store_true", help="continue the model in service")
    parser.add_argument("--epochs", type=_positive, metavar="N", help="epochs of sampled steps")
    parser.add_argument("--checkpoint-dir", metavar="DIR", help="model versions (default ./checkpoints)")
    parser.add_argument("--config", metavar="FILE", help="settings (default ./fleetcast.toml if present)")
    parser.add_argument(
        "--rollback", action="store_true", help="put the version before the current one back into service"
    )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    """Return the settings; problems of the flags and of the settings are reported together."""
    problems = []
    if options.rollback and (options.data or options.incremental or options.epochs):
        problems.append("--rollback stands alone: it trains nothing")
    if not options.rollback and not options.data:
        problems.append("--data FILE is needed, or --rollback")
    elif options.data and not Path(options.data).is_file():
        problems.append(f"--data {options.data} is not a file")
    try:
        settings = load_settings(
            Path(options.config) if options.config else None,
            {"paths.checkpoint_dir": options.checkpoint_dir},
        )
    except SettingsError as error:
        raise SettingsError([*problems, *error.problems]) from error
    if problems:
        raise SettingsError(problems)
    return settings


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value


def _safe_id(text: str | None) -> str | None:
    """Return an attempt id if it is safe as a file name."""
    return text if text and _ATTEMPT_ID.fullmatch(text) else None


if __name__ == "__main__":
    raise SystemExit(main())
