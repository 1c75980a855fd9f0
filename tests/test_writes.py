import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from remote_write_bodies import (
    body,
    field,
    label_bytes,
    labels,
    packed,
    request_bytes,
    sample_bytes,
    symbols_bytes,
)

from fleetcast.clock import monotonic
from fleetcast.errors import BadData, StorageFull
from fleetcast.ingest.columns import RowsOf
from fleetcast.ingest.records import RecordRules
from fleetcast.schema import Rejection
from fleetcast.serving.intake import Receipt
from fleetcast.serving.writes import WriteIntake
from fleetcast.settings import RemoteWriteSettings

NOW = 1_768_471_200_000
RULES = RecordRules(newest_ms=NOW + 300_000, oldest_ms=NOW - 86_400_000)
LOAD = labels("node_load1")


class Disk:
    """Takes rows, or is full."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int]] = []
        self.is_full = False
        self.rejections: tuple[Rejection, ...] = ()

    def take(self, raw: Sequence[object]) -> Receipt:
        if self.is_full:
            raise StorageFull("no space")
        assert isinstance(raw, RowsOf)
        times = np.asarray(raw.columns["timestamp"]).tolist()
        self.rows += [(str(row["server_name"]), at - NOW) for row, at in zip(raw[:], times, strict=True)]
        return Receipt(len(raw) - len(self.rejections), self.rejections, 0)


@pytest.fixture
def disk() -> Disk:
    return Disk()


def writes_of(disk: Disk, wall_s: Callable[[], float] = monotonic, **changes: object) -> WriteIntake:
    settings = dataclasses.replace(RemoteWriteSettings(), **changes)  # type: ignore[arg-type]
    return WriteIntake(settings, disk.take, lambda: RULES, wall_s)


def test_what_a_request_completes_is_handed_on_and_counted(disk: Disk) -> None:
    receipt = writes_of(disk).take(body([(LOAD, [(NOW, 1.0)]), (labels("up"), [(NOW, 1.0)])]))
    assert disk.rows == [("web-01", 0)]
    assert receipt.n_records == 1
    assert {name: n for name, n in receipt.samples.items() if n} == {"taken": 1, "ignored": 1}
    assert receipt.problems == []


def test_a_request_that_completes_nothing_is_taken_without_touching_the_disk(disk: Disk) -> None:
    disk.is_full = True
    idle = labels("node_cpu_seconds_total", cpu="0", mode="idle")
    assert writes_of(disk).take(body([(idle, [(NOW, 1.0)])])).n_records == 0


def test_records_a_full_disk_refused_come_with_the_repetition_of_the_request(disk: Disk) -> None:
    writes = writes_of(disk)
    disk.is_full = True
    for _ in range(3):
        with pytest.raises(StorageFull):
            writes.take(body([(LOAD, [(NOW, 1.0), (NOW + 15_000, 2.0)])]))
    disk.is_full = False
    assert writes.take(body([(LOAD, [(NOW, 1.0), (NOW + 15_000, 2.0)])])).n_records == 2
    assert sorted(disk.rows) == [("web-01", 0), ("web-01", 15_000)]
    assert writes.take(body([(LOAD, [(NOW, 1.0)])])).n_records == 0


def test_a_disk_full_for_long_does_not_make_memory_grow(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetcast.serving.writes._UNSTORED_MAX_ROWS", 5)
    writes = writes_of(disk)
    disk.is_full = True
    for n in range(9):
        with pytest.raises(StorageFull):
            writes.take(body([(LOAD, [(NOW + n * 15_000, 1.0)])]))
    disk.is_full = False
    writes.take(body([]))
    assert [at // 15_000 for _, at in disk.rows] == [4, 5, 6, 7, 8]


def test_samples_that_cannot_be_taken_are_named_and_the_others_are_stored(disk: Disk) -> None:
    writes = writes_of(disk, max_series=1)
    late, early, more = NOW + 900_000, NOW - 90_000_000, labels("node_load1", "web-02:9100")
    receipt = writes.take(body([(LOAD, [(early, 1.0), (NOW, 1.0), (late, 1.0)]), (more, [(NOW, 1.0)])]))
    assert disk.rows == [("web-01", 0)]
    assert receipt.problems == [
        "2 samples are older than the retention or over 5 min in the future",
        "1 series are beyond remote_write.max_series = 1",
    ]


def test_a_series_with_unusable_labels_costs_no_other_one_and_is_named(disk: Disk) -> None:
    twice = [("__name__", "custom"), ("host", "a"), ("host", "b"), ("instance", "web-01:9100")]
    odd = b"".join(field(1, field(1, name.encode()) + field(2, value.encode())) for name, value in twice)
    nameless = label_bytes({"__name__": "odd", "": "x"})
    latin = field(1, field(1, b"__name__") + field(2, "caf\u00e9".encode("latin-1")))
    content = b"".join(field(1, labels + sample_bytes(NOW, 1.0)) for labels in (odd, nameless, latin))
    receipt = writes_of(disk).take(packed(content + request_bytes([(LOAD, [(NOW, 1.0)])])))
    assert disk.rows == [("web-01", 0)]
    assert {name: n for name, n in receipt.samples.items() if n} == {"taken": 1, "invalid": 3}
    (problem,) = receipt.problems
    assert problem.startswith(
        "3 series left out: custom{instance='web-01:9100'} has the label 'host' twice, "
    )
    assert "has a label without a name" in problem
    assert "'__name__', which is not UTF-8" in problem


@pytest.mark.parametrize("has_symbols", [False, True])
def test_a_wanted_series_whose_labels_name_no_server_is_named_at_each_request(
    disk: Disk, has_symbols: bool
) -> None:
    writes = writes_of(disk)
    without = {"__name__": "node_load1", "job": "otel", "host_name": "web-01"}
    unwanted = {"__name__": "go_goroutines", "job": "otel"}
    encode = symbols_bytes if has_symbols else request_bytes
    for number in range(3):
        at = NOW + 15_000 * number
        sent = [(without, [(at, 1.0)]), (unwanted, [(at, 1.0)]), (LOAD, [(at, 1.0)])]
        receipt = writes.take(packed(encode(sent)), has_symbols=has_symbols)
        counted = {name: n for name, n in receipt.samples.items() if n}
        assert counted == {"taken": 1, "invalid": 1, "ignored": 1}
        (problem,) = receipt.problems
        assert problem.startswith("1 series left out: node_load1{job='otel'} names no server: ")
        assert problem.endswith("at least one of them visible, in the label remote_write.server_label")
    assert len(disk.rows) == 3


def test_records_beyond_a_limit_are_named_with_the_reason(disk: Disk) -> None:
    disk.rejections = (Rejection(0, "server_name", "is a new name beyond the limit of 1 servers"),)
    receipt = writes_of(disk).take(body([(LOAD, [(NOW, 1.0)])]))
    assert receipt.problems == ["1 records refused: is a new name beyond the limit of 1 servers"]


def test_a_body_that_is_no_request_changes_nothing(disk: Disk) -> None:
    writes = writes_of(disk)
    with pytest.raises(BadData):
        writes.take(b"nothing")
    assert writes.n_series == 0


def test_series_are_forgotten_and_learnt_anew_without_mixing_them_up(disk: Disk) -> None:
    # Given three servers that fall silent one after the other, over hours
    arrival_s = [0.0]
    writes = writes_of(disk, lambda: arrival_s[0])
    for minute in range(0, 600, 1):
        arrival_s[0] = minute * 60.0
        alive = [n for n in range(3) if minute < 200 * (n + 1)]
        series = [
            (labels("node_load1", f"web-{n}:1"), [(NOW - 36_000_000 + minute * 60_000, 1.0)]) for n in alive
        ]
        writes.take(body(series))
    assert writes.n_series == 1
    writes.take(body([(labels("node_load1", f"web-{n}:1"), [(NOW, float(n))]) for n in range(3)]))
    assert sorted(disk.rows)[-1] == ("web-2", 0)
    assert {name for name, at in disk.rows if at == 0} == {"web-0", "web-1", "web-2"}
