"""A shard: a process that says what the model and the rules make of parts of the fleet.

    python -m fleetcast.serving.shard SOCKET QUESTIONS ANSWERS

Owns: the pure function from a part's window to what is forecast of it (`forecast_part`; a daemon without
shards calls it, too), the arrays that two processes share, and the loop of the process. A shard keeps
nothing but models it has loaded: killed at any moment, it costs the part it had in hand. It ends when its
socket does, with the daemon; signals of a terminal or of systemd are the daemon's. Does not know: which
parts there are, the expert layer's evidence, what clients get.

A message is a short line of JSON over the socket; arrays stand in two blocks of memory without a name. The
daemon writes the first block and the shard the second, each only while the other waits.
"""

import ctypes
import json
import mmap
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import DAY_MS
from fleetcast.forecast.encoding import is_percent
from fleetcast.forecast.experts.rules import RuleForecasts, rule_forecasts
from fleetcast.forecast.experts.trend import Trend
from fleetcast.schema import Floats32, HistoryWindow
from fleetcast.serving.model_loader import Predictor

_MODELS_KEPT = 2  # the model in service, and the one before while a sweep ends
_ALIGN = 64
_MOST_CHARS = 2000  # of what failed
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_RULES = "rules."
_TREND = "trend."
Arrays = Mapping[str, NDArray[Any]]
Answer = Callable[..., tuple[dict[str, NDArray[Any]], dict[str, str]]]
Layout = list[tuple[str, str, Sequence[int], int]]  # name, type, shape, where it begins


@dataclass(frozen=True, slots=True, eq=False)
class PartForecast:
    """What the model and the rules say of one part of the fleet; None where they do not."""

    model: Floats32 | None = None  # (server, metric, horizon, quantile) native units, NaN = no forecast
    rules: RuleForecasts | None = None
    model_failure: Exception | None = None
    rules_failure: Exception | None = None


def forecast_part(
    part: HistoryWindow, predictor: Predictor | None, horizon_bins: int, *, with_rules: bool
) -> PartForecast:
    """Return what is forecast of a part; what fails costs itself only."""
    model = rules = model_failure = rules_failure = None
    if predictor:
        try:
            model = predictor.predict(part)
            wanted = (*part.values.shape[:2], horizon_bins, 3)
            if model.shape != wanted:
                raise ValueError(f"forecasts of shape {model.shape}, expected {wanted}")
        except Exception as error:  # the boundary of what may be left out
            model, model_failure = None, error
    if with_rules:
        try:
            rules = rules_of(part, horizon_bins)
        except Exception as error:  # the same
            rules_failure = error
    return PartForecast(model, rules, model_failure, rules_failure)


