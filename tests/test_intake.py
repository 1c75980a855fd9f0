"""Records on their way in: durable before known, limits and bad records refused one by one and kept aside."""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetcast import files
from fleetcast.clock import FakeClock
from fleetcast.errors import StorageFull
from fleetcast.ingest.columns import RowsOf
from fleetcast.ingest.records import REJECTIONS_KEPT
from fleetcast.schema import RecordBatch, Rejection
from fleetcast.serving.history import BinHistory
from fleetcast.serving.intake import Intake, RejectedRecords
from fleetcast.serving.roster import Fleet, Roster
from fleetcast.settings import BinSettings, BufferSettings, ForecastSettings, ServerSettings


@dataclass
class Disk:
    """Takes batches, or is full."""

    batches: list[RecordBatch] = field(default_factory=list)
    is_full: bool = False

    def append_batch(self, batch: RecordBatch) -> None:
        if self.is_full:
            raise StorageFull("no space")
        self.batches.append(batch)


class World:
    """An intake and everything around it."""

    def __init__(self, folder: Path, *, expires: bool = True, **limits: Any) -> None:
        self.clock = FakeClock()
        self.disk = Disk()
        self.history = BinHistory(BinSettings(), ForecastSettings())
        self.roster = Roster(ForecastSettings())
        self.n_wakes = 0
        self.quarantine = folder / "quarantine.jsonl"
        buffer: Any = self.disk  # stands in for the DataBuffer
        self.intake = Intake(
            buffer,
            Fleet(self.history, self.roster, self.clock, ForecastSettings(), is_data_clock=not expires),
            RejectedRecords(folder, 100_000),
            self.clock,
            ServerSettings(**limits),
            BufferSettings(),
            self._wake,
        )

    def _wake(self) -> None:
        self.n_wakes += 1

    def record(self, name: str = "web-01", *, seconds: float = 0.0, **values: Any) -> dict[str, Any]:
        moment = self.clock.now() + timedelta(seconds=seconds)
        return {"timestamp": moment.isoformat(), "server_name": name, **(values or {"cpu_pct": 12.346})}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_good_records_are_stored_and_known(world: World) -> None:
    receipt = world.intake.take([world.record(), world.record("web-02", mem_used_pct=40.129)])
    assert (receipt.n_received, receipt.rejections) == (2, ())
    assert len(world.disk.batches[0]) == 2
    assert world.roster.servers(world.clock.now()).server_names == ("web-01", "web-02")
    assert world.history.n_servers == 2


def test_records_that_make_a_bin_due_wake_the_sweep(world: World) -> None:
    world.intake.take([world.record()])
    assert world.n_wakes == 0
    world.intake.take([world.record(seconds=299)])
    world.clock.advance(seconds=331)
    world.intake.take([world.record(seconds=299)])
    assert world.n_wakes == 1


def test_history_that_comes_in_does_not_wake_the_sweep_with_each_post(world: World) -> None:
    world.clock.advance(seconds=1000)
    world.intake.take([world.record(seconds=-700)])
    assert (world.n_wakes, len(world.history.due(world.clock.now()))) == (0, 1)


def test_what_is_stored_is_rounded_as_everybody_sees_it(world: World) -> None:
    world.intake.take([world.record()])
    stored = world.disk.batches[0].metrics["cpu_pct"][0]
    assert stored == world.roster.servers(world.clock.now()).values[0, 0] == 12.35


def test_a_bad_record_costs_no_other_and_is_kept_aside(world: World) -> None:
    receipt = world.intake.take([world.record(), {"server_name": "x"}, 7, world.record("web-02")])
    assert receipt.n_received == 2
    assert [(r.index, r.field) for r in receipt.rejections] == [(1, "timestamp"), (2, "")]
    kept = [json.loads(line) for line in world.quarantine.read_text().splitlines()]
    assert [line["record"] for line in kept] == [{"server_name": "x"}, 7]


def test_a_full_disk_keeps_nothing_anywhere(world: World) -> None:
    world.disk.is_full = True
    with pytest.raises(StorageFull):
        world.intake.take([world.record()])
    assert world.history.n_servers == 0
    assert world.roster.servers(world.clock.now()).server_names == ()


def test_no_record_at_all_is_fine(world: World) -> None:
    assert world.intake.take([]).n_received == 0
    assert not world.quarantine.exists()


def test_the_system_clock_bounds_times_on_both_sides(world: World) -> None:
    receipt = world.intake.take(
        [world.record(seconds=301), world.record(seconds=-61 * 86_400), world.record(seconds=299)]
    )
    assert receipt.n_received == 1
    assert [r.field for r in receipt.rejections] == ["timestamp", "timestamp"]


