"""Claims about capacity: P of made futures, which source answers, dates and when there is none."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_inference import World

from data_buffer import DataBuffer
from fleetcast.capacity.crossing import (
    FEWEST,
    FORECAST,
    HARDLY_PASSED,
    HISTORY,
    LIMITS,
    LOWEST,
    NOTHING_SETTLED,
    ORIGINS_KEPT,
    TREND,
    Calibration,
    Guess,
    guess,
)
from fleetcast.capacity.dates import OVER, Ratios, compare, find_trend, look_ahead
from fleetcast.clock import DAY_MS, FakeClock, from_ms, iso_z, parse_plain_utc
from fleetcast.inference import build_fleet
from fleetcast.schema import Floats
from fleetcast.serving import fullness as fullness_module
from fleetcast.serving.capacity import Capacity, CapacityQuestion, _Published, _Standing
from fleetcast.serving.fullness import DatesQuestion, Fullness, FullnessGauges, Soonest
from fleetcast.settings import Settings

NINETY = LIMITS.index(90.0)
N_SERIES = 100


def made_guess(centre: Floats, random: np.random.Generator, share: float = 0.5) -> Guess:
    """Return what the sources know where the forecast is right and trend and history know nothing."""
    n_series = len(centre)
    centres = np.stack([centre, random.uniform(0, 100, n_series)]).astype(np.float32)
    shares = np.full((n_series, len(LIMITS)), share, np.float32)
    return Guess(
        centres, np.full((2, n_series), 5.0, np.float32), shares, np.full(n_series, 50.0, np.float32)
    )


def teach(calibration: Calibration, n_origins: int, seed: int = 1) -> np.random.Generator:
    """Settle windows whose maximum lies around the forecast's centre, by a scale of 5."""
    random = np.random.default_rng(seed)
    for _ in range(n_origins):
        centre = random.uniform(60, 110, N_SERIES)
        said = calibration.say(made_guess(centre, random))
        calibration.settle(said, (centre + 5.0 * random.standard_normal(N_SERIES)).astype(np.float32))
    return random


def test_p_is_the_share_that_came_true() -> None:
    calibration = Calibration()
    random = teach(calibration, 100)
    centre = np.array([90.0, 95.0, 85.0, 70.0])
    said = calibration.say(made_guess(centre, random))
    assert said.told[FORECAST, :, NINETY] == pytest.approx([0.5, 0.84, 0.16, 0.0], abs=0.05)
    assert calibration.choose(NINETY) == (FORECAST, LOWEST)
    n_windows, scores = calibration.brier_scores(NINETY)
    assert n_windows > 5000
    assert scores[FORECAST] < scores[HISTORY] < scores[TREND] + 0.05
    for n_said, p, passed in calibration.reliability(FORECAST, NINETY):
        assert n_said < 200 or p == pytest.approx(passed, abs=0.05)


def test_before_anything_settled_only_history_says_something() -> None:
    calibration = Calibration()
    random = np.random.default_rng(3)
    said = calibration.say(made_guess(np.full(4, 95.0), random, 0.25))
    assert np.isnan(said.told[[FORECAST, TREND]]).all()
    assert calibration.choose(NINETY) == (HISTORY, NOTHING_SETTLED)
    calibration.settle(said, np.full(4, 96.0, np.float32))
    assert np.isnan(calibration.say(said.guess).raw[FORECAST]).all(), f"fewer than {FEWEST} settled"


def test_the_source_with_the_lower_settled_score_answers() -> None:
    calibration, random = Calibration(), np.random.default_rng(5)
    for _ in range(60):  # the forecast knows nothing, the own history is right
        passes = random.uniform(size=N_SERIES) < 0.5
        found = made_guess(random.uniform(60, 110, N_SERIES), random)
        found.shares[:] = np.where(passes, 0.95, 0.05)[:, None]
        calibration.settle(calibration.say(found), np.where(passes, 99.0, 10.0).astype(np.float32))
    assert calibration.choose(NINETY) == (HISTORY, LOWEST)


