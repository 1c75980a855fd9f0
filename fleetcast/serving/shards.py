"""Who forecasts the parts of a sweep: this process, or shards, processes beside it.

Owns: starting shards, giving each the next part as soon as it is free, starting one again that ended, and the
order of the answers. History, ledger, expert layer and files stay the daemon's: what a shard computes depends
on the window and the model alone, so any number of shards forecasts the same, to the bit, and a restart with
another number needs no migration. Does not know: how a window is forecast (`shard`), what sweeps make of it.

A part whose shard dies goes to another one. A part that has ended two shards goes without a forecast of the
model and is told; while no shard is there, this process forecasts itself.
"""

import json
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from fleetcast.clock import monotonic
from fleetcast.program import child_environment
from fleetcast.schema import HistoryWindow
from fleetcast.serving.model_loader import Champion
from fleetcast.serving.shard import PartForecast, SharedArrays, forecast_part, question, said_by
from fleetcast.settings import Settings
from fleetcast.workers import GrowingPause

logger = logging.getLogger(__name__)

MODULE = "fleetcast.serving.shard"
RAY_MODULE = "fleetcast.cluster.ray_actors"  # only ever a process of its own: nothing here imports Ray
GONE = "gone"
START_LIMIT_S = 120.0  # a shard starts Python and is ready
_MISSING_S = 30.0  # a shard that is started again is back sooner
ANSWER_LIMIT_S = 60.0  # a part takes less than a second; a shard that is stopped answers never
_NEXT_LIMIT_S = 15.0  # after another shard did not answer in this sweep
_STOPPING_S = 5.0  # where the daemon is to end
_LOOK_S = 1.0
_END_S = 2.0  # an idle shard ends as soon as its channel does
_DEATHS_OF_A_PART = 2
_AHEAD = 2  # parts for each shard that are answered before an older one is: bounds what waits in memory
_Item = tuple[int, HistoryWindow]


class Engine(Protocol):
    """Forecasts the parts of a sweep."""

    def forecasts(
        self, parts: Iterator[HistoryWindow], champion: Champion | None, *, with_rules: bool
    ) -> Iterator[tuple[HistoryWindow, PartForecast]]:
        """Yield each part with what is forecast of it, in order."""

    def start(self) -> None:
        """Start what it needs; does not wait."""

    def look_after(self) -> None:
        """Notice what happened to the shards; does not wait."""

    def report(self) -> dict[str, int]:
        """Return how many shards there are to be, are ready, and were started again."""

    @property
    def problem(self) -> str:
        """Return what has been wrong with the shards for a while, "" where all is well."""

    def stop(self) -> None:
        """End what was started."""


class OneProcess:
    """This process forecasts, part by part."""

    def __init__(self, horizon_bins: int) -> None:
        self._horizon_bins = horizon_bins

    def forecasts(
        self, parts: Iterator[HistoryWindow], champion: Champion | None, *, with_rules: bool
    ) -> Iterator[tuple[HistoryWindow, PartForecast]]:
        """Yield each part with what is forecast of it, in order; a model that fails is asked once."""
        predictor = champion.predictor if champion else None
        for part in parts:
            said = forecast_part(part, predictor, self._horizon_bins, with_rules=with_rules)
            predictor = None if said.model_failure else predictor
            yield part, said

    def start(self) -> None:
        """Do nothing: it is there."""

    def look_after(self) -> None:
        """Do nothing: there are no shards."""

    def report(self) -> dict[str, int]:
        """Return that there is one process."""
        return {"wanted": 1, "ready": 1, "restarts": 0}

    problem = ""

    def stop(self) -> None:
        """Do nothing: nothing was started."""


