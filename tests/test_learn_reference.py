"""A reference by the settings: known changes, large fleets, a training's grid."""

from types import SimpleNamespace

import numpy as np
import pytest
from rhythm_fleet import BIN_MS, DAY, METRICS, SERVERS, START_MS, fleet_grid, made_grid
from seasonal_store import FIRST_TEST_BIN, rows_of
from settled_rows import RowStore

from fleetcast.clock import DAY_MS
from fleetcast.drift.seasonal import renewal as module
from fleetcast.drift.seasonal.renewal import learn_reference
from fleetcast.settings import DriftSettings
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.verdict import training_reference

GRID = made_grid()[:, :, :FIRST_TEST_BIN]
FLEET = fleet_grid(GRID)


def test_the_settings_reach_the_reference() -> None:
    settings = DriftSettings(
        timezone="Europe/Berlin", false_alarms_per_month=3.0, reference_days=8, min_reference_days=9
    )
    made = learn_reference(FLEET, settings)
    assert (made.timezone, made.fleet.false_alarms_per_month) == ("Europe/Berlin", 3.0)
    assert (made.end_ms - made.start_ms) // DAY_MS == 8
    assert not made.is_compared.any(), "8 days of 9"


def test_days_before_a_known_change_do_not_count_and_the_reference_remembers_it() -> None:
    changed = np.full((len(SERVERS), len(METRICS)), np.nan)
    changed[1, 0] = START_MS + 11.5 * DAY_MS
    made = learn_reference(FLEET, DriftSettings(), changed)
    days = made.n_days.reshape(changed.shape)
    assert (days[1, 0], days[1, 1], days[0, 0]) == (2, 14, 14)
    assert not made.is_compared[2]
    found = made.changed_ms()
    assert found[1, 0] == START_MS + 12 * DAY_MS
    assert np.isnan(found).sum() == found.size - 1


def test_a_large_fleet_is_learned_in_parts_and_is_the_same_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learn_reference(FLEET, DriftSettings())
    monkeypatch.setattr(module, "SERVERS_AT_ONCE", 2)
    parts = learn_reference(FLEET, DriftSettings())
    assert sorted(parts.server_names) == sorted(whole.server_names)
    order = [parts.server_names.index(name) for name in whole.server_names]
    rows = (np.array(order)[:, None] * len(METRICS) + np.arange(len(METRICS))).ravel()
    assert np.array_equal(parts.shape.profiles[rows], whole.shape.profiles)
    assert parts.is_compared.all()


def test_a_training_leaves_its_data_the_settled_errors_and_what_changed() -> None:
    grid = TrainingGrid(SERVERS, METRICS, GRID, START_MS, BIN_MS)
    store = RowStore(rows_of(GRID, FIRST_TEST_BIN - 7 * DAY, FIRST_TEST_BIN))
    changed = [SimpleNamespace(server=4, metric=1, since_bin=12 * DAY + 5)]
    made = training_reference(grid, changed, store.read_predictions, DriftSettings())  # type: ignore[arg-type]
    assert made.server_names == SERVERS
    assert made.n_days.tolist() == [14] * 9 + [1]
    assert np.isfinite(made.books.errors.edges[0]).all()
    first = training_reference(grid, [], RowStore(rows_of(GRID, 0, 0)).read_predictions, DriftSettings())
    assert np.isnan(first.books.errors.edges).all(), "no model was in service yet"
