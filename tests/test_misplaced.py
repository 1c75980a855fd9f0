"""A folder, a pipe, junk or a dead link in the place of a file of ours, a file in that of a folder.

Each is told with its path and without a traceback. The inference daemon goes on where it can; else it ends at
its start, and says what belongs there. `retention.json` has its test in `test_retention.py`, the retraining
daemon's files in `integration/test_retraining_daemon.py`; those of alerts are here.
"""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from alert_sink import Sink
from odd_files import put
from programs import free_port
from test_alerts import CALM, Installation
from test_inference import World
from told_daemon import Told

import tft_inference_daemon
from fleetcast.alerts.state import ALERTS_FILE, SILENCES_FILE
from fleetcast.errors import ExitCode, SettingsError
from fleetcast.settings import load_settings

FILES, FOLDERS = ("folder", "fifo", "dangling", "unreadable"), ("plain file", "fifo", "dangling")
DAY = "data/metrics_2020-01-01.parquet"
LEARNED = ("data/feedback.npz", "data/capacity.npz", "data/ledger.json")
GOES_ON = [
    *((path, kind) for path in (*LEARNED, "data/quarantine.jsonl") for kind in FILES),
    *(("checkpoints/excluded_servers.json", kind) for kind in FILES),
    *(("checkpoints/last.ckpt", kind) for kind in FILES),
    *((f"{DAY}/part-000000000001-*.parquet", kind) for kind in FILES),
    *((path, kind) for path in (DAY, "checkpoints", "checkpoints/versions") for kind in FOLDERS),
]
MADE_ANEW = {(path, "dangling") for path in (*LEARNED, "checkpoints/excluded_servers.json")}  # as if absent
SKIPPED = {
    ("data/quarantine.jsonl", "unreadable"),
    (SILENCES_FILE, "unreadable"),
}  # line by line
NAMES = {
    "fifo": "a pipe, a socket or a device",
    "dangling": "a link that leads nowhere",
    "loop": "a link that leads nowhere",
}
ENDS = [
    *(("data/.owner.lock", kind) for kind in ("folder", "fifo", "dangling", "loop")),
    *((path, kind) for path in ("data", "data/log", "data/open_forecasts") for kind in FOLDERS),
]


def misplace(kind: str, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "plain file":
        path.write_text("junk")
    elif kind == "dangling":
        path.symlink_to("/nowhere/at/all")
    else:
        put(kind, path)


def grow(world: World, first: int, last: int) -> None:
    for number in range(first, last):
        assert world.post(("a", number, 10.0 + number), ("b", number, 20.0)).status_code == 200
        world.service.cycle()


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a daemon served for thirty bins."""
    folder = tmp_path_factory.mktemp("lived")
    world = World(folder).start()
    world.add_version("20260115T100001Z-0001")
    grow(world, 0, 30)
    world.client.post("/feed/data", json={"records": [{"timestamp": "x"}]})
    world.end()
    return folder


@pytest.fixture
def copy(lived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = shutil.copytree(lived, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(folder)
    yield folder


@pytest.mark.parametrize(("name", "kind"), GOES_ON)
def test_the_daemon_goes_on_and_names_what_it_cannot_read(
    copy: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = copy.glob(name) if "*" in name else [copy / name]
    misplace(kind, path)
    world = World(copy).start()
    try:
        grow(world, 30, 33)
        world.client.post("/feed/data", json={"records": [{"timestamp": "x"}]})
        assert world.get("/status")["status"] == "ready"
        assert world.get("/predictions/current")["predictions"]["a"]["current"]["cpu_pct"] == 42.0
    finally:
        world.end()
    assert not [record for record in caplog.records if record.exc_info], "a traceback"
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    if (name, kind) not in MADE_ANEW | SKIPPED:
        assert any(path.name in text for text in told), told


@pytest.mark.parametrize(("name", "kind"), ENDS)
def test_without_its_folder_the_daemon_ends_and_says_what_belongs_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    misplace(kind, tmp_path / name)
    flags = ("--port", str(free_port()), "--data-buffer-dir", "data")
    assert tft_inference_daemon.main(flags) == ExitCode.CANNOT_START
    said = capsys.readouterr().err
    belongs = "a plain file" if name.endswith(".lock") else "a folder"
    assert f"{name} is {NAMES.get(kind, f'a {kind}')}, and {belongs} belongs there" in said
    assert "move it away" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", [ALERTS_FILE, SILENCES_FILE])
def test_an_alert_is_sent_whatever_stands_in_the_place_of_its_files(
    tmp_path: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    misplace(kind, tmp_path / name)
    with Told() as told, Sink() as sink:
        told.answers["/status"] = CALM
        own = Installation(tmp_path, told.url, slack_url=sink.url)
        own.check(0.2)
        assert len(sink.bodies()) == 1
        own.restart()
        own.check(0.2)
        assert sink.bodies() == [], "what was told is kept"
    assert not [record for record in caplog.records if record.exc_info], "a traceback"
    if kind != "dangling" and (name, kind) not in SKIPPED:
        assert any(name in record.getMessage() for record in caplog.records)


def test_settings_that_a_link_leads_to_no_more_are_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load_settings(environ={})
    misplace("dangling", tmp_path / "fleetcast.toml")
    with pytest.raises(SettingsError, match=r"fleetcast\.toml is a link that leads nowhere"):
        load_settings(environ={})
