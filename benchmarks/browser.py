"""A real Chromium for tests and screenshots, driven over a pipe by its own protocol; no driver package.

    with Browser() as browser:
        browser.open(url); browser.wait("document.querySelector('tbody tr')"); browser.screenshot()

Every address but this machine's own is unresolvable to it, and every request is noted in `requests`.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIMIT_S = 60.0
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost",
    "--remote-debugging-pipe",
)


class Browser:
    """One page of one browser; `with` ends it and removes its profile."""

    def __init__(self, width: int = 1400, height: int = 900, *, is_dark: bool = False) -> None:
        self._size = (width, height)
        self._is_dark = is_dark
        self._number = 0
        self._buffer = b""
        self.requests: list[str] = []
        self.complaints: list[str] = []  # errors of scripts, and what the policy forbade

    def __enter__(self) -> Self:
        assert CHROMIUM is not None, "no Chromium is installed"
        self._profile = tempfile.mkdtemp(prefix="fleetcast-browser-")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        command = ("bash", CHROMIUM, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank")
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', *command],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TZ": "UTC", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(*self._size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self._is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def resize(self, width: int, height: int) -> None:
        """Give the page another size, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, url: str) -> None:
        """Go to an address and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Return what an expression is in the page."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, limit_s: float = LIMIT_S) -> None:
        """Return when an expression is true in the page."""
        deadline = time.monotonic() + limit_s
        while not self.evaluate(f"!!({condition})"):
            if time.monotonic() > deadline:
                text = self.evaluate("document.body.innerText")[:2000]
                raise AssertionError(f"waited in vain for {condition}\n{self.complaints}\n{text}")
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and release a key that writes nothing, as `ArrowRight`, `Enter`, `Tab`."""
        codes = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        codes |= {"Escape": 27, "+": 187, "-": 189, "PageUp": 33}
        said = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **said, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **said)

    def drag(self, selector: str, start: float, end: float) -> None:
        """Drag over an element with the mouse, between two shares of its width."""
        box = self.evaluate(
            f"(() => {{ const it = document.querySelector({json.dumps(selector)});"
            " it.scrollIntoView({block: 'center'}); return it.getBoundingClientRect().toJSON(); })()"
        )
        steps = [("mouseMoved", start), ("mousePressed", start), ("mouseMoved", (start + end) / 2)]
        for kind, share in (*steps, ("mouseMoved", end), ("mouseReleased", end)):
            x, y = box["x"] + share * box["width"], box["y"] + box["height"] / 2
            button = {"button": "left", "buttons": 1, "clickCount": 1} if kind != "mouseMoved" else {}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def write(self, text: str) -> None:
        """Write text where the focus is."""
        self.call("Input.insertText", text=text)

    def screenshot(self, *, is_whole: bool = False) -> bytes:
        """Return what is seen as a PNG; of the whole page, if asked."""
        if is_whole:
            height = self.evaluate("document.documentElement.scrollHeight")
            self.resize(self._size[0], int(height))
            time.sleep(0.3)
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser for something and return its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                found: dict[str, Any] = answer["result"]
                return found
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        said = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"].get("exception", said["exceptionDetails"])))
        elif event.get("method") == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.complaints.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + LIMIT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser said nothing for {LIMIT_S:.0f} s"
            piece = os.read(self._read, 1 << 20)
            assert piece, f"the browser ended with code {self._process.wait()}"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


def save(path: Path, picture: bytes) -> None:
    """Write a picture, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
