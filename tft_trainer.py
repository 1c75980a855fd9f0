"""Train a model and let the gate decide whether it serves.

    python tft_trainer.py --data training_data.parquet                    a base, from scratch
    python tft_trainer.py --data FILE --incremental --epochs 5            continue what serves
    python tft_trainer.py --rollback                                      back to the version before

Owns: flags, the lock, the order of writing: version → last.ckpt → baseline.npz → old versions
deleted → attempt. Each step is one rename, so a kill leaves the old state or the new one. A training
from scratch notes each epoch: killed and started again with the same data and settings, it goes on.
Does not know: when to train.

Without a model of this fleet, --incremental trains its first (`trainer.base_epochs`): what the shipped
base knows is continued, or fresh weights are. Exit codes:
0 ran to a verdict, promoted or not; 1 failed; 2 bad settings or usage; 4 a trainer is at work;
5 not enough data. The verdict is in checkpoints/attempts/<id>.json and in the manifest.
"""

import argparse
import dataclasses
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetcast import files
from fleetcast.clock import SystemClock, from_ms, iso_z, monotonic
from fleetcast.errors import ExitCode, FleetcastError, SettingsError
from fleetcast.files import OwnerLock
from fleetcast.forecast.registry import (
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
    from fleetcast.training.challenger import Candidate
    from fleetcast.training.grid import TrainingGrid
    from fleetcast.training.verdict import Champion

logger = logging.getLogger("tft_trainer")

ATTEMPT_ID_VARIABLE = "TFT_ATTEMPT_ID"
ATTEMPTS_FOLDER = "attempts"
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
        self._id = _checked_id(os.environ.get(ATTEMPT_ID_VARIABLE)) or new_version_id(self._started_at)

    def run(self) -> int:
        """Train, judge, write; the attempt's file is written whatever the outcome.

        Raises:
            FleetcastError: after the attempt's file says so.
        """
        try:
            version_id, candidate, start = self._train()
        except FleetcastError as error:
            self._write({"why": str(error)}, int(error.exit_code))
            raise
        verdict = candidate.judgement.verdict
        self._write(
            {
                "promoted": verdict.promoted,
                "version": version_id,
                "parent": start.version.id if start else None,
                "why": verdict.why,
                "figures": verdict.figures,
            },
            int(ExitCode.OK),
        )
        logger.info(
            "verdict version=%s promoted=%s why=%s took_s=%.0f",
            *(version_id, verdict.promoted, verdict.why, monotonic() - self._started),
        )
        return int(ExitCode.OK)

    def _train(self) -> "tuple[str, Candidate, Champion | None]":
        # torch, lightning, pyarrow: seconds that --help and a refused lock do not pay
        from fleetcast.training.challenger import Training, find_champion
        from fleetcast.training.context import TrainingContext
        from fleetcast.training.grid import TrainingGrid

        settings, data = self._settings, Path(self._options.data)
        grid = TrainingGrid.read(data, settings.bins.forecast_metrics, settings.bins.bin_s * 1000)
        context = TrainingContext.find(data, os.environ.get(ATTEMPT_ID_VARIABLE))
        if context.attempt_id and _checked_id(context.attempt_id):
            self._id = context.attempt_id
        changed = context.changed_series(grid)
        maker = Training(grid, changed, settings)
        serving = find_champion(self._registry, maker.shape)
        start = serving if self._options.incremental else None
        version_id = new_version_id(self._clock.now())
        epochs = self._epochs(start)
        logger.info(
            "training begins attempt=%s version=%s start=%s compared_with=%s epochs=%d steps_per_epoch=%d",
            *(self._id, version_id, start.version.id if start else "fresh weights"),
            *(serving.version.id if serving else "fallback", epochs, settings.trainer.steps_per_epoch),
        )
        candidate = maker.make(
            version_id,
            iso_z(self._clock.now()),
            start,
            serving,
            epochs,
            shows_progress_bar=sys.stderr.isatty(),
            state_path=self._registry.folder / BASE_STATE_FILE,
        )
        self._keep(version_id, candidate, start, grid, self._reference(grid, context.all_changes(grid)))
        return version_id, candidate, start

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

        A buffer that cannot be read costs the reference, which the daemon then learns day by day.
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

    def _keep(
        self,
        version_id: str,
        candidate: "Candidate",
        start: "Champion | None",
        grid: "TrainingGrid",
        reference: Mapping[str, bytes],
    ) -> None:
        """Write the version, then put into service what the gate let through."""
        contents = {
            MODEL_FILE: candidate.content,
            BASELINE_FILE: candidate.judgement.baseline.to_bytes(),
            **reference,
        }
        self._registry.add(version_id, contents, self._manifest(candidate, start, grid))
        if candidate.judgement.verdict.promoted:
            self._registry.promote(version_id)
        self._registry.set_baseline(version_id)
        pruned = self._registry.prune(self._settings.trainer.keep_versions)
        if pruned:
            logger.info("old versions deleted count=%d newest=%s", len(pruned), pruned[-1])

    def _manifest(
        self, candidate: "Candidate", start: "Champion | None", grid: "TrainingGrid"
    ) -> dict[str, Any]:
        judgement, settings = candidate.judgement, self._settings
        model, verdict = judgement.model, judgement.verdict
        return {
            "created_at": model.trained_at,
            "attempt_id": self._id,
            "parent": start.version.id if start else None,
            "kind": "incremental" if start else "base",
            "promoted": verdict.promoted,
            "verdict": {
                "why": verdict.why,
                "compared_with": candidate.compared_with,
                "figures": verdict.figures,
                "mean_absolute_errors": judgement.errors,
            },
            "data_range": {"start": iso_z(from_ms(grid.start_ms)), "end": iso_z(from_ms(grid.end_ms))},
            "servers": len(grid.server_names),
            "metrics": list(model.metrics),
            "specialists": [sorted(map(list, item.changed_ms)) for item in model.specialists],
            "training": {
                **dataclasses.asdict(candidate.plan),
                "took_s": round(monotonic() - self._started, 1),
            },
            "settings": {
                part: dataclasses.asdict(getattr(settings, part)) for part in ("bins", "forecast", "trainer")
            },
            "schema": {
                "grid": model.description.grid.as_config(),
                "network": model.description.network.as_config(),
            },
        }

    def _write(self, outcome: Mapping[str, Any], exit_code: int) -> None:
        folder = self._registry.folder / ATTEMPTS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "attempt_id": self._id,
            "exit_code": exit_code,
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
        prog="tft_trainer.py", description="Train a forecasting model; a gate decides whether it serves."
    )
    parser.add_argument("--data", metavar="FILE", help="parquet of timestamp, server_name and metrics")
    parser.add_argument("--incremental", action="store_true", help="continue the model that serves")
    parser.add_argument("--epochs", type=_positive, metavar="N", help="epochs of sampled steps")
    parser.add_argument("--checkpoint-dir", metavar="DIR", help="model versions (default ./checkpoints)")
    parser.add_argument("--config", metavar="FILE", help="settings (default ./fleetcast.toml if present)")
    parser.add_argument(
        "--rollback", action="store_true", help="put the version before the current one back into service"
    )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    """Return the settings; what is wrong with the flags is reported with what is wrong there."""
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


def _checked_id(text: str | None) -> str | None:
    """Return an attempt id that is safe as a file name, or None."""
    return text if text and _ATTEMPT_ID.fullmatch(text) else None


if __name__ == "__main__":
    raise SystemExit(main())
