"""Where a long training stands, on disk after every epoch, so that a kill costs one epoch at most.

Owns: the state file: one atomic write per epoch, read with weights_only=True and nothing else. With
`training.py` one of the owners of torch. Does not know: how a step is made.

Format 1, `torch.save` of plain types: {"format": 1, "identity": str, "epoch": int, "weights": {name:
tensor}, "optimizer": {...}, "random": str (JSON), "best": {"loss": float, "epoch": int, "weights":
{name: tensor}}}. The identity says which training it is (data, settings, network, seed): the state
of another one is not used. Epochs done so give the weights an unbroken training gives, to the last bit.
"""

import io
import logging
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fleetcast.files import write_atomic

logger = logging.getLogger(__name__)

FORMAT = 1
# what torch's unpickler raises on foreign bytes, and a mapping of another shape
_FOREIGN = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, MemoryError),
    *(RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
)


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
        """Return where this training was interrupted, or None: never begun, another one's, damaged."""
        try:
            content = torch.load(io.BytesIO(self._path.read_bytes()), map_location="cpu", weights_only=True)
            if content["format"] != FORMAT or content["identity"] != self._identity:
                logger.info("state of another training left aside path=%s", self._path)
                return None
            best = BestEpoch(**content["best"])
            return TrainingState(
                **{name: content[name] for name in ("epoch", "weights", "optimizer", "random")}, best=best
            )
        except FileNotFoundError:
            return None
        except _FOREIGN as error:
            logger.warning("training state cannot be used, begun anew reason=%s", str(error)[:200])
            return None

    def write(self, state: TrainingState) -> None:
        """Put a state on disk in one durable step."""
        plain: Mapping[str, Any] = {
            **{"format": FORMAT, "identity": self._identity, "epoch": state.epoch, "weights": state.weights},
            **{"optimizer": state.optimizer, "random": state.random, "best": _shallow(state.best)},
        }
        stream = io.BytesIO()
        torch.save(plain, stream)
        write_atomic(self._path, stream.getvalue())

    def remove(self) -> None:
        """Forget: the training is over."""
        self._path.unlink(missing_ok=True)


def _shallow(best: BestEpoch) -> dict[str, Any]:
    return {"loss": best.loss, "epoch": best.epoch, "weights": best.weights}
