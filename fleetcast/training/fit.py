"""Fit a network to sampled windows: the loss, the schedule, the epochs, and what survives a kill.

Owns: the loss and the optimiser, which epoch was the best, when to stop early, the state file.
This file alone builds a `lightning.Trainer`; Lightning itself writes nothing. Does not know: where
data come from, what a gate is.

The state file costs a killed training one epoch at most. Format 1, one atomic write after every
epoch, `torch.save` of plain types, read with weights_only=True and nothing else:
{"format": 1, "identity": str, "epoch": int, "weights": {name: tensor}, "optimizer": {...},
"random": str (JSON), "best": {"loss": float, "epoch": int, "weights": {name: tensor}}}.
The identity says which training it is (data, settings, network, seed); the state of another
training is not used. A resumed training ends with the weights of an unbroken one, to the last bit.
"""

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from fleetcast.clock import monotonic
from fleetcast.errors import CorruptFile
from fleetcast.files import read_regular, remove_leftover, write_atomic
from fleetcast.forecast.checkpoint import UNREADABLE
from fleetcast.forecast.encoding import GridShape
from fleetcast.forecast.network import NetworkConfig
from fleetcast.forecast.selection import Weights
from fleetcast.schema import QUANTILES, Floats32
from fleetcast.training.network import Batch, StaticNetwork, as_arrays, as_batch, as_tensors, build
from fleetcast.training.sampler import TrainingBatch, WindowSampler

logger = logging.getLogger(__name__)

FORMAT = 1
_GRADIENT_LIMIT = 1.0
_WEIGHT_DECAY = 1e-2
_FINAL_RATE = 0.02  # of the peak, at the end of the cosine
# past, ahead, static, metric, targets, whether a window is replayed
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Fit:
    """How long and how fast to train."""

    epochs: int
    steps_per_epoch: int
    learning_rate: float
    warmup_steps: int
    threads: int
    seed: int
    shows_progress_bar: bool = False
    keep_weight: float = 0.0  # of the distance from the starting weights' answers, on replayed windows
    patience_epochs: int = 0  # epochs without a lower validation loss after which to stop; 0: never


@dataclass(frozen=True)
class BestEpoch:
    """The weights that forecast the validation windows best so far."""

    loss: float
    epoch: int
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class TrainingState:
    """A training after some of its epochs."""

    epoch: int  # epochs done
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    random: str  # of the sampler, as JSON
    best: BestEpoch


class StateFile:
    """The state of one training; written by the trainer only, under its lock."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity

    def read(self) -> TrainingState | None:
        """Return where this training was interrupted; None: never begun, another training's, damaged."""
        try:
            content = torch.load(io.BytesIO(read_regular(self._path)), map_location="cpu", weights_only=True)
            if content["format"] != FORMAT or content["identity"] != self._identity:
                logger.info("state file is of another training, starting anew path=%s", self._path)
                return None
            best = BestEpoch(**content["best"])
            return TrainingState(
                **{name: content[name] for name in ("epoch", "weights", "optimizer", "random")}, best=best
            )
        except FileNotFoundError:
            return None
        except (CorruptFile, *UNREADABLE) as error:
            logger.warning("training state unusable, starting anew reason=%s", str(error)[:200])
            return None

    def write(self, state: TrainingState) -> None:
        """Put a state on disk in one durable step."""
        plain = {**vars(state), "best": dict(vars(state.best))}
        stream = io.BytesIO()
        torch.save({"format": FORMAT, "identity": self._identity, **plain}, stream)
        write_atomic(self._path, stream.getvalue())

    def remove(self) -> None:
        """Delete the file: the training is over."""
        remove_leftover(self._path)


