"""How a challenger is made: where it starts, what it is shown, what its manifest says.

Owns: the order of one training on one grid: scope, held-out tail, mix of windows, weights, verdict,
manifest; and which series a training without a known change sees more of (the badly forecast ones).
Does not know: flags, locks, files of versions, how a step is made (`fit`), the rule (`gate`).
"""

import hashlib
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from fleetcast.bins import count_trainable, enough_to_train
from fleetcast.clock import DAY_MS, from_ms, iso_z
from fleetcast.errors import BadCheckpoint, NotEnoughData
from fleetcast.forecast.checkpoint import ModelDescription, Specialist
from fleetcast.forecast.encoding import GridShape
from fleetcast.forecast.network import METRIC_SLOTS, NetworkConfig
from fleetcast.forecast.predictor import Forecaster
from fleetcast.forecast.registry import Registry
from fleetcast.forecast.selection import Weights
from fleetcast.schema import ChangedSeries, Floats, Longs
from fleetcast.settings import Settings
from fleetcast.training.fit import Fit, Resumable, StateFile, fit
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.holdout import HoldOut, Losses, Predictor, Sample, first_held_bins
from fleetcast.training.sampler import WindowMix, WindowSampler
from fleetcast.training.specialists import choose_scope
from fleetcast.training.verdict import Challenger, Champion, judge_challenger

logger = logging.getLogger(__name__)

_MAX_WINDOWS = 3_000  # forecast to find the badly forecast series: a CPU second of a model of width 32
_BEST, _WORST = 0.5, 3.0  # shares of the fallback's loss beyond which all are alike
_VALIDATED = 768  # windows that judge an epoch of a base training
_WARMUP_STEPS, _INCREMENTAL_WARMUP_STEPS = 50, 20
_MOST_SHOWN = 10  # times a specialist sees a window of the change: seen more often, it is learned by heart
_EMBEDDING = "input_embeddings.embeddings.metric.weight"


def find_champion(registry: Registry, bin_ms: int, horizon_bins: int) -> Champion | None:
    """Return the champion for these bins: the current version, else the newest usable one, else the base."""
    for version in registry.usable_versions():
        try:
            model = Forecaster.load(version.model_path, bin_ms=bin_ms, horizon_bins=horizon_bins)
        except BadCheckpoint as error:
            logger.warning("version skipped reason=%s", error)
            continue
        return Champion(version, model)
    return None


