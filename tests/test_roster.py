"""Newest values by server, whatever the order records come in."""

from datetime import UTC, datetime, timedelta

import numpy as np

from fleetcast.clock import to_ms
from fleetcast.schema import RecordBatch
from fleetcast.serving.roster import PresentServers, Roster
from fleetcast.settings import ForecastSettings

NOW = datetime(2026, 1, 15, 10, 0, tzinfo=UTC)
NAN = float("nan")


def batch(*rows: tuple[str, float, dict[str, float]]) -> RecordBatch:
    """Rows of (server, seconds before NOW, values)."""
    names = tuple(dict.fromkeys(row[0] for row in rows))
    metrics = dict.fromkeys(metric for row in rows for metric in row[2])
    return RecordBatch(
        names,
        np.array([names.index(row[0]) for row in rows], dtype=np.int32),
        np.array([to_ms(NOW) - round(row[1] * 1000) for row in rows], dtype=np.int64),
        {metric: np.array([row[2].get(metric, NAN) for row in rows]) for metric in metrics},
    )


def current(present: PresentServers) -> dict[str, dict[str, float]]:
    return {
        name: {m: float(v) for m, v in zip(present.metrics, values, strict=True) if not np.isnan(v)}
        for name, values in zip(present.server_names, present.values, strict=True)
    }


def test_the_newest_value_of_each_metric_is_current() -> None:
    roster = Roster(ForecastSettings())
    roster.add(batch(("a", 20, {"cpu_pct": 1.0, "mem_pct": 5.0}), ("a", 10, {"cpu_pct": 2.0})))
    assert current(roster.servers(NOW)) == {"a": {"cpu_pct": 2.0, "mem_pct": 5.0}}


def test_order_within_a_batch_does_not_matter() -> None:
    roster = Roster(ForecastSettings())
    roster.add(batch(("a", 10, {"cpu_pct": 2.0}), ("a", 30, {"cpu_pct": 9.0}), ("a", 20, {"cpu_pct": 8.0})))
    assert current(roster.servers(NOW)) == {"a": {"cpu_pct": 2.0}}


def test_a_backfill_does_not_move_the_present() -> None:
    roster = Roster(ForecastSettings())
    roster.add(batch(("a", 10, {"cpu_pct": 2.0})))
    roster.add(batch(("a", 3600, {"cpu_pct": 50.0})))
    assert current(roster.servers(NOW)) == {"a": {"cpu_pct": 2.0}}


def test_a_repeated_record_takes_the_last_value() -> None:
    roster = Roster(ForecastSettings())
    roster.add(batch(("a", 10, {"cpu_pct": 2.0})))
    roster.add(batch(("a", 10, {"cpu_pct": 3.0})))
    assert current(roster.servers(NOW)) == {"a": {"cpu_pct": 3.0}}


def test_thirty_minutes_of_silence_are_stale_and_a_day_is_gone() -> None:
    roster = Roster(ForecastSettings())
    roster.add(batch(("a", 0, {"cpu_pct": 1.0})))
    assert roster.servers(NOW + timedelta(seconds=1799)).is_stale.tolist() == [False]
    assert roster.servers(NOW + timedelta(seconds=1800)).is_stale.tolist() == [True]
    assert roster.servers(NOW + timedelta(seconds=86_399)).server_names == ("a",)
    assert roster.servers(NOW + timedelta(seconds=86_400)).server_names == ()


def test_many_gone_servers_are_forgotten_and_the_others_keep_their_values() -> None:
    roster = Roster(ForecastSettings())
    roster.add(batch(*((f"old-{i}", 0, {"cpu_pct": float(i)}) for i in range(200))))
    later = NOW + timedelta(days=2)
    day = -2 * 86_400.0
    roster.add(batch(("new", day, {"mem_pct": 4.0}), ("old-7", day, {"cpu_pct": 70.0})))
    roster.servers(later)
    assert current(roster.servers(later)) == {"old-7": {"cpu_pct": 70.0}, "new": {"mem_pct": 4.0}}
    roster.add(batch(("third", day, {"cpu_pct": 1.0})))
    assert current(roster.servers(later))["third"] == {"cpu_pct": 1.0}


def test_it_counts_changes_and_knows_its_metrics() -> None:
    roster = Roster(ForecastSettings())
    before = roster.changes
    roster.add(batch(("a", 0, {"cpu_pct": 1.0, "fans": 3.0})))
    assert roster.changes > before
    assert roster.n_metrics == 2
    assert roster.unknown_metrics(("fans", "disks")) == ["disks"]


def test_a_metric_of_which_nothing_is_stored_gives_its_place_free_and_the_others_keep_their_values() -> None:
    roster = Roster(ForecastSettings())
    roster.note_metrics(["old", "cpu_pct"])
    roster.add(batch(("a", 0, {"junk": 1.0, "cpu_pct": 2.0, "fans": 3.0})))
    assert roster.n_metrics == 4
    roster.forget_metrics({"junk", "old"})
    assert roster.metric_names() == ("cpu_pct", "fans")
    assert current(roster.servers(NOW)) == {"a": {"cpu_pct": 2.0, "fans": 3.0}}
    roster.add(batch(("a", 0, {"new": 4.0})))
    assert current(roster.servers(NOW)) == {"a": {"cpu_pct": 2.0, "fans": 3.0, "new": 4.0}}


def test_it_grows_with_servers_and_metrics() -> None:
    roster = Roster(ForecastSettings())
    rows = [(f"s{i}", 0.0, {f"metric_{i % 30}": float(i)}) for i in range(100)]
    roster.add(batch(*rows))
    assert current(roster.servers(NOW)) == {name: values for name, _, values in rows}