class Shards:
    """Processes beside this one forecast; the methods belong to the thread that sweeps."""

    def __init__(
        self, settings: Settings, program: Sequence[str] = (MODULE,), *, share_process: bool = False
    ) -> None:
        """Start none yet.

        Args:
            program: the module that is a shard, and its first arguments.
            share_process: shards that are started together have one process.
        """
        self._program, self._share_process = program, share_process
        own = settings.forecast
        self._told = {
            "bin_ms": settings.bins.bin_s * 1000,
            "horizon_bins": own.horizon_bins,
            "min_history_s": own.model_min_history_s,
            "threads": own.torch_threads,
        }
        self._n_wanted = own.shards
        self._alone = OneProcess(own.horizon_bins)
        self._shards: list[_Shard] = []
        self._pause = GrowingPause()
        self._restarts = 0
        self._is_begun = False
        self._whole_at = monotonic()  # when all shards were ready, as of the newest look
        self.is_stopping: Callable[[], bool] = lambda: False  # set by the daemon

    def start(self) -> None:
        """Start the processes; they are ready some seconds later."""
        self._is_begun, self._whole_at = True, monotonic()
        self._start_missing()

    def stop(self) -> None:
        """End the processes."""
        self._is_begun = False
        for shard in self._shards:
            shard.channel.close()  # all at once
        deadline = monotonic() + _END_S
        for shard in self._shards:
            shard.end(max(0.0, deadline - monotonic()))  # it keeps nothing
        self._shards.clear()

    def report(self) -> dict[str, int]:
        """Return how many there are to be, how many are ready, and how many were started again."""
        n_ready = sum(shard.is_ready for shard in list(self._shards))  # other threads ask, too
        return {"wanted": self._n_wanted, "ready": n_ready, "restarts": self._restarts}

    @property
    def problem(self) -> str:
        """Return which shards have been missing for a while, "" where none have."""
        told, missing_s = self.report(), monotonic() - self._whole_at
        if told["ready"] == told["wanted"] or missing_s < _MISSING_S:
            return ""
        return f"{told['ready']} of {told['wanted']} shards are ready, for {missing_s:.0f} s"

    def look_after(self) -> None:
        """Notice which shards are ready or gone, and start again what is missing; does not wait."""
        self._look(None)
        for shard in [one for one in self._shards if one.waits_s > START_LIMIT_S and not self._share_process]:
            logger.error(
                "killed a shard that does not become ready pid=%d limit_s=%g", shard.pid, START_LIMIT_S
            )
            self._lose(shard)

    def _look(self, sweep: "_Sweep | None", limit_s: float = 0.0) -> None:
        for shard in wait_for(self._shards, limit_s):
            self._hear(shard, sweep)
        self._start_missing()
        if all(shard.is_ready for shard in self._shards) and len(self._shards) == self._n_wanted:
            self._whole_at = monotonic()

    def forecasts(
        self, parts: Iterator[HistoryWindow], champion: Champion | None, *, with_rules: bool
    ) -> Iterator[tuple[HistoryWindow, PartForecast]]:
        """Yield each part with what is forecast of it, in order."""
        if champion is not None and champion.path is None:  # a model that no other process can load
            yield from self._alone.forecasts(parts, champion, with_rules=with_rules)
            return
        sweep = _Sweep(parts, champion, with_rules)
        for shard in [one for one in self._shards if one.item is not None]:
            self._lose(shard)  # it works for a sweep that failed
        while True:
            self._look(sweep)
            self._give(sweep)
            if sweep.next_index in sweep.done:
                yield sweep.pop()
            elif any(shard.item is not None for shard in self._shards):
                self._look(sweep, _LOOK_S)
                self._end_hung(sweep)
            elif (item := sweep.take()) is not None:  # no shard is there
                self._forecast_alone(sweep, item)
            else:
                return

    def _give(self, sweep: "_Sweep") -> None:
        """Give each free shard a part."""
        for shard in [one for one in self._shards if one.is_free]:
            item = sweep.take(_AHEAD * self._n_wanted)
            if item is None:
                return
            if not shard.ask(item, sweep.champion, with_rules=sweep.with_rules):
                sweep.put_back(item)
                self._lose(shard)

    def _hear(self, shard: "_Shard", sweep: "_Sweep | None") -> None:
        item, said = shard.item, shard.hear()
        if said is not None and item is not None:
            if sweep is not None and shard.cannot_load:  # this process has the model in memory
                self._forecast_alone(sweep, item)
            elif sweep is not None:
                sweep.done[item[0]] = (item[1], said)
            if self.report()["ready"] == self._n_wanted:
                self._pause.reset()
        elif shard.why_lost == GONE:
            self._lose(shard, sweep, _END_S)
        elif shard.why_lost:  # its other half, elsewhere; it gets another one
            self._restarts += 1
            logger.error("a shard was lost, it is started again error=%s", shard.why_lost)
            shard.item = None
            if item is not None and sweep is not None:
                sweep.give_back(item, shard.why_lost)

    def _end_hung(self, sweep: "_Sweep") -> None:
        limit_s = _STOPPING_S if self.is_stopping() else _NEXT_LIMIT_S if sweep.has_hung else ANSWER_LIMIT_S
        for shard in [one for one in self._shards if one.item is not None and one.waits_s > limit_s]:
            logger.error("killed a shard that does not answer pid=%d limit_s=%g", shard.pid, limit_s)
            sweep.has_hung = True
            self._lose(shard, sweep, 0.0)

    def _lose(self, lost: "_Shard", sweep: "_Sweep | None" = None, limit_s: float = 0.0) -> None:
        """Give up a shard, with all of its process; their parts are other ones'.

        Args:
            limit_s: how long to wait for its end, if it may be ending; then it is killed.
        """
        pause_s = self._pause.left_s or self._pause.begin()
        all_lost = [one for one in self._shards if one.process is lost.process]
        for shard in all_lost:
            self._shards.remove(shard)
            self._restarts += 1
            how = shard.end(limit_s)
            if shard.item is not None and sweep is not None:
                sweep.give_back(shard.item, how)
        if all_lost:
            how = f"shards={len(all_lost)} pid={lost.pid} {how}"
            logger.error("shards ended, they are started again after %.0f s %s", pause_s, how)

    def _start_missing(self) -> None:
        if not self._is_begun or self._pause.left_s:
            return
        while n_missing := self._n_wanted - len(self._shards):
            try:
                self._shards += _begin(self._program, self._told, n_missing if self._share_process else 1)
            except OSError as error:  # no memory, no process
                logger.error("a shard cannot be started error=%s", error)
                self._pause.begin()
                return

    def _forecast_alone(self, sweep: "_Sweep", item: _Item) -> None:
        """Forecast a part here: no shard is there."""
        ((part, said),) = self._alone.forecasts(iter([item[1]]), sweep.champion, with_rules=sweep.with_rules)
        sweep.done[item[0]] = (part, said)


