"""One policy over one scene: forecast, look, train, go on. In one process, without HTTP.

Owns: the order of a replay and the real trainer's runs in it. What is real: the forecaster, the
registry, `tft_trainer.main` with its gate, and whatever the policy is made of. What is not: HTTP,
the buffer's files (`ReplayRecord` stands in) and the load of a training host.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time
from typing import Any

import tft_trainer
from benchmarks.forecast.parts.training_rounds import write_export
from benchmarks.loop.parts.fleet import ReplayFleet
from benchmarks.loop.parts.policies import (
    CHECK_BINS,
    DAILY,
    LITERAL,
    ORACLE,
    OURS,
    UNSPECIALISED,
    WEEKLY,
    Context,
    Cron,
    Engine,
    Never,
    Oracle,
    Policy,
)
from benchmarks.loop.parts.record import HORIZONS, ReplayRecord, forecast_stretch
from data_buffer import DataBuffer
from fleetcast.clock import from_ms, iso_z, to_ms
from fleetcast.forecast.predictor import Forecaster
from fleetcast.forecast.registry import ATTEMPTS_FOLDER, Registry
from fleetcast.program import models_dir
from fleetcast.retraining.state import Verdict, read_verdict
from fleetcast.schema import Floats32
from fleetcast.settings import Settings, load_settings
from fleetcast.training.challenger import find_champion

TRAINING_DAYS = 30


@dataclass(frozen=True)
class ReplayTraining:
    """One training of a replay."""

    bin: int
    at: str
    rule: str
    told_series: int
    promoted: bool
    why: str
    cpu_s: float


class ReplayRun:
    """Replays one scene under one policy; its folder is emptied first."""

    def __init__(self, fleet: ReplayFleet, policy: str, folder: Path, initial: Path, settings: str) -> None:
        """Prepare.

        Args:
            initial: the checkpoint folder of the initial training, copied.
            settings: of the trainings, as TOML.
        """
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(initial, folder / "checkpoints", symlinks=True)
        self._fleet, self._folder, self._config = fleet, folder, folder / "fleetcast.toml"
        if policy == UNSPECIALISED:
            settings = settings.replace("[trainer]\n", "[trainer]\nspecialist_max_share = 0.0\n")
        self._config.write_text(f'[paths]\ndata_buffer_dir = "{folder}/data_buffer"\n{settings}', "utf-8")
        self._record = ReplayRecord.begun(fleet)
        literal = {"drift.basis": "literal"} if policy == LITERAL else {}
        loaded = load_settings(self._config, literal)
        self._registry = Registry(folder / "checkpoints", models_dir(loaded))
        self._policy = self._made(policy, loaded)
        self._model = self._loaded()
        self._stored_ms = fleet.grid.start_ms + fleet.begin * fleet.grid.bin_ms
        self.trainings: list[ReplayTraining] = []

    def _made(self, name: str, settings: Settings) -> Policy:
        if name in (WEEKLY, DAILY):
            return Cron(self._fleet, 7 if name == WEEKLY else 1)
        if name in (OURS, UNSPECIALISED, LITERAL):
            return Engine(self._record, self._registry, settings, self._folder)
        return Oracle(self._fleet) if name == ORACLE else Never()

    def run(self, by_initial: Floats32 | None) -> Floats32:
        """Replay to the end.

        Args:
            by_initial: what `run` returned for the policy that never trains, where it was run and
                its forecasts are all that is needed here: they are not made twice.
        Returns:
            (server, metric, origin bin from the replay's first, horizon, quantile)
        """
        first = self._model.version
        for start in range(self._fleet.begin, self._fleet.grid.n_bins, CHECK_BINS):
            end = min(start + CHECK_BINS, self._fleet.grid.n_bins)
            if by_initial is not None and self._model.version == first:
                made = by_initial[:, :, start - self._fleet.begin : end - self._fleet.begin]
            else:
                made = forecast_stretch(self._model, self._fleet, start, end)
            self._record.note(start, made, self._model.version)
            context = self._policy.wants(end)
            if context is not None:
                self._train(end, context)
        return self._record.quantiles[:, :, self._fleet.begin :]

    def figures(self) -> dict[str, Any]:
        """Return what was done: the trainings, and how often the drift monitor was in alarm."""
        looked = self._policy if isinstance(self._policy, Engine) else None
        share = looked.in_alarm / max(looked.checks, 1) if looked else None
        return {
            "trainings": [asdict(item) for item in self.trainings],
            "model_changes": [item.bin for item in self.trainings if item.promoted],
            "checks_in_alarm_pct": None if share is None else round(100 * share, 2),
        }

    def _train(self, end: int, context: Context) -> None:
        data = self._folder / "training_data_incremental.parquet"
        write_export(data, self._fleet.until(end, TRAINING_DAYS))
        (self._folder / "training_context.json").write_text(json.dumps(context))
        if isinstance(self._policy, Engine):  # the drift reference of a training is learned from them
            self._store_settled()
        began_s = process_time()
        verdict = trained(data, self._folder / "checkpoints", self._config)
        cpu_s = process_time() - began_s
        self._policy.trained(verdict)
        self._model = self._loaded()
        grid = self._fleet.grid
        self.trainings.append(
            ReplayTraining(
                bin=end,
                at=iso_z(from_ms(grid.start_ms + end * grid.bin_ms)),
                rule=str(context.get("rule", "calendar")),
                told_series=len(context.get("drifting", ())),
                promoted=verdict.promoted,
                why=verdict.why,
                cpu_s=round(cpu_s, 1),
            )
        )

    def _store_settled(self) -> None:
        """Put what was settled since the last training where the trainer reads it."""
        start_ms, end_ms = self._stored_ms, to_ms(self._record.newest_record_time()) + 1
        buffer = DataBuffer(self._folder / "data_buffer", expire=False)
        buffer.append_predictions(self._record.read_predictions(start_ms, end_ms, 1))
        buffer.close()
        self._stored_ms = end_ms

    def _loaded(self) -> Forecaster:
        """Return the model in service: the shipped base where the gate rejected the first training."""
        found = find_champion(self._registry, self._fleet.grid.bin_ms, max(HORIZONS))
        if found is None:
            raise RuntimeError("no model is in service, not even a base")
        return found.model


def trained(data: Path, checkpoints: Path, config: Path) -> Verdict:
    """Run the trainer as the retraining daemon does; return its verdict.

    Raises:
        RuntimeError: it did not reach a verdict.
    """
    flags = [
        "--incremental",
        "--data",
        str(data),
        "--checkpoint-dir",
        str(checkpoints),
        "--config",
        str(config),
    ]
    code = tft_trainer.main(flags)
    if code:
        raise RuntimeError(f"tft_trainer {' '.join(flags)} exited {code}")
    attempts = checkpoints / ATTEMPTS_FOLDER
    newest = max(attempts.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    verdict = read_verdict(checkpoints, newest.stem)
    if verdict is None:
        raise RuntimeError(f"{newest}: no verdict")
    return verdict
