"""When recorded time has to stand still: only with the data clock.

Owns: the answer to "may more records come in now?". Records that arrived while a sweep is due
would let the clock run past it; a training is given the time it would have had in life.
Does not know: how long a request waits before it is told to come back (`server`).
"""

from collections.abc import Callable
from pathlib import Path

from fleetcast.clock import Clock, monotonic
from fleetcast.files import is_locked
from fleetcast.forecast.registry import ATTEMPT_LOCK, TRAINER_LOCK
from fleetcast.serving.history import BinHistory

_PROBE_S = 0.1  # asking takes the lock for an instant: not more often than needed


class TrainingProbe:
    """Whether a training runs, on this host or in another container with the same folder."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self._locks = tuple(checkpoint_dir / name for name in (ATTEMPT_LOCK, TRAINER_LOCK))
        self._asked_at = float("-inf")
        self._is_running = False

    def __call__(self) -> bool:
        """Return whether the export, the trainer or its verdict is under way; safe from any thread."""
        if monotonic() - self._asked_at >= _PROBE_S:
            self._is_running = any(is_locked(path) for path in self._locks)
            self._asked_at = monotonic()
        return self._is_running


class DataHold:
    """Holds records back while bins are due, are worked off, or a training runs."""

    def __init__(
        self,
        history: BinHistory,
        clock: Clock,
        is_sweeping: Callable[[], bool],
        is_training: Callable[[], bool],
    ) -> None:
        self._history = history
        self._clock = clock
        self._is_sweeping = is_sweeping
        self._is_training = is_training

    def __call__(self) -> bool:
        """Return whether records have to wait."""
        return self._is_sweeping() or self._history.has_due(self._clock.now()) or self._is_training()
