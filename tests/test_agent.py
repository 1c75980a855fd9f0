"""The agent: real readings of this machine, delivered by real HTTP, kept while no daemon answers."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from programs import wait_for
from scripted_daemon import ScriptedDaemon

from fleetcast.errors import DaemonAway
from fleetcast.loop import Stop
from fleetcast.schema import VIRTUAL_DISKS
from fleetcast.sources.agent import (
    BATCH_RECORDS,
    LONGEST_WAIT_S,
    Backlog,
    CounterRate,
    Delivery,
    HostMeter,
    LocalAgent,
)
from fleetcast.sources.client import DaemonClient, FeedAnswer, RequestRefused

ROOT = Path(__file__).resolve().parents[1]
ALWAYS_THERE = {"cpu_pct", "mem_pct", "load_average", "disk_usage_pct"}
ALL_METRICS = ALWAYS_THERE | {"disk_io_mb_s", "net_in_mb_s", "net_out_mb_s"}


def test_a_rate_is_the_growth_of_every_device_over_the_elapsed_time() -> None:
    rate = CounterRate()

    assert rate.update({"vda": 100, "vdb": 1_000}, at_s=10.0) is None
    assert rate.update({"vda": 600, "vdb": 2_500}, at_s=14.0) == 500.0


def test_a_counter_that_fell_to_near_zero_began_again_there() -> None:
    rate = CounterRate()
    rate.update({"vda": 5_000, "vdb": 0}, at_s=0.0)

    assert rate.update({"vda": 10, "vdb": 200}, at_s=2.0) == 105.0
    assert rate.update({"vda": 30, "vdb": 200}, at_s=4.0) == 10.0


@pytest.mark.parametrize("fallen", [4_999, 1_000, 51])
def test_after_any_other_fall_the_sum_is_absent_once(fallen: int) -> None:
    rate = CounterRate()
    rate.update({"vda": 5_000, "vdb": 0}, at_s=0.0)

    assert rate.update({"vda": fallen, "vdb": 200}, at_s=2.0) is None
    assert rate.update({"vda": fallen + 20, "vdb": 200}, at_s=4.0) == 10.0


def test_a_disk_replaced_under_its_name_has_no_rate_through_psutils_own_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a made /proc; psutil hides a fall from its caller unless told not to
    (tmp_path / "net").mkdir()
    (tmp_path / "self").mkdir()
    for name in ("stat", "meminfo", "vmstat", "filesystems", "self/mounts"):
        (tmp_path / name).write_text(Path("/proc", name).read_text())
    whole = [one.name for one in Path("/sys/block").glob("*") if not one.name.startswith(VIRTUAL_DISKS)]
    if not whole:
        pytest.skip("this machine has no physical disk")
    clock = [0.0]

    def turn(sectors: int, received: int) -> None:
        numbers = f"100 0 {sectors} 0 100 0 0 0 0 0 0 0 0 0 0 0 0"
        (tmp_path / "diskstats").write_text(f"   8       0 {whole[0]} {numbers}\n")
        nic = f"  eth0: {received} 1 0 0 0 0 0 0 1000 1 0 0 0 0 0 0\n"
        (tmp_path / "net/dev").write_text("a|b\nc|d\n" + nic)
        clock[0] += 5

    turn(10**9, 10**12)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    meter = HostMeter(Path("/"), lambda: clock[0])
    found = []
    for sectors, received in ((10**9 + 20_000, 10**12 + 5 * 10**6), (2 * 10**8, 10**11)):
        turn(sectors, received)
        reading = meter.read()
        found.append((reading.get("disk_io_mb_s"), reading.get("net_in_mb_s")))
    # Then
    assert found == [(2.048, 1.0), (None, None)]


def test_a_device_that_just_appeared_does_not_bring_its_whole_past() -> None:
    rate = CounterRate()
    rate.update({"eth0": 0}, at_s=0.0)

    assert rate.update({"eth0": 10, "eth1": 10**12}, at_s=1.0) == 10.0


def test_without_a_usable_counter_the_rate_is_absent_rather_than_zero() -> None:
    rate = CounterRate()
    rate.update({"vda": 10}, at_s=0.0)

    assert rate.update({"vda": 5}, at_s=1.0) is None
    assert rate.update({}, at_s=2.0) is None
    assert rate.update({"vda": 5}, at_s=2.0) is None


def test_a_clock_that_stood_still_gives_no_rate() -> None:
    rate = CounterRate()
    rate.update({"vda": 10}, at_s=1.0)

    assert rate.update({"vda": 20}, at_s=1.0) is None


def test_this_machine_has_the_metrics_an_agent_promises() -> None:
    readings = HostMeter().read()

    assert set(readings) <= ALL_METRICS
    assert set(readings) >= ALWAYS_THERE
    assert all(isinstance(value, float) and value >= 0 for value in readings.values())
    assert readings["mem_pct"] <= 100


def test_a_file_system_that_is_not_mounted_is_absent(tmp_path: Path) -> None:
    assert "disk_usage_pct" not in HostMeter(tmp_path / "gone").read()


def test_a_full_backlog_gives_up_its_oldest_record() -> None:
    backlog = Backlog(limit=2)
    for number in range(3):
        backlog.add({"n": number})

    assert backlog.oldest(10)[0] == [{"n": 1}, {"n": 2}]
    assert backlog.displaced == 1


def test_a_record_displaced_during_its_delivery_does_not_take_a_newer_one_with_it() -> None:
    backlog = Backlog(limit=2)
    backlog.add({"n": 0})
    backlog.add({"n": 1})
    _, mark = backlog.oldest(1)
    backlog.add({"n": 2})  # displaces record 0 while it travels

    backlog.forget(mark)

    assert backlog.oldest(10)[0] == [{"n": 1}, {"n": 2}]


class Daemon:
    """Answers a delivery from a script: an exception is raised, None accepts everything."""

    def __init__(self, *script: DaemonAway | None) -> None:
        self.script = list(script)
        self.taken: list[int] = []
        self.tries = 0

    def post(self, records: Sequence[Mapping[str, Any]]) -> FeedAnswer:
        self.tries += 1
        step = self.script.pop(0) if self.script else None
        if step is not None:
            raise step
        self.taken += [int(record["n"]) for record in records]
        return FeedAnswer(len(records), 0)


def _filled(count: int) -> Backlog:
    backlog = Backlog(limit=count)
    for number in range(count):
        backlog.add({"n": number})
    return backlog


def test_what_waited_is_delivered_in_order_and_in_batches() -> None:
    daemon, backlog = Daemon(), _filled(2 * BATCH_RECORDS + 1)

    Delivery(backlog, daemon.post).run_due()

    assert daemon.taken == list(range(2 * BATCH_RECORDS + 1))
    assert daemon.tries == 3
    assert len(backlog) == 0


def test_while_the_daemon_is_away_tries_grow_rare_and_nothing_is_lost() -> None:
    now = [0.0]
    daemon, backlog = Daemon(*[DaemonAway("refused")] * 20), _filled(3)
    delivery = Delivery(backlog, daemon.post, wall_s=lambda: now[0])

    for second in range(120):
        now[0] = float(second)
        delivery.run_due()

    assert daemon.tries == 8  # at 0, 1, 3, 7, 15, 31, 61 and 91 s
    assert delivery.is_away
    assert len(backlog) == 3
    daemon.script.clear()
    now[0] += LONGEST_WAIT_S
    delivery.run_due()
    assert daemon.taken == [0, 1, 2]
    assert not delivery.is_away


def test_a_retry_after_longer_than_the_own_patience_is_honoured() -> None:
    now = [0.0]
    daemon = Daemon(RequestRefused(503, "busy", retry_after_s=20.0))
    delivery = Delivery(_filled(1), daemon.post, wall_s=lambda: now[0])

    delivery.run_due()
    now[0] = 19.9
    delivery.run_due()
    assert daemon.tries == 1
    now[0] = 20.0
    delivery.run_due()

    assert daemon.taken == [0]


def test_a_body_the_daemon_calls_too_large_is_halved_until_it_fits() -> None:
    too_large = RequestRefused(413, "too large")
    daemon, backlog = Daemon(too_large, too_large), _filled(8)

    Delivery(backlog, daemon.post).run_due()

    assert daemon.taken == list(range(8))
    assert daemon.tries == 6  # 8, 4, then 2 + 2 + 2 + 2


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def agent_port() -> Iterator[int]:
    """A port without a listener yet, and an agent that already sends to it."""
    port = _free_port()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "fleetcast.sources.agent", "--url", f"http://127.0.0.1:{port}",
            "--interval", "0.2", "--server-name", "this-host",
        ],
        cwd=ROOT,
        env={"PATH": "/usr/bin", "TFT_API_KEY": "secret-key"},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "delivery failed" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    yield port
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0, log
    assert "signal SIGHUP ends nothing" in log
    assert "agent ends daemon=" in log
    assert "secret-key" not in log


def test_readings_taken_while_the_daemon_was_away_arrive_when_it_is_back(agent_port: int) -> None:
    born = datetime.now(UTC)

    with ScriptedDaemon(port=agent_port) as daemon:
        deadline = time.monotonic() + 30
        while len(daemon.taken) < 15 and time.monotonic() < deadline:
            time.sleep(0.05)

    received = daemon.taken
    times = [datetime.fromisoformat(record["timestamp"]) for record in received]
    assert times[0] < born
    assert times == sorted(times)
    assert len(set(times)) == len(times)
    assert all(record["server_name"] == "this-host" for record in received)
    assert set(received[1]) - {"timestamp", "server_name"} >= ALWAYS_THERE
    assert {headers["X-API-Key"] for headers in daemon.headers} == {"secret-key"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "localhost:8000"], "must look like http://127.0.0.1:8000"),
        (["--interval", "0"], "--interval must be in 0.1..3600 seconds, got 0"),
        (["--interval", "nan"], "--interval must be in 0.1..3600 seconds, got nan"),
        (["--backlog", "0"], "--backlog must be at least 1, got 0"),
        (["--server-name", "a\nb"], "--server-name must be 1 to 128 printable characters"),
        (["--server-name", "\u3164"], "at least one of them visible"),
    ],
)
def test_a_flag_that_makes_no_sense_ends_it_with_what_would_be_right(flags: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fleetcast.sources.agent", *flags],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    assert message in done.stderr


def test_a_delivery_that_ends_begins_again_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = LocalAgent("web-01", HostMeter(Path("/")), DaemonClient("http://127.0.0.1:9"))
    calls: list[int] = []

    def fail_once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise SystemExit

    monkeypatch.setattr(agent._delivery, "run_due", fail_once)
    stop = Stop()
    runner = threading.Thread(target=agent.run, args=(60.0, stop))
    runner.start()
    wait_for("a second delivery", lambda: len(calls) > 1, 30)
    assert "problem=delivery failed once" in agent.summary()
    stop.request("test")
    runner.join(30)
    assert not runner.is_alive()
