"""Shards and trainings as Ray actors: a process that speaks to a Ray cluster for a daemon or a trainer.

    python -m fleetcast.cluster.ray_actors shards ADDRESS HANDLES...      started by the inference daemon
    python -m fleetcast.cluster.ray_actors train REQUEST JOB ANSWER       started by the trainer

Owns: joining the cluster; one actor for each shard, carrying a model's bytes to where the actor is, and
another actor for one that is lost; one actor for a training, its progress, and what becomes of a training
whose machine has no room, is lost or has too little memory. It is a process apart, since Ray ends a process
whose node or head is lost for long: the daemon then forecasts by itself and starts this process again, the
trainer then trains by itself. Does not know: sweeps, parts, what clients get (`serving/shards`); how a window
is forecast (`serving/shard`); what a job is (`training/elsewhere`), who judges a model.

An actor keeps nothing but models; Ray starts it where there is room. Each machine has this same package and
Python version. A training's actor writes no file that anyone reads: one that lives on behind a broken network
answers to nothing.
"""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import platform
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from fleetcast.clock import monotonic, sleep
from fleetcast.errors import ExitCode, FleetcastError
from fleetcast.loop import configure_logging
from fleetcast.program import child_environment
from fleetcast.schema import Floats32
from fleetcast.serving.shard import Answer, Answerer, Lost, Shard, die_with_parent, shards_of
from fleetcast.settings import LoggingSettings
from fleetcast.workers import GrowingPause, Workers

logger = logging.getLogger("fleetcast.cluster.ray_actors")  # not "__main__"

NAMESPACE = "fleetcast"
_MODELS_KEPT = 2
_LOOK_S = 1.0
_STARTING_S = 15.0  # that a process takes on a machine which has room; from then on a training waits
_NEWS_S = 10.0
_JOIN_S = 60  # that a trainer waits for the cluster
_MACHINES_TRIED, _STARTS_TRIED = 2, 5
_MOST_CHARS = 500  # of a line of a training's log
_ID_CHARS = 12
_Said = tuple[dict[str, NDArray[Any]], dict[str, str]]


class Actor:
    """What runs on a node."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Import what a forecast needs."""
        self._answerer = Answerer(settings)

    def ready(self) -> int:
        """Return the process number, once there is one."""
        return os.getpid()

    def answer(self, asked: Mapping[str, Any], values: Floats32, model: bytes | None) -> _Said:
        """Return what is said of a part.

        Args:
            model: the bytes of the model that the question names, None for none.
        """
        if model is None or self._answerer.knows(asked["model"]):
            return self._answerer.answer(asked, values)
        with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
            file.write(model)
            file.flush()
            return self._answerer.answer(asked, values, Path(file.name))


