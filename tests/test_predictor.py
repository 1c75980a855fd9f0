"""Claims about a model in service: what it loads, what it answers, what it refuses."""

import io
import pickle
import resource
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcast.errors import BadCheckpoint, BadData
from fleetcast.forecast.encoding import GridShape, decode
from fleetcast.forecast.predictor import Forecaster
from fleetcast.schema import HistoryWindow
from fleetcast.training.grid import TrainingGrid
from fleetcast.training.sampler import WindowMix, WindowSampler

OLD_CHECKPOINT = (
    Path(__file__).parent / "data" / "model_format_1.ckpt"
)  # trained on samples/smd_fleet.parquet
METRICS = ("cpu_pct", "mem_pct", "disk_write_pct")
BIN_MS = 300_000
END_MS = 1_700_006_400_000 // BIN_MS * BIN_MS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@cache
def loaded() -> Forecaster:
    return Forecaster.load(OLD_CHECKPOINT)


@pytest.fixture
def forecaster() -> Forecaster:
    return loaded()


def window(values: np.ndarray, metrics: tuple[str, ...] = METRICS, bin_ms: int = BIN_MS) -> HistoryWindow:
    names = tuple(f"web-{index}" for index in range(len(values)))
    return HistoryWindow(names, metrics, np.asarray(values, np.float32), END_MS, bin_ms)


def fleet(n_server: int = 3, n_bin: int = 2304) -> np.ndarray:
    random = np.random.default_rng(2)
    rhythm = 30 + 20 * np.sin(2 * np.pi * np.arange(n_bin) / 288)
    return np.clip(rhythm + random.normal(0, 3, (n_server, 3, n_bin)), 0, 100)


def test_a_checkpoint_of_format_1_loads_and_forecasts(forecaster: Forecaster) -> None:
    assert forecaster.metrics == METRICS
    assert forecaster.version.startswith("20261123T")
    quantiles = forecaster.predict(window(fleet()))
    assert quantiles.shape == (3, 3, 96, 3)
    assert quantiles.dtype == np.float32
    assert np.isfinite(quantiles).all()


def test_it_forecasts_a_daily_rhythm_better_than_the_last_value(forecaster: Forecaster) -> None:
    series = fleet(n_bin=2304 + 96)
    quantiles = forecaster.predict(window(series[:, :, :2304]))
    future = series[:, :, 2304:]
    error = np.abs(quantiles[..., 1] - future).mean()
    last = np.abs(series[:, :, 2303:2304] - future).mean()
    assert error < 0.6 * last


def test_quantiles_never_cross_and_stay_plausible(forecaster: Forecaster) -> None:
    quantiles = forecaster.predict(window(fleet()))
    assert (np.diff(quantiles, axis=-1) >= 0).all()
    assert quantiles.min() >= 0
    assert quantiles.max() <= 100


def test_a_series_does_not_depend_on_the_fleet_around_it(forecaster: Forecaster) -> None:
    values = fleet(100)  # more than one pass holds
    together = forecaster.predict(window(values))
    alone = forecaster.predict(window(values[97:98]))
    np.testing.assert_allclose(together[97], alone[0], rtol=1e-3, atol=1e-3)


def test_metrics_keep_their_meaning_whatever_their_order(forecaster: Forecaster) -> None:
    values = fleet()
    usual = forecaster.predict(window(values))
    turned = forecaster.predict(window(values[:, ::-1], METRICS[::-1]))
    np.testing.assert_allclose(turned[:, ::-1], usual, rtol=1e-3, atol=1e-3)


def test_a_metric_of_any_name_is_forecast(forecaster: Forecaster) -> None:
    # Given a daily rhythm under names the model was never trained on
    series = fleet(n_bin=2304 + 96)
    quantiles = forecaster.predict(window(series[..., :2304], ("disk_usage_pct", "queue_depth", "odd")))
    # Then every forecast is whole and better than the last value
    assert np.isfinite(quantiles).all()
    future = series[..., 2304:]
    errors = np.abs(quantiles[..., 1] - future).mean(axis=(0, 2))
    assert (errors < 0.6 * np.abs(series[..., 2303:2304] - future).mean(axis=(0, 2))).all()


def test_a_server_needs_an_hour_of_values(forecaster: Forecaster) -> None:
    values = np.full((2, 3, 2304), np.nan)
    values[0, :, -12:], values[1, :, -11:] = 20.0, 20.0
    quantiles = forecaster.predict(window(values))
    assert np.isfinite(quantiles[0]).all()
    assert np.isnan(quantiles[1]).all()
    patient = Forecaster.load(OLD_CHECKPOINT, min_history_s=600.0)
    assert np.isfinite(patient.predict(window(values))).all()