def test_a_source_that_is_hardly_better_answers_too_and_the_answer_shows_no_lower_score_beside_it() -> None:
    calibration, random = Calibration(), np.random.default_rng(8)
    for _ in range(
        60
    ):  # one window in two passes: the forecast knows all but a little, the history a little more
        passes = random.uniform(size=N_SERIES) < 0.5
        found = made_guess(np.where(passes, 96.0, 84.0), random)
        found.shares[:] = np.where(passes, 0.9, 0.1)[:, None]
        peaks = np.where(passes ^ (random.uniform(size=N_SERIES) < 0.1), 96.0, 84.0)
        calibration.settle(calibration.say(found), peaks.astype(np.float32))
    _, scores = calibration.brier_scores(NINETY)
    best = int(np.argmin(scores))
    assert scores[best] < scores[FORECAST] < 1.1 * scores[best], scores
    assert calibration.choose(NINETY) == (best, LOWEST)


def test_where_no_window_has_passed_yet_the_source_that_never_says_so_does_not_answer() -> None:
    calibration, random = Calibration(), np.random.default_rng(6)
    for _ in range(60):  # flat below the limit: plain history is never wrong, the forecast a little
        said = calibration.say(made_guess(np.full(N_SERIES, 75.0), random, 0.0))
        calibration.settle(said, np.full(N_SERIES, 76.0, np.float32))
    assert calibration.brier_scores(NINETY)[1][HISTORY] == 0
    assert calibration.choose(NINETY) == (FORECAST, HARDLY_PASSED)


def test_what_is_said_too_high_is_told_lower() -> None:
    calibration, random = Calibration(), np.random.default_rng(7)
    for _ in range(60):  # the history says 80 %, and 30 % pass
        said = calibration.say(made_guess(np.full(N_SERIES, 80.0), random, 0.8))
        passed = random.uniform(size=N_SERIES) < 0.3
        calibration.settle(said, np.where(passed, 99.0, 10.0).astype(np.float32))
    assert calibration.say(said.guess).told[HISTORY, 0, NINETY] == pytest.approx(0.32, abs=0.03)


def test_a_noisy_series_is_not_held_against_the_surprises_of_flat_ones() -> None:
    """Flat series often leave their small scale by far; noisy ones never do."""
    calibration, random = Calibration(), np.random.default_rng(10)
    is_noisy = np.arange(N_SERIES) % 2 == 1
    scale = np.where(is_noisy, 20.0, 0.5).astype(np.float32)
    found = Guess(
        np.where(is_noisy, 50.0, 80.0).astype(np.float32)[None].repeat(2, axis=0),
        scale[None].repeat(2, axis=0),
        np.full((N_SERIES, len(LIMITS)), 0.1, np.float32),
        np.full(N_SERIES, 50.0, np.float32),
    )
    for _ in range(40):
        jumps = 12.0 * (random.uniform(size=N_SERIES) < 0.3)  # 24 scales of a flat series
        peaks = np.where(is_noisy, 50.0 + random.uniform(-5, 10, N_SERIES), 80.0 + jumps)
        calibration.settle(calibration.say(found), peaks.astype(np.float32))
    told = calibration.say(found).raw[FORECAST, :, NINETY]
    assert told[is_noisy].max() < 0.1, "half of what all series together say, .15"
    assert 0.2 < told[~is_noisy].min() <= told[~is_noisy].max() < 0.3


def test_scores_kept_before_scales_were_count_for_all() -> None:
    calibration = Calibration()
    random = teach(calibration, 60)
    found = made_guess(np.array([90.0, 70.0]), random)
    before = calibration.say(found).raw[FORECAST]
    calibration.scales[:] = np.nan
    assert calibration.say(found).raw[FORECAST] == pytest.approx(before)


def test_windows_that_begin_over_the_limit_and_silent_ones_teach_nothing_about_it() -> None:
    calibration, random = Calibration(), np.random.default_rng(9)
    found = made_guess(np.full(N_SERIES, 95.0), random)
    found.now[:] = 93.0
    calibration.settle(calibration.say(found), np.full(N_SERIES, 99.0, np.float32))
    assert calibration.reliability(HISTORY, NINETY)[:, 0].sum() == 0
    found.now[:] = 50.0
    calibration.settle(calibration.say(found), np.full(N_SERIES, np.nan, np.float32))
    assert calibration.reliability(HISTORY, NINETY)[:, 0].sum() == 0