class Models:
    """Models that are in the cluster's memory, by file; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._references: dict[str, Any] = {}

    def reference(self, path: str) -> Any:
        """Return what an actor gets the bytes by, None for no model.

        Raises:
            OSError: the file cannot be read.
        """
        if not path:
            return None
        with self._lock:
            if path not in self._references:
                self._references[path] = ray.put(Path(path).read_bytes())
                for old in list(self._references)[:-_MODELS_KEPT]:
                    del self._references[old]
            return self._references[path]


class RayShard(Shard):
    """Passes questions on to an actor."""

    models = Models()

    def prepare(self, settings: Mapping[str, Any]) -> Answer:
        """Return what answers, once the cluster has room for an actor."""
        actor = _start_actor(settings)

        def answer(asked: Mapping[str, Any], values: Floats32) -> _Said:
            try:
                model = self.models.reference(asked["model"])
            except OSError as error:  # the daemon loaded it: the file was taken away meanwhile
                model, asked = None, {**asked, "model": ""}
                missing = {"load": str(error)}
            else:
                missing = {}
            try:
                arrays, failures = ray.get(actor.answer.remote(asked, values, model))
            except ray.exceptions.RayError as error:
                raise Lost(_short(error)) from error
            return arrays, failures | missing

        return answer


def _start_actor(settings: Mapping[str, Any]) -> Any:
    """Return an actor that is ready, after as long as it takes."""
    pause = GrowingPause()
    while True:
        kind: Any = ray.remote(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")(Actor)
        actor = kind.remote(settings)
        try:
            ray.get(actor.ready.remote())
        except ray.exceptions.RayError as error:
            logger.error("an actor ended before it was ready error=%s", _short(error))
            sleep(pause.begin())
        else:
            return actor


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage()[:_MOST_CHARS])


class TrainingActor:
    """Carries out one training on a node; `train` and `news` run side by side."""

    def __init__(self, nice: int) -> None:
        """Keep what is logged from now on."""
        os.nice(nice)
        self._lines = _Lines()
        root = logging.getLogger()
        root.addHandler(self._lines)
        root.setLevel(logging.INFO)

    def ready(self) -> str:
        """Return where this is, once it is there."""
        return f"{platform.node()} node={ray.get_runtime_context().get_node_id()[:_ID_CHARS]}"

    def train(self, job: NDArray[Any]) -> tuple[dict[str, Any], bytes]:
        """Return what becomes of a job: why it failed, or its checkpoint."""
        from fleetcast.training.elsewhere import train_job  # torch: no shard needs it

        try:
            return {}, train_job(job.tobytes())
        except FleetcastError as error:  # as data: Ray cannot carry an exception that takes more than a text
            return {"failed": str(error), "exit_code": int(error.exit_code)}, b""

    def news(self, n_known: int) -> list[str]:
        """Return what was logged since."""
        return self._lines.kept[n_known:]


class NoRoom(Exception):
    """Raised where the cluster has no machine for a training."""


def train(job: NDArray[Any], told: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Return what becomes of a job: where and as which checkpoint, or why not.

    A machine that is lost costs what it did; another one begins anew, once.

    Args:
        told: `cpus`, `memory_bytes`, `nice`, `room_s`: what it needs, and how long it may wait for that.
    """
    lost: list[str] = []
    reference = ray.put(job)
    for _ in range(_MACHINES_TRIED):
        try:
            actor, node = _place(told)
        except NoRoom as error:
            lost.append(str(error))
            break
        logger.info("a training begins on another machine %s", node)
        try:
            said, checkpoint = _follow(actor, actor.train.remote(reference))
            return {"node": node, **said}, checkpoint
        except ray.exceptions.OutOfMemoryError:
            hint = "lower trainer.max_cells, or give that machine more"
            return _failure(f"the training ran out of memory on {node} ({hint})"), b""
        except ray.exceptions.RayTaskError as error:
            return _failure(f"the training failed on {node}: {_short(error)}"), b""
        except ray.exceptions.RayError as error:
            lost.append(f"the training was lost with {node}: {_short(error)}")
            logger.warning("%s", lost[-1])
            _kill(actor)  # it may come back: no two train at once
    return {"away": "; ".join(lost)}, b""


