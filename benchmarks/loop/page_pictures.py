"""Pictures of the page for the documents, and for eyes: each view, three widths, light and dark.

    make demo
    python -m benchmarks.loop.page_pictures --folder demo_run            the pictures of docs/
    python -m benchmarks.loop.page_pictures --folder demo_run --all --out /tmp/pictures

An inference daemon starts on a copy of the folder, so that it stays as it was. It needs a Chromium
on the path. Owns: which views are taken. Does not know: what is on them.
Exit codes: 0 taken, 1 the page did not come.
"""

import argparse
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from PIL import Image

from benchmarks.browser import Browser, save
from benchmarks.programs import InferenceDaemon, wait_for
from fleetcast.clock import iso_z, parse_plain_utc

LEFT_OUT = ("*.py", "fleetcast", "*.log", "*.parquet.tmp", "training_data_*")
WIDTHS = (400, 900, 1400)
SHOWN_WIDTH, SHOWN_HEIGHT = 1200, 800  # of the pictures in the documents
VIEWS = {
    "fleet": "",
    "server": "server?name={server}",
    "capacity": "capacity",
    "drift": "drift",
    "trainings": "trainings",
    "health": "health",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("demo_run"), help="where a demo has run")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="where the pictures go")
    parser.add_argument("--server", default="smd-machine-1-7", help="whose page is taken")
    parser.add_argument("--all", action="store_true", help="every view in three widths, light and dark")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as copied:
        folder = Path(copied) / "run"
        shutil.copytree(arguments.folder, folder, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        with InferenceDaemon(folder) as daemon:
            wait_for("the model", lambda: daemon.status()["model"]["version"] is not None)
            go_on(daemon)
            pictures = every_picture if arguments.all else shown_pictures
            for name, picture in pictures(daemon.url, arguments.server):
                save(arguments.out / name, picture)
                print(f"{arguments.out / name}: {len(picture) // 1000} KB")
            daemon.stop()
    return 0


def go_on(daemon: InferenceDaemon) -> None:
    """Send the last values once more, two bins later, so that the model forecasts."""
    current = daemon.client.get("/predictions/current?fields=current")
    later = iso_z(parse_plain_utc(current["timestamp"]) + timedelta(minutes=10))
    n_sweeps = daemon.status()["sweep"]["count"]
    daemon.client.post_records(
        [
            {"timestamp": later, "server_name": name, **entry["current"]}
            for name, entry in current["predictions"].items()
        ]
    )
    wait_for("a sweep", lambda: daemon.status()["sweep"]["count"] > n_sweeps)


def shown_pictures(url: str, server: str) -> Iterator[tuple[str, bytes]]:
    """Yield the pictures of the documents."""
    for name in ("fleet", "server", "drift"):
        with Browser(SHOWN_WIDTH, SHOWN_HEIGHT) as browser:
            visit(browser, url, VIEWS[name].format(server=server))
            yield f"{name}.png", smaller(browser.screenshot())


def every_picture(url: str, server: str) -> Iterator[tuple[str, bytes]]:
    """Yield every view in each width, light and dark."""
    for is_dark in (False, True):
        for width in WIDTHS:
            for name, place in VIEWS.items():
                with Browser(width, 900, is_dark=is_dark) as browser:
                    visit(browser, url, place.format(server=server))
                    yield (
                        f"{name}-{width}-{'dark' if is_dark else 'light'}.png",
                        browser.screenshot(is_whole=True),
                    )


def visit(browser: Browser, url: str, place: str) -> None:
    """Open a view and wait until it is drawn."""
    browser.open(f"{url}/ui/#/{place}")
    browser.wait("document.querySelector('main .card')")
    browser.wait("document.querySelector('main').innerText.length > 100")
    browser.wait("document.getElementById('pulse').innerText")
    if place.startswith(("server", "drift")):
        browser.wait("document.querySelector('.plot canvas')")


def smaller(picture: bytes) -> bytes:
    """Return the same picture without transparency, packed as tightly as PNG can."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").save(stream, "PNG", optimize=True)
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(main())
