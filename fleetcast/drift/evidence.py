"""What a drift check takes in: the window of the version in service, its baseline, the detector.

Owns: which version's rows count, from when on, and against which baseline and reference.
Does not know: thresholds and verdicts (`drift_monitor`), how either is stored.

A training leaves its baseline in force whether or not its model was promoted, and the window
holds only bins after the data of that training. So no drift is judged twice.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fleetcast.clock import to_ms
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.literal.window import DriftWindow, PairWindow
from fleetcast.drift.seasonal.detector import SeasonalDetector
from fleetcast.drift.seasonal.follower import SeasonalFollower
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.renewal import FOLDER as REFERENCE_FOLDER
from fleetcast.drift.seasonal.renewal import ReferenceRenewal
from fleetcast.errors import CorruptFile
from fleetcast.exclusions import Exclusions
from fleetcast.forecast.registry import Registry, Version
from fleetcast.schema import Floats32, SettledForecasts
from fleetcast.settings import CALIBRATED, DriftSettings, Settings

if TYPE_CHECKING:  # pyarrow: a monitor that is fed by hand does without
    from fleetcast.storage.store import DataBuffer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class DriftEvidence:
    """Everything one check needs; with neither detector nor `missing` the literal metrics decide."""

    window: PairWindow
    model_version: str | None
    baseline: Baseline | None = None
    detector: SeasonalDetector | None = None  # as of the newest settled bin
    missing: str = ""  # why there is no detector
    reference_version: str | None = None  # whose reference the detector compares with
    fleet_ratios: tuple[Floats32, ...] = ()  # (family,) of each bin of the last day
    unknown_servers: tuple[str, ...] = ()  # seen lately, not in the reference

    @property
    def is_seasonal(self) -> bool:
        """Whether the seasonal detector decides, or would if it had a reference."""
        return self.detector is not None or bool(self.missing)

    @property
    def reference(self) -> Reference | None:
        """Return what the detector compares with."""
        return self.detector.reference if self.detector else None


class DriftSource:
    """Reads the evidence again and again, each time no more than is new. Not thread safe."""

    def __init__(
        self,
        store: "DataBuffer",
        registry: Registry,
        settings: DriftSettings,
        bin_ms: int,
        folder: Path = Path(),
        correct_within_s: float = 0.0,
        *,
        forgotten: Mapping[str, int] | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            correct_within_s: how long after a bin's end late rows may still correct it.
            folder: the working directory, where a renewed reference lies.
            forgotten: servers that people wanted forgotten, and when (ms).
        """
        self._store = store
        self._registry = registry
        self._settings = settings
        self._window = DriftWindow(self.read, settings, bin_ms)
        references = folder / REFERENCE_FOLDER
        self._renewal = ReferenceRenewal(self.one_ahead, settings, bin_ms, references, forgotten)
        self._follower = SeasonalFollower(
            self.one_ahead, self._renewal, settings, bin_ms, int(correct_within_s * 1000)
        )
        self._loaded: tuple[Version, Baseline, int] | None = None  # version, baseline, data end
        self._unusable = ""  # why the baseline in force is not

    @classmethod
    def of(cls, settings: Settings, store: "DataBuffer", registry: Registry) -> Self:
        """Return the source that a program with these settings reads."""
        bin_ms, late_s = settings.bins.bin_s * 1000, settings.bins.correct_within_s
        orders = Exclusions(settings.paths.checkpoint_dir).forgotten()
        forgotten = {name: one.before_ms for name, one in orders.items()}
        return cls(store, registry, settings.drift, bin_ms, correct_within_s=late_s, forgotten=forgotten)

    def evidence(
        self, served: str | None = None, *, may_renew: bool = False, first_training: str = ""
    ) -> DriftEvidence:
        """Return what there is now.

        Args:
            served: the version the inference daemon says it serves; None asks the registry.
            may_renew: whether this process owns the working directory.
            first_training: what a fleet's first training still lacks, for people.
        """
        version = served or self.version_by_registry()
        in_force, baseline, floor_ms = self._baseline_in_force()
        newest = self._store.newest_record_time()
        newest_ms = None if newest is None else to_ms(newest)
        window = self._window.refresh(version, floor_ms, newest_ms)
        if self._settings.basis != CALIBRATED:
            return DriftEvidence(window, version, baseline)
        if in_force is None or newest_ms is None:
            missing = (
                self._unusable or f"the first training makes the drift reference: {first_training or 'due'}"
            )
            if in_force is not None:
                missing = "no records in the buffer"
            return DriftEvidence(window, version, baseline, missing=missing)
        self._follower.follow(in_force, version, newest_ms, may_renew=may_renew)
        return DriftEvidence(
            window,
            version,
            baseline,
            self._follower.detector,
            missing=self._follower.missing,
            reference_version=in_force.id,
            fleet_ratios=tuple(self._follower.ratios),
            unknown_servers=self._follower.unknown_servers(),
        )

    def reference_in_force(self) -> Reference | None:
        """Return the reference in force, None where there is none that can be used.

        Raises:
            BadCheckpoint: `baseline.npz` leads nowhere.
        """
        version = self._registry.baseline_in_force()
        return None if version is None else self._renewal.load(version)

    @property
    def last_trained(self) -> Version | None:
        """Return the version of the last training that ran to a verdict, as of the newest evidence."""
        return self._loaded[0] if self._loaded else None

    def version_by_registry(self) -> str | None:
        """Return the version that should be in service, by what is on disk."""
        current = self._registry.current_id()
        if current is not None:
            return current
        base = self._registry.base()
        return base.id if base else None

    def _baseline_in_force(self) -> tuple[Version | None, Baseline | None, int]:
        """Return the version in force, its baseline and the end of its data; read once per version."""
        self._unusable = ""
        try:
            version = self._registry.baseline_in_force()
            if version is None:
                return None, None, 0
            if self._loaded is None or self._loaded[0].id != version.id:
                baseline = Baseline.load(version.baseline_path)
                self._loaded = (version, baseline, version.data_end_ms or baseline.end_ms)
        except (CorruptFile, FileNotFoundError) as error:
            logger.warning("no baseline can be used reason=%s", error)
            self._unusable = f"the baseline in force cannot be used: {error}"
            return None, None, 0
        return self._loaded

    def read(self, start_ms: int, end_ms: int) -> SettledForecasts:
        """Return the settled forecasts of these target times, half open."""
        return self._store.read_predictions(start_ms, end_ms)

    def one_ahead(self, start_ms: int, end_ms: int) -> SettledForecasts:
        """Return those that were made one bin ahead."""
        return self._store.read_predictions(start_ms, end_ms, 1)
