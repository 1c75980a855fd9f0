"""Which model is in service, and how the next one gets there.

Owns: the reference that sweeps use, and the thread that loads and warms a new version beside
the old one. A bad version leaves the old one in service and appears in `/status`; the loader does
not try it again until `last.ckpt` points elsewhere.
Does not know: what a model is made of. It is given `load`, so that importing this file is cheap.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fleetcast.clock import DAY_MS, iso_z, monotonic
from fleetcast.errors import BadCheckpoint, FleetcastError, OtherBins
from fleetcast.forecast.registry import Registry, Version
from fleetcast.schema import Floats32, HistoryWindow
from fleetcast.serving.board import ModelInfo

logger = logging.getLogger(__name__)

_WARM_UP_BINS = 2304


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
    ) -> None:
        self._registry = registry
        self._load = load
        self._bin_ms = bin_ms
        self._horizon_bins = horizon_bins
        self._on_load = on_load
        self._thread: threading.Thread | None = None
        self._pointer: str | None = None  # what last.ckpt pointed to when we last looked
        self._problems: list[str] = []
        self.champion: Champion | None = None
        self.n_failures = 0

    @property
    def is_loading(self) -> bool:
        """Whether a version is being loaded beside the one in service."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin to load the champion in the background."""
        self._begin(self._registry.current_id())

    def notice(self) -> None:
        """Begin a reload if `last.ckpt` points elsewhere than before; cheap, does not wait."""
        if self.is_loading:
            return
        pointer = self._registry.current_id()
        if pointer != self._pointer and pointer is not None:
            self._begin(pointer)

    def wait(self, timeout_s: float) -> bool:
        """Wait for a load under way; return whether none is left."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.is_loading

    def report(self) -> dict[str, Any]:
        """Return the model's part of `/status`."""
        champion = self.champion
        return {
            **(champion.info.as_dict() if champion else {"version": None, "trained_at": None, "base": None}),
            "metrics": list(champion.predictor.metrics) if champion else [],
            "specialised_series": champion.n_specialised if champion else 0,
            "loading": self.is_loading,
            "problems": list(self._problems),
        }

    def _begin(self, pointer: str | None) -> None:
        self._pointer = pointer
        # daemon: a stop does not wait for an import of torch
        self._thread = threading.Thread(target=self._run_to_the_end, name="model-loader", daemon=True)
        self._thread.start()

    def _run_to_the_end(self) -> None:
        """Let no error end the thread without a word: it is a problem in `/status`, counted and logged."""
        try:
            self._run()
        except Exception as error:  # the boundary of this thread
            logger.exception("the model loader failed")
            self._note(error)

    def _run(self) -> None:
        """Load the version pointed to, or with nothing in service the best there is."""
        self._problems = []
        started = monotonic()
        if self.champion is None:
            versions = self._registry.usable_versions(self._note)
        else:
            versions = iter(self._find_pointed())
        for version in versions:
            champion = self._try(version)
            if champion:
                self.champion = champion
                self.n_failures = 0
                logger.info("model in service version=%s took_s=%.3f", version.id, monotonic() - started)
                self._on_load(True)
                return
        kept = self.champion.info.version if self.champion else "the fallback forecast"
        logger.info("no model to put into service, %s goes on serving", kept)

    def _find_pointed(self) -> list[Version]:
        try:
            version = self._registry.version(self._pointer or "")
            version.verify()
        except BadCheckpoint as error:
            self._note(error)
            return []
        return [version]

    def _try(self, version: Version) -> Champion | None:
        try:
            predictor = self._load(version.model_path)
            self._warm_up(predictor, version.model_path)
        except OtherBins as error:
            if version.is_base:  # shipped for the default bins; nothing is wrong with either
                logger.info("the shipped base model is not used: %s", error)
            else:
                self._note(error)
            return None
        except (FleetcastError, OSError, RuntimeError, ValueError, ImportError, MemoryError) as error:
            self._note(error)
            return None
        info = ModelInfo(version.id, iso_z(version.created_at), version.is_base)
        return Champion(predictor, info, version.n_specialist_series)

    def _note(self, error: Exception) -> None:
        self.n_failures += 1
        self._problems.append(str(error))
        logger.error("model version cannot serve: %s", error)
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
