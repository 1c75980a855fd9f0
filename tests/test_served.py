"""Claims about the served loss: the expert layer replayed over the held-out tails, for every side alike."""

import numpy as np
import pytest
from oracle_fleet import N_BIN, SHAPE, Oracle, grid

from fleetcast.forecast.experts.layer import ExpertLayer
from fleetcast.schema import ChangedSeries, HistoryWindow
from fleetcast.training.gate import Sides, judge
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.holdout import HoldOut, Losses, Sample, first_held_bins
from fleetcast.training.served import LayerReplay, served_losses

FLEET = grid(4)


def hold_out_of(
    fleet: TrainingGrid, changed: tuple[ChangedSeries, ...] = (), sample: Sample | None = None
) -> HoldOut:
    first = first_held_bins(fleet, changed, 0.1, 288)
    return HoldOut(fleet, SHAPE, first, changed, (1, 12, 96), sample or Sample(1))


@pytest.fixture(scope="module")
def hold_out() -> HoldOut:
    return hold_out_of(FLEET)


@pytest.fixture(scope="module")
def sides(hold_out: HoldOut) -> dict[str, Losses]:
    return {
        "good": hold_out.losses(Oracle(FLEET, 0.5)),
        "bad": hold_out.losses(Oracle(FLEET, 60.0)),
        "twin": hold_out.losses(Oracle(FLEET, 0.5)),
    }


@pytest.fixture(scope="module")
def served(hold_out: HoldOut, sides: dict[str, Losses]) -> dict[str, Losses]:
    return served_losses(hold_out, sides)


def test_a_bad_model_costs_clients_far_less_than_it_says(
    sides: dict[str, Losses], served: dict[str, Losses]
) -> None:
    raw, got = np.nanmean(sides["bad"].pinball), np.nanmean(served["bad"].pinball)
    assert got < raw / 3, "the rules stand in for it"
    assert np.nanmean(served["good"].pinball) < got


def test_a_better_model_beats_what_clients_get_and_its_twin_does_not(
    sides: dict[str, Losses], served: dict[str, Losses]
) -> None:
    nothing = np.zeros((4, 2), np.bool_)

    def of(losses: dict[str, Losses], ours: str, theirs: str) -> Sides:
        return Sides(losses[ours], losses[theirs])

    better = judge(of(sides, "good", "bad"), nothing, FLEET.metrics, 1, of(served, "good", "bad"))
    assert better.promoted, better.why
    assert better.why.startswith("better: served loss on all series is")
    assert better.figures["served"].keys() == {"changed", "unchanged"}
    assert better.figures["unchanged"]["ratio"] < better.figures["served"]["unchanged"]["ratio"] < 1
    twin = judge(of(sides, "twin", "good"), nothing, FLEET.metrics, 1, of(served, "twin", "good"))
    assert not twin.promoted
    assert twin.figures["served"]["unchanged"]["ratio"] == 1.0


def test_the_same_data_and_seed_give_the_same_losses(
    hold_out: HoldOut, sides: dict[str, Losses], served: dict[str, Losses]
) -> None:
    again = served_losses(hold_out, {"good": sides["good"]})
    np.testing.assert_array_equal(again["good"].pinball, served["good"].pinball)


