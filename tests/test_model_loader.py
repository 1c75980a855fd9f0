"""Models in and out of service: beside the old one, and never a bad one."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetcast.clock import FakeClock, iso_z
from fleetcast.errors import BadCheckpoint, OtherBins
from fleetcast.forecast.registry import Registry
from fleetcast.schema import Floats32, HistoryWindow
from fleetcast.serving.model_loader import ModelLoader
from fleetcast.workers import Workers

CLOCK = FakeClock()


class Constant:
    """A model that always forecasts its number."""

    def __init__(self, number: float, horizon_bins: int = 4) -> None:
        self.number = number
        self._horizon_bins = horizon_bins

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("cpu_pct",)

    def predict(self, window: HistoryWindow) -> Floats32:
        shape = (len(window.server_names), len(window.metrics), self._horizon_bins, 3)
        return np.full(shape, self.number, dtype=np.float32)


def load(path: Path) -> Constant:
    """Read a number; anything else is no model."""
    content = path.read_bytes()
    if content == b"other bins":
        raise OtherBins(path, "made for 96 bins of 300 s")
    try:
        return Constant(float(content))
    except ValueError as error:
        raise BadCheckpoint(path, f"not a model: {content[:20]!r}") from error


class World:
    """A checkpoint folder and the model served from it."""

    def __init__(self, folder: Path) -> None:
        self.registry = Registry(folder / "checkpoints", folder / "models")
        self.loads: list[bool] = []
        self.model = ModelLoader(
            self.registry, load, bin_ms=300_000, horizon_bins=4, on_load=self.loads.append
        )

    def add(
        self, version_id: str, content: bytes, *, promote: bool = True, promoted: bool = True, **more: Any
    ) -> None:
        manifest = {"created_at": iso_z(CLOCK.now()), "parent": None, "promoted": promoted, **more}
        self.registry.add(version_id, {"model.ckpt": content, "baseline.npz": b""}, manifest)
        if promote:
            self.registry.promote(version_id)

    def damage(self, version_id: str) -> None:
        (self.registry.folder / "versions" / version_id / "model.ckpt").write_bytes(b"9")

    def started(self) -> ModelLoader:
        self.model.start()
        assert self.model.wait(30)
        return self.model

    def noticed(self) -> ModelLoader:
        self.model.notice()
        assert self.model.wait(30)
        return self.model

    @property
    def version(self) -> str | None:
        return self.model.champion.info.version if self.model.champion else None


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_without_any_version_the_fallback_serves(world: World) -> None:
    report = world.started().report()
    folders = f"{world.registry.folder} or {world.registry.folder.parent / 'models'}"
    assert report == {
        "version": None, "trained_at": None, "base": None, "metrics": [], "specialised_series": 0,
        "loading": False, "problems": [f"there is no model version in {folders}"],
    }  # fmt: skip
    assert world.loads == []


def test_the_version_pointed_to_serves(world: World) -> None:
    world.add("20260115T100000Z-0001", b"1")
    assert world.started().report() == {
        "version": "20260115T100000Z-0001",
        "trained_at": "2026-01-15T10:00:00Z",
        "base": False,
        "metrics": ["cpu_pct"],
        "specialised_series": 0,
        "loading": False,
        "problems": [],
    }


def test_how_many_series_have_weights_of_their_own_is_told(world: World) -> None:
    manifest = {"specialists": [[["web-1", "cpu_pct"], ["web-2", "cpu_pct"]], [["web-3", "mem_pct"]]]}
    world.add("20260115T100000Z-0001", b"1", **manifest)
    assert world.started().report()["specialised_series"] == 3


def test_a_shipped_base_made_for_other_bins_is_passed_over_and_everybody_is_told(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = Registry(tmp_path / "models")
    manifest = {"created_at": iso_z(CLOCK.now()), "parent": None, "promoted": True}
    base.add("20260101T000000Z-base", {"model.ckpt": b"other bins"}, manifest)
    base.promote("20260101T000000Z-base")

    report = world.started().report()

    (problem,) = report["problems"]
    assert report["version"] is None
    assert "the shipped base model is not used" in problem and "made for 96 bins of 300 s" in problem
    assert (world.loads, world.model.n_failures) == ([], 0)
    assert any(problem in line.message for line in caplog.records if line.levelname == "WARNING")


def test_a_version_of_our_own_made_for_other_bins_is_a_failure(world: World) -> None:
    world.add("20260115T100000Z-0001", b"other bins")

    assert "made for 96 bins" in world.started().report()["problems"][0]
    assert world.loads == [False]


def test_a_new_version_is_noticed_and_swapped_in(world: World) -> None:
    world.add("20260115T100000Z-0001", b"1")
    old = world.started().champion
    world.add("20260116T100000Z-0002", b"2")
    assert world.model.champion is old
    world.noticed()
    assert world.version == "20260116T100000Z-0002"
    assert world.loads == [True, True]


@pytest.mark.parametrize("content", [b"junk", b"nan"])
def test_a_bad_new_version_leaves_the_old_one_and_is_not_tried_again_at_once(
    world: World, content: bytes
) -> None:
    world.add("20260115T100000Z-0001", b"1")
    world.started()
    world.add("20260116T100000Z-0002", content)
    world.noticed()
    world.noticed()
    assert world.version == "20260115T100000Z-0001"
    assert world.loads == [True, False]
    assert "20260116T100000Z-0002" in world.model.report()["problems"][0]
    world.add("20260117T100000Z-0003", b"3")
    world.noticed()
    assert world.version == "20260117T100000Z-0003"
    assert world.model.report()["problems"] == []


def test_a_version_whose_bytes_changed_is_refused_on_reload(world: World) -> None:
    world.add("20260115T100000Z-0001", b"1")
    world.started()
    world.add("20260116T100000Z-0002", b"2")
    world.damage("20260116T100000Z-0002")
    world.noticed()
    assert world.version == "20260115T100000Z-0001"
    assert "sha256" in world.model.report()["problems"][0]


def test_at_start_a_bad_version_means_the_newest_valid_one(world: World) -> None:
    world.add("20260115T100000Z-0001", b"1")
    world.add("20260116T100000Z-0002", b"2")
    world.add("20260117T100000Z-0003", b"junk")
    world.started()
    assert world.version == "20260116T100000Z-0002"
    assert world.loads == [False, True]


def test_at_start_with_only_bad_versions_the_fallback_serves_until_a_good_one_comes(world: World) -> None:
    world.add("20260115T100000Z-0001", b"junk")
    world.started()
    assert world.version is None
    world.add("20260116T100000Z-0002", b"2")
    world.noticed()
    assert world.version == "20260116T100000Z-0002"


def test_a_version_the_gate_rejected_never_serves(world: World) -> None:
    world.add("20260115T100000Z-0001", b"1", promote=False, promoted=False)
    world.started()
    assert world.version is None


def test_a_last_ckpt_that_is_no_link_of_ours_is_reported_and_not_served(world: World) -> None:
    world.add("20260115T100000Z-0001", b"1")
    link = world.registry.folder / "last.ckpt"
    link.unlink()
    link.write_bytes(b"2")
    world.started()
    assert world.version == "20260115T100000Z-0001"
    assert "last.ckpt" in world.model.report()["problems"][0]


def test_a_pointer_that_vanishes_leaves_the_model_in_service(world: World) -> None:
    world.add("20260115T100000Z-0001", b"1")
    world.started()
    (world.registry.folder / "last.ckpt").unlink()
    world.noticed()
    assert world.version == "20260115T100000Z-0001"


def test_a_model_for_another_horizon_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.model = ModelLoader(world.registry, load, bin_ms=300_000, horizon_bins=96)
    world.add("20260115T100000Z-0001", b"1")
    world.started()
    assert world.version is None
    assert "96" in world.model.report()["problems"][0]


def test_while_a_version_loads_the_old_one_serves_and_nobody_waits(tmp_path: Path) -> None:
    release = threading.Event()

    def slow_load(path: Path) -> Constant:
        if path.parent.name.endswith("0002"):
            release.wait(30)
        return load(path)

    world = World(tmp_path)
    world.model = ModelLoader(world.registry, slow_load, bin_ms=300_000, horizon_bins=4)
    world.add("20260115T100000Z-0001", b"1")
    world.started()
    world.add("20260116T100000Z-0002", b"2")
    world.model.notice()
    assert world.model.is_loading
    assert not world.model.wait(0.0)
    assert world.version == "20260115T100000Z-0001"
    world.model.notice()  # nothing is begun twice
    release.set()
    assert world.model.wait(30)
    assert world.version == "20260116T100000Z-0002"


def test_an_error_that_no_one_expected_is_a_problem_in_the_report_and_counted(world: World) -> None:
    def fail(_path: Path) -> Constant:
        raise KeyError("surprise")

    world.model = ModelLoader(
        world.registry, fail, bin_ms=300_000, horizon_bins=4, on_load=world.loads.append
    )
    world.add("20260115T100000Z-0001", b"1")
    assert "surprise" in world.started().report()["problems"][0]
    assert world.loads == [False]


def test_whatever_one_version_raises_the_next_is_tried(world: World) -> None:
    def fail_for_the_newest(path: Path) -> Constant:
        if path.parent.name.endswith("0002"):
            raise KeyError("surprise")
        return load(path)

    world.model = ModelLoader(world.registry, fail_for_the_newest, bin_ms=300_000, horizon_bins=4)
    world.add("20260115T100000Z-0001", b"1")
    world.add("20260116T100000Z-0002", b"2")
    assert "surprise" in world.started().report()["problems"][0]
    assert world.version == "20260115T100000Z-0001"


def test_whatever_is_wrong_with_the_checkpoints_the_base_serves(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Registry(tmp_path / "models")
    manifest = {"created_at": iso_z(CLOCK.now()), "parent": None, "promoted": True}
    base.add("20260101T000000Z-base", {"model.ckpt": b"5"}, manifest)
    base.promote("20260101T000000Z-base")

    def fail() -> list[str]:
        raise KeyError("surprise")

    monkeypatch.setattr(world.registry, "version_ids", fail)
    assert "surprise" in world.started().report()["problems"][0]
    assert world.version == "20260101T000000Z-base"


class Wall:
    """A monotonic clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        for module in ("fleetcast.workers", "fleetcast.serving.model_loader"):
            monkeypatch.setattr(f"{module}.monotonic", lambda: self.now_s)


