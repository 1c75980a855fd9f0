"""Real records with holes, through the real daemon: no server waits for ever, nothing is settled unsent."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.programs import InferenceDaemon, wait_for
from fleetcast.errors import ExitCode
from fleetcast.files import read_json
from fleetcast.sources import replay

pytestmark = pytest.mark.slow
SAMPLE = Path(__file__).parents[2] / "samples" / "smd_fleet.parquet"
START = datetime(2000, 1, 10, tzinfo=UTC)
GAP = (START + timedelta(hours=20), START + timedelta(hours=50))  # 30 hours without a record
AWAY = "smd-machine-2-1"
AWAY_TIME = (START + timedelta(hours=6), START + timedelta(hours=16))
BIN = pd.Timedelta("5min")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], pd.DataFrame]]:
    """Sixty hours with both holes, sent as fast as they are taken; the folder, the status, what was sent."""
    folder = tmp_path_factory.mktemp("gaps")
    # what is settled does not hang on who forecasts; the fallback is the quickest
    (folder / "fleetcast.toml").write_text('[paths]\nmodels_dir = "no_models"\n')
    sent = pd.read_parquet(SAMPLE, columns=["timestamp", "server_name", "cpu_r_norm01", "mem_u_norm01"])
    sent = sent[(sent.timestamp < START + timedelta(hours=60)) & (sent.timestamp.dt.minute % 5 == 2)]
    in_gap = sent.timestamp.between(*GAP, inclusive="left")
    is_away = (sent.server_name == AWAY) & sent.timestamp.between(*AWAY_TIME, inclusive="left")
    sent = sent[~in_gap & ~is_away]
    sent.to_parquet(folder / "holes.parquet")
    flags = [
        "--data",
        str(folder / "holes.parquet"),
        "--map",
        "cpu_pct=cpu_r_norm01*100",
        "mem_pct=mem_u_norm01*100",
    ]
    with InferenceDaemon(folder, "--clock", "data") as daemon:
        assert replay.main([*flags, "--url", daemon.url]) == ExitCode.OK
        wait_for("the last sweep", lambda: daemon.status()["backlog"] == 0)
        status = daemon.status()
        assert daemon.stop() == ExitCode.OK
    yield folder, status, sent


def settled(folder: Path) -> pd.DataFrame:
    parts = [pd.read_parquet(path) for path in sorted((folder / "data_buffer").glob("predictions_*"))]
    return pd.concat(parts, ignore_index=True)


Ran = tuple[Path, dict[str, Any], pd.DataFrame]


def test_no_bin_is_left_waiting_after_a_gap_of_30_hours(ran: Ran) -> None:
    _, status, sent = ran
    assert datetime.fromisoformat(status["newest_record_time"]) == sent.timestamp.max()
    assert status["backlog"] == 0
    assert status["bins"]["skipped"] == 0


def test_nothing_is_settled_that_was_not_sent(ran: Ran) -> None:
    folder, _, sent = ran
    rows = settled(folder)
    bins = set(zip(sent.server_name, sent.timestamp.dt.floor(BIN), strict=True))
    assert [key for key in zip(rows.server_name, rows.target, strict=True) if key not in bins] == []


def test_an_actual_is_the_mean_of_what_was_sent_in_its_bin(ran: Ran) -> None:
    folder, _, sent = ran
    rows = settled(folder)
    cpu = rows[(rows.metric == "cpu_pct") & (rows.horizon == 1)]
    means = (sent.cpu_r_norm01 * 100).groupby([sent.server_name, sent.timestamp.dt.floor(BIN)]).mean()
    expected = means.loc[list(zip(cpu.server_name, cpu.target, strict=True))].to_numpy()
    assert abs(cpu.actual.to_numpy() - expected).max() < 0.01  # percents are kept with two decimals


def test_every_forecast_is_settled_or_expired_and_none_twice(ran: Ran) -> None:
    folder, status, _ = ran
    ledger, rows = read_json(folder / "data_buffer" / "ledger.json"), settled(folder)
    waiting = sum(count for origin in ledger["waiting"].values() for count in origin.values())
    assert ledger["opened"] == ledger["settled"] + ledger["expired"] + waiting
    assert ledger["expired"] > 0, "what was forecast into the holes"
    assert status["ledger"]["due"] == status["ledger"]["settled"] + status["ledger"]["expired"]
    assert not rows.duplicated(["origin", "horizon", "server_name", "metric"]).any()
    assert len(rows) == ledger["settled"]


def test_a_server_that_returns_is_forecast_again(ran: Ran) -> None:
    folder, _, _ = ran
    rows = settled(folder)
    returned = rows[(rows.server_name == AWAY) & (rows.origin >= AWAY_TIME[1])]
    assert returned.target.min() <= pd.Timestamp(AWAY_TIME[1]) + 3 * BIN
    before_gap = returned[(returned.horizon == 1) & (returned.target < GAP[0])]
    assert len(before_gap) >= 2 * (4 * 12 - 3)


def test_no_forecast_is_made_in_the_name_of_a_bin_without_records(ran: Ran) -> None:
    folder, _, sent = ran
    origins = set(settled(folder).origin)
    assert origins <= set(sent.timestamp.dt.floor(BIN))
