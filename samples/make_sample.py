"""Cut samples/smd_fleet.parquet out of the Server Machine Dataset in long form.

Owns: which machines, days and columns are in the sample. Not run by anything: it documents
how the file was made. Run: `python samples/make_sample.py LONG_FORM.parquet`
(columns `timestamp`, `server_name`, metrics scaled to 0..1 by the data set's authors).
"""

import argparse
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FLEET = ("1-2", "1-3", "1-6", "1-7", "1-8", "2-1", "2-7", "2-8")
FLEET_START = datetime(2000, 1, 10, tzinfo=UTC)
FLEET_DAYS = 7
DONOR = "1-5"  # the machine whose disk writes alternate every five minutes
DONOR_START = datetime(2000, 1, 21, tzinfo=UTC)
DONOR_DAYS = 9
COLUMNS = (
    "cpu_r_norm01",
    "load_1_norm01",
    "mem_u_norm01",
    "disk_rb_norm01",
    "disk_wb_norm01",
    "disk_svc_norm01",
    "eth1_fi_norm01",
    "eth1_fo_norm01",
)


def stretch(table: pa.Table, machines: tuple[str, ...], start: datetime, days: int) -> pa.Table:
    """Return the rows of `machines` in [start, start + days)."""
    names = pa.array([f"smd-machine-{machine}" for machine in machines])
    inside = pc.and_(
        pc.greater_equal(table["timestamp"], pa.scalar(start, table["timestamp"].type)),
        pc.less(table["timestamp"], pa.scalar(start + timedelta(days=days), table["timestamp"].type)),
    )
    return table.filter(pc.and_(inside, pc.is_in(pc.cast(table["server_name"], "string"), names)))


def main() -> None:
    """Write the sample beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    table = pq.read_table(parser.parse_args().data, columns=["timestamp", "server_name", *COLUMNS])
    sample = pa.concat_tables(
        [
            stretch(table, FLEET, FLEET_START, FLEET_DAYS),
            stretch(table, (DONOR,), DONOR_START, DONOR_DAYS),
        ]
    ).sort_by([("server_name", "ascending"), ("timestamp", "ascending")])
    sample = sample.replace_schema_metadata(None)
    target = Path(__file__).with_name("smd_fleet.parquet")
    pq.write_table(sample, target, compression="zstd", compression_level=19, write_page_checksum=True)


if __name__ == "__main__":
    main()
