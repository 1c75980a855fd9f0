"""The fleet of the demo: the bundled sample, with another machine's real days spliced into three servers.

Owns: which servers change, when, and what they send from then on. Nothing is simulated: from the
change on they send what machine 1-5 sent, at the same time of day (samples/README.md).
"""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fleetcast.program import shipped_folder

SAMPLE = "smd_fleet.parquet"
MAPS = ("cpu_pct=cpu_r_norm01*100", "mem_pct=mem_u_norm01*100", "disk_write_pct=disk_wb_norm01*100")
START = datetime(2000, 1, 10, tzinfo=UTC)
CHANGE = datetime(2000, 1, 15, 9, tzinfo=UTC)
END = datetime(2000, 1, 16, 18, tzinfo=UTC)  # of what the closing table tells
# then a model that is still to come into service does, and a bad one is put in by hand: what it needs to be
# found, and what comes after it
PUT_IN = datetime(2000, 1, 16, 18, 30, tzinfo=UTC)
TAKEN_BACK_BY = datetime(2000, 1, 16, 22, 30, tzinfo=UTC)
FINISH = datetime(2000, 1, 17, tzinfo=UTC)
DONOR = "smd-machine-1-5"
# server -> the day of the donor that it continues with; the time of day is kept
SPLICED = {
    "smd-machine-1-3": datetime(2000, 1, 21, 9, tzinfo=UTC),
    "smd-machine-1-7": datetime(2000, 1, 24, 9, tzinfo=UTC),
    "smd-machine-2-8": datetime(2000, 1, 27, 9, tzinfo=UTC),
}


def write_feed(path: Path) -> None:
    """Write what the fleet sends until END, ready for a replay, and the three parts after it beside it."""
    table = _fleet()
    bounds = (START, END, PUT_IN, TAKEN_BACK_BY, FINISH)
    for number, (first, last) in enumerate(pairwise(bounds)):
        times = table["timestamp"]
        is_own = pc.and_(pc.greater_equal(times, _moment(table, first)), pc.less(times, _moment(table, last)))
        pq.write_table(table.filter(is_own), part(path, number))


def part(path: Path, number: int) -> Path:
    """Return where a part of the feed stands, the first one at `path` itself."""
    return path.with_stem(f"{path.stem}_{number}") if number else path


def _fleet() -> pa.Table:
    table = pq.read_table(shipped_folder("samples") / SAMPLE)
    is_donor = pc.equal(table["server_name"], DONOR)
    donor, fleet = table.filter(is_donor), table.filter(pc.invert(is_donor))
    spliced = pc.is_in(fleet["server_name"], pa.array(list(SPLICED)))
    goes_on = pc.or_(pc.invert(spliced), pc.less(fleet["timestamp"], _moment(fleet, CHANGE)))
    kept = fleet.filter(pc.and_(goes_on, pc.less(fleet["timestamp"], _moment(fleet, FINISH))))
    moved = [_move(donor, server, since) for server, since in SPLICED.items()]
    return pa.concat_tables([kept, *(rows.cast(kept.schema) for rows in moved)])


def _move(donor: pa.Table, server: str, since: datetime) -> pa.Table:
    """Return the donor's rows from `since` on as if `server` had sent them from CHANGE on."""
    times = donor["timestamp"]
    inside = pc.and_(
        pc.greater_equal(times, _moment(donor, since)),
        pc.less(times, _moment(donor, since + (FINISH - CHANGE))),
    )
    rows = donor.filter(inside)
    shift = pa.scalar(CHANGE - since, pa.duration("ms"))
    rows = rows.set_column(0, "timestamp", pc.add(rows["timestamp"], shift))
    return rows.set_column(1, "server_name", pa.array([server] * len(rows)))


def _moment(table: pa.Table, moment: datetime) -> pa.Scalar:
    return pa.scalar(moment, table["timestamp"].type)


def hours(first: datetime, last: datetime) -> float:
    """Return the hours between two times."""
    return (last - first) / timedelta(hours=1)