def test_old_windows_are_forgotten() -> None:
    calibration = Calibration()
    teach(calibration, ORIGINS_KEPT)
    before = calibration.brier_scores(NINETY)[0]
    teach(calibration, 20, seed=2)
    assert calibration.brier_scores(NINETY)[0] == pytest.approx(before, rel=0.1)


def test_a_guess_is_made_of_quantiles_line_and_own_past() -> None:
    history = np.full((3, 400), 20.0, np.float32)
    history[0, -72:] = 20.0 + np.arange(72)  # climbs by 1 a bin
    history[1, 100:103] = 95.0
    history[2, :] = np.nan
    quantiles = np.full((3, 96, 3), 30.0, np.float32)
    quantiles[..., 2] = 34.0
    found = guess(quantiles, history, 96)
    assert found.centres[FORECAST].tolist() == [30.0, 30.0, 30.0]
    assert found.scales[FORECAST].tolist() == [4.0, 4.0, 4.0]
    assert found.centres[TREND, 0] == pytest.approx(91.0 + 96.0)
    assert found.centres[TREND, 1] == pytest.approx(20.0)
    assert np.isnan(found.centres[TREND, 2])
    assert found.shares[0, NINETY] == pytest.approx(1 / 26)  # the newest window holds the climb
    assert found.shares[1, NINETY] == pytest.approx(8 / 26)
    assert np.isnan(found.shares[2]).all()


def climb(n_days: int, pace: float = 1.0, start: float = 40.0, noise: float = 0.3, seed: int = 0) -> Floats:
    return start + pace * np.arange(n_days) + noise * np.random.default_rng(seed).standard_normal(n_days)


@pytest.fixture(scope="module")
def ratios() -> Ratios:
    return compare([climb(50, pace, 20.0, seed=seed) for seed, pace in enumerate((0.5, 1.0, 1.5))])


def test_a_steady_climb_has_dates_around_the_day(ratios: Ratios) -> None:
    told = look_ahead(climb(40), 95.0, ratios)
    assert told.early_days is not None
    assert told.late_days is not None
    assert told.early_days <= 95.0 - 79.0 <= told.late_days
    assert told.late_days - told.early_days < 8
    assert told.p_within == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("maxima", "why"),
    [
        (climb(6), "6 of 7 days since the last clean-up"),
        (climb(20, 0.0), "it does not climb"),
        (climb(20, 0.5), "beyond the 20 days known"),
        (np.concatenate([climb(20, 2.0), climb(10, 2.0)]), "it was freed at 78 % before"),
        (climb(70), OVER),
        (np.full(5, np.nan), "nothing was sent"),
    ],
    ids=["young", "flat", "too far", "freed before", "over", "silent"],
)
def test_there_is_no_date_where_the_record_does_not_bear_one(
    maxima: Floats, why: str, ratios: Ratios
) -> None:
    told = look_ahead(maxima, 95.0, ratios)
    assert told.early_days is None
    assert why in told.why_not


def test_a_fleet_whose_climbs_ended_before_gets_no_date() -> None:
    stopped = [np.concatenate([climb(20, 1.0, seed=seed), np.full(40, 60.0)]) for seed in range(10)]
    told = look_ahead(climb(40), 95.0, compare(stopped))
    assert told.why_not == "growth like this often did not go on"
    assert told.p_within is not None
    assert told.p_within < 0.7


def test_a_nightly_free_has_no_trend_in_its_daily_maxima() -> None:
    trend = find_trend(climb(30, 0.0, 85.0))
    assert trend is not None
    assert not trend.is_climb


# the daemon


@pytest.fixture
def world_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path, mode="system").start()
    yield world
    world.end()


def grow(world: World, n_bins: int, start: int = 0) -> None:
    """Let `low` stay, `odd` sit over the limit, and `leak` climb by 0.4 a bin."""
    for number in range(start, start + n_bins):
        rows = [("low", number, 10.0), ('odd <b>"', number, 93.0), ("leak", number, 30.0 + 0.4 * number)]
        assert world.post(*rows).status_code == 200
        world.service.cycle()


def bin_start(number: int) -> datetime:
    return datetime(2020, 1, 1, tzinfo=UTC) + timedelta(minutes=5 * number)