def _kill(actor: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(actor)


def _failure(why: str) -> dict[str, Any]:
    return {"failed": why, "exit_code": int(ExitCode.FAILED)}


def _place(told: Mapping[str, Any]) -> tuple[Any, str]:
    """Return an actor for a training, and where it is.

    Raises:
        NoRoom: no machine is large enough, or none was free for as long as the training may wait.
    """
    pause, why = GrowingPause(), ""
    for _ in range(_STARTS_TRIED):
        try:
            return _start_training(told)
        except ray.exceptions.RayError as error:  # a machine that was lost counts for half a minute
            why = _short(error)
            logger.warning("a process for the training ended before it was ready error=%s", why)
            sleep(pause.begin())
    raise NoRoom(f"no process for the training became ready in the Ray cluster: {why}")


def _start_training(told: Mapping[str, Any]) -> tuple[Any, str]:
    needs = f"{told['cpus']} CPU and {told['memory_bytes'] / 1e9:.1f} GB of memory"
    _require_machine(told, needs)
    kind: Any = ray.remote(TrainingActor)
    options = {"num_cpus": told["cpus"], "memory": told["memory_bytes"], "max_restarts": 0}
    actor = kind.options(max_concurrency=2, scheduling_strategy="SPREAD", **options).remote(told["nice"])
    ready, began, is_told = actor.ready.remote(), monotonic(), False
    while not ray.wait([ready], timeout=_LOOK_S)[0]:
        waited_s = monotonic() - began
        try:
            _require_machine(told, needs)
            if waited_s > told["room_s"]:
                raise NoRoom(f"no machine of the Ray cluster had {needs} free for {told['room_s']:g} s")
        except NoRoom:
            _kill(actor)
            raise
        if waited_s > _STARTING_S and not is_told:
            logger.warning("no machine of the Ray cluster has %s free: the training waits", needs)
            is_told = True
    return actor, str(ray.get(ready))


def _require_machine(told: Mapping[str, Any], needs: str) -> None:
    cluster: Any = ray
    wanted = {"CPU": told["cpus"], "memory": told["memory_bytes"]}
    alive = [node["Resources"] for node in cluster.nodes() if node["Alive"]]
    if not any(all(has.get(name, 0) >= least for name, least in wanted.items()) for has in alive):
        raise NoRoom(f"no machine of the Ray cluster has {needs}")


def _follow(actor: Any, answer: Any) -> Any:
    """Return the answer of an actor, and log what it logs meanwhile.

    Raises:
        ray.exceptions.RayError: it is lost, or failed.
    """
    n_told, is_over = 0, False
    while not is_over:
        is_over = bool(ray.wait([answer], timeout=_LOOK_S)[0])
        with contextlib.suppress(ray.exceptions.RayError):  # busy, or gone: then the answer says so
            for line in ray.get(actor.news.remote(n_told), timeout=_NEWS_S):
                n_told += 1
                logger.info("there | %s", line)
    return ray.get(answer)


def _join(address: str) -> str:
    """Join the cluster; return why that cannot be, or ""."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": {"PYTHONPATH": child_environment()["PYTHONPATH"]}},
        )
    except (ConnectionError, RuntimeError) as error:
        return f"no Ray cluster at {address}: {_short(error)} (`ray start --head` begins one)"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # after Ray, which sets its own
        signal.signal(number, signal.SIG_IGN)
    return ""


def main(argv: Sequence[str]) -> int:
    """Be the shards of the daemon, or the training of the trainer, that started this process; end with it."""
    die_with_parent()
    what, *arguments = argv
    return _be_shards(*arguments) if what == "shards" else _train(*arguments)


def _train(request: str, job: str, answer: str) -> int:
    told = json.loads(request)
    configure_logging(None, LoggingSettings(level=told["level"]))
    signal.alarm(_JOIN_S)  # ends this process: Ray tries for minutes, and hears no other signal meanwhile
    away = _join(told["address"])
    signal.alarm(0)
    content = np.frombuffer(mmap.mmap(int(job), 0, prot=mmap.PROT_READ), np.uint8)
    said, checkpoint = ({"away": away}, b"") if away else train(content, told)
    if checkpoint:
        said["sha256"] = hashlib.sha256(checkpoint).hexdigest()
    with os.fdopen(int(answer), "wb") as stream:
        stream.write(json.dumps(said).encode() + b"\n" + checkpoint)
    os._exit(0)  # as below


def _be_shards(address: str, *handles: str) -> int:
    shards, parent = shards_of(handles, RayShard), os.getppid()
    if away := _join(address):
        print(away, file=sys.stderr)
        return 1
    workers = Workers()
    threads = [workers.thread(f"shard {number}", one.run, once=True) for number, one in enumerate(shards)]
    for thread in threads:
        thread.start()
    # a thread may wait for the cluster, and not see that the daemon is gone; without one the daemon starts
    # this process again
    while os.getppid() == parent and all(thread.is_alive for thread in threads):
        sleep(_LOOK_S)
    os._exit(0)  # Ray ends the actors of a process that is gone; its own farewell may wait for a lost node


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
