"""Feedback in service: what settled bins teach survives a restart, and damage costs no forecast."""

import logging
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fleetcast.errors import StorageBroken
from fleetcast.forecast.experts.layer import ExpertLayer
from fleetcast.schema import Floats32, HistoryWindow, RecordBatch
from fleetcast.serving.corrector import FILE, Corrector
from fleetcast.serving.history import BinHistory
from fleetcast.serving.shard import rules_of
from fleetcast.settings import BinSettings, ForecastSettings

BIN = 300_000
T0 = 1_768_471_200_000
METRICS = ("cpu_pct", "mem_pct")
HOME = np.zeros((1, 2), np.bool_)  # no series has moved
MODEL, LAST = 60.0, 50.0


class Fleet:
    """Two servers whose cpu_pct stays at 50 while the model says 60; bins close one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history = BinHistory(BinSettings(forecast_metrics=METRICS), ForecastSettings())
        self.n_bins = 0
        self.start()

    def start(self) -> None:
        self.corrector = Corrector(self.folder, self.history, (1, 12, 96))
        self.corrector.note_version("v1")

    def close(self, n_bins: int, version: str | None = "v1") -> None:
        """Close bins; from each one every server is forecast."""
        self.corrector.note_version(version)
        for _ in range(n_bins):
            time = T0 + self.n_bins * BIN
            cpu = {"cpu_pct": np.array([LAST, LAST])}
            self.history.add(RecordBatch(("a", "b"), np.array([0, 1], np.int32), np.array([time, time]), cpu))
            self.closed = self.history.close(time)
            self.corrector.learn(self.closed)
            self.n_bins += 1
            self.forecast()

    def forecast(self) -> Floats32:
        """Server a's cpu_pct as clients see it, (horizon, quantile)."""
        window = next(self.history.parts(T0 + (self.n_bins - 1) * BIN, 99))
        quantiles = np.full((2, 2, 96, 3), np.nan, np.float32)
        quantiles[:, 0] = np.array([MODEL - 20, MODEL, MODEL + 20], np.float32)
        self.corrector.mix(window, quantiles, rules_of(window, 96))
        assert np.isnan(quantiles[:, 1]).all(), "a metric without a forecast stays unknown"
        return np.asarray(quantiles[0, 0])


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_a_model_that_is_wrong_in_settled_bins_loses_its_say(fleet: Fleet) -> None:
    fleet.close(5)
    assert fleet.forecast()[0, 1] == pytest.approx(MODEL, abs=0.01), "five settled bins change nothing yet"
    fleet.close(40)
    assert fleet.forecast()[0, 1] == pytest.approx(LAST, abs=0.5)
    assert fleet.forecast()[95, 1] == pytest.approx(MODEL, abs=0.01), "nothing settled eight hours ahead"


def test_what_was_learned_survives_a_restart_and_no_bin_teaches_twice(fleet: Fleet) -> None:
    fleet.close(60)
    before = fleet.forecast()
    fleet.corrector.save(at_once=True)
    fleet.start()
    np.testing.assert_array_equal(fleet.forecast(), before)
    for _ in range(50):  # a kill between storing and marking settles the same bin again
        fleet.corrector.learn(fleet.closed)
    np.testing.assert_array_equal(fleet.forecast(), before)


def test_forecasts_that_are_open_at_a_stop_still_teach_after_the_restart(fleet: Fleet) -> None:
    fleet.close(20)
    fleet.corrector.save(at_once=True)
    fleet.start()
    fleet.close(14)
    stopped = fleet.forecast()[11]
    other = Fleet(fleet.folder / "other")
    other.folder.mkdir()
    other.start()
    other.close(34)
    np.testing.assert_allclose(stopped, other.forecast()[11], atol=0.05)


def test_the_naive_forecast_is_mixed_by_the_same_rule(fleet: Fleet) -> None:
    fleet.close(60, version=None)
    assert fleet.forecast()[0, 1] == pytest.approx(LAST, abs=0.5)


def test_what_is_known_of_a_model_counts_for_the_version_after_it(fleet: Fleet) -> None:
    fleet.close(60)
    mixture, of_a = fleet.corrector._layer.mixture, (np.array([0]), np.array([[True, True]]), HOME)
    shares = mixture.shares(*of_a)
    fleet.corrector.note_version("v2")
    np.testing.assert_array_equal(mixture.shares(*of_a), shares)
    assert fleet.forecast()[0, 1] == pytest.approx(LAST, abs=0.5)


def test_widths_of_format_1_are_taken_over(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    fleet.close(60)
    fleet.corrector.save(at_once=True)
    path = fleet.folder / FILE
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if not name.startswith("pending")}
    arrays |= {"format": np.int64(1), "losses": np.zeros((2, 2, 3, 9), np.float32)}
    arrays |= {name: arrays[name].take(0, axis=-3) for name in ("widen", "fleet_widen")}
    del arrays["last_losses"], arrays["trend_sums"]
    np.savez(path, **arrays)
    with caplog.at_level(logging.INFO):
        fleet.start()
    assert "format 1" in caplog.text
    mixture = fleet.corrector._layer.mixture
    np.testing.assert_allclose(mixture.widen[:2, :, 0], arrays["widen"], atol=1e-6)
    assert not mixture.counts.any()


