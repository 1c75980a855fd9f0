"""The lines of docs/formats.md for readers that are not ours, run as printed."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from buffer_rows import batch

from data_buffer import DataBuffer
from fleetcast.clock import FakeClock, to_ms

DOCS = Path(__file__).parents[1] / "docs" / "formats.md"
FILES, *READERS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
NOW = datetime(2026, 1, 15, 12, tzinfo=UTC)


@pytest.mark.parametrize("lines", READERS, ids=["polars", "duckdb", "pyarrow"])
def test_a_metric_that_came_later_is_read_with_all_rows(
    lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(lines.split()[1].strip(","))  # polars and duckdb are not among the requirements
    monkeypatch.chdir(tmp_path)
    buffer = DataBuffer("data_buffer", clock=FakeClock(NOW))
    for age_h, row in (
        (48, {"cpu_pct": 0.0}),
        (2, {"cpu_pct": 1.0}),
        (1, {"gpu_pct": 2.0}),
        (0, {"cpu_pct": 3.0}),
    ):
        buffer.append_batch(batch([("a", to_ms(NOW - timedelta(hours=age_h)), row)]))
        buffer.flush()
    buffer.close()
    names: dict[str, object] = {}
    exec(FILES + lines, names)
    frame = names["frame"]
    columns = getattr(frame, "column_names", None) or frame.columns  # type: ignore[attr-defined]
    assert len(frame) == 4  # type: ignore[arg-type]
    assert set(columns) == {"timestamp", "server_name", "cpu_pct", "gpu_pct"}