def rules_of(part: HistoryWindow, horizon_bins: int) -> RuleForecasts:
    """Return what the rules say of a part's series, server by server."""
    flags = np.tile(np.array([is_percent(name) for name in part.metrics], np.bool_), len(part.values))
    day_bins = max(1, DAY_MS // part.bin_ms)
    return rule_forecasts(part.values.reshape(-1, part.values.shape[2]), flags, day_bins, horizon_bins)


class SharedArrays:
    """Arrays in a block of memory that two processes have mapped; it grows and never shrinks."""

    def __init__(self, descriptor: int) -> None:
        """Map it when it is first needed.

        Args:
            descriptor: of a file in memory; the caller closes it.
        """
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None

    def put(self, arrays: Arrays) -> Layout:
        """Copy arrays in, over those before; return where each stands."""
        layout: Layout = []
        end = 0
        for name, array in arrays.items():
            layout.append((name, array.dtype.str, array.shape, end))
            end += -(-array.nbytes // _ALIGN) * _ALIGN
        block = self._block_of(end)
        for (_, _, shape, start), array in zip(layout, arrays.values(), strict=True):
            place = np.ndarray(shape, array.dtype, block, start)
            np.copyto(place, array)
        return layout

    def get(self, layout: Layout) -> dict[str, NDArray[Any]]:
        """Return the arrays that stand there, as views: good until the other side writes again."""
        ends = [start + np.dtype(kind).itemsize * int(np.prod(shape)) for _, kind, shape, start in layout]
        block = self._block_of(max(ends, default=0))
        return {
            name: np.ndarray(tuple(shape), np.dtype(kind), block, start)
            for name, kind, shape, start in layout
        }

    def _block_of(self, size: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            there = os.fstat(self._descriptor).st_size
            if there < max(size, 1):
                there = max(size, 2 * there, mmap.PAGESIZE)
                os.ftruncate(self._descriptor, there)
            self._map = mmap.mmap(self._descriptor, there)  # an older one goes with its last view
        return self._map


def arrays_of(said: PartForecast) -> dict[str, NDArray[Any]]:
    """Return the arrays of what was said, by name."""
    found: dict[str, NDArray[Any]] = {} if said.model is None else {"model": said.model}
    if said.rules is not None:
        for item in fields(said.rules):
            if item.name != "trend":
                found[_RULES + item.name] = getattr(said.rules, item.name)
        found |= {_TREND + item.name: getattr(said.rules.trend, item.name) for item in fields(Trend)}
    return found


def said_by(arrays: Arrays, failures: Mapping[str, str]) -> PartForecast:
    """Undo `arrays_of`, in arrays of its own."""
    own = {name: array.copy() for name, array in arrays.items()}
    rules = None
    if any(name.startswith(_RULES) for name in own):
        trend = Trend(**{item.name: own[_TREND + item.name] for item in fields(Trend)})
        names = [item.name for item in fields(RuleForecasts) if item.name != "trend"]
        rules = RuleForecasts(**{name: own[_RULES + name] for name in names}, trend=trend)
    model_failure, rules_failure = (
        RuntimeError(failures[name]) if failures.get(name) else None for name in ("model", "rules")
    )
    return PartForecast(own.get("model"), rules, model_failure, rules_failure)


def question(part: HistoryWindow, model: str, *, with_rules: bool) -> dict[str, NDArray[Any]]:
    """Return what a shard is asked: the values, and the rest as JSON, since a channel takes short lines only.

    Args:
        model: file of the model, "" for none.
    """
    asked = {"names": part.server_names, "metrics": part.metrics, "end_bin_ms": part.end_bin_ms}
    asked |= {"bin_ms": part.bin_ms, "model": model, "with_rules": with_rules}
    return {"values": part.values, "asked": np.frombuffer(json.dumps(asked).encode(), np.uint8)}


class Answerer:
    """Answers questions with models that it loads once."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Import what a forecast needs, once.

        Args:
            settings: as the daemon tells them: `bin_ms`, `horizon_bins`, `min_history_s`, `threads`.
        """
        from fleetcast.forecast.predictor import Forecaster, set_threads

        set_threads(settings["threads"])
        self._load: Callable[[Path], Predictor] = partial(
            Forecaster.load,
            bin_ms=settings["bin_ms"],
            horizon_bins=settings["horizon_bins"],
            min_history_s=settings["min_history_s"],
        )
        self._horizon_bins = int(settings["horizon_bins"])
        self._models: dict[str, Predictor] = {}

    def answer(
        self, asked: Mapping[str, Any], values: Floats32, file: Path | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """Return the arrays that are said of a part, and what failed.

        Args:
            asked: a question.
            values: (server, metric, bin)
            file: where the model is in this place; None: where the question says.
        """
        names, metrics = tuple(asked["names"]), tuple(asked["metrics"])
        part = HistoryWindow(names, metrics, values, asked["end_bin_ms"], asked["bin_ms"])
        failures: dict[str, str] = {}
        predictor = None
        try:
            predictor = self._model(asked["model"], file)
        except Exception as error:  # the daemon loaded it: the file was taken away meanwhile
            failures["load"] = str(error) or type(error).__name__
        said = forecast_part(part, predictor, self._horizon_bins, with_rules=asked["with_rules"])
        for name, failure in (("model", said.model_failure), ("rules", said.rules_failure)):
            if failure is not None:
                failures[name] = str(failure) or type(failure).__name__
        return arrays_of(said), {name: text[:_MOST_CHARS] for name, text in failures.items()}

    def knows(self, model: str) -> bool:
        """Whether a model is loaded."""
        return model in self._models

    def _model(self, path: str, file: Path | None) -> Predictor | None:
        if path and path not in self._models:
            self._models[path] = self._load(file or Path(path))
            for old in list(self._models)[:-_MODELS_KEPT]:
                del self._models[old]
        return self._models.get(path)


class Lost(Exception):
    """Raised by what answers where it is lost itself: `prepare` makes another."""


class Shard:
    """The loop of a shard over one channel."""

    def __init__(self, channel: Connection, questions: SharedArrays, answers: SharedArrays) -> None:
        self._channel, self._questions, self._answers = channel, questions, answers

    def run(self) -> None:
        """Answer until the daemon is gone."""
        try:
            settings = json.loads(self._channel.recv_bytes())
            answer = self.prepare(settings)
            self._tell({})  # ready
            while True:
                layout = json.loads(self._channel.recv_bytes())
                try:
                    found = self._questions.get(layout)
                    arrays, failures = answer(json.loads(found["asked"].tobytes()), found["values"])
                    told = {"layout": self._answers.put(arrays), "failures": failures}
                except (Lost, OSError) as error:  # the part goes to another shard meanwhile
                    self._tell({"lost": str(error)[:_MOST_CHARS] or type(error).__name__})
                    answer = self.prepare(settings)
                    told = {}
                self._tell(told)
        except (EOFError, OSError):
            return

    def prepare(self, settings: Mapping[str, Any]) -> Answer:
        """Return what answers."""
        return Answerer(settings).answer

    def _tell(self, message: Mapping[str, Any]) -> None:
        self._channel.send_bytes(json.dumps(message).encode())


def main(argv: Sequence[str]) -> int:
    """Be a shard of the daemon that started this process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    for shard in shards_of(argv):
        shard.run()
    return 0


def die_with_parent() -> None:
    """Let the kernel end this process with the one that started it, even if it is stopped or at work."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def shards_of(argv: Sequence[str], kind: type[Shard] = Shard) -> list[Shard]:
    """Return the shards that a command line names: three handles for each."""
    handles = [int(text) for text in argv]
    return [
        kind(Connection(channel), SharedArrays(questions), SharedArrays(answers))
        for channel, questions, answers in zip(*(handles[place::3] for place in range(3)), strict=True)
    ]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
