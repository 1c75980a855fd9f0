"""Claims about a model with a specialist: whose weights forecast which series, and its file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fleetcast.errors import BadCheckpoint
from fleetcast.forecast.checkpoint import Specialist
from fleetcast.forecast.predictor import Forecaster
from fleetcast.schema import Floats32, HistoryWindow

DATA = Path(__file__).parent / "data"
METRICS = ("cpu_pct", "mem_pct", "disk_write_pct")
SPECIAL = dict.fromkeys(
    [("web-1", "mem_pct"), ("web-2", "cpu_pct"), ("gone", "cpu_pct"), ("web-0", "odd_pct")], 1_700_000_000_000
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def plain() -> Forecaster:
    return Forecaster.load(DATA / "model_format_1.ckpt")


def moved(model: Forecaster, by: float = 0.5) -> dict[str, Floats32]:
    """Return weights whose answers differ everywhere."""
    return {**model.weights, "output_layer.bias": model.weights["output_layer.bias"] + by}


def specialised(model: Forecaster, series: dict[tuple[str, str], int] = SPECIAL) -> Forecaster:
    return Forecaster(model.description, model.weights, [Specialist(moved(model), series)])


def window(n_server: int = 4, metrics: tuple[str, ...] = METRICS) -> HistoryWindow:
    random = np.random.default_rng(2)
    values = 40 + random.normal(0, 3, (n_server, len(metrics), 600)).cumsum(axis=2) * 0.2
    names = tuple(f"web-{index}" for index in range(n_server))
    return HistoryWindow(names, metrics, values.astype(np.float32), 1_700_006_400_000, 300_000)


def test_the_specialist_forecasts_its_series_and_no_other() -> None:
    # Given the fleet's weights, others, and a model that has both
    model, asked = plain(), window()
    by_fleet = model.predict(asked)
    by_specialist = Forecaster(model.description, moved(model)).predict(asked)
    # When it forecasts
    found = specialised(model).predict(asked)
    # Then its series have the one's forecasts and all others the other's
    is_special = np.zeros((4, 3), np.bool_)
    is_special[1, 1] = is_special[2, 0] = True
    np.testing.assert_allclose(found[~is_special], by_fleet[~is_special], rtol=1e-5)
    np.testing.assert_allclose(found[is_special], by_specialist[is_special], rtol=1e-5)
    assert not np.allclose(found[is_special], by_fleet[is_special])


def test_each_specialist_has_its_own_weights() -> None:
    model, asked = plain(), window()
    sizes = {"cpu_pct": 0.5, "mem_pct": 1.0}
    pair = [Specialist(moved(model, by), {("web-1", metric): 0}) for metric, by in sizes.items()]
    found = Forecaster(model.description, model.weights, pair).predict(asked)
    for column, by in enumerate(sizes.values()):
        alone = Forecaster(model.description, moved(model, by)).predict(asked)
        np.testing.assert_allclose(found[1, column], alone[1, column], rtol=1e-5)


def test_servers_keep_their_weights_in_whatever_order_they_come() -> None:
    model, asked = specialised(plain()), window()
    found = model.predict(asked)
    order = [2, 0, 3, 1]
    names = tuple(asked.server_names[row] for row in order)
    other = HistoryWindow(names, METRICS, asked.values[order], asked.end_bin_ms, asked.bin_ms)
    np.testing.assert_allclose(model.predict(other), found[order], rtol=1e-5)


def test_a_metric_without_a_slot_of_its_own_has_a_specialist_where_one_lists_it() -> None:
    model, asked = plain(), window(2, ("cpu_pct", "odd_pct"))
    moves = np.abs(specialised(model).predict(asked) - model.predict(asked)).max(axis=(2, 3))
    assert (moves > 0.1).tolist() == [[False, True], [False, False]]


def test_a_large_fleet_goes_through_in_passes() -> None:
    model, asked = plain(), window(300, ("cpu_pct",))
    every_other = {(f"web-{index}", "cpu_pct"): 0 for index in range(0, 300, 2)}
    found = specialised(model, every_other).predict(asked)
    by_fleet = model.predict(asked)
    np.testing.assert_allclose(found[1::2], by_fleet[1::2], rtol=1e-5)
    assert (np.abs(found[0::2] - by_fleet[0::2]).max(axis=(1, 2, 3)) > 0.1).all()


def test_a_model_with_a_specialist_survives_its_file(tmp_path: Path) -> None:
    model = specialised(plain())
    (tmp_path / "model.ckpt").write_bytes(model.to_bytes())
    again = Forecaster.load(tmp_path / "model.ckpt")
    assert [item.changed_ms for item in again.specialists] == [SPECIAL]
    np.testing.assert_array_equal(again.predict(window()), model.predict(window()))


def test_a_checkpoint_of_format_2_loads_and_forecasts() -> None:
    model = Forecaster.load(DATA / "model_format_2.ckpt")
    assert [set(item.changed_ms) for item in model.specialists] == [
        {("web-1", "mem_pct")},
        {("web-2", "cpu_pct")},
    ]
    found = model.predict(window())
    assert np.isfinite(found).all()
    assert (found[1, 1] != Forecaster(model.description, model.weights).predict(window())[1, 1]).any()


def test_without_a_specialist_the_file_is_one_that_older_programs_read(tmp_path: Path) -> None:
    model = plain()
    (tmp_path / "model.ckpt").write_bytes(model.to_bytes())
    assert torch.load(tmp_path / "model.ckpt", weights_only=True)["format"] == 1


def content(**parts: Any) -> dict[str, Any]:
    item = torch.load(DATA / "model_format_2.ckpt", weights_only=True)
    first, *others = item["specialists"]
    return {**item, "specialists": [{**first, **parts}, *others]}


def with_weights(**tensors: torch.Tensor) -> dict[str, Any]:
    weights = content()["specialists"][0]["state_dict"]
    return content(
        state_dict={**weights, **{name.replace("__", "."): item for name, item in tensors.items()}}
    )


@pytest.mark.parametrize(
    "damaged",
    [
        {**content(), "format": 3},
        {**content(), "specialists": None},
        {**content(), "specialists": content()["specialists"] * 2},
        content(series=[]),
        content(series=[["web-1", "mem_pct"]]),
        content(series=[["web-1", "mem_pct", "yesterday"]]),
        content(series=[["web-2", "cpu_pct", 0]]),
        content(series=7),
        content(state_dict={}),
        with_weights(output_layer__bias=torch.full((3,), torch.nan)),
        with_weights(output_layer__bias=torch.full((4,), 1.0)),
        with_weights(output_layer__weight=torch.full((3, 8), 3e38)),
    ],
)
def test_a_damaged_specialist_is_a_bad_checkpoint(tmp_path: Path, damaged: dict[str, Any]) -> None:
    torch.save(damaged, tmp_path / "model.ckpt")
    with pytest.raises(BadCheckpoint):
        Forecaster.load(tmp_path / "model.ckpt")


def test_the_file_says_what_it_holds() -> None:
    model = specialised(plain())
    found = Forecaster.from_bytes(model.to_bytes(), Path("model.ckpt"))
    assert found.description == model.description
    assert [item.changed_ms for item in found.specialists] == [SPECIAL]
