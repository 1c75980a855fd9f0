"""The reference's file: exact, never pickled, and honest about damage."""

import pickle
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rhythm_fleet import usual_reference

from fleetcast.drift.seasonal.reference import Reference
from fleetcast.errors import CorruptFile, UnknownFormat


@pytest.fixture
def path(tmp_path: Path) -> Path:
    saved = tmp_path / "reference.npz"
    usual_reference().save(saved)
    return saved


def assert_same(one: Any, other: Any) -> None:
    for item in fields(one):
        left, right = getattr(one, item.name), getattr(other, item.name)
        if is_dataclass(left):
            assert_same(left, right)
        elif isinstance(left, np.ndarray):
            assert left.dtype == right.dtype and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
        else:
            assert left == right


def rewritten(path: Path, **changes: Any) -> Path:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(path, **{**arrays, **changes})
    return path


def test_what_is_saved_is_what_is_loaded(path: Path) -> None:
    assert_same(usual_reference(), Reference.load(path))


def test_nothing_in_it_needs_pickle(path: Path) -> None:
    with np.load(path, allow_pickle=False) as archive:
        assert all(archive[name].dtype.kind in "iufUb" for name in archive.files)


def test_an_unknown_format_is_refused_with_the_one_we_read(path: Path) -> None:
    with pytest.raises(UnknownFormat, match="expected 3"):
        Reference.load(rewritten(path, format=np.int64(9)))


def test_a_file_of_the_first_format_is_refused_so_that_it_is_learned_again() -> None:
    """Format 1 knows no usual day bin by bin, so nothing newer can be made of it."""
    with pytest.raises(UnknownFormat, match=r"reference format 1.*expected 3"):
        Reference.load(Path(__file__).parent / "data" / "reference_format_1.npz")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip at all", pickle.dumps({"format": 1})])
def test_junk_is_corrupt(tmp_path: Path, content: bytes) -> None:
    junk = tmp_path / "reference.npz"
    junk.write_bytes(content)

    with pytest.raises(CorruptFile):
        Reference.load(junk)


def test_a_bare_array_is_corrupt(tmp_path: Path) -> None:
    np.save(tmp_path / "bare.npy", np.zeros(3))

    with pytest.raises(CorruptFile, match="not a reference"):
        Reference.load(tmp_path / "bare.npy")


@pytest.mark.parametrize(
    "changes",
    [
        {"limits": np.zeros((2, 2), np.float32)},
        {"shape.profiles": np.zeros((10, 5), np.float32)},
        {"books.values.edges": np.array(["a"])},
        {"books.tails": np.full((10, 2), 10_000)},
        {"shape.weekly_rows": np.arange(10)},
        {"bin_ms": np.int64(7)},
        {"bin_ms": np.array(["five"])},
        {"timezone": np.array("Mars/Olympus")},
        {"metrics": np.array(["cpu_pct"])},
    ],
)
def test_fields_that_do_not_fit_each_other_are_corrupt(path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptFile):
        Reference.load(rewritten(path, **changes))


def test_a_missing_field_is_named(path: Path) -> None:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files if name != "pull"}
    np.savez(path, **arrays)

    with pytest.raises(CorruptFile, match="pull"):
        Reference.load(path)


def test_every_torn_file_is_corrupt(path: Path) -> None:
    whole = path.read_bytes()
    for cut in np.linspace(1, len(whole) - 1, 12).astype(int):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptFile):
            Reference.load(path)
