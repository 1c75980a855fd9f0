"""What a challenger is shown of a change: most of a batch, but nothing by heart."""

from pathlib import Path

import pytest
from oracle_fleet import grid
from test_specialist_scope import model

from fleetcast.forecast.registry import Version
from fleetcast.schema import ChangedSeries
from fleetcast.settings import Settings
from fleetcast.training.challenger import Training
from fleetcast.training.verdict import Champion


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
    fleet, start = grid(), Champion(Version("v1", Path("v1"), {}), model())
    changed = (ChangedSeries(1, 0, fleet.n_bins - known_bins),)
    training = Training(fleet, changed, Settings(), start, epochs=1)
    mix = training._mix(n_window)
    assert mix.changed == changed
    assert mix.changed_share == pytest.approx(share)
