"""Every printed shell command, as printed, against real daemons and a real buffer."""

import json
import re
from datetime import datetime

import pytest
from spec_blocks import BLOCKS, covers
from workplace import Workplace

pytestmark = pytest.mark.slow


@covers("option-1-automated-recommended", "9eee3101")
def test_the_two_daemons_run_side_by_side(daemons: Workplace) -> None:
    assert [process.poll() for process in daemons.started] == [None, None]
    health = daemons.run("curl -sf http://localhost:8000/health")
    assert health.returncode == 0, health.stderr


@covers("option-2-manual-testing", "46c6a1d1")
def test_the_manual_checks_answer_beside_running_daemons(daemons: Workplace) -> None:
    once, monitor, stats = (daemons.run(cmd) for cmd in BLOCKS["option-2-manual-testing"].commands())
    assert once.returncode == 0, once.stderr
    for word in ("PER", "DSS", "FDS", "Anomaly", "Combined", "quiet", "6", "30", "3"):
        assert word.lower() in once.stdout.lower(), once.stdout
    assert monitor.returncode == 0, monitor.stderr
    assert "collecting" in monitor.stdout
    assert stats.returncode == 0, stats.stderr
    assert "'total_records': 1440" in stats.stdout


def test_the_manual_checks_answer_in_an_empty_folder_too(empty: Workplace) -> None:
    """What cannot look at a buffer says which folder it means (exit 6), and none leaves a file behind."""
    before = sorted(path.name for path in empty.folder.iterdir())
    for command in BLOCKS["option-2-manual-testing"].commands():
        done = empty.run(command)
        assert done.returncode in (0, 6), (command, done.stdout, done.stderr)
        assert done.returncode == 0 or "data_buffer" in done.stderr
    assert sorted({path.name for path in empty.folder.iterdir()} - {"__pycache__"}) == before


@covers("adaptive_retraining_daemon.py-400-lines-3", "50419833")
def test_the_retraining_daemon_takes_the_printed_flags(daemons: Workplace) -> None:
    with_flags, once = BLOCKS["adaptive_retraining_daemon.py-400-lines-3"].commands()
    second = daemons.run(with_flags)
    assert second.returncode == 4, "the flags are accepted and the running daemon is noticed"
    assert f"pid {daemons.started[1].pid}" in second.stderr
    before = {path: path.stat().st_mtime_ns for path in daemons.folder.glob("*.json*")}
    assert daemons.run(once).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in daemons.folder.glob("*.json*")} == before


@covers("check-drift-status", "20907bd3")
def test_the_drift_file_reads_as_shown(daemons: Workplace) -> None:
    block = BLOCKS["check-drift-status"]
    done = daemons.run(block.commands()[0])
    assert done.returncode == 0, done.stderr
    found, shown = json.loads(done.stdout), json.loads(block.text.split("# Example output:\n")[1])
    assert_same_shape(found, shown)
    assert found["status"] == "collecting", (
        "three hours: tests/test_drift_monitor.py has a file with a verdict"
    )
    assert found["recommendation"] is None
    assert set(found["trends"].values()) <= {"increasing", "stable", "decreasing", None}
    assert found["status_reason"].startswith(
        "the first training makes the drift reference: data span 3.0 h of 48 h"
    )


@covers("check-retraining-state", "10155f6e")
def test_the_state_file_reads_as_shown(daemons: Workplace) -> None:
    block = BLOCKS["check-retraining-state"]
    done = daemons.run(block.commands()[0])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["last_training_time"] is None
    assert found["training_history"] == []
    assert found["total_trainings"] == 0
    assert found["timezone"] == "UTC"


@covers("check-buffer-status", "3b670916")
def test_the_buffer_status_snippet_prints_its_four_lines(daemons: Workplace) -> None:
    done = daemons.run(BLOCKS["check-buffer-status"].commands()[0])
    assert done.returncode == 0, done.stderr
    files, records, disk, span = done.stdout.splitlines()
    assert re.fullmatch(r"Files: [12]", files)
    assert records == "Records: 1,440"
    assert re.fullmatch(r"Disk: [\d.]+ MB", disk)
    assert re.fullmatch(r"Range: \d{4}-\d\d-\d\d to \d{4}-\d\d-\d\d", span)


def test_the_buffer_status_snippet_works_on_an_empty_buffer_and_creates_nothing(empty: Workplace) -> None:
    before = sorted(path.name for path in empty.folder.iterdir())
    done = empty.run(BLOCKS["check-buffer-status"].commands()[0])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["Files: 0", "Records: 0"]
    after = {path.name for path in empty.folder.iterdir()} - {"__pycache__"}
    assert sorted(after) == before


@covers("issue-retraining-not-triggered-despite-high-drift", "95370d6a")
def test_the_quiet_period_filter_gives_the_mean_cpu(daemons: Workplace) -> None:
    mean_cpu, last_training = BLOCKS["issue-retraining-not-triggered-despite-high-drift"].commands()
    done = daemons.run(mean_cpu)
    assert done.returncode == 0, done.stderr
    assert 0.0 <= float(done.stdout) < 60.0
    assert daemons.run(last_training).stdout.strip() == "null"


@covers("issue-data-buffer-empty", "18f72d3b")
def test_the_day_files_and_the_log_show_the_buffering(daemons: Workplace) -> None:
    listing, tail = BLOCKS["issue-data-buffer-empty"].commands()
    assert re.search(r"metrics_\d{4}-\d\d-\d\d\.parquet", daemons.run(listing).stdout)
    done = daemons.run(tail.replace("tail -f", "timeout 2 tail -f"))  # it would never end
    assert "buffer" in done.stdout


@covers("step-by-step-process-3", "94c23f00")
def test_the_export_and_the_training_run_as_printed(trained: Workplace) -> None:
    assert (trained.folder / "training_data_incremental.parquet").exists()
    assert (trained.folder / "checkpoints" / "last.ckpt").is_symlink()
    (attempt,) = (trained.folder / "checkpoints" / "attempts").glob("*.json")
    assert json.loads(attempt.read_text())["promoted"] is True


@covers("issue-training-failed", "04b04ef5")
def test_the_training_data_snippet_describes_the_export(trained: Workplace) -> None:
    snippet, disk = BLOCKS["issue-training-failed"].commands()
    done = trained.run(snippet)
    assert done.returncode == 0, done.stderr
    records, servers, span = done.stdout.splitlines()
    assert int(records.removeprefix("Records: ")) > 0
    assert servers == "Servers: 8"
    first, last = (datetime.fromisoformat(text) for text in span.removeprefix("Date range: ").split(" to "))
    assert 2.9 < (last - first).total_seconds() / 86_400 <= 3.0
    assert trained.run(disk).returncode == 0


def assert_same_shape(found: object, shown: object) -> None:
    """Check that every printed key is there, with a value of the printed kind; null is "not yet"."""
    if isinstance(shown, dict):
        assert isinstance(found, dict)
        for key, value in shown.items():
            assert key in found
            assert_same_shape(found[key], value)
    elif isinstance(shown, bool):
        assert isinstance(found, bool)
    elif isinstance(shown, float):
        assert found is None or isinstance(found, int | float)
    else:
        assert found is None or type(found) is type(shown)
