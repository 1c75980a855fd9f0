"""Sealing in its child: one sorted file that reads back, or the day stays as it was."""

import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from buffer_rows import NOON_MS, day_folder, rows_of_frame, table

from fleetcast.schema import RecordBatch
from fleetcast.storage import parts, upkeep
from fleetcast.storage.days import Quarantine
from fleetcast.storage.parts import DICTIONARY, Encoding, OpenPart, PartName, encodings_by_trial, write_part
from fleetcast.storage.tables import METRICS, floats, nulls_for_nan, table_of_batch
from fleetcast.storage.upkeep import Sealed, SealProcess, seal
from fleetcast.storage.writer import DayWriter

DAY = date(2026, 1, 15)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def day(tmp_path: Path) -> Path:
    """A day of four parts, of different metrics, not in order of servers."""
    writer = DayWriter(tmp_path, METRICS, Quarantine(tmp_path / "quarantine"))
    for number, server in enumerate(("d", "a", "c", "b"), start=1):
        rows = [(server, NOON_MS + tick, {"load": float(tick), f"m{number}": 1.0}) for tick in range(50)]
        writer.add(DAY, table(*rows), number)
    return tmp_path


def test_a_sealed_day_holds_every_row_sorted_and_says_which_parts_it_is_made_of(day: Path) -> None:
    expected = rows_of_frame(pd.read_parquet(day_folder(day)))
    sealed = seal(day, "metrics", DAY, day / "sealed")
    assert (sealed.n_rows, sealed.rejects) == (200, ())
    assert sealed.parts == tuple(PartName(number, 50) for number in (1, 2, 3, 4))
    frame = pd.read_parquet(day / "sealed")
    assert rows_of_frame(frame) == expected
    assert frame.equals(frame.sort_values(["server_name", "timestamp"], ignore_index=True))
    assert OpenPart(day / "sealed", None, METRICS).number == 4


def test_a_sealed_day_is_compressed_and_checksummed(day: Path) -> None:
    seal(day, "metrics", DAY, day / "sealed")
    column = pq.ParquetFile(day / "sealed").metadata.row_group(0).column(2)
    assert column.compression == "ZSTD"
    data = bytearray((day / "sealed").read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    (day / "sealed").write_bytes(bytes(data))
    part = OpenPart(day / "sealed", None, METRICS)
    list(part.tables())
    assert part.n_damaged_groups == 1


def odd_day(n_servers: int = 4, n_rows: int = 1_500) -> pa.Table:
    """A day of columns for each of which another encoding is best, and of odd numbers."""
    rng = np.random.default_rng(5)
    size = n_servers * n_rows
    odd = np.array([-0.0, 0.0, 5e-324, -2.2e-308, np.inf, 1.5])
    columns = {
        "few": rng.integers(0, 50, size) * 1.001,
        "walk": (rng.normal(0, 3, size).cumsum() + 5_000).round(1),
        "raw": 1.0 + rng.random(size),
        "odd": odd[rng.integers(0, len(odd), size)],
        "same": np.full(size, 7.0),
    }
    names = [f"s{number}" for number in range(n_servers)]
    times = NOON_MS + np.tile(np.arange(n_rows) * 1_000, n_servers)
    codes = np.repeat(np.arange(n_servers, dtype=np.int32), n_rows)
    rows = table_of_batch(RecordBatch(names, codes, times, columns))
    gaps = nulls_for_nan(np.where(rng.random(size) < 0.3, np.nan, columns["few"]))
    return rows.append_column("sparse", gaps).append_column("zz_nan", pa.array(np.full(size, np.nan)))


def whole_form(monkeypatch: pytest.MonkeyPatch, path: Path, rows: pa.Table, form: str | None) -> Path:
    """Seal rows with one encoding for every column of numbers; None is by trial."""
    with monkeypatch.context() as patched:
        if form is not None:
            every = Encoding(form, 9)
            patched.setattr(
                parts,
                "encodings_by_trial",
                lambda table, schema: dict.fromkeys(table.column_names[2:], every),
            )
        write_part(path, iter([rows]), METRICS, rows.schema, 1, is_sealed=True)
    return path


FORMS = ("RLE_DICTIONARY", "PLAIN", "BYTE_STREAM_SPLIT")


def column_sizes(path: Path) -> dict[str, int]:
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(place) for place in range(group.num_columns)]
    return {column.path_in_schema: column.total_compressed_size for column in columns[2:]}