class Training:
    """One training on one grid: `train`, then `judge`, then `manifest`."""

    def __init__(
        self,
        grid: TrainingGrid,
        changed: tuple[ChangedSeries, ...],
        settings: Settings,
        start: Champion | None,
        epochs: int,
        *,
        shows_progress_bar: bool = False,
    ) -> None:
        """Choose what the training moves and what it must not see; nothing is trained yet.

        Args:
            changed: the series named as changed.
            start: what to continue from; None = fresh weights.
        Raises:
            NotEnoughData: the grid cannot carry a training.
        """
        self._grid, self._changed, self._settings = grid, changed, settings
        self._start = start
        self._shape = GridShape(grid.bin_ms, settings.forecast.horizon_bins)
        self._require_data()
        trainer = settings.trainer
        self._scope = choose_scope(
            grid, changed, start.model if start else None, trainer.specialist_max_share
        )
        longest = round(trainer.holdout_max_s * 1000 / grid.bin_ms)
        self._first_held = first_held_bins(grid, self._scope.shown, trainer.holdout_share, longest)
        self._plan = self._make_plan(epochs, shows_progress_bar=shows_progress_bar)

    @property
    def parent_id(self) -> str | None:
        """Return the version that the training continues."""
        return self._start.version.id if self._start else None

    @property
    def _starts_from_base(self) -> bool:
        """Return whether this is the fleet's first training: the shipped base knows other fleets only.

        Nothing that it learned has to be kept, and no day of the history is known already
        (docs/decisions/first-training.md).
        """
        return self._start is not None and self._start.version.is_base

    def _require_data(self) -> None:
        grid = self._grid
        n_window = count_trainable(grid.values, self._shape.horizon_bins)
        reason = enough_to_train(grid.span_s, n_window, self._settings.decision)
        if reason:
            raise NotEnoughData(reason, hint="let the fleet be recorded for longer")
        logger.info(
            "data read servers=%d metrics=%s span_h=%.1f windows=%d changed_series=%d",
            *(len(grid.server_names), ",".join(grid.metrics), grid.span_s / 3600, n_window),
            len(self._changed),
        )

    def _make_plan(self, epochs: int, *, shows_progress_bar: bool) -> Fit:
        trainer, makes_specialist = self._settings.trainer, self._scope.makes_specialist
        is_incremental = self._start is not None
        is_held = is_incremental and not makes_specialist and not self._starts_from_base
        rate = trainer.incremental_learning_rate if is_incremental else trainer.learning_rate
        return Fit(
            epochs=epochs,
            steps_per_epoch=trainer.steps_per_epoch,
            learning_rate=trainer.specialist_learning_rate if makes_specialist else rate,
            warmup_steps=_INCREMENTAL_WARMUP_STEPS if is_incremental else _WARMUP_STEPS,
            threads=trainer.threads,
            seed=trainer.seed,
            shows_progress_bar=shows_progress_bar,
            keep_weight=trainer.keep_weight if is_held else 0.0,
            patience_epochs=0 if is_incremental else trainer.patience_epochs,
        )

    def train(self, version_id: str, trained_at: str, state_path: Path) -> Forecaster:
        """Train one model, and load it back as a daemon would.

        Args:
            state_path: where a training from fresh weights notes each epoch, to resume after a kill.
        Raises:
            NotEnoughData: no window lies before the held-out tail.
            BadCheckpoint: the trained model does not load back, or is not finite.
        """
        description = self._description(version_id, trained_at)
        if self._start is None or self._scope.begun is None:
            trained = self._train_fresh(description, state_path)
        else:
            trained = self._train_on(description, self._start.model, self._scope.begun)
        return Forecaster.from_bytes(trained.to_bytes(), Path(f"{version_id} (not written yet)"))

    def _train_fresh(self, description: ModelDescription, state_path: Path) -> Forecaster:
        state = StateFile(state_path, self._identity(description))
        weights = self._fit(description, None, state)
        state.remove()
        return Forecaster(description, weights)

    def _train_on(self, description: ModelDescription, start: Forecaster, begun: Weights) -> Forecaster:
        """Return a model whose scope was trained on; its other weights are those of `start`."""

        def widen(weights: Weights) -> Weights:
            return _with_new_metrics(weights, start.metrics, description)

        weights = self._fit(description, widen(begun))
        kept = [replace(item, weights=widen(item.weights)) for item in self._scope.kept]
        if self._scope.changed_ms is None:
            return Forecaster(description, weights, kept)
        made = Specialist(weights, self._scope.changed_ms)
        return Forecaster(description, widen(start.weights), [*kept, made])

    def judge(self, model: Forecaster, champion: Champion | None) -> Challenger:
        """Compare a trained model with the champion (None: the fallback) on the held-out tail."""
        return judge_challenger(
            model,
            champion,
            self._grid,
            self._first_held,
            self._changed,
            self._settings,
            has_new_specialist=self._scope.makes_specialist,
        )

    def manifest(self, challenger: Challenger, attempt_id: str, took_s: float) -> dict[str, Any]:
        """Return what the version's manifest says beside its id and its files."""
        model, verdict, grid = challenger.model, challenger.verdict, self._grid
        return {
            "created_at": model.trained_at,
            "attempt_id": attempt_id,
            "parent": self.parent_id,
            "kind": "incremental" if self._start else "base",
            "promoted": verdict.promoted,
            "passed_gate": verdict.promoted,
            "verdict": {
                "why": verdict.why,
                "compared_with": challenger.compared_with,
                "figures": verdict.figures,
                "mean_absolute_errors": challenger.errors,
                "served_absolute_errors": challenger.served_errors,
            },
            "data_range": {"start": iso_z(from_ms(grid.start_ms)), "end": iso_z(from_ms(grid.end_ms))},
            "servers": len(grid.server_names),
            "metrics": list(model.metrics),
            "specialists": [sorted(map(list, item.changed_ms)) for item in model.specialists],
            "training": {**asdict(self._plan), "took_s": round(took_s, 1)},
            "settings": {
                part: asdict(getattr(self._settings, part)) for part in ("bins", "forecast", "trainer")
            },
            "schema": {
                "grid": model.description.grid.as_config(),
                "network": model.description.network.as_config(),
            },
        }

    def _description(self, version_id: str, trained_at: str) -> ModelDescription:
        old = self._start.model.description if self._start else None
        known = old.metrics if old else ()
        metrics = (*known, *(metric for metric in self._grid.metrics if metric not in known))
        width = self._settings.trainer.hidden_size
        network = old.network if old else NetworkConfig.for_grid(self._shape, width)
        own_slots = metrics[: METRIC_SLOTS - 1]  # further ones share the slot of the unknown
        return ModelDescription(version_id, trained_at, own_slots, self._shape, network)

    def _identity(self, description: ModelDescription) -> str:
        """Return what a training is: the same data, settings and network give the same weights."""
        digest = hashlib.sha256(self._grid.values.tobytes())
        digest.update(self._first_held.tobytes())
        plan = replace(self._plan, shows_progress_bar=False)
        parts = (description.metrics, description.grid, description.network, self._grid.start_ms)
        digest.update(repr((*parts, plan, self._settings.trainer)).encode())
        return digest.hexdigest()

    def _fit(
        self, description: ModelDescription, weights: Weights | None, state: StateFile | None = None
    ) -> dict[str, Any]:
        trainer, plan = self._settings.trainer, self._plan
        batch_size = trainer.incremental_batch_size if self._start else trainer.batch_size
        slots = [description.slot(metric) for metric in self._grid.metrics]
        first_held, validation = self._first_held, None
        if plan.patience_epochs:
            # of the bins before the held-out tail, these are for no step of a base training
            n_bins = (self._grid.n_bins - int(first_held.max())) // 2
            newest = WindowMix(recent_share=1.0, recent_bins=n_bins)
            validation = self._sampler(first_held, newest).batch(_VALIDATED, slots)
            first_held = first_held - n_bins
        sampler = self._sampler(first_held, self._mix(plan.epochs * plan.steps_per_epoch * batch_size))
        return fit(
            description.network,
            self._shape,
            weights,
            lambda: sampler.batch(batch_size, slots),
            plan,
            validation=validation,
            state=Resumable(state, sampler) if state else None,
        )

    def _mix(self, n_window: int) -> WindowMix:
        """Return what a batch is drawn from: a change that is known, else the recent and badly forecast.

        A first training has seen nothing of the fleet yet: it draws from the whole history alike.

        Args:
            n_window: that the training draws in all.
        """
        trainer, scope, first_held = self._settings.trainer, self._scope, self._first_held
        if self._start is None:
            return WindowMix()
        if scope.makes_specialist:
            known = sum(max(0, int(first_held[s.server, s.metric]) - s.since_bin) for s in scope.shown)
            share = min(trainer.specialist_changed_share, _MOST_SHOWN * known / n_window)
            return WindowMix(scope.shown, share)
        if scope.shown:
            return WindowMix(scope.shown, trainer.changed_share)
        if self._starts_from_base:
            return WindowMix()
        recent = round(trainer.recent_days * DAY_MS / self._grid.bin_ms)
        weights = series_weights(self._start.model, self._grid, self._shape, first_held, recent, trainer.seed)
        return WindowMix(recent_share=trainer.recent_share, recent_bins=recent, recent_weights=weights)

    def _sampler(self, first_held: Longs, mix: WindowMix) -> WindowSampler:
        return WindowSampler(self._grid, self._shape, first_held, mix, self._settings.trainer.seed)


