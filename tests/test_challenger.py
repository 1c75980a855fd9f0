"""What a challenger is shown: of a change nothing by heart, of a fleet's history all of it at first."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracle_fleet import grid
from test_specialist_scope import model

from fleetcast.forecast.network import METRIC_SLOTS
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


@pytest.mark.parametrize("is_base", [True, False])
def test_a_first_training_is_not_held_to_the_shipped_base_and_draws_from_the_whole_history(
    is_base: bool,
) -> None:
    # Given the same weights, once as the base of another fleet and once as a version of this one
    start = Champion(Version("v1", Path("v1"), {}, is_base), model())
    # When a training without a known change continues them
    settings = Settings()
    training = Training(grid(), (), settings, start, epochs=1)
    mix = training._mix(1000)
    # Then only the version of this fleet is kept to, and half of each batch is its newest days
    trainer = settings.trainer
    assert training._plan.keep_weight == (0.0 if is_base else trainer.keep_weight)
    assert mix.recent_share == (0.0 if is_base else trainer.recent_share)
    assert (mix.recent_weights is None) == is_base


def test_a_fleet_of_more_metrics_than_a_model_has_slots_is_trained() -> None:
    few = grid()
    names = tuple(f"metric_{number}" for number in range(40))
    values = np.broadcast_to(few.values[:, :1], (len(few.server_names), len(names), few.n_bins))
    many = replace(few, metrics=names, values=values)
    description = Training(many, (), Settings(), None, epochs=1)._description("v1", "")
    slots = [description.slot(name) for name in names]
    assert slots == [*range(1, METRIC_SLOTS), *[0] * (len(names) - METRIC_SLOTS + 1)]
