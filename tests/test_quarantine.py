"""Damaged bytes are kept for a person, within a bound, and never stand in the way."""

import logging
from pathlib import Path

import pytest

from fleetcast.storage.days import Quarantine


def sizes(folder: Path) -> list[int]:
    return sorted(path.stat().st_size for path in folder.iterdir())


def test_bytes_and_files_are_kept_under_names_of_their_own(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine")
    quarantine.keep_bytes("segment-1", b"abc")
    quarantine.keep_bytes("segment-1", b"de")
    damaged = tmp_path / "metrics_2026-01-15.parquet" / "part"
    damaged.parent.mkdir()
    damaged.write_bytes(b"fghi")
    quarantine.keep_file(damaged)
    assert sizes(tmp_path / "quarantine") == [2, 3, 4]
    assert damaged.exists(), "the caller removes it"
    assert quarantine.n_kept == 3
    (kept,) = (tmp_path / "quarantine").glob("metrics_2026-01-15.parquet.part.*")
    assert kept.read_bytes() == b"fghi"


def test_the_oldest_go_when_the_bound_is_reached(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, max_bytes=100)
    for size in (40, 50, 60):
        quarantine.keep_bytes("some", bytes(size))
    assert sizes(tmp_path) == [60]
    quarantine.keep_bytes("huge", bytes(1000))
    assert sizes(tmp_path) == [100]


def test_a_disk_that_takes_nothing_does_not_stop_the_repair(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "quarantine").write_text("a file where the folder should be")
    quarantine = Quarantine(tmp_path / "quarantine")
    with caplog.at_level(logging.ERROR):
        quarantine.keep_bytes("segment-1", b"abc")
        quarantine.keep_file(tmp_path / "missing")
    assert [record.levelname for record in caplog.records if record.levelno >= logging.ERROR] == ["ERROR"] * 2