@pytest.mark.parametrize("older", [3, 4])
def test_what_formats_3_and_4_learned_is_taken_over(fleet: Fleet, older: int) -> None:
    fleet.close(60)
    mixture = fleet.corrector._layer.mixture
    before = mixture.shares(np.array([0]), np.array([[True, True]]), HOME)
    misses, total = mixture.misses[:2].copy(), (mixture.widen + mixture.fleet_widen)[:2]
    fleet.corrector.save(at_once=True)
    path = fleet.folder / FILE
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["format"] = np.int64(older)
    if older == 3:
        del arrays["lately"]
    np.savez(path, **arrays)
    fleet.start()
    mixture = fleet.corrector._layer.mixture
    after = mixture.shares(np.array([0]), np.array([[True, True]]), HOME)
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(mixture.misses[:2], misses)
    # what the fleet's part of a factor was, in full, is what both parts are now
    factors = mixture.factors(np.array([0, 1]), np.zeros((2, 2), np.bool_))
    np.testing.assert_allclose(np.log(factors), np.clip(total[:, :, 0], -1.5, 1.5), atol=1e-5)
    assert not mixture.retreat(np.array([0, 1])).any()


def test_what_format_2_learned_is_taken_over_for_series_at_home(fleet: Fleet) -> None:
    fleet.close(60)
    before = fleet.corrector._layer.mixture.shares(np.array([0]), np.array([[True, True]]), HOME)
    fleet.corrector.save(at_once=True)
    path = fleet.folder / FILE
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    states = ("losses", "counts", "last_losses", "widen", "fleet_widen")
    arrays |= {"format": np.int64(2)} | {name: arrays[name].take(0, axis=-3) for name in states}
    del arrays["apart"], arrays["misses"], arrays["lately"]
    np.savez(path, **arrays)
    fleet.start()
    after = fleet.corrector._layer.mixture.shares(np.array([0]), np.array([[True, True]]), HOME)
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("damage", ["empty", "flipped", "cut", "other metrics"])
def test_a_file_that_cannot_be_used_is_logged_and_learning_starts_afresh(
    fleet: Fleet, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.close(30)
    fleet.corrector.save(at_once=True)
    path = fleet.folder / FILE
    content = bytearray(path.read_bytes())
    if damage == "other metrics":
        fleet.history.metrics = ("cpu_pct", "latency_ms")
    content[content.index(b"losses.npy") + 200] ^= damage == "flipped"
    path.write_bytes(bytes({"empty": b"", "cut": content[: len(content) // 2]}.get(damage, content)))
    with caplog.at_level(logging.WARNING):
        fleet.start()
    assert "feedback starts afresh" in caplog.text
    assert fleet.forecast()[0, 1] == pytest.approx(MODEL, abs=0.01)


@pytest.mark.parametrize("name", ["origins", "last", "offsets"])
def test_open_lessons_of_another_kind_are_left_out_and_all_others_taken_up(fleet: Fleet, name: str) -> None:
    fleet.close(30)
    fleet.corrector.save(at_once=True)
    path = fleet.folder / FILE
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    fleet.start()
    (_, whole, _) = fleet.corrector._layer._pending
    assert np.isfinite(whole.last).any(), "what is of our kind is taken up"
    key = f"pending_12_{name}"
    np.savez(path, **(arrays | {key: arrays[key].astype("U")}))
    fleet.start()
    (_, hurt, other) = fleet.corrector._layer._pending
    assert (np.isfinite(hurt.last).any(), np.isfinite(other.last).any()) == (False, True)
    fleet.close(20)


def test_it_is_saved_about_once_a_minute_not_at_every_bin(fleet: Fleet) -> None:
    fleet.close(1)
    fleet.corrector.save()
    assert not (fleet.folder / FILE).exists()
    fleet.corrector.save(at_once=True)
    assert (fleet.folder / FILE).exists()


def test_a_folder_that_cannot_be_written_leaves_the_forecasts_as_they_are(fleet: Fleet) -> None:
    fleet.close(100)
    before = fleet.forecast()
    fleet.corrector._path = fleet.folder / "missing" / FILE
    with pytest.raises(StorageBroken):
        fleet.corrector.save(at_once=True)
    np.testing.assert_array_equal(fleet.forecast(), before)


def test_servers_long_gone_give_up_their_rows(fleet: Fleet) -> None:
    fleet.close(100)
    names = tuple(f"gone-{i}" for i in range(100))
    window = HistoryWindow(names, METRICS, np.full((100, 2, 12), 50, np.float32), 0, BIN)
    fleet.corrector.mix(window, np.ones((100, 2, 96, 3), np.float32), rules_of(window, 96))
    before = fleet.forecast()
    fleet.corrector.save(at_once=True)
    assert set(fleet.corrector._rows) == {"a", "b"}
    np.testing.assert_array_equal(fleet.forecast(), before)


def test_a_save_of_a_large_fleet_holds_no_second_copy_of_it(tmp_path: Path) -> None:
    history = BinHistory(BinSettings(), ForecastSettings())
    corrector = Corrector(tmp_path, history, (1, 12, 96))
    corrector._rows = {f"server-{row}": row for row in range(5000)}
    mixture = corrector._layer.mixture
    mixture.reserve(5000)
    n_bytes = sum(getattr(mixture, name).nbytes for name in mixture.ROW_ARRAYS)
    corrector._is_changed = True
    history.unknown = lambda names: []  # type: ignore[method-assign]
    tracemalloc.start()
    corrector.save(at_once=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / FILE).stat().st_size > n_bytes
    assert peak < n_bytes


def test_rows_of_a_growing_fleet_have_few_spare_ones() -> None:
    layer = ExpertLayer(np.ones(1, np.bool_))
    for n_rows in range(256, 10_001, 256):
        layer.mixture.reserve(n_rows)
        layer._pending[0]._reserve(n_rows)
    assert len(layer.mixture.losses) < 1.13 * 10_000
    assert layer._pending[0].n_rows < 1.13 * 10_000