@pytest.mark.parametrize("n_bin", [1, 12, 13, 100, 576, 2303, 2304, 3000])
def test_any_length_of_history_has_an_answer(forecaster: Forecaster, n_bin: int) -> None:
    quantiles = forecaster.predict(window(fleet(n_bin=n_bin)))
    assert np.isfinite(quantiles).all() == (n_bin >= 12)


def test_a_constant_and_a_silent_series_stay_about_what_they_are(forecaster: Forecaster) -> None:
    values = np.full((2, 3, 2304), 40.0)
    values[1] = 0.0
    quantiles = forecaster.predict(window(values))
    assert np.abs(quantiles[0] - 40.0).max() <= 0.5
    assert 0 <= quantiles[1].min() <= quantiles[1].max() <= 0.5


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.one_of(st.floats(width=32), st.sampled_from([np.nan, np.inf, 0.0, 3e38])), min_size=12, max_size=60
    )
)
def test_whatever_is_sent_the_answer_is_numbers_in_order_or_none(values: list[float]) -> None:
    quantiles = loaded().predict(window(np.tile(np.array(values, np.float32), (1, 3, 1))))
    is_none = np.isnan(quantiles).all(axis=(2, 3))
    assert (np.isfinite(quantiles).all(axis=(2, 3)) | is_none).all()
    assert (np.diff(quantiles[~is_none], axis=-1) >= 0).all()


def test_an_empty_fleet_has_an_empty_forecast(forecaster: Forecaster) -> None:
    assert forecaster.predict(window(np.empty((0, 3, 10)))).shape == (0, 3, 96, 3)
    assert forecaster.predict(window(np.empty((2, 0, 10)), ())).shape == (2, 0, 96, 3)


def test_training_and_serving_see_the_same_window(forecaster: Forecaster) -> None:
    """The sampler's answer on a grid is the server's on the same bins: no skew."""
    values = fleet(2, 3000).astype(np.float32)
    grid = TrainingGrid(("web-0", "web-1"), METRICS, values, END_MS - 2999 * BIN_MS, BIN_MS)
    shape = GridShape(BIN_MS, 96)
    sampler = WindowSampler(grid, shape, np.full((2, 3), 3000), WindowMix(), 3)
    sampler._cut_short = lambda history: None  # type: ignore[method-assign]  # the one thing serving has not
    series, origins = sampler._windows(20)
    sampler._windows = lambda size: (series, origins)  # type: ignore[method-assign]
    batch = sampler.batch(20, [1, 2, 3])
    known = batch.metric_slots > 0
    trained = decode(forecaster.answer(batch.arrays, batch.metric_slots), batch.arrays.scale, shape)
    for row in np.flatnonzero(known):
        origin, server, metric = int(origins[row]), int(series[row]) // 3, int(series[row]) % 3
        served = forecaster.predict(
            HistoryWindow(
                grid.server_names,
                METRICS,
                values[:, :, max(0, origin - 2303) : origin + 1],
                grid.start_ms + origin * BIN_MS,
                BIN_MS,
            )
        )
        np.testing.assert_allclose(trained[row], served[server, metric], rtol=1e-4, atol=1e-4)


def test_a_model_survives_its_file_bit_by_bit(forecaster: Forecaster, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(forecaster.to_bytes())
    again = Forecaster.load(tmp_path / "model.ckpt")
    assert again.description == forecaster.description
    np.testing.assert_array_equal(again.predict(window(fleet())), forecaster.predict(window(fleet())))


def test_a_model_for_other_bins_is_refused_with_what_to_do(forecaster: Forecaster) -> None:
    assert Forecaster.load(OLD_CHECKPOINT, bin_ms=BIN_MS, horizon_bins=96)
    with pytest.raises(BadCheckpoint, match=r"96 bins of 300 s .*train one for 96 bins of 60 s"):
        Forecaster.load(OLD_CHECKPOINT, bin_ms=60_000, horizon_bins=96)
    with pytest.raises(BadCheckpoint, match="train one for 48 bins"):
        Forecaster.load(OLD_CHECKPOINT, bin_ms=BIN_MS, horizon_bins=48)
    with pytest.raises(BadData, match="60000 ms"):
        forecaster.predict(window(fleet(), bin_ms=60_000))


class Attack:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "in the weights"])
def test_no_checkpoint_executes_code(tmp_path: Path, how: str) -> None:
    trace, path = tmp_path / "executed", tmp_path / "model.ckpt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Attack(trace)))
    elif how == "torch.save":
        torch.save(Attack(trace), path)
    else:
        content = torch.load(OLD_CHECKPOINT, weights_only=True)
        torch.save({**content, "state_dict": {**content["state_dict"], "x": Attack(trace)}}, path)
    with pytest.raises(BadCheckpoint):
        Forecaster.load(path)
    assert not trace.exists()


