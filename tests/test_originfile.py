"""Open forecasts on disk: what is written is read, also by the program of the version before."""

import io
from pathlib import Path

import numpy as np
import pytest

from fleetcast.errors import CorruptFile
from fleetcast.schema import ClosedBin, FleetForecast
from fleetcast.serving.ledger import cut_to_horizons, match_actuals, read_origin, write_origin

BIN = 300_000


def forecast() -> FleetForecast:
    quantiles = np.arange(12, dtype=np.float32).reshape(1, 1, 4, 3)
    own = np.array([[[50.0, 51.0, 52.0, 53.0]]], np.float32)
    return FleetForecast(0, BIN, ("a",), ("cpu_pct",), quantiles, np.array([[True]]), "v1", own)


def test_the_models_own_median_is_settled_beside_the_one_that_was_given(tmp_path: Path) -> None:
    write_origin(tmp_path / "0.npz", cut_to_horizons(forecast(), (1, 3)))
    kept = read_origin(tmp_path / "0.npz")
    rows = match_actuals(kept, ClosedBin(3 * BIN, ("a",), ("cpu_pct",), np.array([[8.5]], np.float32)))
    assert (rows.p50.tolist(), rows.model_p50.tolist(), rows.actual.tolist()) == ([7.0], [52.0], [8.5])


def test_a_file_of_format_1_is_read_with_the_median_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "0.npz"
    write_origin(path, cut_to_horizons(forecast(), (1, 3)))
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        older = {name: arrays[name] for name in arrays if name != "model_median"} | {"format": np.int64(1)}
    np.savez(path, **older)
    assert read_origin(path).model_median.tolist() == [[[1.0, 7.0]]]


def test_a_file_of_an_unknown_format_or_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.npz"
    write_origin(path, cut_to_horizons(forecast(), (1, 3)))
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        whole = {name: arrays[name] for name in arrays}
    for change in ({"format": np.int64(3)}, {"model_median": np.zeros((1, 1, 5), np.float32)}):
        np.savez(path, **(whole | change))
        with pytest.raises(CorruptFile):
            read_origin(path)
