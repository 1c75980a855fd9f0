"""A whole state folder of revision 1815b79, whose daemons were killed, is taken over by today's code.

`tests/data/state_1815b79.tar.xz` was written by the programs of that revision: two servers for 53 h
through the inference daemon (`benchmarks/faults/parts/feed.py`), one training through the retraining
daemon, its version in service, 144 forecasts open, then kill -9. It is never made again.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import InferenceDaemon, Program, wait_for

from benchmarks.faults.parts.feed import Fleet, Tally, count_records, stored
from fleetcast.files import read_json
from fleetcast.loop import Stop
from fleetcast.sources.client import RecordSender

pytestmark = pytest.mark.slow

STATE = Path(__file__).parents[1] / "data" / "state_1815b79.tar.xz"
N_STEPS = 3229  # minutes that were acknowledged before the kill
VERSION = "20261123T222833Z-faff"
SETTLED, OPEN = 132, 144


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return Fleet(n_servers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("upgraded")
    with tarfile.open(STATE) as archive:
        archive.extractall(place, filter="data")
    return place


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[InferenceDaemon]:
    with InferenceDaemon(folder, "--clock", "data") as running:
        yield running


def test_every_record_is_there_the_unsealed_log_included(daemon: InferenceDaemon) -> None:
    assert daemon.status()["buffer"]["total_records"] == 2 * N_STEPS


def test_open_forecasts_are_known_and_settle_when_their_time_comes(
    daemon: InferenceDaemon, fleet: Fleet, folder: Path
) -> None:
    assert daemon.status()["ledger"]["open"] == OPEN

    sender = RecordSender(daemon.client, Stop())
    for step in range(N_STEPS, N_STEPS + 11):  # two bins close
        sender.send(fleet.records(step))
    wait_for("the sweeps", lambda: daemon.status()["backlog"] == 0)
    wait_for("settled ones", lambda: daemon.status()["ledger"]["settled"] > SETTLED)

    assert daemon.status()["last_errors"] == []


def test_the_older_version_forecasts(daemon: InferenceDaemon, fleet: Fleet) -> None:
    answer = daemon.client.get("/predictions/current")

    assert answer["model"]["version"] == VERSION
    assert {item["source"] for item in answer["predictions"].values()} == {"model"}
    assert set(answer["predictions"]) == set(fleet.names)


def test_the_retraining_daemon_takes_its_state_over(daemon: InferenceDaemon, folder: Path) -> None:
    before = read_json(folder / "retraining_state.json")
    once = Program(
        "adaptive_retraining_daemon.py", folder, "--clock", "data", "--once", "--daemon-url", daemon.url
    )

    assert once.run() == 0, once.output
    after = read_json(folder / "retraining_state.json")
    assert after["attempts"] == before["attempts"]
    assert "Traceback" not in once.output
    assert "set aside" not in once.output


def test_after_a_clean_stop_nothing_is_lost_or_doubled(
    daemon: InferenceDaemon, fleet: Fleet, folder: Path
) -> None:
    assert daemon.stop() == 0, daemon.output

    tally = Tally()
    count_records(folder, fleet, N_STEPS + 11, tally)
    assert tally.is_clean, tally
    settled = stored(folder, "predictions")
    assert len(settled) > SETTLED
    assert not settled.duplicated(["origin", "horizon", "server_name", "metric"]).any()
