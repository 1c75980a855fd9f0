"""The test of a bake: its guarantee on null races, what it finds and when, the wires, and its file."""

import dataclasses
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.loop.bake_power import REAL_SD, persistent
from fleetcast.promotion.evidence import (
    GOES_ON,
    PASSED,
    WORSE,
    Block,
    Evidence,
    Limits,
    judge,
    log_e,
    parse_evidence,
)
from fleetcast.schema import Floats

LIMITS = Limits()


def share_over(races: Floats, alpha: float) -> float:
    return float(np.mean([log_e(race).max() >= np.log(1 / alpha) for race in races]))


@pytest.mark.parametrize("lag_1", [0.0, 0.5])
@pytest.mark.parametrize("sd", [REAL_SD, 3 * REAL_SD])
def test_a_week_of_races_without_a_difference_is_called_in_one_percent_at_most(
    sd: float, lag_1: float
) -> None:
    races = persistent(np.random.default_rng(3), 2000, 168, lag_1) * sd
    assert share_over(races, alpha=0.01) <= 0.01


def test_where_whole_days_go_one_way_or_the_other_few_weeks_are_called() -> None:
    rng = np.random.default_rng(4)
    days = rng.choice([-1, 1], size=(2000, 7)).repeat(24, axis=1)
    races = days * 0.0066 + rng.normal(size=(2000, 168)) * REAL_SD  # a real difference, its sign by the day
    assert share_over(races, alpha=0.01) <= 0.06


@pytest.mark.parametrize(("gain", "blocks", "share"), [(2.0, 72, 0.95), (1.0, 96, 0.95)])
def test_a_difference_that_lasts_is_found(gain: float, blocks: int, share: float) -> None:
    races = np.random.default_rng(5).normal(size=(400, blocks)) * REAL_SD + gain * REAL_SD
    assert share_over(races, alpha=0.01) >= share


def test_the_process_is_what_the_paper_writes_block_by_block() -> None:
    """Against the sum written out: exp(l S - psi(l) V), l on a grid, each bound alone."""
    steps = np.array([0.03, -0.01, 0.02, 0.05, 0.01])
    bound, found = 0.1, log_e(np.array([0.03, -0.01, 0.02, 0.05, 0.01]), bounds=(0.1,))
    c, total, spread = 2 * bound, 0.0, 0.0
    for number, step in enumerate(steps):
        mean = total / number if number else 0.0
        total, spread = total + step, spread + (step - mean) ** 2
        grid = [(0.95 / 0.02) ** (k / 23) * 0.02 / c for k in range(24)]
        parts = [np.exp(x * total - (-np.log(1 - c * x) - c * x) / c**2 * spread) for x in grid]
        assert found[number] == pytest.approx(np.log(np.mean(parts)))


def test_no_single_hour_decides() -> None:
    assert log_e(np.array([1.0, *[0.0] * 23])).max() < np.log(2)


def bake(
    *ratios: float, raw: float | None = None, far: tuple[float, float] | None = None, **more: Any
) -> Evidence:
    """A block for each ratio of the new loss to the old one."""
    blocks = tuple(
        Block("2026-01-15T10:00:00Z", 500, (100 * r, 100.0), (100 * (raw or r), 100.0), far) for r in ratios
    )
    return dataclasses.replace(Evidence("1", "B", "A"), blocks=blocks, **more)


def test_a_model_that_is_as_good_stays_after_a_day() -> None:
    assert judge(bake(*[1.0] * 23), LIMITS).kind == GOES_ON
    passed = judge(bake(*[0.98] * 24), LIMITS)
    assert passed.kind == PASSED
    assert passed.why == "clients got forecasts 2.0 % closer over 24 hours beside A"


def test_a_tenth_worse_is_found_within_a_day_and_said_in_words() -> None:
    ratios = 1.1 + np.random.default_rng(6).normal(size=24) * 2 * REAL_SD
    found = [judge(bake(*ratios[:hours]), LIMITS).kind for hours in range(1, 25)]
    assert WORSE in found[:23], "a day at most"
    verdict = judge(bake(*ratios[: found.index(WORSE) + 1]), LIMITS)
    assert verdict.why.startswith("clients got forecasts 1"), verdict.why
    assert "further off over" in verdict.why
    assert "in at most 5% of bakes" in verdict.why
    assert verdict.figures["log10_e_worse"] >= verdict.figures["log10_e_needed"]


def test_harm_of_the_model_alone_counts_although_the_layer_hides_it_from_clients() -> None:
    verdict = judge(bake(*[1.0] * 20, raw=1.3), LIMITS)
    assert verdict.kind == WORSE
    assert verdict.why.startswith("its own forecasts were 30.0 % further off")
    assert verdict.why.endswith("clients got forecasts as good")


def test_a_percent_is_no_harm_however_long_it_lasts() -> None:
    assert judge(bake(*[1.01] * 24), LIMITS).kind == PASSED
    assert judge(bake(*[1.01] * 160), dataclasses.replace(LIMITS, bake_hours=168)).kind == GOES_ON


def test_the_wire_trips_at_three_hours_in_a_row_at_one_and_a_half_times_the_loss() -> None:
    assert judge(bake(1.0, 1.6, 1.6), LIMITS).kind == GOES_ON
    assert judge(bake(1.6, 1.6, 1.4, 1.6), LIMITS).kind == GOES_ON
    tripped = judge(bake(1.0, 1.6, 1.6, 1.6), LIMITS)
    assert tripped.kind == WORSE
    assert tripped.why.startswith("3 hours in a row its loss was over 1.5 times that of A (now 1.60 times")
    far = judge(bake(1.0, 1.0, 1.0, far=(160.0, 100.0)), LIMITS)
    assert far.kind == WORSE
    assert "farthest ahead" in far.why


def test_a_model_that_forecasts_nothing_is_taken_back_after_three_sweeps() -> None:
    assert judge(bake(failing=2, why_failing="boom"), LIMITS).kind == GOES_ON
    verdict = judge(bake(failing=3, why_failing="boom"), LIMITS)
    assert (verdict.kind, verdict.why) == (WORSE, "it made no forecasts in 3 sweeps in a row: boom")


def test_a_rare_chance_is_not_told_as_none() -> None:
    verdict = judge(bake(*[1.4] * 23), replace(LIMITS, alpha=0.005))
    assert "in at most 0.5% of bakes" in verdict.why


def test_a_bake_that_can_compare_nothing_ends_and_says_so() -> None:
    assert judge(bake(small=24), LIMITS).why == "in 24 hours too few forecasts differed from those of A"
    unable = judge(bake(1.0, unable="its file is damaged"), LIMITS)
    assert (unable.kind, unable.why) == (PASSED, "it cannot be compared any more: its file is damaged")


def test_evidence_survives_its_file_and_damage_is_told_from_it() -> None:
    known = bake(1.0, 1.2, far=(3.0, 2.0), void=1, failing=1, why_failing="boom")
    raw = json.loads(json.dumps(known.as_json()))
    assert parse_evidence(raw) == known
    damaged: list[dict[str, Any]] = [
        {"format": 2},
        {"blocks": [{}]},
        {"blocks": [{**raw["blocks"][0], "raw": [1.0, float("nan")]}]},
        {"blocks": [{**raw["blocks"][0], "served": [-1.0, 1.0]}]},
        {"void": None},
    ]
    for change in damaged:
        with pytest.raises((KeyError, TypeError, ValueError)):
            parse_evidence({**raw, **change})