def make_engine(settings: Settings, is_stopping: Callable[[], bool] = lambda: False) -> Engine:
    """Return who forecasts, by the settings; it is not started yet."""
    own = settings.forecast
    if own.engine == "local" and own.shards == 1:
        return OneProcess(own.horizon_bins)
    is_ray = own.engine == "ray"
    shards = Shards(
        settings, (RAY_MODULE, "shards", own.ray_address) if is_ray else (MODULE,), share_process=is_ray
    )
    shards.is_stopping = is_stopping
    return shards


class _Sweep:
    """The parts of one sweep: not yet asked, in hand, answered."""

    def __init__(self, parts: Iterator[HistoryWindow], champion: Champion | None, with_rules: bool) -> None:
        self.champion, self.with_rules = champion, with_rules
        self.done: dict[int, tuple[HistoryWindow, PartForecast]] = {}
        self.next_index = 0
        self.has_hung = False
        self._parts = enumerate(parts)
        self._again: deque[_Item] = deque()
        self._deaths: dict[int, int] = {}
        self._n_taken = 0

    def take(self, most_ahead: int | None = None) -> _Item | None:
        """Return the next part to ask for, None where there is none.

        Args:
            most_ahead: parts that may be asked for or answered before the next one in order is.
        """
        if self._again:
            return self._again.popleft()
        if most_ahead is not None and self._n_taken - self.next_index >= most_ahead:
            return None
        item = next(self._parts, None)
        self._n_taken += item is not None
        return item

    def pop(self) -> tuple[HistoryWindow, PartForecast]:
        """Return the next answer in order."""
        self.next_index += 1
        return self.done.pop(self.next_index - 1)

    def put_back(self, item: _Item) -> None:
        """Let another shard forecast a part that was not asked for."""
        self._again.appendleft(item)

    def give_back(self, item: _Item, how: str) -> None:
        """Let another shard forecast a part, or none where it has ended too many."""
        index, part = item
        self._deaths[index] = self._deaths.get(index, 0) + 1
        if self._deaths[index] < _DEATHS_OF_A_PART:
            self.put_back(item)
            return
        failure = RuntimeError(
            f"{self._deaths[index]} shards ended over {len(part.server_names)} servers: {how}"
        )
        self.done[index] = (
            part,
            PartForecast(
                None, None, failure if self.champion else None, failure if self.with_rules else None
            ),
        )


