"""Claims about what a training is told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetcast.schema import ChangedSeries
from fleetcast.training.grid import TrainingContext, TrainingGrid

HOUR_MS = 3_600_000


def grid() -> TrainingGrid:
    values = np.zeros((2, 2, 100), np.float32)
    return TrainingGrid(("web-01", "web-02"), ("cpu_pct", "mem_pct"), values, HOUR_MS, 300_000)


def written(folder: Path, content: Any) -> Path:
    (folder / "training_context.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    return folder / "data.parquet"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def test_drifting_series_are_found_with_the_bin_of_their_change(tmp_path: Path) -> None:
    data = written(
        tmp_path,
        {
            "attempt_id": "a1",
            "drifting": [
                {"server": "web-02", "metric": "mem_pct", "since": "1970-01-01T02:03:00Z", "score": 3},
                {"server": "web-01", "metric": "cpu_pct", "since": "1960-01-01T00:00:00"},
            ],
        },
    )
    context = TrainingContext.find(data, None)
    assert context.attempt_id == "a1"
    assert context.changed_series(grid()) == (ChangedSeries(1, 1, 12), ChangedSeries(0, 0, 0))


def test_without_a_file_nothing_drifted(tmp_path: Path) -> None:
    context = TrainingContext.find(tmp_path / "data.parquet", "a7")
    assert context == TrainingContext("a7")
    assert context.changed_series(grid()) == ()


def test_the_working_directory_is_looked_at_second(tmp_path: Path) -> None:
    written(tmp_path / "cwd", {"attempt_id": "here", "drifting": []})
    assert TrainingContext.find(tmp_path / "data.parquet", None).attempt_id == "here"
    data = written(tmp_path, {"attempt_id": "beside", "drifting": []})
    assert TrainingContext.find(data, None).attempt_id == "beside"


def test_the_context_of_another_attempt_says_nothing(tmp_path: Path) -> None:
    entry = {"server": "web-01", "metric": "cpu_pct", "since": "1970-01-01T02:00:00Z"}
    data = written(tmp_path, {"attempt_id": "old", "drifting": [entry]})
    assert TrainingContext.find(data, "new") == TrainingContext("new")
    assert len(TrainingContext.find(data, "old").changed_series(grid())) == 1


def test_the_time_of_the_change_goes_before_the_time_it_was_noticed(tmp_path: Path) -> None:
    entry = {"server": "web-01", "metric": "cpu_pct", "since": "1970-01-01T05:00:00Z"}
    data = written(tmp_path, {"drifting": [{**entry, "changed_ms": 2 * HOUR_MS}]})
    assert TrainingContext.find(data, None).changed_series(grid()) == (ChangedSeries(0, 0, 12),)


@pytest.mark.parametrize(
    "times", [{}, {"since": None}, {"changed_ms": None}, {"since": None, "changed_ms": None}]
)
def test_a_change_without_a_time_is_taken_for_a_day_old(tmp_path: Path, times: dict[str, Any]) -> None:
    data = written(tmp_path, {"drifting": [{"server": "web-02", "metric": "cpu_pct", **times}]})
    week = TrainingGrid(("web-02",), ("cpu_pct",), np.zeros((1, 1, 2016), np.float32), HOUR_MS, 300_000)
    assert TrainingContext.find(data, None).changed_series(week) == (ChangedSeries(0, 0, 2016 - 288),)
    # and where the data are shorter than a day, for as old as they are
    assert TrainingContext.find(data, None).changed_series(grid()) == (ChangedSeries(1, 0, 0),)


def test_a_series_named_twice_counts_once_since_its_first_change(tmp_path: Path) -> None:
    entry = {"server": "web-01", "metric": "cpu_pct"}
    both = [{**entry, "changed_ms": hour * HOUR_MS} for hour in (4, 2, 3)]
    data = written(tmp_path, {"drifting": both})
    assert TrainingContext.find(data, None).changed_series(grid()) == (ChangedSeries(0, 0, 12),)


@pytest.mark.parametrize("content", ["{torn", "[]", '"x"', "{}", '{"drifting": 5, "attempt_id": []}', ""])
def test_a_damaged_file_is_left_out(tmp_path: Path, content: str) -> None:
    context = TrainingContext.find(written(tmp_path, content), None)
    assert context.attempt_id is None
    assert context.changed_series(grid()) == ()


@pytest.mark.parametrize(
    "entry",
    [
        5,
        {},
        {"server": "gone", "metric": "cpu_pct", "since": "1970-01-01T02:00:00Z"},
        {"server": "web-01", "metric": "latency_ms", "since": "1970-01-01T02:00:00Z"},
        {"server": "web-01", "metric": "cpu_pct", "since": "yesterday"},
        {"server": "web-01", "metric": "cpu_pct", "changed_ms": "1970-01-01T02:00:00Z"},
        {"server": "web-01", "metric": "cpu_pct", "changed_ms": True},
        {"server": "web-01", "metric": "cpu_pct", "changed_ms": float("inf")},
        {"server": "web-01", "metric": "cpu_pct", "changed_ms": 4e12},
        {"server": "web-01", "metric": "cpu_pct", "since": "2099-01-01T00:00:00Z"},
        {"server": ["web-01"], "metric": {}, "since": 3},
    ],
)
def test_an_entry_that_means_nothing_here_is_left_out_alone(tmp_path: Path, entry: Any) -> None:
    good = {"server": "web-01", "metric": "cpu_pct", "since": "1970-01-01T02:00:00Z"}
    data = written(tmp_path, {"drifting": [entry, good, good]})
    assert TrainingContext.find(data, None).changed_series(grid()) == (ChangedSeries(0, 0, 12),)


def test_changes_known_before_are_no_news_but_are_all_changes(tmp_path: Path) -> None:
    grid = made_grid_of_two()
    context = TrainingContext(
        "a1",
        ({"server": "a", "metric": "cpu_pct", "changed_ms": grid.start_ms + 20 * grid.bin_ms},),
        (
            {"server": "a", "metric": "cpu_pct", "changed_ms": grid.start_ms + 5 * grid.bin_ms},
            {"server": "b", "metric": "cpu_pct", "changed_ms": grid.start_ms + 7 * grid.bin_ms},
        ),
    )
    assert context.changed_series(grid) == (ChangedSeries(0, 0, 20),)
    assert context.all_changes(grid) == (ChangedSeries(0, 0, 20), ChangedSeries(1, 0, 7))


def made_grid_of_two() -> TrainingGrid:
    return TrainingGrid(("a", "b"), ("cpu_pct",), np.zeros((2, 1, 50), np.float32), 0, 300_000)
