"""What may stand where a plain file belongs, for tests of readers and writers."""

import os
import socket
from pathlib import Path

KINDS = ("fifo", "socket", "folder", "loop", "unreadable")


def put(kind: str, path: Path) -> None:
    """Put something else at `path`; root reads an unreadable file all the same, so it gets junk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            place = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            server.bind(f"/proc/self/fd/{place}/{path.name}")  # a socket's path is at most 108 bytes
            os.close(place)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.write_bytes(b"\xff\x00 = junk")
        path.chmod(0)