class _Fitting(lightning.LightningModule):
    """Pinball loss over every bin of the horizon, AdamW, warm-up and cosine."""

    def __init__(
        self,
        network: nn.Module,
        config: NetworkConfig,
        grid: GridShape,
        plan: Fit,
        parent: StaticNetwork | None,
    ) -> None:
        super().__init__()
        self.network = network
        self._config, self._plan, self._parent = config, plan, parent
        self._interpolation = torch.from_numpy(grid.interpolation())  # (knot, horizon)
        self._bin_weights = torch.from_numpy(grid.bin_weights())
        self._quantiles = torch.tensor(QUANTILES)
        self._steps_done = 0
        self._optimizer_state: dict[str, Any] = {}
        self.optimizer: torch.optim.Optimizer | None = None

    def resume(self, state: TrainingState) -> None:
        """Continue where a training was interrupted."""
        self.network.load_state_dict(state.weights)
        self._steps_done = state.epoch * self._plan.steps_per_epoch
        self._optimizer_state = state.optimizer

    def loss(self, batch: Tensors) -> Tensor:
        """Return the loss of one batch."""
        past, ahead, static, metric, targets, is_replay = batch
        weights = dict(self.network.named_parameters(remove_duplicate=False))
        answer = StaticNetwork(weights, self._config)(Batch(past, ahead, static, metric))
        bins = torch.einsum("nkq,kh->nhq", answer, self._interpolation)
        loss = pinball(bins, targets, self._bin_weights, self._quantiles)
        if self._parent is None or not bool(is_replay.any()):
            return loss
        replay = Batch(past[is_replay], ahead[is_replay], static[is_replay], metric[is_replay])
        return loss + self._plan.keep_weight * self._distance_moved(replay, answer[is_replay])

    def _distance_moved(self, replay: Batch, answer: Tensor) -> Tensor:
        """Return how far the answers to replayed windows are from those of the starting weights."""
        assert self._parent is not None
        with torch.no_grad():
            before = self._parent(replay)
        return nn.functional.smooth_l1_loss(answer, before)

    def training_step(self, batch: Tensors, _index: int) -> Tensor | None:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss if bool(torch.isfinite(loss)) else None  # None skips the step

    def configure_optimizers(self) -> Any:
        # fused: 400 small tensors one by one take 12 ms a step, fused 3
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self._plan.learning_rate, weight_decay=_WEIGHT_DECAY, fused=True
        )
        if self._optimizer_state:
            optimizer.load_state_dict(self._optimizer_state)
        self.optimizer = optimizer
        n_step, done = self._plan.epochs * self._plan.steps_per_epoch, self._steps_done
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_share(done + step, n_step, self._plan.warmup_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def pinball(answer: Tensor, targets: Tensor, bin_weights: Tensor, quantiles: Tensor) -> Tensor:
    """Return the mean pinball loss of known targets.

    Args:
        answer: (window, horizon, quantile)
        targets: (window, horizon) NaN = unknown.
    """
    is_known = torch.isfinite(targets)
    missed = torch.where(is_known, targets, 0.0)[..., None] - answer
    losses = torch.maximum(quantiles * missed, (quantiles - 1) * missed).mean(dim=-1)
    weights = bin_weights * is_known
    return (losses * weights).sum() / weights.sum().clamp(min=1.0)


def rate_share(step: int, n_step: int, warmup_steps: int) -> float:
    """Return the learning rate at a step as a share of its peak: warm-up, then cosine.

    >>> [round(rate_share(step, 100, 10), 2) for step in (0, 9, 10, 55, 100)]
    [0.1, 1.0, 1.0, 0.51, 0.02]
    """
    warmup_steps = min(warmup_steps, n_step // 2)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, n_step - warmup_steps))
    return _FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2


def _tensors(drawn: TrainingBatch) -> Tensors:
    batch = as_batch(drawn.arrays, drawn.metric_slots)
    rest = torch.from_numpy(drawn.targets), torch.from_numpy(drawn.is_replay)
    return batch.past, batch.ahead, batch.static, batch.metric, *rest


@dataclass(frozen=True)
class Resumable:
    """What a training needs to resume after a kill: its file, and the sampler whose draws go on."""

    file: StateFile
    sampler: WindowSampler


class Epochs(lightning.Callback):
    """Counts the epochs of one training, those before an interruption included."""

    def __init__(
        self,
        fitting: _Fitting,
        n_epoch: int,
        patience: int,
        validation: Tensors | None,
        resumable: Resumable | None,
    ) -> None:
        """Begin, or resume where the state file says.

        Args:
            patience: epochs without a lower validation loss after which to stop; 0: never.
        """
        self._fitting, self._n_epoch, self._patience = fitting, n_epoch, patience
        self._validation, self._resumable = validation, resumable
        self._best = BestEpoch(math.inf, 0, _copy(fitting.network))
        self.done = 0
        self._done_before = 0
        self._started = monotonic()
        interrupted = resumable.file.read() if resumable else None
        if resumable and interrupted:
            fitting.resume(interrupted)
            resumable.sampler.random_state = interrupted.random
            self.done = self._done_before = interrupted.epoch
            self._best = interrupted.best
            logger.info("training resumes epoch=%d/%d", self.done, n_epoch)

    @property
    def is_over(self) -> bool:
        """Whether no epoch is left to train."""
        is_stale = 0 < self._patience <= self.done - self._best.epoch
        return self.done >= self._n_epoch or (self._validation is not None and is_stale)

    def result(self) -> dict[str, Tensor]:
        """Return the weights the training ends with."""
        return dict(self._best.weights)

    def on_train_epoch_end(self, trainer: Any, _module: Any) -> None:
        """Lightning calls this after the last step of an epoch."""
        self.done += 1
        loss = self._validation_loss()
        if loss is None or loss < self._best.loss:
            self._best = BestEpoch(
                math.inf if loss is None else loss, self.done, _copy(self._fitting.network)
            )
        self._log(float(trainer.callback_metrics.get("loss", float("nan"))), loss)
        if self._resumable:
            self._resumable.file.write(self._state(self._resumable))
        if self.is_over and self.done < self._n_epoch:
            logger.info("stopped early epoch=%d best_epoch=%d", self.done, self._best.epoch)
            trainer.should_stop = True

    def _validation_loss(self) -> float | None:
        if self._validation is None:
            return None
        with torch.no_grad():
            loss = float(self._fitting.loss(self._validation))
        return loss if math.isfinite(loss) else math.inf

    def _state(self, resumable: Resumable) -> TrainingState:
        assert self._fitting.optimizer is not None
        return TrainingState(
            self.done,
            _copy(self._fitting.network),
            self._fitting.optimizer.state_dict(),
            resumable.sampler.random_state,
            self._best,
        )

    def _log(self, loss: float, validation_loss: float | None) -> None:
        elapsed, own = monotonic() - self._started, self.done - self._done_before
        logger.info(
            "epoch trained epoch=%d/%d loss=%.4f%s elapsed_s=%.0f remaining_s=%.0f",
            *(self.done, self._n_epoch, loss),
            "" if validation_loss is None else f" validation_loss={validation_loss:.4f}",
            *(elapsed, elapsed / own * (self._n_epoch - self.done)),
        )


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def fit(
    config: NetworkConfig,
    grid: GridShape,
    weights: Weights | None,
    draw: Callable[[], TrainingBatch],
    plan: Fit,
    *,
    validation: TrainingBatch | None = None,
    state: Resumable | None = None,
) -> dict[str, Floats32]:
    """Train and return the weights: the best epoch's by the validation windows, else the last ones.

    Args:
        weights: where to start from; None = fresh.
        draw: returns the next batch.
        validation: windows no batch holds.
        state: notes each epoch, and says where an interrupted training resumes.
    """
    torch.set_num_threads(plan.threads)
    for name in ("lightning.pytorch", "lightning.fabric"):  # advertisements and hardware notes
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(plan.seed)
    with warnings.catch_warnings():
        # the libraries warn of loaders and hyperparameters that this training has none of
        warnings.simplefilter("ignore")
        network = build(config)
        start = None if weights is None else as_tensors(weights)
        if start is not None:
            network.load_state_dict(start)
        parent = StaticNetwork(start, config) if start is not None and plan.keep_weight > 0 else None
        fitting = _Fitting(network, config, grid, plan, parent)
        epochs = Epochs(
            fitting,
            plan.epochs,
            plan.patience_epochs,
            _tensors(validation) if validation else None,
            state,
        )
        if epochs.is_over:
            return as_arrays(epochs.result())
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=plan.epochs - epochs.done,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=plan.shows_progress_bar,
            gradient_clip_val=_GRADIENT_LIMIT,
            callbacks=[epochs],
        )
        trainer.fit(fitting, train_dataloaders=_Steps(draw, plan.steps_per_epoch))
    return as_arrays(epochs.result())


class _Steps:
    """One epoch of batches; Lightning takes any iterable with a length."""

    def __init__(self, draw: Callable[[], TrainingBatch], count: int) -> None:
        self._draw, self._count = draw, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensors]:
        for _ in range(self._count):
            yield _tensors(self._draw())
