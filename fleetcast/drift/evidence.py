"""What a drift check looks at: the window of the version in service and the baseline in force.

Owns: which version's rows count, from when on, and against which baseline.
Does not know: thresholds and verdicts (`drift_monitor`), how either is stored.

A training leaves its baseline in force whether or not its model was promoted, and the window
holds only bins after the data of that training. So no drift is judged twice.
"""

import logging
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from fleetcast.clock import to_ms
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.literal.window import DriftWindow, PairWindow
from fleetcast.drift.seasonal.follower import SeasonalEvidence, SeasonalFollower
from fleetcast.drift.seasonal.renewal import FOLDER as REFERENCE_FOLDER
from fleetcast.drift.seasonal.renewal import ReferenceRenewal
from fleetcast.errors import CorruptFile
from fleetcast.forecast.registry import Registry, Version
from fleetcast.schema import SettledForecasts
from fleetcast.settings import CALIBRATED, DriftSettings

logger = logging.getLogger(__name__)


class ForecastStore(Protocol):
    """What is asked of the DataBuffer."""

    def read_predictions(
        self, start_ms: int, end_ms: int, horizon: int | None = None
    ) -> SettledForecasts: ...

    def newest_record_time(self) -> datetime | None: ...


@dataclass(frozen=True, slots=True, eq=False)
class DriftEvidence:
    """Everything one check needs."""

    window: PairWindow
    model_version: str | None
    baseline: Baseline | None
    seasonal: SeasonalEvidence = field(default_factory=SeasonalEvidence)


class DriftSource:
    """Reads the evidence again and again, each time no more than is new. Not thread safe."""

    def __init__(
        self,
        store: ForecastStore,
        registry: Registry,
        settings: DriftSettings,
        bin_ms: int,
        folder: Path = Path(),
    ) -> None:
        """Read nothing yet.

        Args:
            folder: the working directory, where a renewed reference lies.
        """
        self._store = store
        self._registry = registry
        self._settings = settings
        self._window = DriftWindow(self.read, settings, bin_ms)
        renewal = ReferenceRenewal(self.one_ahead, settings, bin_ms, folder / REFERENCE_FOLDER)
        self._seasonal = SeasonalFollower(self.one_ahead, renewal, settings, bin_ms)
        self._loaded: tuple[Version, Baseline, int] | None = None  # version, baseline, data end

    def evidence(self, served: str | None = None, *, may_renew: bool = False) -> DriftEvidence:
        """Return what there is now.

        Args:
            served: the version the inference daemon says it serves; None asks the registry.
            may_renew: whether this process owns the working directory.
        """
        version = served or self.version_by_registry()
        in_force, baseline, floor_ms = self._baseline_in_force()
        newest = self._store.newest_record_time()
        newest_ms = None if newest is None else to_ms(newest)
        window = self._window.refresh(version, floor_ms, newest_ms)
        if self._settings.basis != CALIBRATED:
            return DriftEvidence(window, version, baseline)
        seasonal = self._seasonal.refresh(in_force, version, newest_ms, may_renew=may_renew)
        return DriftEvidence(window, version, baseline, seasonal)

    def version_by_registry(self) -> str | None:
        """Return the version that should be in service, by what is on disk."""
        current = self._registry.current_id()
        if current is not None:
            return current
        base = self._registry.base()
        return base.id if base else None

    def _baseline_in_force(self) -> tuple[Version | None, Baseline | None, int]:
        """Return the version in force, its baseline and the end of its data; read once per version."""
        try:
            version = self._registry.baseline_in_force()
            if version is None:
                return None, None, 0
            if self._loaded is None or self._loaded[0].id != version.id:
                baseline = Baseline.load(version.baseline_path)
                self._loaded = (version, baseline, version.data_end_ms or baseline.end_ms)
        except (CorruptFile, FileNotFoundError) as error:
            logger.warning("no baseline can be used reason=%s", error)
            return None, None, 0
        return self._loaded

    def read(self, start_ms: int, end_ms: int) -> SettledForecasts:
        """Return the settled forecasts of these target times, half open."""
        return self._store.read_predictions(start_ms, end_ms)

    def one_ahead(self, start_ms: int, end_ms: int) -> SettledForecasts:
        """Return those that were made one bin ahead."""
        return self._store.read_predictions(start_ms, end_ms, 1)
