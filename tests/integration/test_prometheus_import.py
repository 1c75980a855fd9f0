"""Two days out of Debian's real Prometheus, backfilled by its own promtool, into the real daemon, twice."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ingest.parts.recorded_prometheus import Scrapes, backfill, missing_programs, serve
from benchmarks.programs import InferenceDaemon
from data_buffer import DataBuffer
from fleetcast.clock import SystemClock

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEP_S = 300


@pytest.fixture(autouse=True)
def real_programs() -> None:
    missing = missing_programs()
    if missing and os.environ.get("CI"):
        pytest.fail(f"{missing} not installed; .ci/run does it")
    if missing:
        pytest.skip(f"{missing} not installed")


def test_what_prometheus_scraped_is_in_the_buffer_as_bins_and_once(tmp_path: Path) -> None:
    end_s = int(SystemClock().now().timestamp()) // STEP_S * STEP_S
    scrapes = Scrapes(4, end_s - 2 * 86_400, end_s)
    blocks, state = tmp_path / "blocks", tmp_path / "daemon"
    blocks.mkdir()
    state.mkdir()
    backfill(blocks, scrapes)
    with serve(blocks) as (url, _), InferenceDaemon(state) as daemon:
        words = ["prometheus", "--url", url, "--days", "3", "--match", '{job="node"}', "--anew"]
        command = [sys.executable, "-m", "fleetcast", "import", *words, "--daemon-url", daemon.url]
        for _ in range(2):
            environ = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, cwd=state, env=environ, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        frame = DataBuffer(state / "data_buffer").get_training_window(days=4, include_today=True)
    assert len(frame) == len(frame.drop_duplicates(["server_name", "timestamp"]))
    for number, name in enumerate(scrapes.names()):
        rows = frame[frame.server_name == name].set_index("timestamp").sort_index()
        assert len(rows) in (576, 577)  # 577: the very first scrape ends a step of its own
        # before its second bin there was no counter to make a rate of; its last has no scrape on its end
        whole = rows.iloc[-575:-1]
        middles = whole.index.as_unit("s").astype("int64").to_numpy()
        # a scrape on the edge of two steps counts in both before Prometheus 3
        ends = middles + STEP_S // 2
        busy = np.mean([scrapes.busy(number, ends - 60 * back) for back in range(5)], axis=0)
        assert whole.mem_pct.to_numpy() == pytest.approx(100 * busy, abs=0.04)
        assert whole.load_average.to_numpy() == pytest.approx(2 * busy, abs=0.002)
        assert whole.cpu_pct.to_numpy() == pytest.approx(100 * scrapes.busy(number, middles), abs=0.1)
        assert whole.disk_io_mb_s.to_numpy() == pytest.approx(2.0 + 0.1 * (number + 1), rel=1e-3)
        assert whole.net_in_mb_s.to_numpy() == pytest.approx(5.0, rel=1e-3)
        assert whole.disk_usage_pct.is_monotonic_increasing