def test_under_the_data_clock_old_records_are_welcome_but_not_those_before_1970(tmp_path: Path) -> None:
    world = World(tmp_path, expires=False)
    old = {"timestamp": "2000-01-01T00:00:00Z", "server_name": "a", "cpu_pct": 1.0}
    receipt = world.intake.take(
        [old, {**old, "timestamp": "1969-12-31T23:59:59Z"}, world.record(seconds=301)]
    )
    assert receipt.n_received == 1
    assert [r.index for r in receipt.rejections] == [1, 2]


def test_servers_beyond_the_limit_are_refused_and_known_ones_go_on(tmp_path: Path) -> None:
    world = World(tmp_path, max_server_names=2)
    world.intake.take([world.record("a"), world.record("b")])
    receipt = world.intake.take([world.record("c"), {"bad": 1}, world.record("a"), world.record("d")])
    assert receipt.n_received == 1
    assert [(r.index, r.field) for r in receipt.rejections] == [
        (0, "server_name"), (1, "timestamp"), (3, "server_name"),
    ]  # fmt: skip
    assert "limit of 2 servers" in receipt.rejections[0].reason
    assert world.disk.batches[-1].server_names == ("a",)
    assert world.history.n_servers == 2


def test_a_request_fills_the_last_places_in_order(tmp_path: Path) -> None:
    world = World(tmp_path, max_server_names=3)
    receipt = world.intake.take([world.record(name) for name in "abcde"])
    assert receipt.n_received == 3
    assert [r.index for r in receipt.rejections] == [3, 4]


def test_metrics_beyond_the_limit_are_refused_and_leave_no_column(tmp_path: Path) -> None:
    world = World(tmp_path, max_metric_names=2)
    receipt = world.intake.take(
        [world.record(cpu_pct=1.0), world.record(mem_pct=2.0), world.record("b", cpu_pct=1.0, fans=3.0)]
    )
    assert (receipt.n_received, receipt.n_rejected) == (3, 0)
    assert [(one.field, one.n_records) for one in receipt.refused_fields] == [("fans", 1)]
    assert "limit of 2 metrics (server.max_metric_names)" in receipt.refused_fields[0].reason
    assert set(world.disk.batches[0].metrics) == {"cpu_pct", "mem_pct"}
    assert world.disk.batches[0].server_names == ("web-01", "b")


def test_one_bad_client_costs_the_others_a_new_field_and_no_record(world: World) -> None:
    world.intake.take([world.record("bad") | {f"junk_{number}": 1.0 for number in range(600)}])
    receipts = world.intake.take_together([[world.record("a", fans=3.0)], [world.record("b")]])
    assert [one.n_received for one in receipts] == [1, 1]
    assert [one.field for one in receipts[0].refused_fields] == ["fans"]
    assert receipts[1].refused_fields == ()
    assert [batch.server_names for batch in world.disk.batches[1:]] == [("a",), ("b",)]


def test_a_record_without_any_metric_makes_its_server_known(world: World) -> None:
    receipt = world.intake.take([world.record(state="up")])
    assert (receipt.n_received, receipt.n_ignored_fields) == (1, 1)
    assert world.roster.servers(world.clock.now()).server_names == ("web-01",)


def test_requests_taken_together_meet_the_fate_they_would_meet_alone(tmp_path: Path) -> None:
    for folder in ("alone", "together"):
        (tmp_path / folder).mkdir()
    alone, together = (World(tmp_path / folder, max_server_names=3) for folder in ("alone", "together"))
    parts: list[list[object]] = [
        [alone.record("a"), {"bad": 1}, alone.record("b", note="text")],
        [],
        [7, alone.record("c", cpu_pct=-5.0), alone.record("c")],
        [alone.record("d"), alone.record("a", seconds=1)],
    ]
    wanted = [alone.intake.take(part) for part in parts]
    got = together.intake.take_together(parts)
    assert [(one.n_received, one.rejections) for one in got] == [
        (one.n_received, one.rejections) for one in wanted
    ]
    assert sum(one.n_ignored_fields for one in got) == 1
    assert len(together.disk.batches) == 1
    assert together.quarantine.read_text() == alone.quarantine.read_text()


def test_the_limit_of_metrics_in_a_request_is_not_shared_by_those_taken_together(world: World) -> None:
    world.intake._limits = ServerSettings(max_metric_names=10_000)
    parts = [[world.record() | {f"m{number}_{place}": 1.0 for place in range(300)}] for number in range(3)]
    assert [one.n_received for one in world.intake.take_together(parts)] == [1, 1, 1]