def test_a_version_that_failed_is_tried_again_after_a_pause_that_grows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = Wall(monkeypatch)
    world.add("20260115T100000Z-0001", b"1")
    world.started()
    world.add("20260116T100000Z-0002", b"2")
    path = world.registry.folder / "versions" / "20260116T100000Z-0002" / "model.ckpt"
    path.rename(path.with_name("away"))
    world.noticed()
    n_tries = []
    for _ in range(60):
        wall.now_s += 1.0
        world.noticed()
        n_tries.append(len(world.loads))
    assert n_tries[3] == 2 and n_tries[6] == 3  # after 5 s
    assert n_tries[-1] == 5  # and 10, 20
    assert world.model.report()["problems"]
    assert world.model.n_failures == 1  # one version, however often it was tried

    path.with_name("away").rename(path)
    wall.now_s += 900.0
    world.noticed()

    assert world.version == "20260116T100000Z-0002"
    assert world.model.report()["problems"] == []


def test_a_loader_that_fails_itself_is_begun_again_and_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = Wall(monkeypatch)
    world.add("20260115T100000Z-0001", b"1")
    is_broken = True

    def end_the_thread(path: Path) -> Constant:
        if is_broken:
            raise SystemExit
        return load(path)

    workers = Workers()
    world.model = ModelLoader(world.registry, end_the_thread, bin_ms=300_000, horizon_bins=4, workers=workers)
    world.started()
    assert "model loader failed once" in world.model.why_broken
    assert workers.failures() == {"model loader": 1}
    assert "model loader failed once" in workers.problems()[0]
    is_broken = False
    world.noticed()
    assert world.version is None
    wall.now_s += 6.0
    world.noticed()
    assert world.version == "20260115T100000Z-0001"
    assert workers.problems() == []
    assert world.model.why_broken == ""


def test_a_load_that_takes_long_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wall, release = Wall(monkeypatch), threading.Event()

    def slow_load(path: Path) -> Constant:
        release.wait(30)
        return load(path)

    world = World(tmp_path)
    world.model = ModelLoader(world.registry, slow_load, bin_ms=300_000, horizon_bins=4)
    world.add("20260115T100000Z-0001", b"1")
    world.model.start()
    assert world.model.report()["problems"] == []
    wall.now_s += 130.0
    assert world.model.report()["problems"] == ["a version has been loading for 130 s"]
    release.set()
    assert world.model.wait(30)
    assert world.model.report()["problems"] == []
