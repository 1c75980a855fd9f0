"""Single servers learned anew and put into a reference."""

import numpy as np
import pytest
from rhythm_fleet import (
    BIN_MS,
    DAY,
    METRICS,
    REFERENCE_DAYS,
    SERVERS,
    START_MS,
    fitted,
    fleet_grid,
    made_grid,
    replay,
    usual_reference,
)

from fleetcast.drift.seasonal.detector import SeasonalDetector
from fleetcast.drift.seasonal.quorum import MATURE_DAYS
from fleetcast.drift.seasonal.reference import Reference, immature_servers, merge
from fleetcast.errors import BadData


def learned(names: tuple[str, ...], seed: int = 5, metrics: tuple[str, ...] = METRICS) -> Reference:
    grid = made_grid(REFERENCE_DAYS, seed, len(names))[:, : len(metrics)]
    return Reference.fit(fleet_grid(grid, names, metrics, START_MS + DAY * BIN_MS))


def test_newer_servers_take_the_place_of_their_old_selves_and_new_ones_come_behind() -> None:
    newer = learned(("db-1", "new-1"))

    both = merge(usual_reference(), newer)

    assert both.server_names == (*SERVERS, "new-1")
    at = SERVERS.index("db-1") * len(METRICS)
    assert np.array_equal(both.shape.profiles[at : at + 2], newer.shape.profiles[:2])
    assert np.array_equal(both.limits[-2:], newer.limits[2:], equal_nan=True)
    assert np.array_equal(both.shape.profiles[:2], usual_reference().shape.profiles[:2])
    assert both.fleet == usual_reference().fleet
    assert both.start_days[at] == 1 and both.start_days[0] == 0


def test_a_merged_reference_judges_the_whole_fleet() -> None:
    both = merge(usual_reference(), learned(("new-1",)))
    drift = SeasonalDetector(both)
    grid = np.concatenate([made_grid()[:, :, : 2 * DAY], made_grid(REFERENCE_DAYS, 5, 1)[:, :, : 2 * DAY]])

    replay(drift, grid[:, :, :DAY], START_MS + 30 * DAY * BIN_MS)

    assert drift.check().n_compared == 6 * len(METRICS)


def test_servers_with_few_days_or_none_are_immature() -> None:
    short = fitted(made_grid()[:, :, : (MATURE_DAYS - 1) * DAY])

    assert immature_servers(short, SERVERS) == SERVERS
    assert immature_servers(usual_reference(), ("stranger",)) == ("stranger",)


def test_a_metric_never_sent_does_not_make_a_server_young() -> None:
    grid = made_grid(MATURE_DAYS, 3, 2)
    grid[0, 1] = np.nan
    names = ("a", "b")

    reference = Reference.fit(fleet_grid(grid, names))

    assert immature_servers(reference, names) == ()


def test_references_of_other_metrics_do_not_merge() -> None:
    with pytest.raises(BadData, match="metrics differ"):
        merge(usual_reference(), learned(("db-1",), metrics=METRICS[:1]))
