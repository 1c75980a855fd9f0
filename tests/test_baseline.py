"""Claims about the baseline's sketches and its file."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from fleetcast.drift.literal.baseline import Baseline
from fleetcast.errors import CorruptFile, UnknownFormat

BIN_MS = 300_000


def grid(n_server: int = 2, n_bin: int = 600) -> np.ndarray:
    random = np.random.default_rng(3)
    return random.normal(50, 10, (n_server, 2, n_bin)).astype(np.float32)


def sketch(values: np.ndarray) -> Baseline:
    names = tuple(f"web-{index}" for index in range(values.shape[0]))
    return Baseline.from_grid(values, 0, BIN_MS, names, ("cpu_pct", "mem_pct"), "v1")


def test_quantiles_and_moments_are_numpy_s_own_where_no_value_is_missing() -> None:
    values = grid()
    baseline = sketch(values)
    flat = values[:, 0].ravel().astype(float)
    np.testing.assert_allclose(baseline.quantiles[0], np.quantile(flat, np.linspace(0, 1, 1001)), rtol=1e-9)
    np.testing.assert_allclose(baseline.means[0], flat.mean())
    np.testing.assert_allclose(baseline.stds[0], flat.std())
    np.testing.assert_allclose(baseline.p95[0], np.quantile(flat, 0.95), rtol=1e-9)
    np.testing.assert_allclose(
        baseline.series_quantiles[1, 1], np.quantile(values[1, 1], np.linspace(0, 1, 65)), rtol=1e-5
    )
    assert baseline.counts.tolist() == [1200, 1200]


def test_missing_values_leave_the_sketch_of_the_present_ones() -> None:
    values = grid()
    values[0, 0, :100] = np.nan
    baseline = sketch(values)
    present = values[0, 0, 100:]
    assert baseline.series_counts[0, 0] == 500
    np.testing.assert_allclose(
        baseline.series_quantiles[0, 0], np.quantile(present, np.linspace(0, 1, 65)), rtol=1e-5
    )
    np.testing.assert_allclose(baseline.series_means[0, 0], present.mean(), rtol=1e-5)


def test_a_series_known_only_since_its_change_weighs_as_much_as_the_others() -> None:
    # Given one server with a week at 10 and one with two hours at 90
    values = np.full((2, 2, 2016), np.nan, np.float32)
    values[0] = 10.0
    values[1, :, -24:] = 90.0
    baseline = sketch(values)
    # Then the pooled mean stands in the middle, as it does in a live window of both
    assert baseline.means[0] == pytest.approx(50.0)


def test_hours_of_the_day_are_told_apart() -> None:
    values = np.zeros((1, 2, 576), np.float32)
    values[..., 12:24] = 6.0  # 01:00 of the first of two days
    baseline = sketch(values)
    assert baseline.hour_means[0, 0, :3].tolist() == [0.0, 3.0, 0.0]
    assert baseline.hour_counts[0, 0].tolist() == [24] * 24


@pytest.mark.parametrize("values", [np.full((2, 2, 5), np.nan), np.empty((0, 2, 5)), np.empty((2, 2, 0))])
def test_a_grid_without_values_gives_zero_counts_and_no_nan(values: np.ndarray) -> None:
    baseline = sketch(values.astype(np.float32))
    assert baseline.counts.tolist() == [0, 0]
    assert np.isfinite(baseline.quantiles).all()
    assert np.isfinite(baseline.series_quantiles).all()


def test_a_saved_baseline_loads_back_equal(tmp_path: Path) -> None:
    baseline = sketch(grid())
    (tmp_path / "baseline.npz").write_bytes(baseline.to_bytes())
    loaded = Baseline.load(tmp_path / "baseline.npz")
    for item in fields(Baseline):
        left, right = getattr(baseline, item.name), getattr(loaded, item.name)
        if isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right


@pytest.mark.parametrize("junk", [b"", b"junk", b"PK\x03\x04 torn", b"\x93NUMPY\x01\x00 torn"])
def test_junk_is_a_corrupt_file(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "baseline.npz"
    path.write_bytes(junk)
    with pytest.raises(CorruptFile):
        Baseline.load(path)


@pytest.mark.parametrize("cut", [10, 100, 1000])
def test_a_torn_file_is_a_corrupt_file(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "baseline.npz"
    path.write_bytes(sketch(grid()).to_bytes()[:-cut])
    with pytest.raises(CorruptFile):
        Baseline.load(path)


def test_a_bare_array_and_a_pickle_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(CorruptFile):
        Baseline.load(tmp_path / "a.npy")
    np.savez(tmp_path / "p.npz", format=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CorruptFile):
        Baseline.load(tmp_path / "p.npz")


def test_another_format_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", format=np.int64(99))
    with pytest.raises(UnknownFormat, match="99"):
        Baseline.load(tmp_path / "b.npz")


def test_a_field_of_the_wrong_kind_or_shape_is_refused(tmp_path: Path) -> None:
    good = dict(np.load(_saved(tmp_path)))
    for name, wrong in (("counts", np.zeros(7)), ("means", np.array(["x", "y"])), ("start_ms", np.zeros(2))):
        np.savez(tmp_path / "w.npz", **{**good, name: wrong})
        with pytest.raises(CorruptFile):
            Baseline.load(tmp_path / "w.npz")


def _saved(tmp_path: Path) -> Path:
    path = tmp_path / "good.npz"
    path.write_bytes(sketch(grid()).to_bytes())
    return path


def test_a_large_fleet_is_sketched_in_pieces_that_do_not_show() -> None:
    values = grid(600, 40)
    whole, part = sketch(values), sketch(values[500:510])
    np.testing.assert_array_equal(whole.series_quantiles[500:510], part.series_quantiles)
    np.testing.assert_array_equal(whole.hour_means[500:510], part.hour_means)


def test_a_baseline_of_format_1_still_loads() -> None:
    loaded = Baseline.load(Path(__file__).parent / "data" / "baseline_format_1.npz")
    assert loaded.metrics == ("cpu_pct", "mem_pct", "disk_write_pct")
    assert len(loaded.server_names) == 8
    assert loaded.error_horizons.tolist() == [1, 12, 96]
