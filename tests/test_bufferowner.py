"""The owner of a folder: any order of appends, flushes, sealings and restarts leaves one row per key."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from buffer_rows import DAY_MS, NOON_MS, Key, Values, batch, rows_of, rows_of_frame
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from test_daystore import SealHere

from fleetcast.clock import from_ms
from fleetcast.errors import AlreadyRunning, StorageBroken
from fleetcast.locks import is_locked
from fleetcast.storage import upkeep
from fleetcast.storage.bin_days import make_bins, sealed_file
from fleetcast.storage.days import day_path, list_days
from fleetcast.storage.store import LOCK_NAME, DataBuffer
from fleetcast.storage.tables import BINS, METRICS
from fleetcast.storage.upkeep import UpkeepPace

LATER = datetime(2027, 1, 1, tzinfo=UTC)
BIN_MS = 2

rows = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "ä"]),
        st.integers(0, 2).flatmap(
            lambda day: st.integers(0, 4).map(lambda tick: NOON_MS + day * DAY_MS + tick)
        ),
        st.dictionaries(st.sampled_from(["x", "y", "z"]), st.integers(0, 9).map(float), max_size=2),
    ),
    min_size=1,
    max_size=8,
)


def means(rows: dict[Key, Values]) -> dict[Key, Values]:
    """Return the means of bins, of values whose sums are exact."""
    by_bin: dict[Key, dict[str, list[float]]] = {}
    for (server, time), values in rows.items():
        found = by_bin.setdefault((server, time // BIN_MS * BIN_MS), {})
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {
        key: {name: sum(some) / len(some) for name, some in found.items()} for key, found in by_bin.items()
    }


class BufferLife(RuleBasedStateMachine):
    """A buffer beside a plain dictionary that says what it must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.folder = Path(self.place.name)
        self.expected: dict[Key, Values] = {}
        self._child, upkeep.SealProcess = upkeep.SealProcess, SealHere  # type: ignore[misc, assignment]
        self.owner = self.open()

    def open(self) -> DataBuffer:
        pace = UpkeepPace(compact_parts=3, seal_quiet_s=1e9)
        return DataBuffer(self.folder, expire=False, pace=pace).open()

    @rule(some=rows)
    def append(self, some: list[tuple[str, int, Values]]) -> None:
        self.owner.append_batch(batch(some))
        for server, time, values in some:
            self.expected.setdefault((server, time), {}).update(values)

    @rule()
    def flush(self) -> None:
        self.owner.flush()

    @rule()
    def compact(self) -> None:
        self.owner.maintain(LATER)

    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        """Seal a day as the child does, and put it in place as its parent does."""
        self.owner.flush()
        writer = self.owner._own().metrics._writer
        days = [day for day in list_days(self.folder, METRICS) if writer.path(day).is_dir()]
        if days:
            day = data.draw(st.sampled_from(days))
            sealed = upkeep.seal(self.folder, "metrics", day, self.folder / ".sealed")
            writer.put_sealed(day, sealed.path, sealed.rejects)

    @rule(server=st.sampled_from(["a", "b", "ä"]), day=st.integers(0, 2))
    def forget(self, server: str, day: int) -> None:
        """Forget what a server sent before some time, as far as days are sealed, and rewrite open ones."""
        before = NOON_MS + day * DAY_MS + 2
        while not self.owner.forget({server: before}, from_ms(before + 2 * DAY_MS)):
            pass
        self.expected = {
            (name, at): values
            for (name, at), values in self.expected.items()
            if name != server or at >= before
        }
        for path in self.folder.glob("*bins_*"):
            means = pd.read_parquet(path)
            assert not ((means.server_name == server) & (means.timestamp < from_ms(before - BIN_MS))).any()

    @rule(data=st.data())
    def take_means(self, data: st.DataObject) -> None:
        """Put means of bins beside any sealed day, as the child and its parent do."""
        days = [day for day in list_days(self.folder, METRICS) if sealed_file(self.folder, day)]
        if days:
            day = data.draw(st.sampled_from(days))
            make_bins(self.folder, day, BIN_MS, self.folder / ".means")
            (self.folder / ".means").replace(day_path(self.folder, BINS, day))

    @rule()
    def restart(self) -> None:
        self.owner.close()
        self.owner = self.open()

    @rule()
    def die(self) -> None:
        self.owner._own().lock.release()  # as the kernel does for a killed process
        self.owner = self.open()

    @invariant()
    def holds_one_row_per_key_with_the_last_values(self) -> None:
        reader = DataBuffer(self.folder)
        assert rows_of(reader.iter_batches(0, 2**45)) == self.expected
        assert rows_of(reader.iter_bins(0, 2**45, BIN_MS)) == means(self.expected)
        stats = reader.get_stats()
        assert stats["total_records"] == len(self.expected)
        newest = max((time for _, time in self.expected), default=None)
        expected = None if newest is None else from_ms(newest)
        assert self.owner.newest_record_time() == reader.newest_record_time() == expected

    def teardown(self) -> None:
        self.owner.flush()
        found: dict[Key, Values] = {}
        for path in self.folder.glob("metrics_*.parquet"):
            found |= rows_of_frame(pd.read_parquet(path))
        assert found == self.expected
        self.owner.close()
        upkeep.SealProcess = self._child  # type: ignore[misc]
        self.place.cleanup()


BufferLife.TestCase.settings = settings(
    max_examples=25, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_any_life_of_a_buffer = BufferLife.TestCase


def test_ownership_lasts_from_construction_to_close(tmp_path: Path) -> None:
    owner = DataBuffer(tmp_path / "b", expire=True).open()
    assert is_locked(tmp_path / "b" / LOCK_NAME)
    with pytest.raises(AlreadyRunning):
        DataBuffer(tmp_path / "b", expire=True).open()
    owner.close()
    assert not is_locked(tmp_path / "b" / LOCK_NAME)


def test_an_owner_that_cannot_start_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file where the folder should be")
    with pytest.raises(StorageBroken):
        DataBuffer(tmp_path, expire=True).open()
    assert not is_locked(tmp_path / LOCK_NAME)


def test_a_close_that_fails_for_one_kind_still_closes_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = DataBuffer(tmp_path, expire=True).open()
    closed: list[str] = []

    def failing() -> None:
        raise StorageBroken("cannot flush")

    monkeypatch.setattr(owner._own().predictions, "close", failing)
    real = owner._own().metrics.close
    monkeypatch.setattr(owner._own().metrics, "close", lambda *_: (closed.append("metrics"), real())[0])
    with pytest.raises(StorageBroken):
        owner.close()
    assert closed == ["metrics"]
    assert not is_locked(tmp_path / LOCK_NAME)


def test_the_newest_time_survives_a_restart(tmp_path: Path) -> None:
    owner = DataBuffer(tmp_path, expire=False).open()
    assert owner.newest_record_time() is None
    owner.append_batch(batch([("a", NOON_MS, {}), ("a", NOON_MS - 5, {})]))
    owner.close()
    again: Any = DataBuffer(tmp_path, expire=False).open()
    assert again.newest_record_time() == from_ms(NOON_MS)
    again.close()
