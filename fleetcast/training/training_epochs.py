"""What happens between the epochs of a training: validation, the state on disk, the early stop.

Owns: which epoch was the best, when to stop, one log line per epoch. With `training.py` an owner of
torch and lightning. Does not know: networks, losses, schedules, where batches come from.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, Protocol

import lightning
import torch
from torch import Tensor, nn

from fleetcast.clock import monotonic
from fleetcast.training.training_state import BestEpoch, StateFile, TrainingState

logger = logging.getLogger(__name__)

# past, ahead, static, metric, targets, whether a window is replayed
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class RandomState(Protocol):
    """A source of batches that can be set back to where it stood."""

    random_state: str


class Fitting(Protocol):
    """The training that goes on between the epochs."""

    network: nn.Module
    optimizer: torch.optim.Optimizer | None

    def loss(self, batch: Tensors) -> Tensor: ...

    def go_on(self, state: TrainingState) -> None: ...


@dataclass(frozen=True)
class Resumable:
    """What lets a training go on after a kill: its file, and the sampler whose draws it continues."""

    file: StateFile
    sampler: RandomState


class Epochs(lightning.Callback):
    """Counts the epochs of one training, those before an interruption included."""

    def __init__(
        self,
        fitting: Fitting,
        n_epoch: int,
        patience: int,
        validation: Tensors | None,
        resumable: Resumable | None,
    ) -> None:
        """Begin, or go on where the state file says.

        Args:
            patience: epochs without a lower validation loss after which to stop; 0: never.
        """
        self._fitting, self._n_epoch, self._patience = fitting, n_epoch, patience
        self._validation, self._resumable = validation, resumable
        self._best = BestEpoch(math.inf, 0, _copied(fitting.network))
        self.done = 0
        self._done_before = 0
        self._started = monotonic()
        interrupted = resumable.file.read() if resumable else None
        if resumable and interrupted:
            fitting.go_on(interrupted)
            resumable.sampler.random_state = interrupted.random
            self.done = self._done_before = interrupted.epoch
            self._best = interrupted.best
            logger.info("training goes on where it was interrupted epoch=%d/%d", self.done, n_epoch)

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
                math.inf if loss is None else loss, self.done, _copied(self._fitting.network)
            )
        self._tell(float(trainer.callback_metrics.get("loss", float("nan"))), loss)
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
            _copied(self._fitting.network),
            self._fitting.optimizer.state_dict(),
            resumable.sampler.random_state,
            self._best,
        )

    def _tell(self, loss: float, validation_loss: float | None) -> None:
        elapsed, own = monotonic() - self._started, self.done - self._done_before
        logger.info(
            "epoch trained epoch=%d/%d loss=%.4f validation_loss=%.4f elapsed_s=%.0f remaining_s=%.0f",
            *(self.done, self._n_epoch, loss, math.nan if validation_loss is None else validation_loss),
            *(elapsed, elapsed / own * (self._n_epoch - self.done)),
        )


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
