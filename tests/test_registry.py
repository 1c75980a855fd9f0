"""Claims about versions, the one in service, and what a crash can leave behind."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fleetcast.errors import BadCheckpoint, OrderRefused
from fleetcast.forecast.registry import Registry, Version, new_version_id
from fleetcast.promotion.desk import Desk
from fleetcast.promotion.orders import new_order

NOW = datetime(2026, 1, 15, 10, 0, 5, tzinfo=UTC)


def add(registry: Registry, version_id: str, *, promoted: bool = True, parent: str | None = None) -> Version:
    version = registry.add(
        version_id,
        {"model.ckpt": f"weights {version_id}".encode(), "baseline.npz": b"sketch"},
        {"created_at": "2026-01-15T10:00:05Z", "promoted": promoted, "parent": parent},
    )
    if promoted:
        registry.promote(version_id)
    registry.set_baseline(version_id)
    return version


def roll_back(registry: Registry) -> tuple[str | None, str | None]:
    """Let a person order a rollback; return the version taken out of service and the one put back."""
    ended = Desk(registry).give(new_order("rollback", "harms", "ann", NOW))
    assert ended is not None
    if ended.phase == "refused":
        raise OrderRefused(ended.why)
    return ended.source, ended.target


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "checkpoints")


def test_an_empty_folder_has_nothing_to_serve_and_reading_creates_nothing(registry: Registry) -> None:
    assert registry.current_id() is None
    assert registry.current() is None
    assert registry.baseline_in_force() is None
    assert list(registry.usable_versions()) == []
    assert not registry.folder.exists()


def test_a_promoted_version_serves_through_a_relative_link(registry: Registry) -> None:
    version = add(registry, "20260115T100005Z-0001")
    link = registry.folder / "last.ckpt"
    assert str(link.readlink()) == "versions/20260115T100005Z-0001/model.ckpt"
    assert link.read_bytes() == b"weights 20260115T100005Z-0001"
    assert registry.current_id() == version.id
    assert [item.id for item in registry.usable_versions()] == [version.id]


def test_a_rejected_version_never_serves_but_its_baseline_is_in_force(registry: Registry) -> None:
    add(registry, "20260115T100005Z-0001")
    add(registry, "20260115T110005Z-0002", promoted=False)
    assert registry.current_id() == "20260115T100005Z-0001"
    assert [item.id for item in registry.usable_versions()] == ["20260115T100005Z-0001"]
    in_force = registry.baseline_in_force()
    assert in_force is not None
    assert in_force.id == "20260115T110005Z-0002"


def test_a_damaged_current_version_gives_way_to_the_newest_intact_one(registry: Registry) -> None:
    for number in (1, 2, 3):
        add(registry, f"20260115T10000{number}Z-000{number}")
    current = registry.current()
    assert current is not None
    current.model_path.write_bytes(b"flipped")
    problems: list[BadCheckpoint] = []
    assert [item.id[-4:] for item in registry.usable_versions(problems.append)] == ["0002", "0001"]
    assert "sha256" in str(problems[0])


@pytest.mark.parametrize("damage", ["no manifest", "torn manifest", "foreign format", "no files", "bad time"])
def test_a_version_without_a_sound_manifest_is_passed_over(registry: Registry, damage: str) -> None:
    version = add(registry, "20260115T100005Z-0001")
    manifest = version.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.unlink()
    if damage == "torn manifest":
        manifest.write_text('{"format"')
    elif damage == "foreign format":
        manifest.write_text(json.dumps({**content, "format": 99}))
    elif damage == "no files":
        manifest.write_text(json.dumps({**content, "files": {}}))
    elif damage == "bad time":
        manifest.write_text(json.dumps({**content, "created_at": "yesterday"}))
    problems: list[BadCheckpoint] = []
    assert list(registry.usable_versions(problems.append)) == []
    assert len(problems) == 1
    with pytest.raises(BadCheckpoint):
        registry.current()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("specialists", [1, 2]),
        ("specialists", "all"),
        ("specialists", [[["web-1"]]]),
        ("promoted", "yes"),
        ("parent", 7),
        ("data_range", []),
        ("data_range", {"end": "tomorrow"}),
        ("files", {"model.ckpt": 5}),
    ],
)
def test_a_manifest_with_a_field_of_another_kind_is_passed_over(
    registry: Registry, field: str, value: object
) -> None:
    version = add(registry, "20260115T100005Z-0001")
    manifest = version.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, field: value}))
    problems: list[BadCheckpoint] = []
    assert list(registry.usable_versions(problems.append)) == []
    assert field in str(problems[0])


def test_a_plain_file_in_place_of_the_link_is_reported_and_passed_over(registry: Registry) -> None:
    add(registry, "20260115T100005Z-0001")
    (registry.folder / "last.ckpt").unlink()
    (registry.folder / "last.ckpt").write_bytes(b"copied here")
    problems: list[BadCheckpoint] = []
    assert [item.id for item in registry.usable_versions(problems.append)] == ["20260115T100005Z-0001"]
    assert "not a link" in str(problems[0])


def test_a_link_out_of_the_folder_is_not_followed(registry: Registry) -> None:
    registry.folder.mkdir(parents=True)
    for target in ("/etc/passwd", "versions/../model.ckpt", "elsewhere/x/model.ckpt"):
        link = registry.folder / "last.ckpt"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert registry.current_id() is None


def test_the_shipped_base_serves_last(tmp_path: Path) -> None:
    shipped = Registry(tmp_path / "models")
    add(shipped, "20250101T000000Z-ba5e")
    registry = Registry(tmp_path / "checkpoints", tmp_path / "models")
    assert [(item.id, item.is_base) for item in registry.usable_versions()] == [
        ("20250101T000000Z-ba5e", True)
    ]
    add(registry, "20260115T100005Z-0001")
    assert [item.is_base for item in registry.usable_versions()] == [False, True]


def test_a_damaged_baseline_does_not_stop_the_model_but_is_never_used(registry: Registry) -> None:
    version = add(registry, "20260115T100005Z-0001")
    version.baseline_path.write_bytes(b"flipped")
    assert [item.id for item in registry.usable_versions()] == [version.id]
    with pytest.raises(BadCheckpoint):
        registry.baseline_in_force()


def test_what_a_killed_trainer_left_is_no_version_and_is_swept_by_the_next(registry: Registry) -> None:
    add(registry, "20260115T100005Z-0001")
    torn = registry.folder / "versions" / ".20260115T110005Z-0002.tmp-abcd1234"
    torn.mkdir()
    (torn / "model.ckpt").write_bytes(b"half")
    assert registry.version_ids() == ["20260115T100005Z-0001"]
    add(registry, "20260115T120005Z-0003")
    assert not torn.exists()


def test_rollback_returns_to_the_parent_and_the_version_rolled_back_never_serves_by_itself(
    registry: Registry,
) -> None:
    # Given 1 → 2 → 3 in service, the baseline of 3 in force
    add(registry, "20260115T100001Z-0001")
    add(registry, "20260115T100002Z-0002", parent="20260115T100001Z-0001")
    add(registry, "20260115T100003Z-0003", parent="20260115T100002Z-0002")
    # When it is rolled back twice
    assert roll_back(registry) == ("20260115T100003Z-0003", "20260115T100002Z-0002")
    assert roll_back(registry) == ("20260115T100002Z-0002", "20260115T100001Z-0001")
    # Then the first serves alone, and the newest baseline stays in force
    assert [item.id for item in registry.usable_versions()] == ["20260115T100001Z-0001"]
    in_force = registry.baseline_in_force()
    assert in_force is not None
    assert in_force.id == "20260115T100003Z-0003"
    with pytest.raises(OrderRefused, match="nothing to roll back to"):
        roll_back(registry)


def test_rollback_without_a_model_says_so(registry: Registry) -> None:
    with pytest.raises(OrderRefused, match="points to no version"):
        roll_back(registry)


def test_version_ids_sort_by_time() -> None:
    later = datetime(2026, 1, 15, 10, 0, 6, tzinfo=UTC)
    assert new_version_id(NOW) < new_version_id(later)
    assert new_version_id(NOW).startswith("20260115T100005Z-")


def test_a_version_knows_its_data_s_end(registry: Registry) -> None:
    version = registry.add(
        "20260115T100005Z-0001",
        {"model.ckpt": b"w"},
        {"created_at": "2026-01-15T10:00:05Z", "data_range": {"end": "1970-01-01T00:00:01Z"}},
    )
    assert version.data_end_ms == 1000
    assert version.created_at == NOW
    assert not version.is_promoted


def ids(count: int) -> list[str]:
    return [f"20260115T100005Z-{number:04d}" for number in range(1, count + 1)]


def test_pruning_keeps_the_newest_and_whatever_is_in_use(registry: Registry) -> None:
    # Given ten versions: 2 was trained from 1 and serves, the others were rejected, the baseline is 4's
    for version_id in ids(10):
        add(registry, version_id, promoted=version_id in ids(2), parent=ids(1)[0])
    registry.set_baseline(ids(4)[-1])
    # When all but the newest three are pruned
    pruned = registry.prune(3)
    # Then the champion, the versions a rollback needs and the baseline's are still there, whole
    kept = [ids(10)[index] for index in (0, 1, 3, 7, 8, 9)]
    assert registry.version_ids() == kept
    assert pruned == [version_id for version_id in ids(10) if version_id not in kept]
    assert sorted(path.name for path in (registry.folder / "versions").iterdir()) == kept
    for version_id in kept:
        registry.version(version_id).verify()
    # and a second time there is nothing to do
    assert registry.prune(3) == []
    assert roll_back(registry) == (kept[1], kept[0])


def test_after_a_rollback_what_serves_again_is_kept(registry: Registry) -> None:
    for version_id in ids(5):
        add(registry, version_id)
    for _ in range(3):
        roll_back(registry)
    assert registry.current_id() == ids(2)[-1]
    registry.prune(1)
    assert registry.version_ids() == [ids(5)[index] for index in (0, 1, 4)]


def test_pruning_an_empty_folder_creates_nothing(registry: Registry) -> None:
    assert registry.prune(5) == []
    assert not registry.folder.exists()


def test_a_kill_while_pruning_leaves_no_half_version(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version_id in ids(6):
        add(registry, version_id)

    def killed(path: str, **_kwargs: int) -> None:
        raise KeyboardInterrupt(path)

    # When the process dies at the first file it deletes
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "unlink", killed)
        registry.prune(2)
    # Then every version that has a name is whole, the champion too
    assert registry.version_ids() == ids(6)[-2:]
    for version_id in registry.version_ids():
        registry.version(version_id).verify()
    assert registry.current_id() == ids(6)[-1]
    # and the next training sweeps the rest
    add(registry, "20260115T100005Z-0007")
    assert len(list((registry.folder / "versions").iterdir())) == 3


def test_leftovers_are_removed_without_following_links(registry: Registry, tmp_path: Path) -> None:
    # Given a leftover that is a link to somebody's folder, and one with such a link inside
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    versions = registry.folder / "versions"
    versions.mkdir(parents=True)
    (versions / ".x.tmp-1").symlink_to(precious)
    (versions / ".y.tmp-1" / "deep").mkdir(parents=True)
    (versions / ".y.tmp-1" / "deep" / "link").symlink_to(precious)
    (versions / ".z.tmp-1").symlink_to(tmp_path / "nowhere")
    (versions / ".f.tmp-1").write_text("half a file")
    # When the next version is stored
    add(registry, "20260115T100005Z-0001")
    # Then the leftovers are gone and the folder is as it was
    assert [path.name for path in versions.iterdir()] == ["20260115T100005Z-0001"]
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_a_pruned_version_that_is_a_link_costs_only_the_link(registry: Registry, tmp_path: Path) -> None:
    for version_id in ids(6):
        add(registry, version_id)
    oldest = registry.folder / "versions" / ids(6)[0]
    oldest.rename(tmp_path / "elsewhere")
    oldest.symlink_to(tmp_path / "elsewhere")
    registry.prune(2)
    assert not oldest.is_symlink()
    assert (tmp_path / "elsewhere" / "model.ckpt").exists()


def test_a_leftover_that_will_not_go_is_logged_and_stops_nothing(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (registry.folder / "versions" / ".x.tmp-1" / "sub").mkdir(parents=True)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", refuse)
        add(registry, "20260115T100005Z-0001")
    assert registry.version_ids() == ["20260115T100005Z-0001"]
    assert "cannot delete a leftover" in caplog.text