def test_the_daemon_says_who_is_over_and_since_when(world: World) -> None:
    grow(world, 4)
    told = world.get("/capacity")
    assert (told["limit"], told["horizon_s"], told["servers"]) == (90.0, 28_800, 3)
    assert told["rows"] == [
        {
            "server": 'odd <b>"', "metric": "cpu_pct", "state": "over", "now": 93.0, "p": None,
            "first_possible": None, "likely": None,
            "since": "2020-01-01T00:00:00Z", "since_or_before": True, "silent_since": None,
        }
    ]  # fmt: skip
    assert told["metrics"]["cpu_pct"]["windows"] == 0
    assert told["metrics"]["cpu_pct"]["brier"] is None
    assert told["metrics"]["cpu_pct"]["why"] == NOTHING_SETTLED
    assert told["not_sent"] == ["mem_pct"]
    metrics = world.client.get("/metrics").text
    assert 'fleetcast_capacity_over{metric="cpu_pct"} 1.0' in metrics
    assert 'fleetcast_capacity_likely_crossings{metric="cpu_pct"} 0.0' in metrics


def test_over_since_is_looked_for_in_all_of_the_memory_and_marked_where_that_holds_no_bin_below(
    world: World,
) -> None:
    # Given: servers that are over for 17 hours, for an hour, and in all that is known of them
    world.clock.advance(hours=8)
    for number in range(207):
        long, short = 95.0 if number > 2 else 50.0, 95.0 if number > 194 else 50.0
        rows = [("long", number, long), ("short", number, short), ("always", number, 90.0)]
        assert world.post(*rows).status_code == 200
        world.service.cycle()
    # Then: each has its own first bin, and only the last one may have been over before
    told = {row["server"]: (row["since"], row["since_or_before"]) for row in world.get("/capacity")["rows"]}
    assert told == {
        "long": (iso_z(bin_start(3)), False),
        "short": (iso_z(bin_start(195)), False),
        "always": (iso_z(bin_start(0)), True),
    }


def test_where_all_servers_are_silent_the_rows_hold_their_last_values_and_no_past_times(
    world_now: World,
) -> None:
    # Given: a server that is over and one that is forecast to get there, and then nobody sends any more
    world = world_now
    for number in range(141, 145):
        rows = [("over", number, 95.0), ("falls", number, 97.0 if number < 144 else 89.0)]
        assert world.post(*rows).status_code == 200
        world.clock.advance(minutes=5)
        world.service.cycle()
    # When: two hours pass
    for _ in range(24):
        world.clock.advance(minutes=5)
        world.service.cycle()
    # Then: what is told is what was last known
    told, now = world.get("/capacity?min_p=0"), iso_z(world.clock.now())
    assert (told["silent"], told["not_sent"]) == (2, ["mem_pct"])
    rows = {row["server"]: row for row in told["rows"]}
    assert {name: (row["state"], row["now"]) for name, row in rows.items()} == {
        "over": ("over", 95.0), "falls": ("not known yet", 89.0),
    }  # fmt: skip
    for row in rows.values():
        assert all(row[name] is None or row[name] >= now for name in ("first_possible", "likely")), row
    assert rows["over"]["since"] == iso_z(bin_start(141))


def test_the_gauges_count_likely_crossings_of_servers_below_the_limit(tmp_path: Path) -> None:
    capacity = Capacity(tmp_path, build_fleet(Settings(), FakeClock()))
    told = np.full((len(LIMITS), 5), 0.1, np.float32)
    told[NINETY] = [0.5, 0.49, 0.9, np.nan, 1.0]
    now = np.array([50.0, 50.0, 50.0, 50.0, 95.0], np.float32)
    never = np.zeros((5, len(LIMITS)), np.uint16)
    record = {"brier": {"forecast": 0.02}}
    standing = _Standing(told, now, never, never, tuple(record for _ in LIMITS))
    capacity._published = _Published(0, ("a", "b", "c", "d", "e"), {"cpu_pct": standing})

    gauges = capacity.gauges(3)

    assert (gauges.likely, gauges.over) == ({"cpu_pct": 2}, {"cpu_pct": 1})
    assert gauges.expected["cpu_pct"] == pytest.approx(0.5 + 0.49 + 0.9)
    assert [server for server, _ in gauges.probability] == ["a", "b", "c"], "labels are bounded"
    assert gauges.brier == {("cpu_pct", "forecast"): 0.02}


