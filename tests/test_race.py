"""Two models beside each other: pairs, whole hours, and what makes one void."""

import numpy as np

from fleetcast.promotion.evidence import Evidence
from fleetcast.promotion.race import MOST_LOSS, NEW, OLD, Race
from fleetcast.schema import ClosedBin, Floats32

BIN_MS = 300_000
FIRST = 1_768_471_200_000 // BIN_MS // 12 * 12  # the first bin of an hour
METRICS = ("cpu_pct", "net_in_mb_s")
SERVERS = ("a", "b")


class World:
    """Bins of a fleet that stands at 50 and 5.0, forecast by two models that err by what they are told."""

    def __init__(self, new: float = 1.0, old: float = 2.0, horizons: tuple[int, ...] = (1, 12)) -> None:
        self.errors = {NEW: new, OLD: old}
        self.race = Race(Evidence("1", "B", "A"), SERVERS, METRICS, horizons, BIN_MS, min_pairs=24)
        history = np.tile(np.array([50.0, 5.0], np.float32)[None, :, None], (2, 1, 2016))
        history[..., ::2] += 1
        self.race.note_moves(np.arange(2), history, np.array([True, False]))
        self.number = FIRST

    def said(self) -> Floats32:
        found = np.empty((2, 2, 2, 2, len(self.race.horizons), 3), np.float32)
        for side, error in self.errors.items():
            found[side] = (np.array([50.0, 5.0]) + error)[:, None, None]
        return found

    def run(self, n_bins: int, *, opens: bool = True) -> int:
        """Close bins one after another; return how many hours ended."""
        ended = 0
        for _ in range(n_bins):
            values = np.array([[50.0, 5.0], [50.0, 5.0]], np.float32)
            ended += self.race.settle(ClosedBin(self.number * BIN_MS, SERVERS, METRICS, values))
            if opens:
                self.race.open(self.number, self.said())
            self.number += 1
        return ended


def test_an_hour_of_pairs_becomes_a_block_with_both_losses() -> None:
    world = World()
    assert world.run(37) == 3
    blocks = world.race.evidence.blocks
    assert [block.start for block in blocks] == [f"2026-01-15T{hour}:00:00Z" for hour in ("10", "11", "12")]
    assert blocks[1].pairs == 2 * 2 * 12 * 2, "servers, metrics, bins, horizons"
    assert blocks[0].pairs == 4 * 11, "nothing was open before; an hour ahead nothing was due"
    new, old = blocks[1].raw
    assert old > 1.9 * new > 0
    assert blocks[1].served == blocks[1].raw


def test_series_that_both_models_forecast_alike_are_no_pairs() -> None:
    world = World(new=1.0, old=1.0)
    world.run(30)
    assert world.race.evidence.blocks == ()
    assert world.race.evidence.small == 2


def test_a_missing_bin_voids_its_hour_and_no_other() -> None:
    world = World()
    world.run(15)
    world.number += 1
    world.run(30)
    evidence = world.race.evidence
    assert (len(evidence.blocks), evidence.void) == (2, 1)


def test_an_hour_with_less_than_half_the_usual_pairs_is_void() -> None:
    world = World()
    world.run(36)
    world.run(25, opens=False)
    assert world.race.evidence.void == 1
    assert len(world.race.evidence.blocks) == 4


def test_what_is_voided_by_hand_does_not_count() -> None:
    world = World()
    world.run(14)
    world.race.void()
    world.run(24)
    assert (len(world.race.evidence.blocks), world.race.evidence.void) == (2, 1)


def test_a_bin_that_closes_again_changes_nothing() -> None:
    world = World()
    world.run(14)
    values = np.full((2, 2), 90.0, np.float32)
    world.race.settle(ClosedBin((world.number - 1) * BIN_MS, SERVERS, METRICS, values))
    world.run(11)
    new, old = world.race.evidence.blocks[1].raw
    assert old > 1.9 * new


def test_unknown_servers_and_metrics_and_missing_values_are_left_out() -> None:
    world = World()
    world.run(13)
    values = np.array([[np.nan, 5.0], [1.0, 2.0]], np.float32)
    for _ in range(12):
        closed = ClosedBin(world.number * BIN_MS, ("b", "stranger"), ("mem_pct", "net_in_mb_s"), values)
        world.race.settle(closed)
        world.race.open(world.number, world.said())
        world.number += 1
    assert world.race.evidence.blocks[-1].pairs < 40


def test_one_wild_series_does_not_decide() -> None:
    world = World(new=1e6, old=0.5)
    world.run(30)
    new, _ = world.race.evidence.blocks[1].raw
    assert new <= MOST_LOSS * world.race.evidence.blocks[1].pairs


def test_far_forecasts_are_kept_of_every_third_origin_and_stand_apart() -> None:
    world = World(horizons=(1, 12, 96))
    world.run(200)
    assert world.race.n_open <= 1 + 12 + 32 + 1
    assert world.race.evidence.blocks[0].far is None
    far = world.race.evidence.blocks[-1].far
    assert far is None or far[1] > far[0]


def test_a_young_series_is_compared_with_nothing() -> None:
    race = Race(Evidence("1", "B", "A"), SERVERS, METRICS, (1,), BIN_MS, min_pairs=1)
    history = np.full((2, 2, 2016), np.nan, np.float32)
    history[..., -100:] = 50
    race.note_moves(np.arange(2), history, np.array([True, False]))
    said = np.zeros((2, 2, 2, 2, 1, 3), np.float32)
    said[NEW] = 1.0
    for number in range(FIRST, FIRST + 14):
        race.settle(ClosedBin(number * BIN_MS, SERVERS, METRICS, np.full((2, 2), 50.0, np.float32)))
        race.open(number, said)
    assert (race.evidence.blocks, race.evidence.small) == ((), 1)
