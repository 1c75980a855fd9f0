"""What a daemon tells systemd: READY, STOPPING, WATCHDOG and one line of status.

Owns: the notify protocol (sd_notify(3)), a datagram to the socket named in `NOTIFY_SOCKET`.
Does not know: what the daemon does. Not started by systemd, every call does nothing, so that
callers need no condition. `alive()` belongs into the working loop and nowhere else: fed from a
thread of its own it would vouch for a loop that hangs.
"""

import logging
import os
import socket
from collections.abc import Mapping

logger = logging.getLogger(__name__)


class SystemdNotifier:
    """Sends notifications; losing one is never an error of the daemon.

    >>> SystemdNotifier(environ={}).is_listening
    False
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
        # a leading @ stands for the NUL of Linux's abstract socket names
        self._address = f"\0{address[1:]}" if address.startswith("@") else address

    @property
    def is_listening(self) -> bool:
        """Whether systemd (or a container runtime in its place) asked to be told."""
        return bool(self._address)

    def ready(self, status: str = "") -> None:
        """Say that start-up is done and the service does what it is for."""
        self._send("READY=1", status)

    def alive(self, status: str = "") -> None:
        """Say that the working loop has come round; systemd kills a unit that stops saying so."""
        self._send("WATCHDOG=1", status)

    def stopping(self, status: str = "") -> None:
        """Say that the service is ending in good order."""
        self._send("STOPPING=1", status)

    def extend_timeout(self, seconds: float) -> None:
        """Ask for `seconds` more before start-up (a long log replay) counts as failed."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}", "")

    def _send(self, state: str, status: str) -> None:
        if not self._address:
            return
        message = state + (f"\nSTATUS={status.replace(chr(10), ' ')}" if status else "")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
                link.settimeout(1.0)  # a stuck supervisor must not stall the loop
                link.sendto(message.encode(), self._address)
        except OSError as error:
            logger.warning("systemd was not told state=%s error=%s", state, error)
