"""The tables of docs/reliability.md are the newest results, figure by figure."""

from pathlib import Path

import pytest

from benchmarks.faults import reliability_tables
from benchmarks.faults.reliability_tables import DOCUMENT, idle_table, newest, rendered, write_document
from fleetcast.files import write_json

ROW = {"fault": "a fault", "times": 20, "lost": 2, "recovered_s": [0.5, 1.5]}
HEAD = {
    "measured_at": "2026-02-01T10:00:00",
    "revision": "abc1234",
    "machine": {"cores": 2, "load_1_min": 0.5},
}
PROCESS = {
    "memory_mb_second_quarter": 100.0,
    "memory_mb_last_quarter": 101.5,
    "handles_second_quarter": 13,
    "handles_last_quarter": 14,
    "cpu_percent_of_a_core": 0.5,
}


def test_the_document_shows_the_newest_results_and_nothing_typed_in() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")

    assert text == rendered(text), "run `python -m benchmarks.faults.reliability_tables`"


def test_the_newest_results_replace_a_table_that_was_written_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reliability_tables, "RESULTS", tmp_path)
    write_json(tmp_path / "faults_2026-01-31.json", {**HEAD, "faults": []})
    write_json(tmp_path / "faults_2026-02-01.json", {**HEAD, "faults": [ROW]})
    document = tmp_path / "reliability.md"
    document.write_text("before\n<!-- faults: begin -->\n| by hand |\n<!-- faults: end -->\nafter\n")

    write_document(document)

    lines = document.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "| a fault | 20 | **2** | 0 | 0 | 1.0 s (worst 1.5 s) |" in lines
    assert "| by hand |" not in lines


def test_without_results_the_document_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability_tables, "RESULTS", tmp_path)

    assert newest("faults") is None
    assert (
        rendered("<!-- faults: begin -->x<!-- faults: end -->")
        == "<!-- faults: begin -->x<!-- faults: end -->"
    )


def test_a_soak_that_kept_no_samples_says_so_instead_of_a_slope() -> None:
    told = idle_table({"agent": PROCESS, "daemon": {**PROCESS, "memory_mb_per_hour_last_half_hour": 0.25}})

    assert told.splitlines()[2:] == [
        "| agent | 100.0, 101.5 | not kept | 13, 14 | 0.5 % |",
        "| daemon | 100.0, 101.5 | +0.25 MB/h | 13, 14 | 0.5 % |",
    ]
