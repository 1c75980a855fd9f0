"""The notify protocol as sd_notify(3) prints it, against a real datagram socket."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetcast.loop import SystemdNotifier


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.settimeout(5)
        yield receiver, address


def test_each_call_is_one_datagram_in_the_protocol_of_systemd(
    supervisor: tuple[socket.socket, str],
) -> None:
    receiver, address = supervisor
    notifier = SystemdNotifier({"NOTIFY_SOCKET": address})

    notifier.ready("serving on port 8000")
    notifier.alive()
    notifier.extend_timeout(2.5)
    notifier.stopping("signal SIGTERM")

    assert [receiver.recv(4096) for _ in range(4)] == [
        b"READY=1\nSTATUS=serving on port 8000",
        b"WATCHDOG=1",
        b"EXTEND_TIMEOUT_USEC=2500000",
        b"STOPPING=1\nSTATUS=signal SIGTERM",
    ]


def test_an_abstract_socket_is_reached_by_its_at_sign() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0fleetcast-test-notify")
        receiver.settimeout(5)

        SystemdNotifier({"NOTIFY_SOCKET": "@fleetcast-test-notify"}).ready()

        assert receiver.recv(4096) == b"READY=1"


def test_a_status_cannot_smuggle_a_second_assignment(supervisor: tuple[socket.socket, str]) -> None:
    receiver, address = supervisor

    SystemdNotifier({"NOTIFY_SOCKET": address}).alive("web\nMAINPID=1")

    assert receiver.recv(4096) == b"WATCHDOG=1\nSTATUS=web MAINPID=1"


def test_without_systemd_nothing_is_sent_and_nothing_fails() -> None:
    notifier = SystemdNotifier({})

    notifier.ready()
    notifier.alive("x")
    notifier.stopping()


def test_a_supervisor_that_is_gone_does_not_hurt_the_daemon(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SystemdNotifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).alive()

    assert "cannot notify systemd" in caplog.text