def test_each_column_is_sealed_in_the_encoding_that_makes_it_smallest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = odd_day()
    sizes = {form: column_sizes(whole_form(monkeypatch, tmp_path / form, rows, form)) for form in FORMS}
    best = {name: min(FORMS, key=lambda form: sizes[form][name]) for name in ("few", "walk", "raw")}
    assert list(best.values()) == list(FORMS), "the day has a column for each"
    tried = column_sizes(whole_form(monkeypatch, tmp_path / "tried", rows, None))
    for name, size in tried.items():
        assert size <= min(own[name] for own in sizes.values()), name


def test_a_dictionary_is_judged_by_all_rows_that_share_it() -> None:
    percents = np.random.default_rng(6).uniform(0, 100, 131_072).round(2)  # 10,001 values, 13 times each
    some = [pa.table({"busy": nulls_for_nan(percents[:n])}) for n in (8_192, 131_072)]
    chosen = [encodings_by_trial(table, table.schema)["busy"].form for table in some]
    assert chosen == ["PLAIN", "RLE_DICTIONARY"], "and not by a few of them"


def test_only_the_columns_that_gain_most_are_compressed_at_the_costly_level() -> None:
    rows = odd_day(n_rows=5_000)
    chosen = encodings_by_trial(rows, rows.schema)
    assert [name for name, own in chosen.items() if own.level > DICTIONARY.level] == ["walk"]
    wide = pa.concat_tables([rows] * 4)
    assert {own.level for own in encodings_by_trial(wide, rows.schema).values()} == {DICTIONARY.level}


@pytest.mark.parametrize("form", [*FORMS, None])
def test_whatever_the_encoding_pandas_reads_the_same_values_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str | None
) -> None:
    rows = odd_day()
    part = tmp_path / "part"
    write_part(part, iter([rows]), METRICS, rows.schema, 1)
    before = pd.read_parquet(part)
    after = pd.read_parquet(whole_form(monkeypatch, tmp_path / "sealed", rows, form))
    pd.testing.assert_frame_equal(before, after, check_exact=True)
    for name in rows.column_names[2:]:
        assert (before[name].to_numpy().view("u8") == after[name].to_numpy().view("u8")).all(), name
    own = np.concatenate(
        [floats(some.column("odd")) for some in OpenPart(tmp_path / "sealed", None, METRICS).tables()]
    )
    assert (own.view("u8") == floats(rows.column("odd")).view("u8")).all()


def test_large_days_are_sealed_in_row_groups_of_whole_servers(
    day: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_GROUP_ROWS", 120)
    seal(day, "metrics", DAY, day / "sealed")
    metadata = pq.ParquetFile(day / "sealed").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [100, 100]


def test_damaged_parts_are_named_and_cost_only_their_rows(day: Path) -> None:
    (day_folder(day) / PartName(2, 50).text).write_bytes(b"no parquet")
    sealed = seal(day, "metrics", DAY, day / "sealed")
    assert (sealed.n_rows, sealed.rejects) == (150, (PartName(2, 50).text,))
    assert len(sealed.parts) == 4, "the parent compares them with the folder"


def test_a_file_that_does_not_read_back_is_not_handed_over(
    day: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "write_part", lambda *args, **kwargs: 1 + write_part(*args, **kwargs))
    with pytest.raises(OSError, match="does not read back: wrote 201 rows, read 200"):
        seal(day, "metrics", DAY, day / "sealed")


def test_the_child_seals_and_answers(day: Path) -> None:
    process = SealProcess(day, "metrics", DAY, day / "sealed")
    deadline = time.monotonic() + 60
    while process.is_running and time.monotonic() < deadline:
        time.sleep(0.01)
    sealed = process.result()
    names = tuple(PartName(number, 50) for number in (1, 2, 3, 4))
    assert sealed == Sealed(day / "sealed", names, (), 200)
    assert len(pd.read_parquet(day / "sealed")) == 200


def test_a_child_that_fails_leaves_no_file(tmp_path: Path) -> None:
    process = SealProcess(tmp_path, "no such kind", DAY, tmp_path / "sealed")
    assert process.result() is None
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_is_stopped_leaves_no_file(day: Path) -> None:
    process = SealProcess(day, "metrics", DAY, day / "sealed")
    process.stop()
    assert process.is_running is False
    assert not (day / "sealed").exists()


def test_a_child_that_takes_too_long_is_killed(day: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = SealProcess(day, "metrics", DAY, day / "sealed")
    monkeypatch.setattr(upkeep, "TIMEOUT_S", -1.0)
    assert process.is_running in (True, False)
    assert process.result() is None
    assert not (day / "sealed").exists()


def test_a_child_without_its_owner_hands_nothing_over(day: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fleetcast.storage.upkeep",
        str(day),
        "metrics",
        "2026-01-15",
        str(day / "sealed"),
    ]
    done = subprocess.run([*command, "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert not (day / "sealed").exists()