def test_windows_settle_after_the_horizon_and_a_restart_keeps_what_they_taught(world: World) -> None:
    grow(world, 96 + 12 * 5)
    told = world.get("/capacity?min_p=0&metric=cpu_pct")
    settled = world.service._sweeper.capacity
    assert settled is not None
    assert settled._calibrations[0].n_settled[0] == 5
    assert {row["server"] for row in told["rows"]} == {"low", 'odd <b>"', "leak"}
    world.end()
    world.start()
    again = world.service._sweeper.capacity
    assert again is not None
    assert again._calibrations[0].n_settled[0] == 5
    assert np.array_equal(again._calibrations[0].tallies, settled._calibrations[0].tallies)


def test_a_damaged_file_costs_only_what_it_held(tmp_path: Path) -> None:
    fleet = build_fleet(Settings(), FakeClock())
    (tmp_path / "capacity.npz").write_bytes(b"PK\x03\x04 torn")
    capacity = Capacity(tmp_path, fleet)
    assert capacity.answer(CapacityQuestion())["rows"] == []
    capacity.save()
    assert Capacity(tmp_path, fleet)._calibrations[0].n_settled[0] == 0


def test_what_was_learnt_before_scales_were_kept_is_taken_over(tmp_path: Path) -> None:
    fleet = build_fleet(Settings(), FakeClock())
    capacity = Capacity(tmp_path, fleet)
    teach(capacity._calibrations[0], 3)
    capacity.save()
    with np.load(tmp_path / "capacity.npz") as archive:
        older = {name: archive[name] for name in archive.files if name != "scales"} | {"format": np.int64(1)}
    np.savez_compressed(tmp_path / "capacity.npz", **older)

    kept = Capacity(tmp_path, fleet)._calibrations[0]

    assert kept.n_settled[0] == 3
    assert np.array_equal(kept.scores, capacity._calibrations[0].scores, equal_nan=True)
    assert np.isnan(kept.scales).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *product(("tallies", "brier", "n_settled"), (np.nan, -1, np.inf)),
        *product(["scales"], (0, -1, np.inf)),
    ],
)
def test_a_file_with_impossible_sums_is_not_taken_up(tmp_path: Path, name: str, value: float) -> None:
    fleet = build_fleet(Settings(), FakeClock())
    capacity = Capacity(tmp_path, fleet)
    calibration = capacity._calibrations[0]
    calibration.n_settled[0] = 3
    wrong = getattr(calibration, name)
    wrong[...] = value if wrong.dtype.kind == "f" else -1
    capacity.save()
    assert Capacity(tmp_path, fleet)._calibrations[0].n_settled[0] == 0


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("limit=85", "limit must be one of 70, 80, 90, 95, got 85"),
        ("metric=latency_ms", "is no metric in percent that is forecast: cpu_pct, mem_pct are"),
        ("min_p=2", "min_p"),
        ("rows=0", "rows"),
        ("within=8h", "unknown field"),
    ],
)
def test_questions_that_cannot_be_answered_say_what_would_be_right(
    world: World, query: str, says: str
) -> None:
    answer = world.client.get(f"/capacity?{query}")
    assert answer.status_code == 422
    assert says in json.dumps(answer.json()["detail"])


def test_an_unknown_server_is_answered_with_the_nearest(world: World) -> None:
    grow(world, 3)
    answer = world.client.get("/capacity?server=lea")
    assert (answer.status_code, "nearest is leak" in answer.json()["detail"]) == (404, True)
    assert [row["server"] for row in world.get("/capacity?server=odd <b>%22")["rows"]] == ['odd <b>"']


def buffer_of(folder: Path, series: dict[str, Floats], clock: FakeClock) -> DataBuffer:
    """Return a buffer with three records a day and server, the highest in the middle."""
    buffer = DataBuffer(folder, clock=clock, expire=False)
    last = int(clock.now().timestamp() * 1000) // DAY_MS - 1
    records: list[dict[str, Any]] = []
    for name, maxima in series.items():
        for place, value in enumerate(maxima):
            day = last - len(maxima) + 1 + place
            for hour, below in ((2, 1.0), (12, 0.0), (20, 0.5)):
                at = from_ms(day * DAY_MS) + timedelta(hours=hour)
                records.append(
                    {"timestamp": at.isoformat(), "server_name": name, "disk_usage_pct": value - below}
                )
    buffer.append(records)
    return buffer


