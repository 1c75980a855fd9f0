import math
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripted_daemon import Reply, ScriptedDaemon

from fleetcast.clock import SystemClock
from fleetcast.errors import ExitCode
from fleetcast.sources import replay
from fleetcast.sources.replay import Pace

ROOT = Path(__file__).parents[1]
START = datetime(2026, 1, 15, 10, 0, tzinfo=UTC)
MINUTES = 12


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two servers, twelve minutes: three steps of five minutes."""
    times = [START + timedelta(minutes=m) for m in range(MINUTES)]
    table = pa.table(
        {
            "timestamp": pa.array(times * 2, pa.timestamp("ms", "UTC")),
            "server_name": ["web"] * MINUTES + ["db"] * MINUTES,
            "cpu": [0.5] * 2 * MINUTES,
        }
    )
    pq.write_table(table, tmp_path / "fleet.parquet")
    return tmp_path / "fleet.parquet"


def run(file: Path, daemon: ScriptedDaemon, *flags: str) -> int:
    return replay.main(["--data", str(file), "--url", daemon.url, *flags])


def test_everything_arrives_in_order_one_step_of_data_time_per_request(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedDaemon() as daemon:
        assert run(file, daemon, "--map", "cpu_pct=cpu*100") == ExitCode.OK
    assert [len(post) for post in daemon.posts] == [10, 10, 4]
    assert daemon.taken[0] == {"timestamp": "2026-01-15T10:00:00Z", "server_name": "db", "cpu_pct": 50.0}
    times = [record["timestamp"] for record in daemon.taken]
    assert times == sorted(times)
    assert "records=24 sent=24 accepted=24 rejected=0 requests=3 retries=0" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "warns"), [((), True), (("--map", "cpu_pct=cpu*100"), False)])
def test_a_recording_without_a_metric_that_is_forecast_is_warned_of(
    file: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], warns: bool
) -> None:
    with ScriptedDaemon() as daemon:
        assert run(file, daemon, *flags) == ExitCode.OK
    assert ("for example --map cpu_pct=cpu" in capsys.readouterr().err) is warns


def test_a_rejected_record_is_exit_1_and_its_reason_is_shown(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = {
        "status": "ok",
        "records_received": 9,
        "records_rejected": 1,
        "errors": [{"index": 0, "field": "cpu_pct", "reason": "above 1000"}],
    }
    with ScriptedDaemon(Reply(200, body)) as daemon:
        assert run(file, daemon) == ExitCode.FAILED
    output = capsys.readouterr()
    assert "rejected=1" in output.out
    assert "cpu_pct: above 1000" in output.err


def test_a_daemon_that_refuses_for_good_is_exit_1_with_the_place_where_we_stopped(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedDaemon(Reply(), Reply(401, "no")) as daemon:
        assert run(file, daemon) == ExitCode.FAILED
    assert "stopped at record 10" in capsys.readouterr().err


def test_busy_answers_are_waited_out_and_counted(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    busy = Reply(429, "hold", {"Retry-After": "0"})
    with ScriptedDaemon(busy, busy) as daemon:
        assert run(file, daemon) == ExitCode.OK
    assert "accepted=24 rejected=0 requests=5 retries=2" in capsys.readouterr().out


def test_nothing_is_sent_while_a_training_runs(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    posts_when_asked: list[int] = []
    with ScriptedDaemon() as daemon:
        daemon.training_answers.extend([True, True, False])
        answers = daemon.training_answers

        class Watched(type(answers)):  # type: ignore[misc]
            def popleft(self) -> bool:
                posts_when_asked.append(len(daemon.posts))
                return bool(super().popleft())

        daemon.training_answers = Watched(answers)
        assert run(file, daemon) == ExitCode.OK
    assert posts_when_asked == [0, 0, 0]
    assert len(daemon.taken) == 24


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--speed", "fast"], "--speed must be a number or max"),
        (["--speed", "0"], "--speed must be > 0"),
        (["--speed", "nan"], "--speed must be > 0"),
        (["--batch-s", "-1"], "--batch-s must be > 0"),
        (["--days", "0"], "--days must be > 0"),
        (["--shift-to", "tomorrow"], "--shift-to must be now or ISO 8601"),
        (["--map", "CPU=cpu"], "a metric is named"),
        (["--map", "a=cpu", "a=cpu"], "gives a twice"),
        (["--map", "a=gpu"], "no column gpu"),
        (["--servers", "mail"], "no such server: mail"),
        (["--start", "2027-01-01"], "no such rows"),
    ],
)
def test_wrong_usage_is_exit_2_and_says_what_would_be_right(
    file: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedDaemon() as daemon:
        assert run(file, daemon, *flags) == ExitCode.BAD_SETTINGS
    assert message in capsys.readouterr().err
    assert daemon.posts == []


def test_a_shift_to_a_date_puts_the_first_record_there(file: Path) -> None:
    with ScriptedDaemon() as daemon:
        run(file, daemon, "--shift-to", "2030-05-01T00:00:30Z")
    assert daemon.taken[0]["timestamp"] == "2030-05-01T00:00:30Z"


def test_a_shift_to_now_at_full_speed_lets_no_record_lie_in_the_future(file: Path) -> None:
    with ScriptedDaemon() as daemon:
        run(file, daemon, "--shift-to", "now")
    last = datetime.fromisoformat(daemon.taken[-1]["timestamp"])
    assert timedelta(0) <= SystemClock().now() - last < timedelta(minutes=1)


def test_only_the_asked_servers_and_days_are_sent(file: Path) -> None:
    with ScriptedDaemon() as daemon:
        run(file, daemon, "--servers", "db", "--start", "2026-01-15T10:05:00", "--days", "0.0035")
    assert {record["server_name"] for record in daemon.taken} == {"db"}
    assert daemon.taken[0]["timestamp"] == "2026-01-15T10:05:00Z"
    assert len(daemon.taken) == 6  # 0.0035 days are 5 minutes and 2 seconds


def test_a_pace_of_60_makes_a_minute_a_second_and_a_pause_moves_the_schedule() -> None:
    pace = Pace(60.0, 0, started_s=1000.0)
    assert pace.wait_s(60_000, now_s=1000.25) == 0.75
    pace.pause(10.0)
    assert pace.wait_s(60_000, now_s=1000.25) == 10.75
    assert pace.wait_s(60_000, now_s=2000.0) == 0.0
    assert Pace(math.inf, 0, started_s=0.0).wait_s(10**12, now_s=0.0) == 0.0


def test_ctrl_c_ends_between_requests_with_the_summary_and_exit_0(file: Path) -> None:
    with ScriptedDaemon() as daemon:
        command = ["-m", "fleetcast.sources.replay", "--data", str(file), "--url", daemon.url]
        process = subprocess.Popen(
            [sys.executable, *command, "--speed", "300"],  # the second step is due after one second
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        while not daemon.posts and process.poll() is None:
            os.sched_yield()
        process.send_signal(signal.SIGHUP)
        while "SIGHUP ends nothing" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert process.returncode == ExitCode.OK
    assert "sent=10 accepted=10" in output
    assert "stopped by signal SIGINT before the end" in errors


def test_help_answers_without_pyarrow_pandas_and_torch() -> None:
    code = (
        "import sys; from fleetcast.sources import replay\n"
        "try: replay.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'pyarrow', 'pandas', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"
