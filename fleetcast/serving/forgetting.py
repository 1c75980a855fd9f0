"""Servers that people want forgotten: everything this daemon keeps of them goes, one step a cycle.

Owns: the order in which it goes: days of records and of settled forecasts, open forecasts, what forecasts
taught, rejected records; then the name is free. Does not know: orders (`exclusions.py`), how a day is written
again (`storage/upkeep.py`), what the retraining daemon keeps.

A server that is being forgotten is left out of everything as an excluded one, so nothing new is made of it
meanwhile. Each step leaves every file whole and finds by itself what is still to be done: after a kill
the next start begins again, and what was done is only looked at. Main thread alone.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from itertools import islice

from fleetcast.clock import SystemClock, iso_z
from fleetcast.exclusions import Exclusions, Forgotten, note_forgotten
from fleetcast.serving.roster import Fleet
from fleetcast.storage.store import DataBuffer

logger = logging.getLogger(__name__)

_AT_ONCE = 100  # names; the child that writes a day is told them as one argument


class Forgetting:
    """Carries out the orders that wait."""

    def __init__(
        self,
        orders: Exclusions,
        fleet: Fleet,
        buffer: DataBuffer,
        forget: Sequence[Callable[[Collection[str]], bool]],
    ) -> None:
        """Do nothing yet.

        Args:
            forget: what each other part does about some servers, once their stored rows are gone; False
                where it has to wait.
        """
        self._orders = orders
        self._fleet = fleet
        self._buffer = buffer
        self._forget = tuple(forget)

    def step(self) -> None:
        """Do one thing more; cheap where no order waits.

        Raises:
            AlreadyRunning: a command writes the list at this moment; call it again.
            StorageFull, StorageBroken: the same, once there is room.
        """
        waiting = dict(islice(self._orders.being_forgotten().items(), _AT_ONCE))
        new = {name: one for name, one in waiting.items() if not one.before}
        if new:
            self._begin(new)
            return
        if not waiting:
            return
        drops = {name: one.before_ms for name, one in waiting.items()}
        if not self._buffer.forget(drops, self._fleet.clock.now()):
            return
        if all([forget(waiting) for forget in self._forget]):
            note_forgotten(self._orders.folder, waiting, records_gone=iso_z(SystemClock().now()))
            logger.info("servers forgotten n=%d first=%s", len(waiting), ascii(next(iter(waiting))))

    def _begin(self, new: dict[str, Forgotten]) -> None:
        """Write down from when on records count again: the order, or the newest record of recorded data."""
        if self._fleet.is_data_clock:
            before = iso_z(self._fleet.clock.now() + timedelta(seconds=1))
            note_forgotten(self._orders.folder, new, before=before)
            return
        for moment in {one.at for one in new.values()}:
            note_forgotten(
                self._orders.folder,
                {name: one for name, one in new.items() if one.at == moment},
                before=moment,
            )
