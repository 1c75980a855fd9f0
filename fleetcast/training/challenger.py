"""How a candidate is made: what it starts from, what it is shown, what it is judged by.

Owns: the order of one training, from a grid to a judged candidate.
Does not know: flags, locks, where versions live.

Which series a training without a known change should see more of: the badly forecast ones.

Owns: how well what serves forecast every series lately, next to the fallback. Does not know: how
windows are drawn, networks, files.
"""

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fleetcast.bins import count_trainable, enough_to_train
from fleetcast.clock import DAY_MS
from fleetcast.errors import BadCheckpoint, BadData, NotEnoughData
from fleetcast.forecast.encoding import GridShape
from fleetcast.forecast.naive import NaiveForecaster
from fleetcast.forecast.network import METRIC_SLOTS, NetworkConfig
from fleetcast.forecast.predictor import Forecaster, ModelDescription, Specialist, Weights
from fleetcast.forecast.registry import Registry
from fleetcast.schema import ChangedSeries, Floats, Longs
from fleetcast.settings import Settings
from fleetcast.training.fit import Resumable, StateFile, TrainingPlan, fit
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.holdout import HoldOut, Losses, Predictor, first_held_bins
from fleetcast.training.sampler import WindowMix, WindowSampler
from fleetcast.training.specialists import Scope, choose_scope
from fleetcast.training.verdict import FALLBACK, Challenger, Champion, judge_challenger

_MAX_WINDOWS = 3_000  # forecast to find out: a CPU second of a model of width 32
_BEST, _WORST = 0.5, 3.0  # shares of the fallback's loss beyond which nothing is told apart


def series_weights(
    model: Predictor,
    fallback: Predictor,
    grid: TrainingGrid,
    shape: GridShape,
    held_from: Longs,
    recent_bins: int,
    seed: int,
) -> Floats:
    """Return how much more often to draw each series, (server, metric), 1 on average.

    The weight is the square of the model's loss as a share of the fallback's, on the newest
    `recent_bins` before the held-out tail: a series whose dynamics changed is forecast worse than
    by repetition (1.2 to 1.5), one the model knows at 0.6 to 0.8. A fleet of more than 150 servers
    is looked at in a sample; series that nothing is known about count as the average.

    Args:
        held_from: (server, metric) the first bin that must not be looked at.
    """
    seen = replace(grid, values=grid.values[:, :, : int(held_from.min())])
    first = np.full(held_from.shape, max(1, seen.n_bins - recent_bins), np.int64)
    lately = HoldOut(seen, shape, first, (), fallback, (1,), seed, max_windows=_MAX_WINDOWS)
    share = _shares(lately.losses(model), lately.losses(fallback))
    known = np.isfinite(share)
    weights = np.ones(held_from.shape)
    if known.any():
        squares = np.clip(np.where(known, share, 1.0), _BEST, _WORST) ** 2
        weights[lately.servers] = np.where(known, squares / squares[known].mean(), 1.0)
    return np.asarray(weights / weights.mean())


def _shares(ours: Losses, naive: Losses) -> Floats:
    """Return one side's loss as a share of the other's (server, metric), NaN where unknown."""
    known = np.isfinite(ours.pinball) & np.isfinite(naive.pinball)
    sums = [np.where(known, side.pinball, 0.0).sum(axis=0) for side in (ours, naive)]
    return np.where(sums[1] > 0, sums[0] / np.maximum(sums[1], 1e-9), np.nan)


logger = logging.getLogger(__name__)

