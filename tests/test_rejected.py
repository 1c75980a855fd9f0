"""The quarantine of rejected records: readable lines, within its bound, never in the way."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fleetcast import files
from fleetcast.errors import StorageFull
from fleetcast.schema import Rejection
from fleetcast.serving.intake import RejectedRecords

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
