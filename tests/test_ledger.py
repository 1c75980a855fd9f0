"""The forecasts' account: exact counts, exact rows, whatever is killed when."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcast import files
from fleetcast.errors import CorruptFile, StorageFull
from fleetcast.schema import ClosedBin, FleetForecast, SettledForecasts
from fleetcast.serving.ledger import (
    Ledger,
    LedgerCounts,
    cut_to_horizons,
    match_actuals,
    read_origin,
    write_origin,
)

BIN = 300_000
T0 = 1_768_471_200_000
HORIZONS = (1, 3)


def bin_ms(number: int) -> int:
    return T0 + number * BIN


def forecast(origin: int, servers: tuple[str, ...] = ("a", "b"), version: str | None = "v1") -> FleetForecast:
    """A forecast whose p50 at horizon h is 100 * origin + h, for cpu_pct only."""
    quantiles = np.full((len(servers), 2, 4, 3), np.nan, dtype=np.float32)
    quantiles[:, 0] = (100 * origin + np.arange(1, 5))[:, None] + np.array([-1, 0, 1])
    sources = np.zeros((len(servers), 2), dtype=bool)
    sources[0, 0] = version is not None  # server a by the model, the others by the fallback
    return FleetForecast(bin_ms(origin), BIN, servers, ("cpu_pct", "mem_pct"), quantiles, sources, version)


def closed(number: int, **actuals: float) -> ClosedBin:
    values = np.array([[actual, 50.0] for actual in actuals.values()], dtype=np.float32).reshape(-1, 2)
    return ClosedBin(bin_ms(number), tuple(actuals), ("cpu_pct", "mem_pct"), values)


def rows_of(settled: SettledForecasts) -> list[tuple[object, ...]]:
    columns = (
        (settled.origin_ms - T0) // BIN, (settled.target_ms - T0) // BIN, settled.horizon,
        settled.server_name, settled.metric, settled.p50, settled.actual, settled.model_version,
    )  # fmt: skip
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


@pytest.fixture
def reopened(tmp_path: Path) -> Callable[[], Ledger]:
    return lambda: Ledger(tmp_path, HORIZONS, BIN)


def settle(ledger: Ledger, bin_: ClosedBin, *, is_final: bool = True) -> SettledForecasts:
    """Settle a bin; where it is final, no later row can correct it or an older one."""
    done = ledger.settle(bin_)
    ledger.mark_settled(done, bin_.bin_ms + 1 if is_final else 0)
    return done.rows


def test_only_settle_horizons_of_series_with_a_forecast_are_opened(reopened: Callable[[], Ledger]) -> None:
    ledger = reopened()
    assert ledger.open(forecast(0)) == 4
    assert ledger.counts() == LedgerCounts(opened=4, due=0, settled=0, expired=0, open=4)


def test_a_settled_row_pairs_the_forecast_with_its_actual(reopened: Callable[[], Ledger]) -> None:
    ledger = reopened()
    ledger.open(forecast(0))
    ledger.open(forecast(2))
    rows = settle(ledger, closed(3, a=7.0, b=8.0))
    assert rows_of(rows) == [
        (0, 3, 3, "a", "cpu_pct", 3.0, 7.0, "v1"),
        (0, 3, 3, "b", "cpu_pct", 3.0, 8.0, None),
        (2, 3, 1, "a", "cpu_pct", 201.0, 7.0, "v1"),
        (2, 3, 1, "b", "cpu_pct", 201.0, 8.0, None),
    ]
    assert (rows.p10.tolist()[0], rows.p90.tolist()[0]) == (2.0, 4.0)


def test_a_server_without_an_actual_expires(reopened: Callable[[], Ledger]) -> None:
    ledger = reopened()
    ledger.open(forecast(0))
    assert len(settle(ledger, closed(1, a=5.0))) == 1
    assert ledger.counts() == LedgerCounts(opened=4, due=2, settled=1, expired=1, open=2)


def test_bins_jumped_over_in_a_gap_expire_and_are_never_settled_falsely(
    reopened: Callable[[], Ledger],
) -> None:
    ledger = reopened()
    ledger.open(forecast(0))
    assert len(settle(ledger, closed(360, a=5.0, b=5.0))) == 0
    assert ledger.counts() == LedgerCounts(opened=4, due=4, settled=0, expired=4, open=0)


def test_a_forecast_is_settled_once_only(reopened: Callable[[], Ledger]) -> None:
    ledger = reopened()
    ledger.open(forecast(0))
    settle(ledger, closed(1, a=5.0, b=5.0))
    assert len(settle(ledger, closed(1, a=5.0, b=5.0))) == 0
    assert ledger.counts().settled == 2


def test_a_bin_that_is_not_final_is_settled_again_and_counted_once(
    reopened: Callable[[], Ledger], tmp_path: Path
) -> None:
    ledger = reopened()
    ledger.open(forecast(0))
    # Given a bin settled without server b, which may still send
    assert len(settle(ledger, closed(1, a=5.0), is_final=False)) == 1
    assert ledger.counts() == LedgerCounts(opened=4, due=1, settled=1, expired=0, open=3)
    # When rows of b arrive, and others change the mean of a; a kill comes before the account is written
    again = ledger.settle(closed(1, a=6.0, b=7.0))
    ledger = reopened()
    assert rows_of(settle(ledger, closed(1, a=6.0, b=7.0), is_final=False)) == rows_of(again.rows)
    # Then each forecast counts once, with its newest actual
    assert [row[6] for row in rows_of(again.rows)] == [6.0, 7.0]
    assert ledger.counts() == LedgerCounts(opened=4, due=2, settled=2, expired=0, open=2)
    # and the origin's file goes when the last of its bins is final
    settle(ledger, closed(3, a=1.0), is_final=True)
    assert ledger.counts() == LedgerCounts(opened=4, due=4, settled=3, expired=1, open=0)
    assert not list((tmp_path / "open_forecasts").iterdir())


def test_a_bin_nobody_forecast_costs_no_write(reopened: Callable[[], Ledger], tmp_path: Path) -> None:
    ledger = reopened()
    before = (tmp_path / "ledger.json").stat()
    settle(ledger, closed(1, a=5.0))
    assert ledger.settled_through_ms == bin_ms(1)
    assert (tmp_path / "ledger.json").stat() == before


def test_a_repeated_sweep_opens_nothing_twice(reopened: Callable[[], Ledger]) -> None:
    reopened().open(forecast(0))
    ledger = reopened()
    assert ledger.open(forecast(0)) == 0
    assert ledger.counts().opened == 4


def test_forecasts_of_a_silent_fleet_expire_by_the_clock(reopened: Callable[[], Ledger]) -> None:
    ledger = reopened()
    ledger.open(forecast(0))
    assert ledger.expire(bin_ms(1)) == 0
    assert ledger.expire(bin_ms(2)) == 2
    assert ledger.counts() == LedgerCounts(opened=4, due=2, settled=0, expired=2, open=2)
    assert reopened().counts() == ledger.counts()


def test_an_origin_file_goes_when_its_last_horizon_is_done(
    reopened: Callable[[], Ledger], tmp_path: Path
) -> None:
    ledger = reopened()
    ledger.open(forecast(0))
    settle(ledger, closed(1, a=1.0))
    assert [path.name for path in (tmp_path / "open_forecasts").iterdir()] == [f"{T0}.npz"]
    settle(ledger, closed(3, a=1.0))
    assert not list((tmp_path / "open_forecasts").iterdir())


@pytest.mark.parametrize("step", ["opened", "settled but not marked", "marked"])
def test_a_kill_at_any_step_keeps_the_account_exact(reopened: Callable[[], Ledger], step: str) -> None:
    ledger = reopened()
    ledger.open(forecast(0))
    done = ledger.settle(closed(1, a=5.0, b=6.0))
    first = rows_of(done.rows) if step != "opened" else []
    if step == "marked":
        ledger.mark_settled(done, bin_ms(2))
    ledger = reopened()  # nothing of the killed process but its files
    again = rows_of(settle(ledger, closed(1, a=5.0, b=6.0)))
    assert again == ([] if step == "marked" else [(0, 1, 1, "a", "cpu_pct", 1.0, 5.0, "v1"),
                                                  (0, 1, 1, "b", "cpu_pct", 1.0, 6.0, None)])  # fmt: skip
    assert not first or not again or first == again
    assert ledger.counts() == LedgerCounts(opened=4, due=2, settled=2, expired=0, open=2)


def test_a_kill_between_account_and_unlink_leaves_no_ghost(
    reopened: Callable[[], Ledger], tmp_path: Path
) -> None:
    ledger = reopened()
    ledger.open(forecast(0))
    origin = tmp_path / "open_forecasts" / f"{T0}.npz"
    content = origin.read_bytes()
    settle(ledger, closed(1, a=1.0, b=1.0))
    settle(ledger, closed(3, a=1.0, b=1.0))
    origin.write_bytes(content)
    ledger = reopened()
    assert ledger.counts() == LedgerCounts(opened=4, due=4, settled=4, expired=0, open=0)
    assert not origin.exists()


def test_a_full_disk_opens_nothing_and_settles_later(
    reopened: Callable[[], Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = reopened()
    ledger.open(forecast(0))
    before = ledger.counts()

    def refuse(path: Path, data: bytes) -> None:
        raise StorageFull(f"no space to write {path}")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", refuse)
        with pytest.raises(StorageFull):
            ledger.open(forecast(1))
        with pytest.raises(StorageFull):
            settle(ledger, closed(1, a=1.0, b=1.0))
        assert ledger.counts() == before
    settle(ledger, closed(1, a=1.0, b=1.0))
    assert ledger.open(forecast(1)) == 4
    assert ledger.counts() == LedgerCounts(opened=8, due=2, settled=2, expired=0, open=6)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "pickle", "missing"])
def test_a_damaged_origin_file_expires_and_costs_no_other(
    reopened: Callable[[], Ledger], tmp_path: Path, damage: str
) -> None:
    ledger = reopened()
    ledger.open(forecast(0))
    ledger.open(forecast(2))
    settle(ledger, closed(0, a=1.0))
    path = tmp_path / "open_forecasts" / f"{T0}.npz"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[content.index(b"\x93NUMPY", content.index(b"quantiles")) + 140] ^= 4
    path.write_bytes({"truncate": bytes(content[:-100]), "empty": b"", "pickle": b"\x80\x04N."}.get(
        damage, bytes(content)))  # fmt: skip
    if damage == "missing":
        path.unlink()
    ledger = reopened()
    rows = settle(ledger, closed(3, a=7.0, b=8.0))
    assert {row[0] for row in rows_of(rows)} == {2}
    assert ledger.counts() == LedgerCounts(opened=8, due=6, settled=2, expired=4, open=2)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 9}', b'{"format": 1, "waiting": 3}'])
def test_a_damaged_account_is_set_aside_and_rebuilt_from_the_origins(
    reopened: Callable[[], Ledger], tmp_path: Path, content: bytes
) -> None:
    reopened().open(forecast(0))
    (tmp_path / "ledger.json").write_bytes(content)
    ledger = reopened()
    assert ledger.counts() == LedgerCounts(opened=4, due=0, settled=0, expired=0, open=4)
    assert ledger.resume_bin_ms == T0
    assert (tmp_path / "ledger.json.corrupt").read_bytes() == content


def test_another_bin_length_expires_what_it_cannot_settle(tmp_path: Path) -> None:
    old = Ledger(tmp_path, HORIZONS, BIN)
    old.open(forecast(0))
    settle(old, closed(0, a=1.0))
    old.open(forecast(1))
    ledger = Ledger(tmp_path, HORIZONS, 60_000)
    assert ledger.counts() == LedgerCounts(opened=8, due=8, settled=0, expired=8, open=0)
    assert Ledger(tmp_path, HORIZONS, 60_000).counts() == ledger.counts()


def test_foreign_files_in_the_folder_are_left_alone(reopened: Callable[[], Ledger], tmp_path: Path) -> None:
    reopened().open(forecast(5))
    note = tmp_path / "open_forecasts" / "notes.npz"
    note.write_text("mine")
    assert reopened().counts().open == 4
    assert note.read_text() == "mine"


def test_the_state_file_is_readable_json(reopened: Callable[[], Ledger], tmp_path: Path) -> None:
    ledger = reopened()
    ledger.open(forecast(0))
    settle(ledger, closed(1, a=1.0, b=2.0))
    state = json.loads((tmp_path / "ledger.json").read_text())
    assert (state["opened"], state["settled"], state["expired"]) == (4, 2, 0)
    assert state["waiting"] == {str(T0): {str(bin_ms(3)): 2}}


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["sweep", "silence", "kill"]), st.sets(st.sampled_from("abc"))),
        min_size=1,
        max_size=25,
    )
)
def test_whatever_happens_nothing_is_lost_or_counted_twice(
    steps: list[tuple[str, set[str]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    stored: set[tuple[object, ...]] = set()
    ledger, opened, number = Ledger(folder, HORIZONS, BIN), 0, 0
    for step, servers in steps:
        if step == "kill":
            ledger = Ledger(folder, HORIZONS, BIN)
        number += 1
        if step != "sweep" or not servers:
            continue
        names = tuple(sorted(servers))
        rows = settle(ledger, closed(number, **dict.fromkeys(names, 1.0)))
        keys = {row[:5] for row in rows_of(rows)}
        assert not keys & stored
        stored |= keys
        opened += ledger.open(forecast(number, names))
        counts = ledger.counts()
        assert counts.opened == opened == counts.settled + counts.expired + counts.open
        assert counts.settled == len(stored)


def origin_forecast() -> FleetForecast:
    quantiles = np.arange(12, dtype=np.float32).reshape(1, 1, 4, 3)
    own = np.array([[[50.0, 51.0, 52.0, 53.0]]], np.float32)
    return FleetForecast(0, BIN, ("a",), ("cpu_pct",), quantiles, np.array([[True]]), "v1", own)


def test_the_models_own_median_is_settled_beside_the_one_that_was_given(tmp_path: Path) -> None:
    write_origin(tmp_path / "0.npz", cut_to_horizons(origin_forecast(), (1, 3)))
    kept = read_origin(tmp_path / "0.npz")
    rows = match_actuals(kept, ClosedBin(3 * BIN, ("a",), ("cpu_pct",), np.array([[8.5]], np.float32)))
    assert (rows.p50.tolist(), rows.model_p50.tolist(), rows.actual.tolist()) == ([7.0], [52.0], [8.5])


def test_a_file_of_format_1_is_read_with_the_median_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "0.npz"
    write_origin(path, cut_to_horizons(origin_forecast(), (1, 3)))
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        older = {name: arrays[name] for name in arrays if name != "model_median"} | {"format": np.int64(1)}
    np.savez(path, **older)
    assert read_origin(path).model_median.tolist() == [[[1.0, 7.0]]]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("quantiles", "U"),
        ("quantiles", "int64"),
        ("horizons", "U"),
        ("is_model", "float32"),
        ("model_median", "U"),
    ],
)
def test_a_file_whose_arrays_are_of_other_kinds_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "0.npz"
    write_origin(path, cut_to_horizons(origin_forecast(), (1, 3)))
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        whole = {name: arrays[name] for name in arrays}
    np.savez(path, **(whole | {name: whole[name].astype(kind)}))
    with pytest.raises(CorruptFile, match="kinds"):
        read_origin(path)


def test_a_file_of_an_unknown_format_or_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.npz"
    write_origin(path, cut_to_horizons(origin_forecast(), (1, 3)))
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        whole = {name: arrays[name] for name in arrays}
    for change in ({"format": np.int64(3)}, {"model_median": np.zeros((1, 1, 5), np.float32)}):
        np.savez(path, **(whole | change))
        with pytest.raises(CorruptFile):
            read_origin(path)