_VALIDATED = 768  # windows an epoch of a base training is judged by
_WARMUP_STEPS, _INCREMENTAL_WARMUP_STEPS = 50, 20
_MOST_SHOWN = 10  # times a specialist sees a window of the change: more is learned by heart
_EMBEDDING = "input_embeddings.embeddings.metric.weight"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A trained model that was judged."""

    judgement: Challenger
    content: bytes
    compared_with: str
    plan: TrainingPlan


def find_champion(registry: Registry, grid: GridShape) -> Champion | None:
    """Return what serves these bins: the current version, else the newest that can, else the base."""
    for version in registry.usable_versions():
        try:
            model = Forecaster.load(version.model_path, bin_ms=grid.bin_ms, horizon_bins=grid.horizon_bins)
        except BadCheckpoint as error:
            logger.warning("version passed over reason=%s", error)
            continue
        return Champion(version, model)
    return None


class Training:
    """Trains and judges on one grid."""

    def __init__(self, grid: TrainingGrid, changed: tuple[ChangedSeries, ...], settings: Settings) -> None:
        """Prepare; nothing is trained yet.

        Args:
            changed: what the training is told has changed.
        Raises:
            NotEnoughData: the grid cannot carry a training.
        """
        self._grid, self._changed, self._settings = grid, changed, settings
        self.shape = GridShape(grid.bin_ms, settings.forecast.horizon_bins)
        n_window = count_trainable(grid.values, self.shape.horizon_bins)
        reason = enough_to_train(grid.span_s, n_window, settings.decision)
        if reason:
            raise NotEnoughData(reason, hint="let the fleet be recorded for longer")
        logger.info(
            "data read servers=%d metrics=%s span_h=%.1f windows=%d changed_series=%d",
            *(len(grid.server_names), ",".join(grid.metrics), grid.span_s / 3600, n_window, len(changed)),
        )

    def make(
        self,
        version_id: str,
        trained_at: str,
        start: Champion | None,
        serving: Champion | None,
        epochs: int,
        *,
        shows_progress_bar: bool,
        state_path: Path | None = None,
    ) -> Candidate:
        """Train, load back and judge one candidate.

        Args:
            start: what to continue from; None = fresh weights.
            serving: what to beat; None = the fallback.
            state_path: where a training from fresh weights notes each epoch, to go on after a kill.
        Raises:
            NotEnoughData: no window lies before the held-out tail.
            BadCheckpoint: the trained model does not load back, or is not finite.
        """
        description = self._description(version_id, trained_at, start)
        begun = start.model if start else None
        trainer = self._settings.trainer
        scope = choose_scope(self._grid, self._changed, begun, trainer.specialist_max_share)
        longest = round(trainer.holdout_max_s * 1000 / self._grid.bin_ms)
        self._held_from = first_held_bins(self._grid, scope.shown, trainer.holdout_share, longest)
        plan = self._plan(scope, epochs, is_incremental=begun is not None, shows_bar=shows_progress_bar)
        state = StateFile(state_path, self._identity(description, plan)) if state_path and not start else None
        trained = self._trained(description, begun, scope, plan, state)
        content = trained.to_bytes()
        model = Forecaster.from_bytes(content, Path(f"{version_id} (not written yet)"))
        found = judge_challenger(
            model,
            serving,
            self._grid,
            self._held_from,
            self._changed,
            self._settings,
            is_special=scope.is_special,
        )
        return Candidate(found, found.model.to_bytes(), serving.version.id if serving else FALLBACK, plan)

    def _trained(
        self,
        description: ModelDescription,
        start: Forecaster | None,
        scope: Scope,
        plan: TrainingPlan,
        state: StateFile | None,
    ) -> Forecaster:
        """Return the model with the weights of its scope trained."""
        if start is None or scope.begun is None:
            return Forecaster(description, self._fitted(description, start, scope, None, plan, state))
        known = start.metrics
        begun = _with_new_metrics(scope.begun, known, description)
        fitted = self._fitted(description, start, scope, begun, plan, state)
        kept = [replace(s, weights=_with_new_metrics(s.weights, known, description)) for s in scope.kept]
        if scope.changed_ms is None:
            return Forecaster(description, fitted, kept)
        made = Specialist(fitted, scope.changed_ms)
        return Forecaster(description, _with_new_metrics(start.weights, known, description), [*kept, made])

    def _description(self, version_id: str, trained_at: str, start: Champion | None) -> ModelDescription:
        old = start.model.description if start else None
        known = old.metrics if old else ()
        metrics = (*known, *(metric for metric in self._grid.metrics if metric not in known))
        if len(metrics) >= METRIC_SLOTS:
            raise BadData(f"{len(metrics)} metrics, a model holds at most {METRIC_SLOTS - 1}")
        width = self._settings.trainer.hidden_size
        network = old.network if old else NetworkConfig.for_grid(self.shape, width)
        return ModelDescription(version_id, trained_at, metrics, self.shape, network)

    def _plan(self, scope: Scope, epochs: int, *, is_incremental: bool, shows_bar: bool) -> TrainingPlan:
        trainer = self._settings.trainer
        rate = trainer.incremental_learning_rate if is_incremental else trainer.learning_rate
        return TrainingPlan(
            epochs=epochs,
            steps_per_epoch=trainer.steps_per_epoch,
            learning_rate=trainer.specialist_learning_rate if scope.is_special else rate,
            warmup_steps=_INCREMENTAL_WARMUP_STEPS if is_incremental else _WARMUP_STEPS,
            threads=trainer.threads,
            seed=trainer.seed,
            shows_progress_bar=shows_bar,
            keep_weight=trainer.keep_weight if is_incremental and not scope.is_special else 0.0,
            patience_epochs=0 if is_incremental else trainer.patience_epochs,
        )

    def _identity(self, description: ModelDescription, plan: TrainingPlan) -> str:
        """Return what a training is: the same data, settings and network give the same answer."""
        told = hashlib.sha256(self._grid.values.tobytes())
        told.update(self._held_from.tobytes())
        parts = (description.metrics, description.grid, description.network, self._grid.start_ms)
        told.update(repr((*parts, replace(plan, shows_progress_bar=False), self._settings.trainer)).encode())
        return told.hexdigest()

    def _mix(self, start: Forecaster | None, scope: Scope, n_window: int) -> WindowMix:
        """Return what a batch is drawn from: a change that is known, else the recent and badly forecast.

        Args:
            n_window: that the training draws in all.
        """
        trainer = self._settings.trainer
        if start is None:
            return WindowMix()
        if scope.shown:
            if not scope.is_special:
                return WindowMix(scope.shown, trainer.changed_share)
            held_from = self._held_from
            known = sum(max(0, int(held_from[s.server, s.metric]) - s.since_bin) for s in scope.shown)
            return WindowMix(
                scope.shown, min(trainer.specialist_changed_share, _MOST_SHOWN * known / n_window)
            )
        recent = round(trainer.recent_days * DAY_MS / self._grid.bin_ms)
        fallback = NaiveForecaster(self.shape.horizon_bins)
        weights = series_weights(
            start, fallback, self._grid, self.shape, self._held_from, recent, trainer.seed
        )
        return WindowMix(recent_share=trainer.recent_share, recent_bins=recent, recent_weights=weights)

    def _fitted(
        self,
        description: ModelDescription,
        start: Forecaster | None,
        scope: Scope,
        weights: Weights | None,
        plan: TrainingPlan,
        state: StateFile | None,
    ) -> dict[str, Any]:
        trainer = self._settings.trainer
        batch_size = trainer.incremental_batch_size if start else trainer.batch_size
        slots = [description.slot(metric) for metric in self._grid.metrics]
        held_from = self._held_from
        validation = None
        if plan.patience_epochs:
            validation = self._sampler(held_from, self._newest(self._n_validation)).batch(_VALIDATED, slots)
            held_from = held_from - self._n_validation
        n_window = plan.epochs * plan.steps_per_epoch * batch_size
        sampler = self._sampler(held_from, self._mix(start, scope, n_window))
        fitted = fit(
            description.network,
            self.shape,
            weights,
            lambda: sampler.batch(batch_size, slots),
            plan,
            validation=validation,
            state=Resumable(state, sampler) if state else None,
        )
        if state:
            state.remove()
        return fitted

    @property
    def _n_validation(self) -> int:
        """Return the bins before the held-out tail that no step of a base training sees."""
        return (self._grid.n_bins - int(self._held_from.max())) // 2

    def _newest(self, n_bins: int) -> WindowMix:
        return WindowMix(recent_share=1.0, recent_bins=n_bins)

    def _sampler(self, held_from: Longs, mix: WindowMix) -> WindowSampler:
        return WindowSampler(self._grid, self.shape, held_from, mix, self._settings.trainer.seed)


def _with_new_metrics(
    weights: Weights, metrics: tuple[str, ...], description: ModelDescription
) -> dict[str, Any]:
    """Return a model's weights, a metric it did not know starting as the unknown one."""
    embedding = weights[_EMBEDDING].clone()
    for metric in description.metrics[len(metrics) :]:
        embedding[description.slot(metric)] = embedding[0]
    return {**weights, _EMBEDDING: embedding}