class _Shard:
    """One shard, as the daemon sees it: a channel and two blocks of memory; its process may hold others."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Open the channel; `begin` hands its other end to a process."""
        self.is_ready = self.cannot_load = False
        self.item: _Item | None = None  # in hand
        self.why_lost = ""
        self._asked_at = monotonic()
        self._blocks = [os.memfd_create(f"fleetcast-{name}") for name in ("questions", "answers")]
        ours, self._theirs = socket.socketpair()
        self._questions, self._answers = (SharedArrays(block) for block in self._blocks)
        self.handles = (self._theirs.fileno(), *self._blocks)
        self.channel = Connection(ours.detach())
        self.channel.send_bytes(json.dumps(settings).encode())
        self.process: subprocess.Popen[bytes] | None = None

    def begin(self, process: "subprocess.Popen[bytes]") -> None:
        """Belong to a process, which has the other end now."""
        self.process = process
        self._theirs.close()

    @property
    def pid(self) -> int:
        """Return its process number."""
        return self.process.pid if self.process else 0

    @property
    def is_free(self) -> bool:
        """Whether it can be given a part."""
        return self.is_ready and self.item is None

    @property
    def waits_s(self) -> float:
        """Return for how long it has had a part in hand, or has not become ready; 0 where it is free."""
        return 0.0 if self.is_free else monotonic() - self._asked_at

    def ask(self, item: _Item, champion: Champion | None, *, with_rules: bool) -> bool:
        """Give it a part; return False where it is gone."""
        path = str(champion.path) if champion and champion.path else ""
        try:
            layout = self._questions.put(question(item[1], path, with_rules=with_rules))
            self.channel.send_bytes(json.dumps(layout).encode())
        except OSError:  # gone, or no memory
            return False
        self.item, self._asked_at = item, monotonic()
        return True

    def hear(self) -> PartForecast | None:
        """Return what it says of the part in hand; None where it is ready, has lost the part, or is gone."""
        try:
            answer = json.loads(self.channel.recv_bytes())
            if "layout" in answer:
                self.item = None
                self.cannot_load = "load" in answer["failures"]
                return said_by(self._answers.get(answer["layout"]), answer["failures"])
        except (EOFError, OSError):
            self.is_ready, self.why_lost = False, GONE
            return None
        self.why_lost = answer.get("lost", "")
        self.is_ready, self._asked_at = not self.why_lost, monotonic()
        return None

    def end(self, limit_s: float) -> str:
        """End it with its process, which is killed after a while; return how that ended."""
        assert self.process is not None, "it was begun"
        self.close()
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """Give back what the channel takes."""
        self.channel.close()
        self._theirs.close()
        for block in self._blocks:
            os.close(block)


def _begin(program: Sequence[str], settings: Mapping[str, Any], n: int) -> list[_Shard]:
    """Start one process with so many shards.

    Raises:
        OSError: it cannot be started.
    """
    shards = [_Shard(settings) for _ in range(n)]
    handles = [handle for shard in shards for handle in shard.handles]
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", *program, *map(str, handles)],
            stdin=subprocess.DEVNULL,
            env=child_environment(),
            pass_fds=handles,
        )
    except OSError:
        for shard in shards:
            shard.close()
        raise
    for shard in shards:
        shard.begin(process)
    return shards


def wait_for(shards: Sequence[_Shard], limit_s: float) -> list[_Shard]:
    """Return which shards have said something, or are gone."""
    by_channel = {shard.channel: shard for shard in shards}
    return [by_channel[channel] for channel in wait(list(by_channel), limit_s)]  # type: ignore[index]
