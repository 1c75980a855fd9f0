"""The parts of the demo that decide whether it may say "yes"."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fleetcast.clock import iso_z, plain_utc, to_ms
from fleetcast.demo import splice
from fleetcast.demo.claims import Outcome, Phase, claims, error_table, last_values, table
from fleetcast.demo.harness import Reload, Seen, summary
from fleetcast.demo.sabotage import Sabotage, TakenBack
from fleetcast.program import shipped_folder
from fleetcast.schema import SettledForecasts

BIN = timedelta(minutes=5)
CHANGED, UNCHANGED = "smd-machine-1-3", "smd-machine-1-2"


def settled(rows: list[tuple[Any, int, str, float, float, str | None]]) -> SettledForecasts:
    """Make rows from (target, horizon, server, p50, actual, version)."""
    target = np.array([to_ms(row[0]) for row in rows], dtype=np.int64)
    horizon = np.array([row[1] for row in rows], dtype=np.int32)
    p50 = np.array([row[3] for row in rows])
    return SettledForecasts(
        origin_ms=target - horizon * 300_000,
        target_ms=target,
        horizon=horizon,
        server_name=np.array([row[2] for row in rows], dtype=object),
        metric=np.array(["cpu_pct"] * len(rows), dtype=object),
        p10=p50 - 1,
        p50=p50,
        p90=p50 + 1,
        actual=np.array([row[4] for row in rows]),
        model_version=np.array([row[5] for row in rows], dtype=object),
    )


def test_an_error_is_compared_with_the_last_value_on_the_same_forecasts() -> None:
    start = splice.CHANGE
    rows = settled(
        [
            (start, 1, "a", 0.0, 10.0, "v1"),  # its own last value is not settled: left out
            (start + BIN, 1, "a", 13.0, 14.0, "v1"),  # off by 1; repeating 10 is off by 4
            (start + 2 * BIN, 1, "a", 13.0, 16.0, "v1"),  # off by 3; repeating 14 is off by 2
        ]
    )
    assert np.isnan(last_values(rows)).tolist() == [True, False, False]
    phase = Phase("all", start, start + 9 * BIN)
    cell = error_table(rows, [phase], {"g": frozenset("a")}, [1])["g", 1, "all"]
    assert (cell.n, cell.ours, cell.model, cell.last_value) == (2, 2.0, 2.0, 3.0)


def test_a_phase_holds_only_its_own_time_and_servers() -> None:
    start = splice.CHANGE
    rows = settled(
        [(start + i * BIN, 1, server, 0.0, 1.0, v) for i in range(4) for server in "ab" for v in ("v1",)]
        + [(start + 4 * BIN, 1, "a", 0.0, 1.0, None)]
    )
    phase = Phase("p", start + BIN, start + 3 * BIN)
    assert error_table(rows, [phase], {"g": frozenset("a")}, [1])["g", 1, "p"].n == 2


def test_the_feed_is_the_sample_up_to_the_change_and_the_donor_afterwards(tmp_path: Path) -> None:
    splice.write_feed(tmp_path / "feed.parquet")
    parts = [pd.read_parquet(splice.part(tmp_path / "feed.parquet", number)) for number in range(4)]
    assert parts[0].timestamp.max() < splice.END <= parts[1].timestamp.min()
    assert parts[3].timestamp.max() == splice.FINISH - timedelta(minutes=1)
    feed = pd.concat(parts).set_index(["server_name", "timestamp"])
    sample = pd.read_parquet(shipped_folder("samples") / splice.SAMPLE).set_index(
        ["server_name", "timestamp"]
    )
    assert feed.index.is_unique
    assert splice.DONOR not in feed.index.get_level_values(0)
    minute = timedelta(minutes=1)
    for server, since in splice.SPLICED.items():
        last_own = splice.CHANGE - minute
        assert feed.loc[(server, last_own)].equals(sample.loc[(server, last_own)])
        for after in (timedelta(0), timedelta(hours=35)):
            expected = sample.loc[(splice.DONOR, since + after)]
            assert (feed.loc[(server, splice.CHANGE + after)] == expected).all()
    untouched = sample.loc[(UNCHANGED, splice.CHANGE + minute)]
    assert (feed.loc[(UNCHANGED, splice.CHANGE + minute)] == untouched).all()


def test_the_summary_line_of_a_replay_is_read_back() -> None:
    text = "noise\nreplay: records=24 sent=24 accepted=23 rejected=1 requests=3 first=2026-01-15T10:00:00Z\n"
    assert summary(text)["rejected"] == "1"
    assert summary("it crashed") == {}


def attempt(rule: str, started: Any, version: str, outcome: str = "promoted") -> dict[str, Any]:
    return {
        "id": version,
        "rule": rule,
        "started_at": plain_utc(started),
        "version": version,
        "outcome": outcome,
        "reason": "because",
        "why": "",
    }


def named(server: str, score: float) -> dict[str, Any]:
    return {"server": server, "is_drifting": True, "score": score}


@pytest.fixture
def good() -> Outcome:
    """A run in which everything happened: v1 from day 3 on, v2 ten hours after the change."""
    first, second = splice.START + timedelta(days=3), splice.CHANGE + timedelta(hours=10)
    rows = []
    for i in range(4 * 288 // 2):
        target = first + 2 * i * BIN
        version = "v2" if target >= second else "v1"
        for server in (CHANGED, UNCHANGED):
            is_bad = server == CHANGED and target >= splice.CHANGE and version == "v1"
            for step, actual in ((target - BIN, 0.0), (target, 5.0)):
                rows.append((step, 1, server, actual + (9.0 if is_bad else 1.0), actual, version))
    forecasts = settled([row for row in rows if row[0] < splice.END])
    return Outcome(
        seen=Seen(
            requests=100,
            reloads=[Reload("v1", first, 1.0), Reload("v2", second, 2.0)],
            status={"model": {"version": "v2"}},
        ),
        exit_codes={"inference": 0, "retraining": 0, "replay": 0},
        replay={"records": "10", "accepted": "10", "rejected": "0", "requests": "3"},
        attempts=[attempt("initial", first - BIN, "v1"), attempt("drift", second - BIN, "v2")],
        decisions=[
            {"at": iso_z(splice.CHANGE - timedelta(hours=age)), "drift_status": "ready"} for age in (25, 9, 1)
        ],
        contexts={"v2": {"drifting": [named(name, 3.0) for name in splice.SPLICED]}},
        ledger={"due": len(forecasts) + 2, "settled": len(forecasts), "expired": 2},
        rows=forecasts,
        sabotage=Sabotage("bad", "v2"),
        taken_back=TakenBack("the bake", "it was worse", 3, "v2"),
    )


def untrue(outcome: Outcome) -> list[str]:
    return [claim.text.split(" (")[0] for claim in claims(outcome) if not claim.is_true]


def test_a_run_in_which_everything_happened_is_all_yes(good: Outcome) -> None:
    assert untrue(good) == []
    assert "changed    5 min" in table(good)
    assert "sent 103 requests; 0 failed" in table(good)


def changed(outcome: Outcome, **values: Any) -> Outcome:
    return replace(outcome, **values)


def test_one_other_server_may_be_named_after_the_changed_ones_but_not_before_one_and_not_two(
    good: Outcome,
) -> None:
    claim = "the drift check names the changed servers first, and at most one other"
    of_changed = good.contexts["v2"]["drifting"]

    for score, expected in ((1.02, []), (3.1, [claim])):
        context = {"drifting": [named("another", score), *of_changed]}
        assert untrue(changed(good, contexts={"v2": context})) == expected
    two_others = {"drifting": [*of_changed, named("another", 1.02), named("a third", 1.01)]}
    assert untrue(changed(good, contexts={"v2": two_others})) == [claim]


def test_each_thing_that_did_not_happen_is_a_no(good: Outcome) -> None:
    early = attempt("drift", splice.CHANGE - timedelta(hours=5), "v1b", "rejected")
    first, second = good.attempts
    after = to_ms(splice.CHANGE + timedelta(hours=18))
    cases = {
        "the inference daemon accepted every record": changed(good, replay=good.replay | {"accepted": "9"}),
        "the retraining daemon trains nothing while no server changes": changed(
            good, attempts=[first, early, second]
        ),
        "the drift check names the changed servers first, and at most one other": changed(
            good, contexts={"v2": {"drifting": []}}
        ),
        "the ledger accounts for every forecast that was due, and for none twice": changed(
            good, ledger=good.ledger | {"due": 1}
        ),
        "all processes ended with exit code 0": changed(good, exit_codes={"inference": -9}),
        "the inference daemon loaded every promoted model without a failed request": changed(
            good, seen=replace(good.seen, reloads=good.seen.reloads[:1])
        ),
        "a bad model that a person put in is taken out by the daemons": changed(good, taken_back=None),
        "what clients get of the changed servers recovers": changed(
            good, rows=replace(good.rows, p50=good.rows.p50 + 20.0 * (good.rows.target_ms >= after))
        ),
    }
    failed = changed(good, seen=replace(good.seen, failed=1))
    assert untrue(failed) == [
        "the inference daemon loaded every promoted model without a failed request",
        "a bad model that a person put in is taken out by the daemons",
    ]
    unjudged = changed(good, decisions=good.decisions[1:])
    assert untrue(unjudged) == ["the retraining daemon trains nothing while no server changes"]
    for claim, outcome in cases.items():
        assert untrue(outcome) == [claim]


def test_without_a_second_training_two_claims_fall(good: Outcome) -> None:
    alone = changed(good, attempts=good.attempts[:1])
    assert untrue(alone) == [
        "the drift check names the changed servers first, and at most one other",
        "the decision engine started a training because of drift",
    ]
    assert "No training was started after the change." in table(alone)


def test_a_training_that_the_gate_rejects_is_a_good_end_and_told(good: Outcome) -> None:
    first, second = good.attempts
    rejected = changed(
        good, attempts=[first, second | {"outcome": "rejected", "version": None, "why": "not better"}]
    )
    assert untrue(rejected) == []
    assert "Training 9.9 h after the change: the gate kept the model in service (not better)." in table(
        rejected
    )
    assert "its model serves since 10.0 h ()." in table(good)


def test_a_run_that_left_nothing_claims_nothing(good: Outcome) -> None:
    nothing = changed(
        good,
        seen=Seen(failed=1),
        replay={},
        attempts=[],
        contexts={},
        ledger={},
        exit_codes={"replay": 1},
        decisions=[],
    )
    assert len(untrue(nothing)) == len(claims(nothing))