def test_disks_get_dates_from_the_stored_days_although_they_are_not_forecast(tmp_path: Path) -> None:
    clock = FakeClock()
    series = {
        "full soon": climb(40),
        "steady": climb(40, 0.0),
        "other": climb(50, 0.5, 20.0),
        "new": climb(3),
    }
    buffer = buffer_of(tmp_path, series, clock)
    fullness = Fullness(build_fleet(Settings(), clock), buffer)
    with pytest.raises(Exception, match="known: none yet"):
        fullness.answer(DatesQuestion())
    while fullness._newest_day < 0:
        fullness.step()
    told = fullness.answer(DatesQuestion())
    rows = {row["server"]: row for row in told["rows"]}
    assert told["rows"][0]["server"] == "full soon"
    early, late = rows["full soon"]["full_between"]
    assert early <= (clock.now() + timedelta(days=15)).date().isoformat() <= late
    assert rows["steady"]["why_no_date"] == "it does not climb"
    assert rows["new"]["why_no_date"] == "3 of 7 days since the last clean-up"
    assert rows["full soon"]["now"] == pytest.approx(series["full soon"][-1], abs=0.01)
    assert (told["days"], told["with_date"]) == (50, 1)
    clock.advance(days=1)
    fullness.step()
    fullness.step()
    assert fullness.answer(DatesQuestion(server="new"))["matching"] == 1
    buffer.close()


def test_dates_are_asked_over_http(world: World) -> None:
    answer = world.client.get("/capacity/dates")
    assert (answer.status_code, "known: none yet" in answer.json()["detail"]) == (422, True)


def test_the_page_is_told_what_dates_wait_for_instead_of_a_refusal(world_now: World) -> None:
    world = world_now
    for _ in range(3):
        world.service.cycle()
    told = world.get("/ui/api/capacity/dates")
    assert told["waits"] | {"first": ""} == {"is_reading": False, "is_sent": False, "first": ""}
    record = {"timestamp": iso_z(world.clock.now()), "server_name": "a", "disk_usage_pct": 50.0}
    assert world.client.post("/feed/data", json={"records": [record]}).status_code == 200
    told = world.get("/ui/api/capacity/dates")
    first = parse_plain_utc(told["waits"]["first"])
    assert told["waits"]["is_sent"]
    assert timedelta(0) < first - world.clock.now() <= timedelta(days=2)
    world.clock.advance(seconds=(first - world.clock.now()).total_seconds())
    for _ in range(50):
        world.service.cycle()
    told = world.get("/ui/api/capacity/dates")
    assert (told["days"], told["known"]) == (1, ["disk_usage_pct"])
    assert "limit must be" in world.client.get("/capacity/dates?limit=0").json()["detail"]