def _with_new_metrics(
    weights: Weights, metrics: tuple[str, ...], description: ModelDescription
) -> dict[str, Any]:
    """Return a model's weights, a metric it did not know starting as the unknown one."""
    embedding = weights[_EMBEDDING].copy()
    for metric in description.metrics[len(metrics) :]:
        embedding[description.slot(metric)] = embedding[0]
    return {**weights, _EMBEDDING: embedding}


def series_weights(
    model: Predictor,
    grid: TrainingGrid,
    shape: GridShape,
    first_held: Longs,
    recent_bins: int,
    seed: int,
) -> Floats:
    """Return how much more often to draw each series, (server, metric), 1 on average.

    The weight is the square of the model's loss as a share of the fallback's, on the newest
    `recent_bins` before the held-out tail: a series whose dynamics changed is forecast worse than
    by repetition (1.2 to 1.5), a known one at 0.6 to 0.8 of it. Of more than 150 servers a sample is
    forecast; the other series, and those without values, count as the average.

    Args:
        first_held: (server, metric) the first held-out bin.
    """
    seen = replace(grid, values=grid.values[:, :, : int(first_held.min())])
    first = np.full(first_held.shape, max(1, seen.n_bins - recent_bins), np.int64)
    lately = HoldOut(seen, shape, first, (), (1,), Sample(seed, _MAX_WINDOWS, replayed_series=0))
    share = _loss_shares(lately.losses(model), lately.losses(lately.fallback))
    known = np.isfinite(share)
    weights = np.ones(first_held.shape)
    if known.any():
        squares = np.clip(np.where(known, share, 1.0), _BEST, _WORST) ** 2
        weights[lately.servers] = np.where(known, squares / squares[known].mean(), 1.0)
    return np.asarray(weights / weights.mean())


def _loss_shares(ours: Losses, naive: Losses) -> Floats:
    """Return one side's loss as a share of the other's (server, metric), NaN where unknown."""
    known = np.isfinite(ours.pinball) & np.isfinite(naive.pinball)
    sums = [np.where(known, side.pinball, 0.0).sum(axis=0) for side in (ours, naive)]
    return np.where(sums[1] > 0, sums[0] / np.maximum(sums[1], 1e-9), np.nan)
