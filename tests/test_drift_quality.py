"""The drift benchmark's own parts: what it injects, compares with and counts."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.drift import made_fleets
from benchmarks.drift.drift_quality import main
from benchmarks.drift.parts.data import DAY, RecordedFleet, bin_grid, halves, load_fleet
from benchmarks.drift.parts.fleets import REST_BINS, trainings
from benchmarks.drift.parts.injections import KINDS, injected, is_eligible, ranks, rhythm_share, seeded
from benchmarks.drift.parts.ours import fitted_block
from benchmarks.drift.parts.rules import Sketch, Stretch, evidently, ks_test, nannyml, window_gaps
from benchmarks.drift.parts.streams import Adwin, PageHinkley, streamed
from benchmarks.drift.parts.trials import Tally, series_trials

DAYS = 26
START = pd.Timestamp("2026-01-01T00:00:00Z")


def rhythm(days: int, seed: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    clock = 2 * np.pi * np.arange(days * DAY) / DAY
    return 50 + 10 * np.sin(clock) + generator.normal(0, 1, days * DAY)


def stretch(shift: float = 0.0) -> Stretch:
    values = rhythm(3, seed=2)
    values[DAY:] += shift
    return Stretch("cpu_pct", rhythm(21), values, np.zeros(len(values)))


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, Path, Path]:
    times = pd.date_range(START, periods=DAYS * DAY, freq="5min")
    frames = [
        pd.DataFrame({"timestamp": times, "server_name": name, "cpu_pct": rhythm(DAYS, seed)})
        for seed, name in enumerate(("a", "b", "c"))
    ]
    frames[2].loc[24 * DAY :, "cpu_pct"] += 30
    data, stable, regimes = (tmp_path / name for name in ("fleet.parquet", "stable.csv", "regimes.csv"))
    pd.concat(frames).to_parquet(data)
    pd.DataFrame({"server_name": ["a", "b"], "metric": "cpu_pct"}).to_csv(stable, index=False)
    change = {"server_name": ["c"], "metric": ["cpu_pct"], "change_time_utc": [str(times[24 * DAY])]}
    pd.DataFrame(change).to_csv(regimes, index=False)
    return data, stable, regimes


def test_the_split_is_the_one_the_protocol_fixed() -> None:
    develop, report = halves(["a", "b", "c", "d", "e"])

    assert (develop, report) == halves(["a", "b", "c", "d", "e"])
    assert sorted(develop + report) == ["a", "b", "c", "d", "e"] and len(develop) == 2


def test_bins_hold_the_mean_of_their_rows_from_the_first_midnight() -> None:
    times = pd.to_datetime(
        ["2025-12-31T23:59Z", "2026-01-01T00:00Z", "2026-01-01T00:04Z", "2026-01-01T00:10Z"]
    )
    frame = pd.DataFrame({"timestamp": times, "server_name": "a", "cpu_pct": [99.0, 1.0, 3.0, 7.0]})

    grid, start_ms = bin_grid(frame, ["cpu_pct"], ["a"])

    assert start_ms == int(START.timestamp() * 1000)
    assert np.array_equal(grid[0, 0], [2, np.nan, 7], equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_injection_leaves_the_past_alone_and_is_the_same_each_time(kind: str) -> None:
    values, reference = rhythm(6), rhythm(21)

    one = injected(kind, values, 2 * DAY, reference, seeded("a", "m", 0, kind))
    other = injected(kind, values, 2 * DAY, reference, seeded("a", "m", 0, kind))

    assert np.array_equal(one, other)
    assert np.array_equal(one[: 2 * DAY], values[: 2 * DAY])
    assert not np.array_equal(one, values)


@pytest.mark.parametrize("kind", ["shuffle", "sawtooth"])
def test_new_dynamics_keep_the_distribution(kind: str) -> None:
    values = rhythm(6)

    changed = injected(kind, values, 2 * DAY, rhythm(21), seeded("a", "m", 0, kind))

    assert np.allclose(np.sort(changed), np.sort(values))


def test_only_a_series_with_a_rhythm_can_lose_its_phase() -> None:
    noise = np.random.default_rng(3).normal(size=21 * DAY)

    assert is_eligible("phase", rhythm(21)) and not is_eligible("phase", noise)
    assert rhythm_share(rhythm(21)) > 0.9
    assert not is_eligible("level", np.ones(21 * DAY))


def test_the_sketched_distance_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    reference, values = rhythm(21), rhythm(2, seed=5) + 4

    found = window_gaps(Sketch.of(reference), values, np.array([DAY, 2 * DAY]), DAY)

    expected = [
        stats.ks_2samp(values[:DAY], reference).statistic,
        stats.ks_2samp(values[DAY:], reference).statistic,
    ]
    assert found == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize("rule", [ks_test, evidently, nannyml])
def test_peer_rules_see_a_shift_of_a_whole_day(rule: object) -> None:
    assert rule(stretch(30.0))[-1]  # type: ignore[operator]


def test_the_streaming_detectors_find_a_step_and_pass_a_plain_stretch() -> None:
    generator = np.random.default_rng(4)
    plain, stepped = generator.normal(0, 1, 2000), generator.normal(4, 1, 400)

    for kind in (Adwin, PageHinkley):
        detector = kind()
        assert sum(detector.update(value) for value in plain.tolist()) <= 2
        assert any([detector.update(value) for value in stepped.tolist()])


def test_trainings_keep_six_hours_and_three_a_week() -> None:
    always = trainings(lambda learned, earliest: earliest, 0, 14 * DAY)
    never = trainings(lambda learned, earliest: None, 0, 14 * DAY)

    assert (always, never) == (6, 0)
    assert trainings(lambda learned, earliest: earliest, 0, REST_BINS + 1) == 2


def test_hits_count_what_was_missed() -> None:
    tally = Tally()
    tally.delays["level"] += [2.0, np.nan, 4.0]

    figures = tally.hits("level")

    assert figures["hit_pct"] == pytest.approx(200 / 3) and figures["median_delay_h"] == 4.0
    assert tally.hits("ramp") == {"n": 0}


@pytest.mark.slow
def test_it_runs_on_any_servers_and_writes_every_figure(
    recorded: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("benchmarks.results_file.RESULTS", tmp_path / "results")
    monkeypatch.setattr("benchmarks.drift.parts.fleets.DRAWS", 3)
    monkeypatch.setattr("benchmarks.drift.parts.fleets.CHANGE_DRAWS", 2)
    data, stable, regimes = (str(path) for path in recorded)

    files = ["--data", data, "--stable", stable, "--regimes", regimes]
    code = main([*files, "--rules", "ours", "literal 1,000"])

    said = capsys.readouterr().out
    assert (
        code == 0
        and "real changes 100 % in 24 h" in said
        and "literal 1,000" in said
        and "fleet false alarms a month" in said
    )
    assert len(list((tmp_path / "results").glob("*.json"))) == 1
    assert load_fleet(*recorded, "all").server_names == ("a", "b", "c")


def test_a_series_in_alarm_when_the_change_comes_is_left_out() -> None:
    # Given a series that stands higher from the reference's end on
    grid = rhythm(DAYS).astype(np.float32)[None, None]
    grid[:, :, 21 * DAY :] += 30
    fleet = RecordedFleet("made", ("a",), ("cpu_pct",), grid, 0, ((0, 0),), ())
    tally = Tally()

    series_trials(fleet, fitted_block(fleet, 0, 21, 28), ("ours",), {"ours": tally})

    assert tally.already["level"] == tally.already["std2"] == 2
    assert tally.hits("level") == tally.hits("std2") == {"n": 0}


def said_of(capsys: pytest.CaptureFixture[str], recorded: tuple[Path, Path, Path], *more: str) -> str:
    """Return what the benchmark says when it refuses files."""
    data, stable, regimes = (str(path) for path in recorded)
    assert main(["--data", data, "--stable", stable, "--regimes", regimes, "--rules", "ours", *more]) == 2
    return capsys.readouterr().err


def test_a_stable_list_of_other_servers_is_refused_and_ours_are_named(
    recorded: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recorded[1].write_text("server_name,metric\nnobody,cpu_pct\n")

    said = said_of(capsys, recorded)

    assert "none of its series" in said and "servers are a, b, c" in said and "metrics are cpu_pct" in said


def test_files_without_a_header_or_a_column_are_refused_by_name(
    recorded: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recorded[2].write_text("")
    assert "regimes.csv: an empty file" in said_of(capsys, recorded)
    recorded[2].write_text("server_name,metric\n")
    assert "regimes.csv: no column change_time_utc" in said_of(capsys, recorded)
    recorded[0].unlink()
    assert "fleet.parquet" in said_of(capsys, recorded)


def test_a_record_too_short_for_the_reference_says_how_long_it_is(
    recorded: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "26.0 days are too few for --days 24" in said_of(capsys, recorded, "--days", "24")


def test_unknown_servers_beside_known_ones_and_no_changes_are_no_hindrance(
    recorded: tuple[Path, Path, Path],
) -> None:
    data, stable, regimes = recorded
    stable.write_text("server_name,metric\na,cpu_pct\nnobody,cpu_pct\n")
    regimes.write_text("server_name,metric,change_time_utc\n")

    fleet = load_fleet(data, stable, regimes, "all")

    assert (fleet.stable, fleet.changes) == (((0, 0),), ())


def test_a_stream_begins_with_the_same_past_each_time() -> None:
    quiet, other = stretch(), stretch(20.0)

    first = [streamed(kind, part) for kind in (Adwin, PageHinkley) for part in (quiet, other)]
    again = [streamed(kind, part) for kind in (Adwin, PageHinkley) for part in (quiet, other)]

    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))


def test_one_job_a_day_is_a_phase_but_no_rhythm() -> None:
    nightly = np.random.default_rng(4).random(21 * DAY)
    nightly[np.arange(21) * DAY + 24] += 100

    assert is_eligible("phase", nightly) and not is_eligible("rhythm", nightly)
    assert is_eligible("phase", rhythm(21)) and is_eligible("rhythm", rhythm(21))


def test_ranks_run_from_0_to_1_and_equal_values_share_theirs() -> None:
    assert ranks(np.array([5.0, np.nan, 1.0, 5.0, 2.0])).tolist() == pytest.approx(
        [0.875, np.nan, 0.25, 0.875, 0.5], nan_ok=True
    )


def test_a_made_fleet_is_quiet_and_a_change_of_a_third_is_found_and_named(
    recorded: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, stable, _ = recorded
    monkeypatch.setattr(made_fleets, "DRAWS", 5)
    monkeypatch.setattr(made_fleets, "QUIET_DRAWS", 2)
    pool = made_fleets.gather(load_fleet(data, stable, None, "all"), 21, 14)

    generator = np.random.default_rng(1)
    quiet = made_fleets.quiet_figures(pool, 10, generator)
    found = made_fleets.change_figures(pool, "level", 0.3, 10, generator)

    assert quiet["checks_in_alarm_pct"] == 0
    assert found["hit_pct"] == 100 and found["median_delay_h"] < 12
    nearest, widest = (found["named_pct"][margin] for margin in ("1.0", "0.6"))
    assert 50 < nearest["changed"] <= widest["changed"] and nearest["unchanged"] <= widest["unchanged"] < 50
    assert made_fleets.change_figures(made_fleets.Pool(stretches=[{}]), "level", 0.3, 10, generator) == {
        "n": 0
    }