def test_history_that_comes_later_counts_in_the_dates(
    world_now: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: a daemon that has looked at all days, and found none
    world = world_now
    for _ in range(3):
        world.service.cycle()
    assert world.client.get("/capacity/dates").status_code == 422
    # When: forty days are imported
    world.clock.advance(minutes=1)
    days = [world.clock.now() - timedelta(days=40 - place) for place in range(40)]
    rows = [
        {"timestamp": day.isoformat(), "server_name": "a", "disk_usage_pct": float(value)}
        for day, value in zip(days, climb(40), strict=True)
    ]
    assert world.client.post("/feed/data", json={"records": rows}).json()["records_received"] == 40
    for _ in range(50):
        world.service.cycle()
    assert world.client.get("/capacity/dates").status_code == 422, "the import may still go on"
    # Then: a pause later they are known
    monkeypatch.setattr("fleetcast.serving.fullness._PAUSE_S", 0.0)
    for _ in range(200):
        world.service.cycle()
    told = world.get("/capacity/dates")
    assert (told["days"], told["rows"][0]["basis_days"]) == (40, 40)


def test_a_day_that_changes_is_read_again_and_no_scrape_misses_the_dates(
    disks: tuple[Fullness, Soonest, FakeClock], monkeypatch: pytest.MonkeyPatch
) -> None:
    fullness, soonest, clock = disks
    look(fullness, soonest)
    yesterday = clock.now() - timedelta(days=1)
    before = fullness.answer(DatesQuestion(server="steady"))
    row = {"timestamp": yesterday.isoformat(), "server_name": "steady", "disk_usage_pct": 96.0}
    fullness._buffer.append([row])
    times_ms = np.array([int(yesterday.timestamp() * 1000)])
    fullness.note(times_ms)
    for _ in range(50):
        fullness.step()
    assert fullness.answer(DatesQuestion(server="steady")) == before, "records may still come"
    monkeypatch.setattr("fleetcast.serving.fullness._PAUSE_MAX_S", 0.0)  # as one hour after the first of them
    for _ in range(50):
        fullness.step()
        soonest.step()
        assert soonest.gauges(100) is not None
    after = fullness.answer(DatesQuestion(server="steady"))
    assert after["rows"][0]["now"] == 96.0
    told = soonest.gauges(100)
    assert told is not None
    assert told.full == {DISK: 2}


def test_live_records_read_no_day_again(disks: tuple[Fullness, Soonest, FakeClock]) -> None:
    fullness, soonest, clock = disks
    look(fullness, soonest)
    fullness.note(np.array([int(clock.now().timestamp() * 1000)]))
    fullness.note(np.array([], dtype=np.int64))
    assert fullness._changed == {}


def test_days_before_the_oldest_record_cost_no_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    buffer = buffer_of(tmp_path, {"a": climb(3)}, clock)
    fullness = Fullness(build_fleet(Settings(), clock), buffer)
    read: list[int] = []
    whole = fullness._read
    monkeypatch.setattr(fullness, "_read", lambda day: read.append(day) or whole(day))
    while fullness._newest_day < 0:
        fullness.step()
    newest = fullness._newest_day
    assert read == [newest, newest - 1, newest - 2]
    buffer.close()


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[tuple[Fullness, Soonest, FakeClock]]:
    """Disks of which one is full within a week, one within a month, one is full, and one does not climb."""
    clock = FakeClock()
    series = {
        "soon": climb(40, 1.0, 51.0),
        "sooner": climb(40, 1.0, 53.0),
        "later": climb(40, 1.0, 38.0),
        "full": climb(40, 0.0, 97.0),
        "steady": climb(40, 0.0),
    }
    buffer = buffer_of(tmp_path, series, clock)
    fullness = Fullness(build_fleet(Settings(), clock), buffer)
    yield fullness, Soonest(fullness, clock), clock
    buffer.close()


def look(fullness: Fullness, soonest: Soonest) -> FullnessGauges:
    """Go on until everything was looked at."""
    for _ in range(1000):
        fullness.step()
        soonest.step()
        if (told := soonest.gauges(100)) is not None:
            return told
    raise AssertionError("it never ended")


DISK = "disk_usage_pct"


def test_a_scrape_says_what_the_answers_say_of_the_disks_that_are_full_soon(
    disks: tuple[Fullness, Soonest, FakeClock],
) -> None:
    fullness, soonest, clock = disks
    assert soonest.gauges(100) is None, "before the days were read"
    told = look(fullness, soonest)
    rows = {row["server"]: row["full_between"] for row in fullness.answer(DatesQuestion())["rows"]}
    week, month = ((clock.now() + timedelta(days=days)).isoformat() for days in (7, 30))
    dated = {name: days for name, days in rows.items() if days}
    assert {"soon", "sooner", "later"} <= dated.keys()
    for n_days, end in ((7, week), (30, month)):
        assert told.within[DISK, n_days] == sum(days[0] < end for days in dated.values())
    assert 0 < told.within[DISK, 7] < told.within[DISK, 30]
    assert told.full == {DISK: 1}
    for times, place in ((told.early, 0), (told.late, 1)):
        said = {name: from_ms(int(at * 1000)).date().isoformat() for (name, _metric), at in times.items()}
        assert said == {name: days[place] for name, days in dated.items()}
    assert told.earliest[DISK] == min(told.early.values())


def test_the_soonest_disks_are_named_and_no_more_than_allowed(
    disks: tuple[Fullness, Soonest, FakeClock],
) -> None:
    fullness, soonest, _clock = disks
    times = look(fullness, soonest).early
    assert list(times.values()) == sorted(times.values())
    told = soonest.gauges(2)
    assert told is not None
    assert list(told.early) == list(told.late) == list(times)[:2]


def test_disks_are_looked_at_once_a_day_and_their_dates_come_nearer_at_each_scrape(
    disks: tuple[Fullness, Soonest, FakeClock], monkeypatch: pytest.MonkeyPatch
) -> None:
    fullness, soonest, clock = disks
    before = look(fullness, soonest)
    asked: list[str] = []
    rows = fullness.rows
    monkeypatch.setattr(fullness, "rows", lambda metric: asked.append(metric) or rows(metric))
    for _ in range(50):
        fullness.step()
        soonest.step()
    assert asked == []
    clock.advance(days=1)
    for _ in range(50):
        fullness.step()
        soonest.step()
    assert asked == [DISK]
    after = soonest.gauges(100)
    assert after is not None
    assert after.within[DISK, 30] >= before.within[DISK, 30]
    # and once the history is read again, nothing is said until it is
    fullness.clear()
    soonest.step()
    assert soonest.gauges(100) is None


def test_the_alert_asks_at_each_check_and_no_server_is_judged_again(
    disks: tuple[Fullness, Soonest, FakeClock], monkeypatch: pytest.MonkeyPatch
) -> None:
    fullness, soonest, clock = disks
    while not fullness.is_known:
        fullness.step()
    made = fullness.answer(DatesQuestion())
    of_70 = fullness.answer(DatesQuestion(limit=70.0))
    look(fullness, soonest)
    judged: list[float] = []
    whole = fullness_module.dates.look_ahead

    def count(maxima: Any, limit: float, ratios: Ratios) -> Any:
        judged.append(limit)
        return whole(maxima, limit, ratios)

    monkeypatch.setattr(fullness_module.dates, "look_ahead", count)
    assert fullness.answer(DatesQuestion()) == made
    assert fullness.answer(DatesQuestion(n_rows=2))["rows"] == made["rows"][:2]
    assert fullness.answer(DatesQuestion(limit=70.0)) == of_70
    one = fullness.answer(DatesQuestion(server="later"))
    assert (one["rows"], one["with_date"]) == ([row for row in made["rows"] if row["server"] == "later"], 1)
    assert judged == []
    # a new day: the look before answers until the next one is done, but not a question of one's own
    clock.advance(days=1)
    while fullness.whole_days() is None:
        fullness.step()
    assert fullness.answer(DatesQuestion())["newest_day"] == made["newest_day"]
    assert judged == []
    assert fullness.answer(DatesQuestion(limit=70.0))["newest_day"] > made["newest_day"]
    assert judged
    for _ in range(50):
        soonest.step()
    judged.clear()
    after = fullness.answer(DatesQuestion())
    assert (after["newest_day"] > made["newest_day"], judged) == (True, [])
    # what was read is forgotten, and with it what was said of it
    fullness.clear()
    with pytest.raises(Exception, match="known: none yet"):
        fullness.answer(DatesQuestion())


def test_few_answers_are_kept_and_the_alerts_is_among_them(
    disks: tuple[Fullness, Soonest, FakeClock],
) -> None:
    fullness, soonest, _clock = disks
    look(fullness, soonest)
    for limit in range(50, 60):
        fullness.answer(DatesQuestion(limit=float(limit)))
        fullness.answer(DatesQuestion())
    assert len(fullness._looks) == 4
    assert (DISK, 95.0) in fullness._looks


def test_a_look_that_fails_is_told_and_tried_again_later(
    disks: tuple[Fullness, Soonest, FakeClock], monkeypatch: pytest.MonkeyPatch
) -> None:
    fullness, soonest, _clock = disks
    while fullness._newest_day < 0:
        fullness.step()
    now = [0.0]
    monkeypatch.setattr("fleetcast.serving.fullness.monotonic", lambda: now[0])
    monkeypatch.setattr(fullness, "metrics", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        soonest.step()
    for _ in range(10):
        soonest.step()  # not at once
    monkeypatch.undo()
    monkeypatch.setattr("fleetcast.serving.fullness.monotonic", lambda: now[0])
    now[0] = 61.0
    assert look(fullness, soonest).full == {DISK: 1}
