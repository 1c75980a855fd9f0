"""`fleetcast models`, `history` and the orders, as people type them; no daemon runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from desk_folder import FAILED, SPARE, STATES, WAITS, A, B, C

from fleetcast import cli, program
from fleetcast.forecast.registry import Registry
from fleetcast.promotion import command, orders
from fleetcast.promotion.audit import DONE


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    STATES["idle"](Path("checkpoints"))
    return Path("checkpoints")


def run(line: str, capsys: pytest.CaptureFixture[str], reason: str = "because") -> tuple[int, str, str]:
    words = line.split()
    is_order = words[0] not in (command.MODELS, command.HISTORY)
    code = cli.main([*words, *(["--reason", reason] if is_order else [])])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_rollback_works_with_both_daemons_down(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run("rollback", capsys, "nights are wrong")
    assert code == 0
    assert f"rolled back from {C} to {B}: nights are wrong" in said
    assert Registry(folder).current_id() == B


def test_what_is_ordered_shows_in_models_and_history(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("hold", capsys)[0] == 0
    assert run("pause --until 2099-01-01T00:00Z", capsys)[0] == 2
    assert run(f"rollback --to {A}", capsys)[0] == 0
    assert run(f"promote {FAILED}", capsys)[0] == 1
    assert run(f"promote {SPARE}", capsys)[0] == 0
    assert run(f"veto {WAITS}", capsys)[0] == 0
    code, table, _ = run("models", capsys)
    assert code == 0
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert "champion" in lines[SPARE]
    assert "previous" in lines[A]
    assert "rolled back" in lines[C]
    assert "vetoed" in lines[WAITS]
    assert "failed" in lines[FAILED]
    assert "held by" in table
    code, history, _ = run("history --limit 100", capsys)
    assert code == 0
    assert "holds: no training puts a model into service until resume: because" in history
    assert f"{FAILED} did not pass the gate (--force promotes it all the same)" in history
    assert run("history --limit 1", capsys)[1].count("\n") == 1


def test_a_training_is_written_down_for_the_daemon(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run("train-now --force", capsys)
    assert code == 0
    assert "the retraining daemon takes it up" in said
    (order,) = [item for _, item in orders.waiting(folder) if isinstance(item, orders.Order)]
    assert (order.kind, order.force) == ("train-now", True)
    assert "waiting: train-now by" in run("history", capsys)[1]


@pytest.mark.parametrize(
    ("line", "reason", "said"),
    [
        ("promote ../../etc", "because", "must be an id like"),
        ("promote", "because", "VERSION"),
        ("pause --until soon", "because", "a time looks like"),
        ("hold", "a\nb", "one printable line"),
        ("hold", "x" * 1_000_000, "at most 500"),
        ("hold", " ", "is needed"),
        ("hold --force", "because", "unrecognized arguments"),
        ("history --limit 0", "", "must be >= 1"),
    ],
)
def test_wrong_usage_is_2_and_says_what_would_be_right(
    line: str, reason: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code, _, error = run(line, capsys, reason)
    except SystemExit as end:
        code, error = int(end.code or 0), capsys.readouterr().err
    assert code == 2
    assert said in error
    assert not orders.any_waiting(folder)


def test_json_answers_are_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    ended = json.loads(run("hold --json", capsys)[1])
    assert (ended["ended"]["event"], ended["ended"]["phase"]) == ("hold", DONE)
    assert json.loads(run("models --json", capsys)[1])["held"]["why"] == "because"
    assert json.loads(run("history --json", capsys)[1])[-1]["order"] == ended["order"]
    refused = run(f"approve {WAITS} --json", capsys)
    assert refused[0] == 1
    assert json.loads(refused[1])["ended"]["phase"] == "refused"


def test_a_refusal_names_the_order_that_a_person_gave(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run(f"approve {WAITS}", capsys)
    assert code == 1
    assert "(approve)" in said
    assert "(approve)" in run("history --limit 1", capsys)[1]


def test_a_folder_without_models_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, warned = run("models --checkpoint-dir none", capsys)
    assert code == 0
    assert "none is no folder of models yet" in warned
    assert "base" in said or "no model yet" in said
    assert "nothing has happened yet" in run("history --checkpoint-dir none", capsys)[1]
    assert not Path("none").exists()


def test_a_daemon_that_has_trained_nothing_yet_needs_no_folder_of_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new" / "data_buffer").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "new")
    code, _, warned = run("models", capsys)
    assert (code, warned) == (0, "")


@pytest.mark.parametrize("order", ["hold", "rollback", f"promote {A}", "train-now"])
def test_an_order_in_a_folder_that_no_daemon_knows_is_refused(
    order: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(f"{order} --checkpoint-dir none", capsys)
    assert code == 6
    assert "none is no folder of models" in error
    assert "--checkpoint-dir" in error
    assert not Path("none").exists()


def test_a_fresh_fleet_can_be_held_before_its_first_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "fresh"
    (place / "data_buffer").mkdir(parents=True)
    monkeypatch.chdir(place)
    assert run("hold", capsys)[0] == 0
    assert run("history", capsys)[1].count("holds") == 1


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    program_ = [sys.executable, "-m", "fleetcast", "history", "--limit", "1"]
    root = {"PYTHONPATH": str(Path(command.__file__).parents[2]), "PATH": os.environ["PATH"]}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(program_, stdout=writer, stderr=subprocess.PIPE, env=root, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_root_leaves_no_files_in_another_user_s_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.os, "geteuid", lambda: 0)
    stat = Path.stat

    class Foreign:
        st_uid = 4711

    def foreign(path: Path, **kwargs: bool) -> object:
        return Foreign() if path == folder else stat(path, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", foreign)
        code, _, error = run("hold", capsys)
    assert code == 3
    assert "sudo -u '#4711'" in error
    assert not orders.any_waiting(folder)
