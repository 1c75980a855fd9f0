"""A new `last.ckpt` is noticed, loaded and warmed beside the old model, then swapped in.

Owns: the reference that sweeps use, and the thread that loads and warms a new version beside
the old one. A bad version leaves the old one in service and appears in `/status`; the loader tries it
again after a pause that grows, and at once when `last.ckpt` points elsewhere. Whatever keeps a model
from serving is a problem in `report`.
Does not know: what a model is made of. It is given `load`, so that importing this file is cheap.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fleetcast.clock import DAY_MS, iso_z, monotonic
from fleetcast.errors import BadCheckpoint, OtherBins
from fleetcast.forecast.registry import Registry, Version
from fleetcast.schema import Floats32, HistoryWindow
from fleetcast.serving.board import ModelInfo
from fleetcast.workers import GrowingPause, Workers

logger = logging.getLogger(__name__)

WORKER = "model loader"
_WARM_UP_BINS = 2304
_RETRY_S, _RETRY_MOST_S = 5.0, 900.0  # reading a version again costs a second
_LONG_S = 120.0  # a load takes seconds


class Predictor(Protocol):
    """A model that forecasts windows."""

    @property
    def metrics(self) -> tuple[str, ...]: ...

    def predict(self, window: HistoryWindow) -> Floats32: ...


@dataclass(frozen=True, slots=True)
class Champion:
    """The model in service, loaded and warmed."""

    predictor: Predictor
    info: ModelInfo
    n_specialised: int = 0  # series that a specialist forecasts
    path: Path | None = None  # of the model, where another process can load it


class ModelLoader:
    """Swaps models while sweeps go on; `champion` may be read from any thread."""

    def __init__(
        self,
        registry: Registry,
        load: Callable[[Path], Predictor],
        *,
        bin_ms: int,
        horizon_bins: int,
        on_load: Callable[[bool], None] = lambda _succeeded: None,
        workers: Workers | None = None,
    ) -> None:
        self._registry = registry
        self._load = load
        self._bin_ms = bin_ms
        self._horizon_bins = horizon_bins
        self._on_load = on_load
        self._thread = (workers or Workers()).thread(WORKER, self._run, once=True)
        self._began_at = float("-inf")
        self._retry = GrowingPause(_RETRY_S, _RETRY_MOST_S)
        self._pointer: str | None = None  # what last.ckpt pointed to when we last looked
        self._problems: list[str] = []  # of the newest whole round
        self._found: list[str] = []  # in the present round
        self._n_found = 0  # of them, versions that failed
        self._may_heal = False  # something went wrong that another try may not meet
        self.champion: Champion | None = None
        self.n_failures = 0  # in the newest whole round

    @property
    def is_loading(self) -> bool:
        """Whether a version is being loaded beside the one in service."""
        return self._thread.is_alive

    @property
    def why_broken(self) -> str:
        """Return how the loader itself failed with nothing in service; a bad version is no such failure."""
        return "" if self.champion else self._thread.worker.problem

    @property
    def why_not_loaded(self) -> str:
        """Return why the version that `last.ckpt` points to does not serve, "" where it does or may yet."""
        if self.is_loading or not self._problems or self._pointer is None:
            return ""
        serves = self.champion is not None and self.champion.info.version == self._pointer
        return "" if serves else self._problems[0]

    def start(self) -> None:
        """Begin to load the champion in the background."""
        self._begin(self._registry.current_id())

    def notice(self) -> None:
        """Begin a reload if `last.ckpt` points elsewhere than before, or if it is time to try again what
        failed; cheap, does not wait.
        """
        if self.is_loading or self._thread.worker.rest_s:
            return
        pointer = self._registry.current_id()
        if pointer != self._pointer and pointer is not None:
            self._retry.reset()
            self._begin(pointer)
        elif self._may_heal and not self._retry.left_s:
            can_choose = self.champion is None or self.champion.info.is_base
            if pointer is not None or can_choose:
                self._begin(pointer)

    def wait(self, timeout_s: float) -> bool:
        """Wait for a load under way; return whether none is left."""
        return self._thread.join(timeout_s)

    def report(self) -> dict[str, Any]:
        """Return the model's part of `/status`."""
        champion = self.champion
        return {
            **(champion.info.as_dict() if champion else {"version": None, "trained_at": None, "base": None}),
            "metrics": list(champion.predictor.metrics) if champion else [],
            "specialised_series": champion.n_specialised if champion else 0,
            "loading": self.is_loading,
            "problems": self._tell_problems(),
        }

    def _tell_problems(self) -> list[str]:
        problems = list(self._problems)
        loading_s = monotonic() - self._began_at
        if self.is_loading and loading_s > _LONG_S:
            problems.append(f"a version has been loading for {loading_s:.0f} s")
        return problems

    def _begin(self, pointer: str | None) -> None:
        self._pointer = pointer
        self._began_at = monotonic()
        self._thread.start()

    def _run(self) -> None:
        """Load a version, and let whatever kept another from serving be known to the end."""
        self._found, self._n_found, self._may_heal = [], 0, False
        try:
            self._put_into_service()
        except BaseException as error:  # the worker logs and counts it, and tries again
            self._note(error)
            raise
        finally:
            self._problems, self.n_failures = self._found, self._n_found
            if self._may_heal:
                self._retry.begin()
            else:
                self._retry.reset()

    def _put_into_service(self) -> None:
        """Load the version pointed to, or with nothing of its own in service the best there is."""
        started = monotonic()
        in_service = self.champion.info.version if self.champion else None
        for version in self._find_versions():
            if version.id == in_service:
                return
            champion = self._try(version)
            if champion:
                self.champion = champion
                logger.info("model in service version=%s took_s=%.3f", version.id, monotonic() - started)
                self._on_load(True)
                return
        if in_service is None:
            self._say_that_none_serves()

    def _say_that_none_serves(self) -> None:
        if not self._found:
            self._may_heal = True
            self._found.append(f"there is no model version in {self._registry.describe()}")
        logger.warning("no model serves, the fallback forecast does: %s", "; ".join(self._found))

    def _find_versions(self) -> Iterator[Version]:
        if self.champion is not None and self._pointer is not None:
            yield from self._find_pointed(self._pointer)
            return
        try:
            yield from self._registry.usable_versions(self._note)
        except Exception as error:  # whatever is wrong with one folder, the base is another
            self._note(error)
            base = self._registry.base(self._note)
            if base:
                yield base

    def _find_pointed(self, version_id: str) -> list[Version]:
        try:
            version = self._registry.version(version_id)
            version.verify()
        except BadCheckpoint as error:
            self._note(error)
            return []
        return [version]

    def _try(self, version: Version) -> Champion | None:
        """Load and warm a version; whatever is wrong with one, the next is tried."""
        try:
            predictor = self._load(version.model_path)
            self._warm_up(predictor, version.model_path)
            info = ModelInfo(version.id, iso_z(version.created_at), version.is_base)
            return Champion(predictor, info, version.n_specialist_series, version.model_path)
        except OtherBins as error:
            if not version.is_base:
                self._note(error)
            else:  # intact, and shipped for the default bins: no failure, but worth a word
                text = f"the shipped base model is not used: {error}"
                self._found.append(text)
                logger.warning("%s", text)
        except Exception as error:
            self._note(error)
        return None

    def _note(self, error: BaseException) -> None:
        self._n_found += 1
        self._may_heal |= not isinstance(error, OtherBins)  # neither file nor settings can change
        text = str(error) or type(error).__name__
        is_known = text in self._problems
        self._found.append(text)
        level = logging.WARNING if is_known else logging.ERROR
        logger.log(level, "model version cannot serve: %s", text)
        self._on_load(False)

    def _warm_up(self, predictor: Predictor, path: Path) -> None:
        """Forecast a plain series: allocates what a sweep needs, and shows a model that cannot."""
        metrics = predictor.metrics
        wave = 50 + 10 * np.sin(np.arange(_WARM_UP_BINS) * (2 * np.pi * self._bin_ms / DAY_MS))
        values = np.tile(wave.astype(np.float32), (2, len(metrics), 1))
        window = HistoryWindow(("warm-up-1", "warm-up-2"), metrics, values, 0, self._bin_ms)
        quantiles = predictor.predict(window)
        expected = (2, len(metrics), self._horizon_bins, 3)
        if quantiles.shape != expected or not np.isfinite(quantiles).all():
            raise BadCheckpoint(
                path,
                f"forecasts of shape {quantiles.shape}, expected finite {expected}",
                hint="train with the settings of the inference daemon",
            )
