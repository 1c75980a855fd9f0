"""Train a model and let the gate decide whether it goes into service.

    python tft_trainer.py --data training_data.parquet                    a base, from scratch
    python tft_trainer.py --data FILE --incremental --epochs 5            continue the model in service
    python tft_trainer.py --rollback                                      back to the version before

Owns: flags, the lock, the order of writing: version → last.ckpt → baseline.npz → old versions
deleted → attempt. Each step is one rename, so a kill leaves the old state or the new one. A training
from scratch notes each epoch: started again with the same data and settings, a killed one resumes.
Does not know: when to train.

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
from fleetcast.errors import ExitCode, FleetcastError, SettingsError
from fleetcast.files import OwnerLock
from fleetcast.forecast.registry import (
    ATTEMPTS_FOLDER,
    BASELINE_FILE,
    MODEL_FILE,
    REFERENCE_FILE,
    TRAINER_LOCK,
    Registry,
    new_version_id,
)
from fleetcast.loop import configure_logging
from fleetcast.program import models_dir, run_program
from fleetcast.settings import Settings, load_settings

if TYPE_CHECKING:
    from fleetcast.schema import ChangedSeries
    from fleetcast.training.challenger import Training
    from fleetcast.training.context import TrainingContext
    from fleetcast.training.grid import TrainingGrid
    from fleetcast.training.verdict import Challenger, Champion

logger = logging.getLogger("tft_trainer")

ATTEMPT_ID_VARIABLE = "TFT_ATTEMPT_ID"
BASE_STATE_FILE = "base_training.state"  # after each epoch of a training from scratch; gone at its end
_ATTEMPT_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one training, or one rollback; return the exit code."""
    options = _parser().parse_args(argv)

    def work() -> int:
        settings = _settings(options)
        configure_logging(None, settings.logging)
        folder = Path(settings.paths.checkpoint_dir)
        registry = Registry(folder, models_dir(settings))
        with OwnerLock(folder / TRAINER_LOCK, f"the trainer's lock {folder / TRAINER_LOCK}"):
            return _roll_back(registry) if options.rollback else Attempt(options, settings, registry).run()

    return run_program("tft_trainer", work)


class Attempt:
    """One training from its data to its verdict; the caller holds the trainer's lock."""

    def __init__(self, options: argparse.Namespace, settings: Settings, registry: Registry) -> None:
        self._options, self._settings, self._registry = options, settings, registry
        self._clock = SystemClock()
        self._started_at = self._clock.now()
        self._started = monotonic()
        self._id = _safe_id(os.environ.get(ATTEMPT_ID_VARIABLE)) or new_version_id(self._started_at)

    def run(self) -> int:
        """Load, train, judge, write; the attempt's file is written whatever the outcome.

        Raises:
            FleetcastError: after the attempt's file says so.
        """
        try:
            grid, context = self._load()
            training, challenger = self._train(grid, context.changed_series(grid))
            self._keep(training, challenger, self._reference(grid, context.all_changes(grid)))
        except FleetcastError as error:
            self._report({"why": str(error)}, error.exit_code)
            raise
        version_id, verdict = challenger.model.version, challenger.verdict
        outcome = {"promoted": verdict.promoted, "version": version_id, "parent": training.parent_id}
        self._report({**outcome, "why": verdict.why, "figures": verdict.figures}, ExitCode.OK)
        logger.info(
            "verdict version=%s promoted=%s why=%s took_s=%.0f",
            *(version_id, verdict.promoted, verdict.why, monotonic() - self._started),
        )
        return int(ExitCode.OK)

    def _load(self) -> "tuple[TrainingGrid, TrainingContext]":
        """Read the data, and what the daemon says about the attempt."""
        # torch, lightning, pyarrow: seconds that --help and a refused lock do not pay
        from fleetcast.training.context import TrainingContext
        from fleetcast.training.grid import TrainingGrid

        bins, data = self._settings.bins, Path(self._options.data)
        grid = TrainingGrid.read(data, bins.forecast_metrics, bins.bin_s * 1000)
        context = TrainingContext.find(data, os.environ.get(ATTEMPT_ID_VARIABLE))
        self._id = _safe_id(context.attempt_id) or self._id
        return grid, context

    def _train(
        self, grid: "TrainingGrid", changed: "tuple[ChangedSeries, ...]"
    ) -> "tuple[Training, Challenger]":
        """Train a challenger and judge it by what the training did not see."""
        from fleetcast.training.challenger import Training, find_champion

        settings = self._settings
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
        state_path = self._registry.folder / BASE_STATE_FILE
        model = training.train(version_id, iso_z(self._clock.now()), state_path)
        return training, training.judge(model, champion)

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
        try:
            reference = training_reference(
                grid, changed, lambda start, end: buffer.read_predictions(start, end, 1), self._settings.drift
            )
        except FleetcastError as error:
            logger.warning("no drift reference made reason=%s", error)
            return {}
        return {REFERENCE_FILE: reference.to_bytes()}

    def _keep(self, training: "Training", challenger: "Challenger", reference: Mapping[str, bytes]) -> None:
        """Write the version, then put it into service if the gate let it through."""
        model, registry = challenger.model, self._registry
        contents = {
            MODEL_FILE: model.to_bytes(),
            BASELINE_FILE: challenger.baseline.to_bytes(),
            **reference,
        }
        manifest = training.manifest(challenger, self._id, monotonic() - self._started)
        registry.add(model.version, contents, manifest)
        if challenger.verdict.promoted:
            registry.promote(model.version)
        registry.set_baseline(model.version)
        pruned = registry.prune(self._settings.trainer.keep_versions)
        if pruned:
            logger.info("old versions deleted count=%d newest=%s", len(pruned), pruned[-1])

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


def _roll_back(registry: Registry) -> int:
    taken_out, put_back = registry.rollback(SystemClock().now())
    print(f"rolled back from {taken_out} to {put_back}; the daemon reloads at its next forecast")
    return int(ExitCode.OK)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tft_trainer.py",
        description="Train a forecasting model; a gate decides whether it goes into service.",
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