def test_the_rules_are_asked_once_for_all_sides(
    hold_out: HoldOut, sides: dict[str, Losses], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ask = [], ExpertLayer.experts

    def count(self: ExpertLayer, *arguments: object) -> object:
        asked.append(1)
        return ask(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ExpertLayer, "experts", count)
    served_losses(hold_out, {"good": sides["good"]})
    alone = len(asked)
    asked.clear()
    served_losses(hold_out, sides)
    assert len(asked) == alone == len(hold_out.origins) + 48, "two days of warm-up, about one an hour"


def test_what_comes_after_an_origin_changes_nothing_that_is_served_from_it(hold_out: HoldOut) -> None:
    # Given the same fleet with another future from a bin of the tail on
    turn = int(hold_out.origins[len(hold_out.origins) // 2])
    other = FLEET.values.copy()
    other[:, :, turn + 1 :] = 100 - other[:, :, turn + 1 :]
    served: list[dict[int, np.ndarray]] = []

    class Watched(LayerReplay):
        def serve(self, origin: int, experts, model, leads=None, rows=None):  # type: ignore[no-untyped-def]
            served[-1][origin] = super().serve(origin, experts, model, leads, rows)
            return served[-1][origin]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fleetcast.training.served.LayerReplay", Watched)
        for values in (FLEET.values, other):
            served.append({})
            held = hold_out_of(TrainingGrid(FLEET.server_names, FLEET.metrics, values, 0, 300_000))
            served_losses(held, {"fallback": held.losses(held.fallback)})
    one, another = served
    assert one.keys() == another.keys()
    for origin in one:
        is_same = np.array_equal(one[origin], another[origin], equal_nan=True)
        assert is_same == (origin <= turn), origin


def test_a_changed_series_is_given_to_the_layer_and_judged_from_its_own_tail_on() -> None:
    # Given a series that changed 60 bins before the end, so that 36 of them are trained on
    hold_out = hold_out_of(FLEET, (ChangedSeries(2, 1, N_BIN - 60),))
    seen: list[tuple[int, np.ndarray]] = []

    class Watched(LayerReplay):
        def serve(self, origin: int, experts, model, leads=None, rows=None):  # type: ignore[no-untyped-def]
            seen.append((origin, np.isfinite(model).any(axis=(2, 3))[list(rows).index(2), 1]))
            return super().serve(origin, experts, model, leads, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fleetcast.training.served.LayerReplay", Watched)
        (losses,) = served_losses(hold_out, {"good": hold_out.losses(Oracle(FLEET))}).values()
    # Then the model's forecasts of what it was trained on are no evidence, and are not judged
    assert {origin for origin, is_given in seen if is_given} == {o for o, _ in seen if o >= N_BIN - 25}
    judged = hold_out.origins[np.isfinite(losses.pinball[:, 2, 1])]
    assert judged.min() == N_BIN - 25
    assert hold_out.origins[np.isfinite(losses.pinball[:, 0, 0])].min() < N_BIN - 240


def test_of_a_large_fleet_two_hundred_series_are_replayed_the_changed_ones_first() -> None:
    values = np.broadcast_to(FLEET.values[:1], (300, 2, N_BIN))
    large = TrainingGrid(tuple(map(str, range(300))), FLEET.metrics, values, 0, 300_000)
    changed = tuple(ChangedSeries(row, 0, N_BIN - 90) for row in (7, 299))
    hold_out = hold_out_of(large, changed)
    assert len(hold_out.replayed) == 100
    assert {7, 299} <= set(hold_out.servers[hold_out.replayed].tolist())
    assert len(hold_out.origins) <= 300
    none = hold_out_of(large, changed, Sample(1, replayed_series=0))
    assert len(none.replayed) == 0


def test_of_servers_with_hundreds_of_metrics_one_is_replayed_rather_than_none() -> None:
    metrics = tuple(f"metric_{number}" for number in range(201))
    values = np.broadcast_to(FLEET.values[:, :1], (4, 201, N_BIN))
    wide = TrainingGrid(FLEET.server_names, metrics, values, 0, 300_000)
    assert len(hold_out_of(wide).replayed) == 1, "else the gate has nothing to judge by, for ever"


def test_windows_for_the_replay_alone_do_not_weigh_on_the_raw_loss() -> None:
    values = np.broadcast_to(FLEET.values[:1], (300, 2, N_BIN))
    large = TrainingGrid(tuple(map(str, range(300))), FLEET.metrics, values, 0, 300_000)
    hold_out = hold_out_of(large)

    class Flat:
        def predict(self, window: HistoryWindow) -> np.ndarray:
            return np.full((len(window.server_names), 2, 96, 3), 50, np.float32)

    known = np.isfinite(hold_out.losses(Flat()).pinball).all(axis=2)
    counts = known.sum(axis=0)
    assert counts.min() == counts.max(), "every server has as many"
    assert known.any(axis=1).sum() < len(hold_out.origins)


def test_a_young_fleet_is_replayed_without_a_warm_up() -> None:
    young = TrainingGrid(FLEET.server_names, FLEET.metrics, FLEET.values[..., :200], 0, 300_000)
    first = first_held_bins(young, (), 0.2, 288)
    hold_out = HoldOut(young, SHAPE, first, (), (1, 12, 96), Sample(1))
    (losses,) = served_losses(hold_out, {"fallback": hold_out.losses(hold_out.fallback)}).values()
    assert np.isfinite(losses.pinball).any()


def test_origins_meet_a_timetable_at_all_its_minutes() -> None:
    # Given a job each hour: at a steady stride of half an hour every origin would stand at two of 12 bins
    origins = hold_out_of(FLEET).origins
    assert len({origin % 12 for origin in origins.tolist()}) >= 8
    assert (np.diff(origins) <= 12).all(), "no part of the tail is left out"
