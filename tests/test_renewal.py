"""Young servers are learned again once a day; what is being judged is not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rhythm_fleet import BIN_MS, DAY, METRICS, SERVERS, START_MS, fitted, made_grid
from seasonal_store import FIRST_TEST_BIN, VERSION, registry_with, rows_of, source_of, store_of
from settled_rows import RowStore, joined

from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.renewal import ReferenceRenewal, forget_in_references
from fleetcast.settings import DriftSettings

NOW_MS = START_MS + FIRST_TEST_BIN * BIN_MS + 3_600_000


def young(days: int) -> Reference:
    """Return the reference of a first training after some days."""
    return fitted(made_grid()[:, :, : days * DAY])


def renewal(folder: Path, store: RowStore) -> ReferenceRenewal:
    return ReferenceRenewal(store.read_predictions, DriftSettings(), BIN_MS, folder / "drift_reference")


def whole_store() -> RowStore:
    return RowStore(rows_of(made_grid(), 0, FIRST_TEST_BIN + 12))


def test_young_servers_are_learned_again_up_to_the_last_midnight(tmp_path: Path) -> None:
    version = registry_with(tmp_path, young(2)).baseline_in_force()
    assert version is not None
    own = renewal(tmp_path, whole_store())
    known = own.load(version)
    assert known is not None
    assert not known.is_compared.any()
    found = own.renew(version, known, SERVERS, METRICS, NOW_MS, ())
    assert found is not None
    assert found.end_ms == START_MS + FIRST_TEST_BIN * BIN_MS
    assert found.n_days.tolist() == [14] * 10
    assert np.isfinite(found.books.errors.edges).all(), "the model's own errors are known by now"
    assert own.renew(version, found, SERVERS, METRICS, NOW_MS + 3_600_000, ()) is None, "once a day"
    after_restart = renewal(tmp_path, whole_store())
    saved = after_restart.load(version)
    assert saved is not None
    assert np.array_equal(saved.limits, found.limits, equal_nan=True)
    assert after_restart.renew(version, saved, SERVERS, METRICS, NOW_MS, ()) is None


def test_a_server_in_alarm_is_left_as_it_is(tmp_path: Path) -> None:
    version = registry_with(tmp_path, young(6)).baseline_in_force()
    assert version is not None
    own = renewal(tmp_path, whole_store())
    found = own.renew(version, own.load(version), SERVERS, METRICS, NOW_MS, {SERVERS[2]})
    assert found is not None
    days = dict(zip(found.server_names, found.n_days.reshape(-1, 2)[:, 0].tolist(), strict=True))
    assert days == {name: 6 if name == SERVERS[2] else 14 for name in SERVERS}


def test_a_known_change_stays_known(tmp_path: Path) -> None:
    start_days = np.zeros(10, np.int64)
    start_days[4] = 9
    version = registry_with(tmp_path, replace(young(10), start_days=start_days)).baseline_in_force()
    assert version is not None
    own = renewal(tmp_path, whole_store())
    found = own.renew(version, own.load(version), SERVERS, METRICS, NOW_MS, ())
    assert found is not None
    assert found.n_days.tolist() == [14] * 4 + [5] + [14] * 5


def test_a_version_without_a_reference_gets_one_day_by_day(tmp_path: Path) -> None:
    registry_with(tmp_path, None)
    source = source_of(tmp_path, RowStore(rows_of(made_grid(), 0, FIRST_TEST_BIN + 12)))
    assert "learned day by day" in source.evidence(VERSION).missing
    drift = source.evidence(VERSION, may_renew=True).detector
    assert drift is not None
    assert drift.reference.is_compared.all()


def test_what_was_learned_of_a_forgotten_server_is_not_used_and_leaves_the_renewed_file(
    tmp_path: Path,
) -> None:
    version = registry_with(tmp_path, young(10)).baseline_in_force()
    assert version is not None
    found = renewal(tmp_path, whole_store()).renew(version, young(10), SERVERS, METRICS, NOW_MS, ())
    assert found is not None
    gone, others = SERVERS[1], tuple(name for name in SERVERS if name != SERVERS[1])
    store, folder = whole_store().read_predictions, tmp_path / "drift_reference"

    def known(at_ms: int) -> Reference | None:
        return ReferenceRenewal(store, DriftSettings(), BIN_MS, folder, {gone: at_ms}).load(version)

    later, before = known(found.end_ms + 1), known(found.end_ms)
    assert later is not None
    assert before is not None
    assert (later.server_names, before.server_names) == (others, found.server_names)
    rows = [2 * SERVERS.index(name) + metric for name in others for metric in range(2)]
    assert np.array_equal(later.limits, found.limits[rows], equal_nan=True)
    forget_in_references(tmp_path, {gone: found.end_ms + 1})
    (file,) = folder.glob("*.npz")
    assert Reference.load(file).server_names == others
    forget_in_references(tmp_path, dict.fromkeys(others, found.end_ms + 1))
    assert list(folder.glob("*.npz")) == []


def test_mature_servers_are_measured_by_what_their_model_was_trained_on(tmp_path: Path) -> None:
    mature = replace(young(14), n_days=np.full(10, 21))
    version = registry_with(tmp_path, mature).baseline_in_force()
    assert version is not None
    later = NOW_MS + 3 * DAY * BIN_MS
    assert renewal(tmp_path, whole_store()).renew(version, mature, SERVERS, METRICS, later, ()) is None


@pytest.mark.parametrize(("days", "is_learned"), [(4, False), (5, True)])
def test_errors_that_a_first_training_could_not_know_are_learned_once_there_are_days_of_them(
    tmp_path: Path, days: int, is_learned: bool
) -> None:
    # Given servers of full age, forecast by the fallback and for some days by a model
    grid, last = made_grid(23), 22 * DAY
    mature = fitted(grid[:, :, : last - DAY])
    version = registry_with(tmp_path, mature).baseline_in_force()
    assert version is not None
    first = last - days * DAY
    store = RowStore(joined(rows_of(grid, 0, first, version=None), rows_of(grid, first, last + 12)))
    now_ms = START_MS + last * BIN_MS + 3_600_000
    # When a day ends
    found = renewal(tmp_path, store).renew(version, mature, SERVERS, METRICS, now_ms, ())
    # Then they are learned again, with their errors, as soon as there are five days of them
    assert (found is not None) == is_learned
    if found is not None:
        assert np.isfinite(found.books.errors.edges).all()
        tomorrow = now_ms + DAY * BIN_MS
        again = renewal(tmp_path, store).renew(version, found, SERVERS, METRICS, tomorrow, ())
        assert again is None, "and not every day"


def test_more_days_are_never_given_up_for_fewer(tmp_path: Path) -> None:
    """A first training on imported records knows days of which no forecast was settled."""
    version = registry_with(tmp_path, young(10)).baseline_in_force()
    assert version is not None
    known = young(10)
    few = RowStore(rows_of(made_grid(), FIRST_TEST_BIN - 9 * DAY, FIRST_TEST_BIN + 12))
    assert renewal(tmp_path, few).renew(version, known, SERVERS, METRICS, NOW_MS, ()) is None
    enough = RowStore(rows_of(made_grid(), FIRST_TEST_BIN - 10 * DAY, FIRST_TEST_BIN + 12))
    assert renewal(tmp_path, enough).renew(version, known, SERVERS, METRICS, NOW_MS, ()) is not None


def test_nothing_is_learned_while_the_fleet_drifts_nor_by_who_may_not_write(tmp_path: Path) -> None:
    grid = made_grid()
    grid[:, :, FIRST_TEST_BIN + DAY // 2 :] += 40
    store = store_of(grid, FIRST_TEST_BIN + DAY + 20)
    seen = source_of(tmp_path, store, reference=young(10)).evidence(VERSION, may_renew=True)
    assert seen.detector is not None
    assert seen.detector.check().needs_retraining
    assert not (tmp_path / "drift_reference").exists()
    calm = store_of(made_grid(), FIRST_TEST_BIN + DAY + 20, 0)
    source_of(tmp_path, calm).evidence(VERSION)
    assert not (tmp_path / "drift_reference").exists()
    source_of(tmp_path, calm).evidence(VERSION, may_renew=True)
    assert [path.name for path in (tmp_path / "drift_reference").iterdir()] == [f"{VERSION}.npz"]


@pytest.mark.parametrize("damage", ["renewed", "own", "both"])
def test_a_damaged_reference_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    version = registry_with(tmp_path, young(10)).baseline_in_force()
    assert version is not None
    own = renewal(tmp_path, whole_store())
    own.renew(version, own.load(version), SERVERS, METRICS, NOW_MS, ())
    renewed = tmp_path / "drift_reference" / f"{VERSION}.npz"
    for path, names in ((renewed, ("renewed", "both")), (version.reference_path, ("own", "both"))):
        if damage in names:
            path.write_bytes(path.read_bytes()[:500])
    found = renewal(tmp_path, whole_store()).load(version)
    days = None if found is None else int(found.n_days[0])
    assert days == {"renewed": 10, "own": 14, "both": None}[damage]
    assert ("passed over" in caplog.text) == (damage != "own")


def test_a_reference_of_another_time_zone_is_learned_anew(tmp_path: Path) -> None:
    version = registry_with(tmp_path, young(10)).baseline_in_force()
    assert version is not None
    settings = DriftSettings(timezone="Asia/Tokyo")
    own = ReferenceRenewal(whole_store().read_predictions, settings, BIN_MS, tmp_path / "drift_reference")
    assert own.load(version) is None
    found = own.renew(version, None, SERVERS, METRICS, NOW_MS, ())
    assert found is not None
    assert found.timezone == "Asia/Tokyo"
    assert (found.end_ms + 9 * 3_600_000) % (DAY * BIN_MS) == 0, "up to midnight in Tokyo"


def test_a_reference_of_an_older_format_is_passed_over_and_learned_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a version whose own and renewed references were both written before format 2
    version = registry_with(tmp_path, young(10)).baseline_in_force()
    assert version is not None
    old = (Path(__file__).parent / "data" / "reference_format_1.npz").read_bytes()
    folder = tmp_path / "drift_reference"
    folder.mkdir()
    for path in (folder / f"{VERSION}.npz", version.reference_path):
        path.write_bytes(old)

    # When a daemon looks for them, then at what was settled
    own = renewal(tmp_path, whole_store())
    assert own.load(version) is None
    assert caplog.text.count("reference format 1") == 2
    evidence = source_of(tmp_path, whole_store()).evidence(VERSION, may_renew=True)

    # Then the fleet is learned anew, and the file is of today's format
    assert evidence.detector is not None
    assert Reference.load(folder / f"{VERSION}.npz").n_days.min() == 14
