"""The made fleet of `rhythm_fleet` as a store of settled forecasts, with a version and its reference."""

from pathlib import Path

import numpy as np
from rhythm_fleet import (
    BIN_MS,
    DAY,
    METRICS,
    REFERENCE_DAYS,
    SERVERS,
    START_MS,
    Grid,
    made_grid,
    usual_reference,
)
from settled_rows import RowStore

from fleetcast.clock import from_ms, iso_z
from fleetcast.drift.evidence import DriftSource
from fleetcast.drift.literal.baseline import Baseline
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.forecast.registry import Registry
from fleetcast.schema import SettledForecasts
from fleetcast.settings import DriftSettings

VERSION = "20260115T000000Z-aaaa"
FIRST_TEST_BIN = REFERENCE_DAYS * DAY


def rows_of(
    grid: Grid, first_bin: int, last_bin: int, *, error: float = 0.5, version: str | None = VERSION
) -> SettledForecasts:
    """Return one-bin-ahead rows of a grid that starts at START_MS, by time, then server, then metric."""
    part = grid[:, :, first_bin:last_bin].astype(float)
    bins, servers, metrics = (
        axis.ravel()
        for axis in np.meshgrid(
            np.arange(first_bin, last_bin), range(part.shape[0]), range(part.shape[1]), indexing="ij"
        )
    )
    actual = part[servers, metrics, bins - first_bin]
    kept = np.isfinite(actual)
    bins, servers, metrics, actual = bins[kept], servers[kept], metrics[kept], actual[kept]
    target = START_MS + bins * BIN_MS
    return SettledForecasts(
        origin_ms=target - BIN_MS,
        target_ms=target,
        horizon=np.ones(len(target), np.int32),
        server_name=np.array(SERVERS, object)[servers],
        metric=np.array(METRICS, object)[metrics],
        p10=actual - 1,
        p50=actual + error * np.where(bins % 2 == 0, 1, -1),
        p90=actual + 1,
        actual=actual,
        model_version=np.array([version] * len(target), object),
    )


def store_of(grid: Grid, last_bin: int, first_bin: int = FIRST_TEST_BIN) -> RowStore:
    """Return a store that knows a grid up to a bin."""
    return RowStore(rows_of(grid, first_bin, last_bin))


def registry_with(
    folder: Path, reference: Reference | None = None, version: str = VERSION, *, end_bin: int = FIRST_TEST_BIN
) -> Registry:
    """Return a registry in which a version's baseline and reference are in force."""
    registry = Registry(folder / "checkpoints")
    grid = made_grid()[:, :, :end_bin]
    made = Baseline.from_grid(grid, START_MS, BIN_MS, SERVERS, METRICS, version)
    contents = {"model.ckpt": b"no model", "baseline.npz": made.to_bytes()}
    if reference is not None:
        contents["reference.npz"] = reference.to_bytes()
    end = iso_z(from_ms(START_MS + end_bin * BIN_MS))
    registry.add(
        version, contents, {"created_at": end, "promoted": True, "data_range": {"start": end, "end": end}}
    )
    registry.set_baseline(version)
    return registry


def source_of(
    folder: Path,
    store: RowStore,
    *,
    reference: Reference | None = None,
    settings: DriftSettings | None = None,
) -> DriftSource:
    """Return a source whose registry has one version, with the made fleet's usual reference."""
    if not (folder / "checkpoints").exists():
        registry_with(folder, reference or usual_reference())
    return DriftSource(store, Registry(folder / "checkpoints"), settings or DriftSettings(), BIN_MS, folder)