def test_a_hundred_thousand_new_names_leave_nothing_behind_but_the_refusal(tmp_path: Path) -> None:
    world = World(tmp_path, max_server_names=100)
    moment = world.clock.now().isoformat()
    for start in range(0, 100_000, 20_000):
        names = [f"name-{number}" for number in range(start, start + 20_000)]
        columns = {"timestamp": [moment] * len(names), "server_name": names, "cpu_pct": np.ones(len(names))}
        receipt = world.intake.take(RowsOf(columns))
        assert receipt.n_received == (100 if start == 0 else 0)
        assert receipt.by_rule == {"too_many_servers": 20_000 - receipt.n_received}
        assert len(receipt.rejections) == REJECTIONS_KEPT
        assert (
            receipt.rejections[-1].reason
            == "is a new name beyond the limit of 100 servers (server.max_server_names)"
        )
    assert world.history.n_servers == 100
    assert len(world.roster.servers(world.clock.now()).server_names) == 100
    assert sum(len(batch.server_names) for batch in world.disk.batches) == 100
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 100_000  # the quarantine's bound


NOW = datetime(2026, 1, 15, 10, 0, tzinfo=UTC)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_rejected_record_is_kept_with_its_reason(tmp_path: Path) -> None:
    rejected = RejectedRecords(tmp_path, 100_000)
    raw = [{"server_name": "ok"}, {"server_name": 7, "cpu_pct": 1.5}]
    rejected.keep(raw, [Rejection(1, "server_name", "must be text, got 7")], NOW)
    assert lines(tmp_path / "quarantine.jsonl") == [
        {
            "received_at": "2026-01-15T10:00:00Z",
            "index": 1,
            "field": "server_name",
            "reason": "must be text, got 7",
            "record": {"server_name": 7, "cpu_pct": 1.5},
        }
    ]


@pytest.mark.parametrize(
    "record",
    [None, 7, "text", [], float("nan"), {"cpu_pct": float("inf")}, {"a": "\ud800"}, {"a": b"\xff"}, {1: 2},
     {"a": "x\ny"}, {"n": 10**400}, {"n": 2**70}],
)  # fmt: skip
def test_whatever_was_sent_becomes_one_line_of_json(tmp_path: Path, record: object) -> None:
    RejectedRecords(tmp_path, 100_000).keep([record], [Rejection(0, "x", "bad")], NOW)
    (line,) = lines(tmp_path / "quarantine.jsonl")
    assert line["reason"] == "bad"


def test_a_deeply_nested_record_does_no_harm(tmp_path: Path) -> None:
    record: list[object] = []
    for _ in range(100_000):
        record = [record]
    RejectedRecords(tmp_path, 100_000).keep([record], [Rejection(0, "", "bad")], NOW)
    assert "nested too deeply" in lines(tmp_path / "quarantine.jsonl")[0]["record"]


def test_a_long_record_is_cut(tmp_path: Path) -> None:
    RejectedRecords(tmp_path, 100_000).keep([{"a": "x" * 10_000}], [Rejection(0, "a", "bad")], NOW)
    assert len(lines(tmp_path / "quarantine.jsonl")[0]["record"]) == 2000


@pytest.mark.parametrize("n_more", [0, 3000], ids=["whole", "cut"])
def test_a_time_of_columns_is_kept_in_iso_8601(tmp_path: Path, n_more: int) -> None:
    record = {"timestamp": NOW, "server_name": "a", "load": Decimal("1.50"), "note": "x" * n_more}
    RejectedRecords(tmp_path, 100_000).keep([record], [Rejection(0, "timestamp", "bad")], NOW)
    text = (tmp_path / "quarantine.jsonl").read_text()
    assert "2026-01-15T10:00:00Z" in text.partition('"record"')[2]
    assert "datetime" not in text


def test_both_files_together_stay_within_the_bound(tmp_path: Path) -> None:
    rejected = RejectedRecords(tmp_path, 10_000)
    for number in range(100):
        rejected.keep(
            [{"number": number, "x": "y" * 100}] * 5, [Rejection(i, "x", "bad") for i in range(5)], NOW
        )
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quarantine.jsonl", "quarantine.jsonl.1"]
    assert sum(sizes) <= 10_000
    assert lines(tmp_path / "quarantine.jsonl")[-1]["record"]["number"] == 99


def test_one_request_cannot_exceed_the_bound(tmp_path: Path) -> None:
    raw = [{"x": "y" * 500}] * 1000
    RejectedRecords(tmp_path, 10_000).keep(raw, [Rejection(i, "x", "bad") for i in range(1000)], NOW)
    assert (tmp_path / "quarantine.jsonl").stat().st_size <= 5_000


def test_a_full_disk_costs_only_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise StorageFull("no space")

    monkeypatch.setattr(files, "append_line", refuse)
    rejected = RejectedRecords(tmp_path, 10_000)
    rejected.keep([1, 2], [Rejection(0, "", "bad"), Rejection(1, "", "bad")], NOW)
    assert rejected.lost == 2
