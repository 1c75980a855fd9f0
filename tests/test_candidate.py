"""What a candidate is shown of a change: most of a batch, but nothing by heart."""

import pytest
from oracle_fleet import grid
from test_scope import model

from fleetcast.schema import ChangedSeries
from fleetcast.settings import Settings
from fleetcast.training.challenger import Training
from fleetcast.training.holdout import first_held_bins
from fleetcast.training.specialists import choose_scope


@pytest.mark.parametrize(
    ("known_bins", "n_window", "share"),
    [
        (1000, 1000, 0.6),  # the setting's
        (100, 32_000, 10 * 60 / 32_000),  # 60 of 100 bins are not held out: ten times each
    ],
)
def test_no_window_of_a_change_is_shown_more_than_ten_times(
    known_bins: int, n_window: int, share: float
) -> None:
    fleet, start = grid(), model()
    changed = (ChangedSeries(1, 0, fleet.n_bins - known_bins),)
    maker = Training(fleet, changed, Settings())
    scope = choose_scope(fleet, changed, start, 0.5)
    maker._held_from = first_held_bins(fleet, scope.shown, 0.1, 288)
    mix = maker._mix(start, scope, n_window)
    assert mix.changed == changed
    assert mix.changed_share == pytest.approx(share)
