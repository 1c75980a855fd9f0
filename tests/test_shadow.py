"""The model before beside a new one, in the sweeps: what is compared, written, given back, and lost."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from desk_folder import A, B, add
from test_sweep import World

from fleetcast.clock import FakeClock
from fleetcast.errors import StorageFull
from fleetcast.forecast.registry import Registry
from fleetcast.promotion.bake import RACES_FOLDER, read_evidence, settle_bake
from fleetcast.promotion.desk import STATE, Desk
from fleetcast.promotion.evidence import WORSE, Evidence
from fleetcast.schema import Floats32, HistoryWindow
from fleetcast.serving.board import ModelInfo
from fleetcast.serving.corrector import Corrector
from fleetcast.serving.model_loader import Champion
from fleetcast.serving.shadow import FILE, Shadow
from fleetcast.settings import PromotionSettings

SERVERS = ("a", "b", "c")
DAY = 288
SETTINGS = PromotionSettings(min_pairs=6)


class Biased:
    """Repeats the last value and is off by what it is told; may fail."""

    metrics = ("cpu_pct",)

    def __init__(self, bias: float) -> None:
        self.bias = bias
        self.error: Exception | None = None
        self.n_servers = 0

    def predict(self, window: HistoryWindow) -> Floats32:
        if self.error:
            raise self.error
        self.n_servers = len(window.server_names)
        made = np.full((*window.values.shape[:2], 4, 3), np.nan, np.float32)
        spread = np.array([-3.0, 0.0, 3.0], np.float32)
        made[:, 0] = window.values[:, 0, -1, None, None] + self.bias + spread
        return made


class Baking:
    """Sweeps of three servers; A serves for a day, then B comes."""

    def __init__(self, folder: Path, settings: PromotionSettings = SETTINGS) -> None:
        self.folder, self.settings = folder, settings
        self.checkpoints = folder / "checkpoints"
        self.models = {A: Biased(0.5), B: Biased(0.0)}
        self.world = World(folder / "data")
        self.world.service.why_not_loaded = ""  # type: ignore[attr-defined]
        self.desk = Desk(Registry(self.checkpoints), FakeClock())
        for version_id in (A, B):
            add(self.desk.registry, version_id, promoted=True)
        with self.desk.lock():
            self.desk.promote(A, "ann", "first")
        self.loaded: list[str] = []
        self.rng = np.random.default_rng(7)
        self.number = 0
        self.attach()
        self.serve(A)
        self.sweep(DAY)

    def attach(self) -> None:
        def load(path: Path) -> Biased:
            self.loaded.append(path.parent.name)
            return self.models[path.parent.name]

        self.shadow = Shadow(
            self.desk,
            self.world.history,
            load,
            self.settings,
            self.world.settings.settle_horizons,
            self.world.telemetry.errors.note,
        )
        self.world.sweeper.shadow = self.shadow

    def serve(self, version_id: str) -> None:
        info = ModelInfo(version_id, "2026-01-15T10:00:05Z", False)
        self.world.service.champion = Champion(self.models[version_id], info)

    def switch(self) -> None:
        with self.desk.lock():
            self.desk.promote(B, "ann", "better")
        self.serve(B)

    def sweep(self, n_bins: int) -> None:
        for _ in range(n_bins):
            level = 50 + 10 * np.sin(self.number / 40)
            self.world.feed(*((name, self.number, level + self.rng.normal()) for name in SERVERS))
            self.world.sweeper.cycle()
            self.number += 1

    @property
    def evidence(self) -> Evidence:
        bake = self.desk.standing().bake
        assert bake is not None
        return read_evidence(self.checkpoints, bake)


@pytest.fixture
def baking(tmp_path: Path) -> Iterator[Baking]:
    found = Baking(tmp_path)
    yield found
    found.world.buffer.close()


def test_nothing_is_compared_without_a_switch(baking: Baking) -> None:
    assert not baking.shadow.is_comparing
    assert not (baking.checkpoints / RACES_FOLDER).exists()


def test_hours_of_both_models_become_evidence(baking: Baking) -> None:
    baking.switch()
    baking.sweep(5 * 12)
    assert baking.shadow.is_comparing
    assert baking.loaded == [], "the model that served until now is at hand"
    blocks = baking.evidence.blocks
    assert len(blocks) in (4, 5)
    assert blocks[-1].pairs == len(SERVERS) * 12 * 2, "bins and horizons of cpu_pct"
    new, old = (sum(block.raw[side] for block in blocks) for side in (0, 1))
    assert new < old, "half a point off costs the old model something"
    assert baking.world.errors == []


def test_a_bad_model_is_taken_back_within_hours_and_its_elder_serves_on_with_what_it_learned(
    baking: Baking,
) -> None:
    baking.models[B].bias = 20.0
    baking.switch()
    corrector = baking.world.sweeper._corrector
    assert isinstance(corrector, Corrector)
    for _hour in range(8):
        baking.sweep(12)
        verdict = settle_bake(baking.desk, SETTINGS)
        if verdict and verdict.kind == WORSE:
            break
    assert baking.desk.registry.current_id() == A
    session = baking.shadow._session
    assert session is not None
    assert session.corrector is not None
    counts = session.corrector._layer.mixture.counts[: len(SERVERS), 0, 0, 0, 1].copy()
    baking.serve(A)
    baking.sweep(1)
    assert not baking.shadow.is_comparing
    assert not (baking.world.folder / FILE).exists()
    own = corrector._layer.mixture.counts[: len(SERVERS), 0, 0, 0, 1]
    assert own == pytest.approx(counts, rel=0.01), "one bin later"
    assert own.min() > DAY / 4


def test_a_restart_goes_on_with_the_hours_so_far_and_voids_the_present_one(baking: Baking) -> None:
    baking.switch()
    baking.sweep(3 * 12)
    known = baking.evidence
    baking.world.sweeper.keep_feedback(at_once=True)
    baking.world.sweeper._corrector = Corrector(
        baking.world.folder, baking.world.history, baking.world.settings.settle_horizons
    )
    baking.attach()
    baking.sweep(3 * 12)
    assert baking.loaded == [A]
    evidence = baking.evidence
    assert evidence.blocks[: len(known.blocks)] == known.blocks
    assert len(evidence.blocks) > len(known.blocks)
    assert evidence.void >= known.void
    session = baking.shadow._session
    assert session is not None
    assert session.corrector is not None
    assert session.corrector._layer.mixture.counts[..., 1].max() > DAY / 4, "its evidence was kept"


def test_an_elder_that_cannot_be_loaded_ends_the_comparison_and_says_so(baking: Baking) -> None:
    baking.switch()
    baking.attach()  # a restart
    (baking.desk.registry.version(A).folder / "model.ckpt").write_bytes(b"damaged")
    baking.sweep(1)
    assert not baking.shadow.is_comparing
    assert "sha256" in baking.evidence.unable
    verdict = settle_bake(baking.desk, SETTINGS)
    assert verdict is not None
    assert baking.desk.standing().bake is None


def test_an_elder_that_fails_costs_no_forecast_and_is_given_up_after_three_sweeps(baking: Baking) -> None:
    baking.switch()
    baking.sweep(2)
    baking.models[A].error = RuntimeError("boom")
    baking.sweep(2)
    assert baking.shadow.is_comparing
    assert b"cpu_pct" in b"".join(baking.world.board.document())
    baking.sweep(1)
    assert not baking.shadow.is_comparing
    assert baking.evidence.unable == f"{A} fails: boom"
    assert set(baking.world.errors) == {"shadow: boom"}


def test_a_new_model_that_fails_is_taken_back_after_three_sweeps(baking: Baking) -> None:
    baking.switch()
    baking.sweep(2)
    baking.models[B].error = RuntimeError("boom")
    baking.sweep(2)
    assert baking.evidence.failing == 2
    baking.sweep(1)
    settle_bake(baking.desk, SETTINGS)
    assert baking.desk.registry.current_id() == A
    told = [entry.why for entry in baking.desk.audit.entries()][-1]
    assert told == "it made no forecasts in 3 sweeps in a row: boom"


def test_where_both_models_fail_neither_is_blamed(baking: Baking) -> None:
    """The cause lies with what both were given; the new one alone is blamed once the older one is well."""
    baking.switch()
    baking.sweep(2)
    for model in (baking.models[A], baking.models[B]):
        model.error = RuntimeError("boom")
    baking.sweep(5)
    assert (baking.evidence.failing, baking.evidence.unable) == (0, "")
    assert baking.shadow.is_comparing
    settle_bake(baking.desk, SETTINGS)
    assert baking.desk.registry.current_id() == B
    baking.models[A].error = None
    baking.sweep(3)
    assert baking.evidence.failing == 3
    settle_bake(baking.desk, SETTINGS)
    assert baking.desk.registry.current_id() == A


def test_a_new_model_that_recovers_is_not_counted_as_failing(baking: Baking) -> None:
    baking.switch()
    baking.models[B].error = RuntimeError("boom")
    baking.sweep(2)
    baking.models[B].error = None
    baking.sweep(1)
    assert baking.evidence.failing == 0


def test_a_new_model_that_cannot_even_be_loaded_is_taken_back(baking: Baking) -> None:
    with baking.desk.lock():
        baking.desk.promote(B, "ann", "better")
    baking.world.service.why_not_loaded = "it is no model"  # type: ignore[attr-defined]
    baking.sweep(3)
    settle_bake(baking.desk, SETTINGS)
    assert baking.desk.registry.current_id() == A


def test_a_new_model_is_not_blamed_where_its_elder_cannot_be_loaded_either(baking: Baking) -> None:
    """As after `bins.bin_s` was changed: taking the new one back would help nobody and hold the next."""
    with baking.desk.lock():
        baking.desk.promote(B, "ann", "better")
    baking.world.service.why_not_loaded = "made for bins of 300 s"  # type: ignore[attr-defined]
    baking.world.service.champion = None
    baking.attach()  # a restart
    (baking.desk.registry.version(A).folder / "model.ckpt").write_bytes(b"of other bins")
    baking.sweep(3)
    settle_bake(baking.desk, SETTINGS)
    standing = baking.desk.standing()
    assert (baking.desk.registry.current_id(), standing.bake, standing.cooldown) == (B, None, None)
    told = [entry.why for entry in baking.desk.audit.entries()][-1]
    assert told.startswith("it cannot be compared any more: neither of them can be loaded")


def test_a_lost_state_does_not_end_the_comparison(baking: Baking) -> None:
    baking.switch()
    baking.sweep(2)
    (baking.checkpoints / STATE).unlink()
    baking.sweep(24)
    assert baking.shadow.is_comparing
    assert baking.evidence.blocks


def test_a_larger_fleet_is_sampled_and_series_with_weights_of_their_own_come_first(tmp_path: Path) -> None:
    baking = Baking(tmp_path, PromotionSettings(min_pairs=1, shadow_max_servers=1))
    manifest = baking.desk.registry.version(B).folder / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"parent"', '"specialists": [[["c", "cpu_pct"]]], "parent"')
    )
    baking.switch()
    baking.sweep(2)
    session = baking.shadow._session
    assert session is not None
    assert list(session.race.rows) == ["c"]
    assert baking.models[A].n_servers == 1
    baking.world.buffer.close()


def test_with_a_full_disk_the_comparison_goes_on_in_memory(
    baking: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    baking.switch()
    baking.sweep(13)
    with monkeypatch.context() as patch:

        def full(*_args: object) -> None:
            raise StorageFull("no space")

        patch.setattr("fleetcast.serving.shadow.write_evidence", full)
        baking.sweep(24)
    baking.sweep(12)
    assert len(baking.evidence.blocks) >= 3


# a version that waits runs beside the one in service


def test_a_version_that_waits_is_measured_beside_the_one_in_service_and_brings_its_evidence_along(
    baking: Baking,
) -> None:
    with baking.desk.lock():
        baking.desk.keep_waiting(B, "the trainer", "compared first")
    baking.sweep(4 * 12)
    assert baking.loaded == [B]
    race = baking.desk.standing().race
    assert race is not None
    evidence = read_evidence(baking.checkpoints, race)
    assert len(evidence.blocks) >= 3
    new, old = (sum(block.raw[side] for block in evidence.blocks) for side in (0, 1))
    assert new < old, "B is the better one"
    document = b"".join(baking.world.board.document())
    assert A.encode() in document
    assert B.encode() not in document, "nothing of it is served"
    baking.switch()
    baking.sweep(2 * 12)
    bake = baking.desk.standing().bake
    assert bake is not None
    assert (bake.version, bake.against) == (B, A)
    assert len(baking.evidence.blocks) >= 1, "the bake begins with evidence of its own"
    assert baking.world.errors == []


@pytest.fixture
def racing(baking: Baking) -> Baking:
    """One sweep in which B waits beside A."""
    with baking.desk.lock():
        baking.desk.keep_waiting(B, "the trainer", "compared first")
    baking.sweep(1)
    return baking


def test_a_challenger_that_fails_costs_no_forecast_and_loses(racing: Baking) -> None:
    baking = racing
    baking.models[B].error = RuntimeError("boom")
    baking.sweep(3)
    race = baking.desk.standing().race
    assert race is not None
    assert read_evidence(baking.checkpoints, race).failing == 3
    assert b"cpu_pct" in b"".join(baking.world.board.document())
    settle_bake(baking.desk, PromotionSettings(mode="auto"))
    assert baking.desk.standing().waiting is None


def test_a_champion_that_fails_is_no_evidence_for_its_challenger(racing: Baking) -> None:
    baking = racing
    baking.models[A].error = RuntimeError("boom")
    baking.sweep(13)
    race = baking.desk.standing().race
    assert race is not None
    evidence = read_evidence(baking.checkpoints, race)
    assert (evidence.failing, evidence.blocks) == (0, ())
