"""Claims about peers that are not there: a reason in place of a figure."""

from pathlib import Path

import pytest

from benchmarks.drift import peer_environments
from benchmarks.drift.peer_environments import measured, why_missing


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(peer_environments, "FOLDER", tmp_path)
    return tmp_path


def test_a_library_that_was_never_installed_says_how_to_install_it() -> None:
    assert measured("river") == {"why": "not installed: make bench-peers"}


def test_a_library_that_could_not_be_installed_says_why(folder: Path) -> None:
    (folder / "nannyml").mkdir()
    (folder / "nannyml" / "why-not.txt").write_text("no matching distribution")
    assert why_missing("nannyml") == "no matching distribution"
    assert measured("nannyml") == {"why": "no matching distribution"}


def test_a_library_whose_check_fails_says_with_what(folder: Path) -> None:
    python = folder / "alibi_detect" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'ImportError: no such thing' >&2\nexit 1\n")
    python.chmod(0o755)
    assert measured("alibi_detect") == {"why": "ImportError: no such thing"}
