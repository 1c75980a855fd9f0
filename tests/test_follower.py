"""The calibrated detector beside a buffer: fed once, restarted, for another version."""

from pathlib import Path

import numpy as np
import pytest
from rhythm_fleet import BIN_MS, DAY, START_MS, fitted, made_grid
from seasonal_store import FIRST_TEST_BIN, VERSION, registry_with, rows_of, source_of, store_of
from settled_rows import RowStore, joined

from fleetcast.drift.evidence import DriftEvidence, DriftSource
from fleetcast.drift.seasonal import follower
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.forecast.registry import Registry
from fleetcast.settings import DriftSettings

END = FIRST_TEST_BIN + 2 * DAY


def ratios(evidence: DriftEvidence) -> np.ndarray:
    assert evidence.detector is not None, evidence.missing
    return evidence.detector.fleet_ratios()


def raised(from_bin: int, by: float = 30.0) -> np.ndarray:
    grid = made_grid()
    grid[:3, :, from_bin:] += by
    return grid


def test_an_unchanged_fleet_is_judged_and_silent(tmp_path: Path) -> None:
    evidence = source_of(tmp_path, store_of(made_grid(), END)).evidence(VERSION)
    assert evidence.detector is not None
    verdict = evidence.detector.check()
    assert (verdict.status, verdict.needs_retraining, verdict.n_compared) == ("ready", False, 10)
    assert verdict.end_ms == START_MS + (END - 1) * BIN_MS, "the newest settled bin may still grow"
    assert len(evidence.fleet_ratios) == 288


@pytest.mark.parametrize("steps", [(1, 1), (40, 3)])
def test_a_restart_between_any_two_looks_changes_nothing(tmp_path: Path, steps: tuple[int, ...]) -> None:
    grid, bin_now = raised(FIRST_TEST_BIN + DAY), FIRST_TEST_BIN + DAY + 54
    store = store_of(grid, bin_now)
    running = source_of(tmp_path, store)
    for n_bins in steps:
        store.add(rows_of(grid, bin_now, bin_now + n_bins))
        bin_now += n_bins
        one, other = running.evidence(VERSION), source_of(tmp_path, store).evidence(VERSION)
        assert np.array_equal(ratios(one), ratios(other))
        assert np.array_equal(one.fleet_ratios, other.fleet_ratios)
    assert ratios(one).max() > 1


def test_a_second_look_reads_only_what_is_new(tmp_path: Path) -> None:
    store = store_of(made_grid(), END)
    source = source_of(tmp_path, store)
    source.evidence(VERSION)
    store.add(rows_of(made_grid(), END, END + 2))
    store.reads.clear()
    source.evidence(VERSION)
    spans = [(end - start) // BIN_MS for start, end in store.reads]
    assert min(spans) <= 3, spans


def test_what_is_settled_late_but_in_order_counts_after_a_gap(tmp_path: Path) -> None:
    grid = made_grid()
    grid[:, :, FIRST_TEST_BIN + 20 : FIRST_TEST_BIN + DAY] = np.nan  # nearly a day without anything
    store = store_of(grid, FIRST_TEST_BIN + DAY - 5)
    source = source_of(tmp_path, store)
    source.evidence(VERSION)
    store.add(rows_of(grid, FIRST_TEST_BIN + DAY, END))
    assert np.array_equal(
        ratios(source.evidence(VERSION)), ratios(source_of(tmp_path, store).evidence(VERSION))
    )


def test_read_in_small_pieces_it_is_the_same_and_a_long_gap_is_looked_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = raised(FIRST_TEST_BIN + DAY)
    grid[:, :, FIRST_TEST_BIN + 50 : FIRST_TEST_BIN + 200] = np.nan
    store = store_of(grid, END)
    at_once = ratios(source_of(tmp_path, store).evidence(VERSION))
    monkeypatch.setattr(follower, "bins_at_once", lambda n_series: 12)
    store.reads.clear()
    assert np.array_equal(ratios(source_of(tmp_path, store).evidence(VERSION)), at_once)
    assert len(store.reads) > 10
    assert at_once.max() > 1


def test_only_errors_of_the_version_in_service_count(tmp_path: Path) -> None:
    grid = made_grid()
    reference = reference_with_errors(0.5)  # as if a model had been wrong by 0.5 for two weeks
    bad = joined(
        rows_of(grid, FIRST_TEST_BIN - DAY, FIRST_TEST_BIN + DAY),
        rows_of(grid, FIRST_TEST_BIN + DAY, END, error=20.0, version="another"),
    )
    registry_with(tmp_path, reference)
    assert ratios(source_of(tmp_path, RowStore(bad)).evidence(VERSION))[0] < 1
    assert ratios(source_of(tmp_path, RowStore(bad)).evidence("another"))[0] > 1


def reference_with_errors(error: float) -> Reference:
    grid = made_grid()[:, :, :FIRST_TEST_BIN]
    noise = np.random.default_rng(3).uniform(0, 2 * error, grid.shape).astype(np.float32)
    return fitted(grid, errors=noise)


def test_another_version_in_force_starts_the_detector_anew(tmp_path: Path) -> None:
    grid = raised(FIRST_TEST_BIN + 10)
    source = source_of(tmp_path, store_of(grid, END))
    assert ratios(source.evidence(VERSION)).max() > 1
    registry_with(tmp_path, reference_with_errors(0.5), "20260118T000000Z-bbbb")
    found = source.evidence(VERSION)
    assert found.reference_version == "20260118T000000Z-bbbb"
    assert found.reference is not None
    assert np.isfinite(found.reference.books.errors.edges).all(), "the usual one knows no errors"


def test_without_any_training_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    source = DriftSource(
        store_of(made_grid(), END), Registry(tmp_path / "checkpoints"), DriftSettings(), BIN_MS, tmp_path
    )
    assert "the first training makes the drift reference" in source.evidence(VERSION).missing


def test_servers_the_reference_does_not_know_are_named(tmp_path: Path) -> None:
    store = store_of(made_grid(), END)
    new = rows_of(made_grid(), END - 30, END)
    new.server_name[:] = "fresh-1"
    store.add(new)
    assert source_of(tmp_path, store).evidence(VERSION).unknown_servers == ("fresh-1",)


def test_the_literal_basis_does_not_even_look(tmp_path: Path) -> None:
    store = store_of(made_grid(), END)
    evidence = source_of(tmp_path, store, settings=DriftSettings(basis="literal")).evidence(VERSION)
    assert evidence.detector is None and not evidence.is_seasonal
