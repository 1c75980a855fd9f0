"""What the inference daemon says: the version it serves, and the load of its fleet.

Owns: what is read out of `/status` and `/predictions/current?fields=current` (the fleet's load now, and
as it is expected in the next hours), and a thread for each question, so that an inference daemon that
hangs never delays a stop of this one.
Does not know: HTTP (`sources.client`), which load is too much (`quiet`).
"""

import logging
import math
import queue
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from fleetcast.clock import from_ms, iso_z, monotonic, parse_plain_utc
from fleetcast.errors import DaemonAway, FleetcastError
from fleetcast.loop import Stop
from fleetcast.outbound import LOOPBACK
from fleetcast.sources.client import WHOLE, DaemonClient
from fleetcast.workers import Workers

logger = logging.getLogger(__name__)

CPU, MEM = "cpu_pct", "mem_pct"
FLEET_AHEAD = "fleet_ahead"  # of `/status`
_MOST_STEPS, _SHORTEST_S, _LONGEST_S, _MOST_PERCENT = 48, 300, 7200, 1e6
_LOOK_S = 0.05  # between two looks for a stop
_MOST_PROBLEMS, _MOST_CHARS = 10, 500

_Answer = dict[str, Any] | FleetcastError


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """Means over the live servers; None = no live server sends it."""

    live_servers: int | None = None
    cpu_percent: float | None = None
    mem_percent: float | None = None
    away: str = ""  # why the inference daemon could not be asked

    @property
    def avg_cpu(self) -> float:
        """Return the mean CPU to compare with a limit: one that no server sends is below any."""
        return -math.inf if self.cpu_percent is None else self.cpu_percent

    @property
    def avg_mem(self) -> float:
        """Return the mean memory likewise."""
        return -math.inf if self.mem_percent is None else self.mem_percent


@dataclass(frozen=True, slots=True)
class FleetAhead:
    """Means over the live servers that the inference daemon expects, hour by hour."""

    start_s: float = 0.0  # of the first step, seconds since 1970
    step_s: float = 3600.0
    means: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # percent, by metric: CPU, MEM
    missing: str = "the inference daemon says nothing of the hours ahead"  # why there are none, or ""

    @property
    def n_steps(self) -> int:
        """How many steps are known."""
        return min(map(len, self.means.values()), default=0)

    def start_of(self, step: int) -> float:
        """Return when a step begins, in seconds since 1970."""
        return self.start_s + step * self.step_s

    def as_json(self) -> dict[str, Any] | None:
        """Return what `fleet_ahead` reads."""
        if self.missing:
            return None
        start = iso_z(from_ms(int(self.start_s * 1000)))
        return {
            "start": start,
            "step_s": self.step_s,
            **{name: list(own) for name, own in self.means.items()},
        }


def fleet_ahead(document: Mapping[str, Any]) -> FleetAhead:
    """Return what a `/status` says of the hours ahead, or in words why that is of no use."""
    raw = document.get(FLEET_AHEAD)
    if not isinstance(raw, Mapping):
        return FleetAhead()
    lists = {name: raw[name] for name in (CPU, MEM) if raw.get(name) is not None}
    try:
        start_s = parse_plain_utc(raw["start"]).timestamp()
        step_s = _in_bounds(raw["step_s"], _SHORTEST_S, _LONGEST_S)
        means = {
            name: tuple(_in_bounds(item, 0, _MOST_PERCENT) for item in own) for name, own in lists.items()
        }
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return FleetAhead(
            missing="the forecast of the fleet's hours holds something else than numbers and a time"
        )
    lengths = {len(own) for own in means.values()}
    if len(lengths) != 1 or not 2 <= min(lengths) <= _MOST_STEPS:
        shown = ", ".join(map(str, sorted(lengths))) or "no"
        return FleetAhead(
            missing=f"the forecast of the fleet has {shown} hours, 2 to {_MOST_STEPS} alike are needed"
        )
    return FleetAhead(start_s, step_s, means, missing="")


def _in_bounds(value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"expected {low} to {high}")
    return float(value)


def fleet_load(document: Mapping[str, Any]) -> FleetLoad:
    """Return the load that an answer of `/predictions/current` shows.

    Raises:
        DaemonAway: the answer has another shape.
    """
    predictions = document.get("predictions")
    if not isinstance(predictions, Mapping):
        raise DaemonAway("the inference daemon's predictions have another shape: no `predictions`")
    current: list[Mapping[str, Any]] = [
        server["current"]
        for server in predictions.values()
        if isinstance(server, Mapping)
        and isinstance(server.get("current"), Mapping)
        and server.get("stale") is not True
    ]
    return FleetLoad(len(current), _mean(current, CPU), _mean(current, MEM))


