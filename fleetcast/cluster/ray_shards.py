"""Shards as Ray actors: a process passes the daemon's questions on to actors anywhere in a Ray cluster.

    python -m fleetcast.cluster.ray_shards ADDRESS HANDLES...        started by the daemon (`--engine ray`)

Owns: joining the cluster, one actor for each shard, carrying a model's bytes to where the actor is, and
another actor for one that is lost. It is a process apart, since Ray ends a process whose node or head is
lost for long: the daemon then forecasts by itself and starts this process again. Does not know: sweeps,
parts, what clients get (`serving/shards`); how a window is forecast (`serving/shard`).

An actor needs one CPU of the cluster and keeps nothing but models; Ray starts it where there is room. Each
machine has this same package and Python version.
"""

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from numpy.typing import NDArray

from fleetcast.clock import sleep
from fleetcast.program import child_environment
from fleetcast.schema import Floats32
from fleetcast.serving.shard import Answer, Answerer, Lost, Shard, die_with_parent, shards_of
from fleetcast.workers import GrowingPause, Workers

logger = logging.getLogger(__name__)

NAMESPACE = "fleetcast"
_MODELS_KEPT = 2
_LOOK_S = 1.0
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


def main(argv: Sequence[str]) -> int:
    """Be the shards of the daemon that started this process; end with it."""
    die_with_parent()
    address, *handles = argv
    shards, parent = shards_of(handles, RayShard), os.getppid()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": child_environment()["PYTHONPATH"]}},
        )
    except (ConnectionError, RuntimeError) as error:
        print(
            f"no Ray cluster at {address}: {_short(error)} (`ray start --head` begins one)", file=sys.stderr
        )
        return 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # after Ray, which sets its own
        signal.signal(number, signal.SIG_IGN)
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
