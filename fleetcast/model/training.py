"""Fit a network to sampled windows: steps, loss, schedule.

Owns: the loss and the optimiser; with `forecaster.py` and `network.py` the owner of torch, and
the only one that builds a `lightning.Trainer`. Everything stays in memory: no logger, no
checkpoint, no file. Does not know: where data come from, what a gate is.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from fleetcast.clock import monotonic
from fleetcast.model.gridshape import GridShape
from fleetcast.model.network import Batch, NetworkConfig, StaticNetwork, as_batch, build
from fleetcast.model.sampler import TrainingBatch
from fleetcast.schema import QUANTILES

logger = logging.getLogger(__name__)

_GRADIENT_LIMIT = 1.0
_WEIGHT_DECAY = 1e-2
_FINAL_RATE = 0.02  # of the peak, at the end of the cosine

_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # past, ahead, static, metric, targets


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


def fit(
    config: NetworkConfig,
    grid: GridShape,
    weights: Mapping[str, Tensor] | None,
    draw: Callable[[], TrainingBatch],
    plan: Fit,
) -> dict[str, Tensor]:
    """Train and return the weights.

    Args:
        weights: where to start from; None = fresh.
        draw: returns the next batch.
    """
    torch.set_num_threads(plan.threads)
    for name in ("lightning.pytorch", "lightning.fabric"):  # advertisements and hardware notes
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(plan.seed)
    with warnings.catch_warnings():
        # the libraries warn of loaders and hyperparameters that this training has none of
        warnings.simplefilter("ignore")
        network = build(config)
        if weights is not None:
            network.load_state_dict(dict(weights))
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=plan.epochs,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=plan.shows_progress_bar,
            gradient_clip_val=_GRADIENT_LIMIT,
            callbacks=[_EpochLog(plan.epochs)],
        )
        trainer.fit(
            _Fitting(network, config, grid, plan), train_dataloaders=_Steps(draw, plan.steps_per_epoch)
        )
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


class _Steps:
    """One epoch of batches; Lightning takes any iterable with a length."""

    def __init__(self, draw: Callable[[], TrainingBatch], count: int) -> None:
        self._draw, self._count = draw, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[_Tensors]:
        for _ in range(self._count):
            drawn = self._draw()
            batch = as_batch(drawn.arrays, drawn.metric_slots)
            yield batch.past, batch.ahead, batch.static, batch.metric, torch.from_numpy(drawn.targets)


class _Fitting(lightning.LightningModule):
    """Pinball loss over every bin of the horizon, AdamW, warm-up and cosine."""

    def __init__(self, network: nn.Module, config: NetworkConfig, grid: GridShape, plan: Fit) -> None:
        super().__init__()
        self.network = network
        self._config, self._plan = config, plan
        self._interpolation = torch.from_numpy(grid.interpolation())  # (knot, horizon)
        self._bin_weights = torch.from_numpy(grid.bin_weights())
        self._quantiles = torch.tensor(QUANTILES)

    def training_step(self, batch: _Tensors, _index: int) -> Tensor | None:
        past, ahead, static, metric, targets = batch
        weights = dict(self.network.named_parameters(remove_duplicate=False))
        answer = StaticNetwork(weights, self._config)(Batch(past, ahead, static, metric))
        bins = torch.einsum("nkq,kh->nhq", answer, self._interpolation)
        loss = pinball(bins, targets, self._bin_weights, self._quantiles)
        self.log("loss", loss, prog_bar=True)
        return loss if bool(torch.isfinite(loss)) else None  # None skips the step

    def configure_optimizers(self) -> Any:
        # fused: 400 small tensors one by one take 12 ms a step, fused 3
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self._plan.learning_rate, weight_decay=_WEIGHT_DECAY, fused=True
        )
        n_step = self._plan.epochs * self._plan.steps_per_epoch
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_share(step, n_step, self._plan.warmup_steps)
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


class _EpochLog(lightning.Callback):
    """One log line per epoch."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._started = monotonic()

    def on_train_epoch_end(self, trainer: Any, _module: Any) -> None:
        done = trainer.current_epoch + 1
        elapsed = monotonic() - self._started
        logger.info(
            "epoch trained epoch=%d/%d loss=%.4f elapsed_s=%.0f remaining_s=%.0f",
            done,
            self._epochs,
            float(trainer.callback_metrics.get("loss", float("nan"))),
            elapsed,
            elapsed / done * (self._epochs - done),
        )