def _mean(current: list[Mapping[str, Any]], metric: str) -> float | None:
    values = [value for server in current if math.isfinite(value := finite(server.get(metric)))]
    return sum(values) / len(values) if values else None


def finite(value: object) -> float:
    """Return what is a finite number, else NaN: JSON has whole numbers of any length."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return math.nan
    return float(value)


class Inquiry:
    """Asks one daemon; each question is one bounded request. Not thread safe."""

    def __init__(self, url: str, timeout_s: float) -> None:
        DaemonClient(url, timeout_s=timeout_s).close()  # refuses a wrong address now, not at each check
        self._url = url
        self._timeout_s = timeout_s
        self._is_on_this_host = urlsplit(url).hostname in LOOPBACK
        self.served_version: str | None = None  # None: not known
        self.pids: tuple[int, ...] = ()  # of the daemon, where it runs on this host
        self.buffer_folder = ""  # where it keeps its buffer, as it says
        self.ahead = FleetAhead()  # what it expects of its fleet
        self.problems: tuple[str, ...] = ()  # what is wrong with it, in its words or ours
        self._told: tuple[str, ...] = ()

    def look(self, stop: Stop) -> None:
        """Ask which version is served and by which process; a daemon that is away leaves both unknown."""
        self.served_version, self.pids, self.buffer_folder, self.ahead = None, (), "", FleetAhead()
        try:
            status = self._ask("/status", stop)
        except DaemonAway as error:
            logger.warning("inference daemon away error=%s", error)
            self.problems = (f"it cannot be asked: {error}",)
            return
        self._note_problems(status)
        self.ahead = fleet_ahead(status)
        model, pid = status.get("model"), status.get("pid")
        version = model.get("version") if isinstance(model, dict) else None
        self.served_version = version if isinstance(version, str) else None
        if self._is_on_this_host and isinstance(pid, int) and not isinstance(pid, bool) and pid > 0:
            self.pids = (pid,)
        self._note_folder(status)

    def _note_problems(self, status: Mapping[str, Any]) -> None:
        """Take what the daemon says of itself, and log it when it changed."""
        listed = status.get("problems")
        texts = listed if isinstance(listed, list) else []
        self.problems = tuple(str(text)[:_MOST_CHARS] for text in texts[:_MOST_PROBLEMS])
        for text in self.problems:
            if text not in self._told:
                logger.warning("the inference daemon says: %s", text)
        self._told = self.problems

    def why_away(self, stop: Stop) -> str:
        """Return why the daemon cannot be asked, or ""."""
        try:
            self._note_folder(self._ask("/status", stop))
        except DaemonAway as error:
            return str(error)
        return ""

    def _note_folder(self, status: Mapping[str, Any]) -> None:
        buffer = status.get("buffer")
        folder = buffer.get("folder") if isinstance(buffer, Mapping) else None
        self.buffer_folder = folder if isinstance(folder, str) else ""

    def fleet(self, stop: Stop) -> FleetLoad:
        """Return the load of the live servers, or why it is not known."""
        try:
            return fleet_load(self._ask("/predictions/current?fields=current", stop))
        except DaemonAway as error:
            return FleetLoad(away=str(error))

    def _ask(self, path: str, stop: Stop) -> dict[str, Any]:
        answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        Workers().thread("inquiry", partial(self._get, path, answers), once=True).start()
        # the client's own limit does not end the look for the address of a name
        give_up_at = monotonic() + WHOLE * self._timeout_s + _LOOK_S
        while True:
            try:
                answer = answers.get(timeout=_LOOK_S)
            except queue.Empty:
                if stop.is_requested:
                    raise DaemonAway(f"{self._url}{path} was not waited for: {stop.reason}") from None
                if monotonic() > give_up_at:
                    raise DaemonAway(
                        f"{self._url}{path} was not answered whole within {WHOLE * self._timeout_s:g} s"
                    ) from None
                continue
            if isinstance(answer, FleetcastError):
                raise answer
            return answer

    def _get(self, path: str, answers: "queue.SimpleQueue[_Answer]") -> None:
        try:
            with DaemonClient(self._url, timeout_s=self._timeout_s) as client:
                answers.put(client.get(path))
        except FleetcastError as error:
            answers.put(error)
        except BaseException as error:  # without an answer `_ask` would wait for ever
            answers.put(DaemonAway(f"{self._url}{path} could not be asked: {error!r}"))
            raise
