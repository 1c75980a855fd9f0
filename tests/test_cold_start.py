"""What a start imports: each library that it does not need would keep a check, or the first post, waiting."""

from pathlib import Path

import pyarrow as pa
import pytest
from house import ROOT
from small_fleet import SmallFleet
from test_architecture import loaded_after

HEAVY = {"pandas", "scipy", "sklearn", "torch", "lightning", "matplotlib", "fastapi", "pydantic"}
SERVER = {"uvicorn", "starlette", "google"}
AWAY = "http://127.0.0.1:9"  # nothing listens there
ONCE = f"from adaptive_retraining_daemon import main\nassert main(['--once', '--daemon-url', '{AWAY}']) == 0"
REPORT = "from drift_monitor import main\nassert main([]) == 0"
NO_FOLDER = "from drift_monitor import main\nassert main([]) == 6"
FIRST_POST = """
import http.client, json
from dataclasses import replace
from tft_inference_daemon import InferenceDaemon
from fleetcast.clock import SystemClock, iso_z
from fleetcast.inference import InferenceService
from fleetcast.settings import ServerSettings, Settings

class Taken(Exception): ...

def post(service):
    record = {"timestamp": iso_z(SystemClock().now()), "server_name": "web-01", "cpu_pct": 1.0}
    link = http.client.HTTPConnection(service._listener.url.removeprefix("http://"), timeout=30)
    link.request("POST", "/feed/data", json.dumps({"records": [record]}))
    answer = json.loads(link.getresponse().read())
    assert answer["records_received"] == 1, answer
    raise Taken

InferenceService._open_routes = post
service = InferenceDaemon(replace(Settings(), server=ServerSettings(port=0)), "")._build_service()
try:
    service.start()
except Taken:
    service.close()
else:
    raise AssertionError("the other routes were not opened")
"""


FORECAST = f"""
from pathlib import Path
import numpy as np
from fleetcast.forecast.predictor import Forecaster, set_threads
from fleetcast.schema import HistoryWindow
set_threads(1)
model = Forecaster.load(Path({str(ROOT / "models" / "last.ckpt")!r}))
values = np.full((1, 1, 600), 50, np.float32)
bin_ms = model.description.grid.bin_ms
answer = model.predict(HistoryWindow(("a",), ("cpu_pct",), values, 600 * bin_ms, bin_ms))
assert np.isfinite(answer).all()
"""


def test_a_forecast_needs_no_torch(tmp_path: Path) -> None:
    loaded = loaded_after(FORECAST, tmp_path)
    assert loaded.isdisjoint({"torch", "lightning", "pytorch_forecasting", "scipy", "sklearn", "pandas"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fleet = SmallFleet(tmp_path)
    fleet.buffer.open()
    fleet.grow(700)
    fleet.serve()
    fleet.grow(120)
    fleet.buffer.close()
    return tmp_path


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [(ONCE, HEAVY | SERVER | {"smtplib"}), (REPORT, HEAVY | SERVER | {"smtplib", "requests", "psutil"})],
    ids=["once", "report"],
)
def test_a_check_imports_neither_a_network_nor_a_web_framework(
    code: str, unwanted: set[str], folder: Path
) -> None:
    assert loaded_after(code, folder) & unwanted == set()


def test_a_report_on_no_buffer_does_without_pyarrow(tmp_path: Path) -> None:
    assert loaded_after(NO_FOLDER, tmp_path) & (HEAVY | SERVER | {"pyarrow", "requests"}) == set()


def test_the_first_post_is_taken_before_anything_else_is_imported(tmp_path: Path) -> None:
    assert loaded_after(FIRST_POST, tmp_path) & (HEAVY | {"requests", "psutil", "smtplib"}) == set()


def test_an_arrow_body_is_read_without_pandas(tmp_path: Path) -> None:
    names = pa.array(["web-01", None, "w" * 600])
    times = pa.array([1, None, 3], pa.timestamp("ms", "UTC"))
    columns = {"timestamp": times, "server_name": names, "cpu_pct": pa.array([1.0, None, float("nan")])}
    columns |= {"text": names.dictionary_encode(), "seen": names.cast(pa.string_view()), "no": pa.nulls(3)}
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "body").write_bytes(sink.getvalue())
    code = (
        "from pathlib import Path\nfrom fleetcast.ingest.arrow import read_columns\n"
        "assert len(read_columns(Path('body').read_bytes())) == 6"
    )
    assert loaded_after(code, tmp_path) & HEAVY == set()