def test_what_is_missing_or_torn_is_a_bad_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    with pytest.raises(BadCheckpoint, match="No such file"):
        Forecaster.load(path)
    whole = OLD_CHECKPOINT.read_bytes()
    for content in (b"", b"junk", whole[:1000], whole[:-1], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(BadCheckpoint):
            Forecaster.load(path)


def changed(**parts: Any) -> dict[str, Any]:
    return {**torch.load(OLD_CHECKPOINT, weights_only=True), **parts}


def without(name: str) -> dict[str, Any]:
    content = changed()
    del content[name]
    return content


def with_weights(**tensors: Any) -> dict[str, Any]:
    content = changed()
    return {**content, "state_dict": {**content["state_dict"], **tensors}}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        None,
        {"format": 1},
        without("state_dict"),
        without("grid"),
        without("metrics"),
        changed(format=2),
        changed(state_dict={}),
        changed(state_dict=[1, 2]),
        changed(metrics=[f"m{index}" for index in range(40)]),
        changed(metrics=5),
        changed(grid={"bin_ms": 0, "horizon_bins": 96, "history_bins": 2304}),
        changed(grid={"bin_ms": 300_000, "horizon_bins": 48, "history_bins": 2304}),
        changed(grid={"bin_ms": "x"}),
        changed(network={}),
        with_weights(**{"output_layer.bias": torch.full((3,), torch.nan)}),
        with_weights(**{"output_layer.bias": torch.full((4,), 1.0)}),
        with_weights(**{"output_layer.weight": "words"}),
        with_weights(**{"output_layer.weight": torch.full((3, 8), 3e38)}),
    ],
)
def test_a_checkpoint_that_is_not_ours_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(BadCheckpoint):
        Forecaster.load(tmp_path / "model.ckpt")


def repacked(compress_type: int, **members: bytes) -> bytes:
    """Return the old checkpoint's archive with some members replaced."""
    made = io.BytesIO()
    with zipfile.ZipFile(OLD_CHECKPOINT) as old, zipfile.ZipFile(made, "w", compress_type) as new:
        for item in old.infolist():
            short = item.filename.rpartition("/")[2].replace(".", "_")
            new.writestr(item.filename, members.get(short, old.read(item.filename)))
    return made.getvalue()


BOMB = torch.zeros(1).as_strided((1_200_000_000,), (0,))  # 4.8 GB of one number


@pytest.mark.parametrize(
    "content",
    [
        with_weights(more=BOMB),
        with_weights(**{"output_layer.bias": BOMB}),
        with_weights(**{"output_layer.bias": torch.zeros(1).expand(3)}),
        with_weights(**{"output_layer.bias": torch.zeros(3, dtype=torch.float64)}),
        with_weights(**{"output_layer.bias": torch.zeros(3, requires_grad=True).to_sparse()}),
        changed(network={**changed()["network"], "hidden_size": 10**9, "continuous_size": 8}),
        changed(network={**changed()["network"], "n_heads": 0}),
        changed(grid={**changed()["grid"], "history_bins": 99_999}),
        changed(metrics=[["cpu_pct"] * 10]),
        changed(version=["x"]),
        changed(format=2, specialists="all"),
        changed(format=2, specialists=[1, 2]),
        changed(format=2, specialists=[{"series": [["a", "cpu_pct", "now"]], "state_dict": {}}]),
        changed(more=bytearray(10)),
    ],
)
def test_a_checkpoint_of_wild_content_is_refused_before_it_takes_memory(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadCheckpoint):
        Forecaster.load(tmp_path / "model.ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_a_packed_or_overlong_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(repacked(zipfile.ZIP_DEFLATED))
    with pytest.raises(BadCheckpoint, match="packed"):
        Forecaster.load(path)
    path.write_bytes(
        repacked(zipfile.ZIP_STORED, data_pkl=b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")
    )
    with pytest.raises(BadCheckpoint, match="builtins bytearray"):
        Forecaster.load(path)
    with path.open("wb") as stream:
        stream.truncate(2**40)  # a hole takes no disk
    with pytest.raises(BadCheckpoint, match="at most"):
        Forecaster.load(path)


@pytest.mark.parametrize("how", ["random", "crossed", "huge"])
def test_weights_that_are_no_trained_network_are_refused(tmp_path: Path, how: str) -> None:
    torch.manual_seed(1)
    weights = dict(changed()["state_dict"])
    if how == "random":
        weights = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
    elif how == "crossed":
        for name in ("output_layer.weight", "output_layer.bias"):
            weights[name] = weights[name].flip(0)
    else:
        weights["output_layer.bias"] = torch.full((3,), 1000.0)
    torch.save(changed(state_dict=weights), tmp_path / "model.ckpt")
    with pytest.raises(BadCheckpoint, match=r"spreads from now|not in order"):
        Forecaster.load(tmp_path / "model.ckpt")
