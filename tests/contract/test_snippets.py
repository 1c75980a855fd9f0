"""Every printed Python snippet, executed as printed."""

import ast
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_fleet import quiet_answers, settings
from spec_blocks import BLOCKS, covers
from told_daemon import Told
from workplace import Workplace, until


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def execute(key: str, **names: Any) -> dict[str, Any]:
    """Run a block with the names it takes for granted; return all names afterwards."""
    scope = dict(names)
    exec(compile(BLOCKS[key].text, key, "exec"), scope)
    return scope


def printed_result(key: str) -> str:
    """Return the text of the `# Returns:` comment."""
    comment = BLOCKS[key].text.split("# Returns: ")[1].split("\n\n")[0]
    return re.sub(r"\n#\s*", " ", comment)


@covers("drift_monitor.py-467-lines", "bb989625")
def test_the_monitor_snippet(capsys: pytest.CaptureFixture[str]) -> None:
    from drift_monitor import DriftMonitor

    rng = np.random.default_rng(7)
    actuals = {"cpu_pct": rng.normal(40, 5, 400), "mem_pct": rng.normal(60, 3, 400)}
    predictions = {name: values * 1.01 for name, values in actuals.items()}
    scope = execute(
        "drift_monitor.py-467-lines",
        DriftMonitor=DriftMonitor,
        predictions=predictions,
        actuals=actuals,
        features=actuals,
    )
    shown = ast.literal_eval(printed_result("drift_monitor.py-467-lines"))
    assert shown.keys() <= scope["metrics"].keys()
    assert isinstance(scope["metrics"]["needs_retraining"], bool)
    assert scope["metrics"]["per"] == pytest.approx(0.01, abs=2e-3)
    assert "PER" in capsys.readouterr().out.upper()
    assert shown.keys() <= json.loads(Path("drift_metrics.json").read_text())["current_metrics"].keys()


@covers("drift_monitor.py-467-lines-2", "70aa87ca")
def test_the_thresholds_can_be_assigned_and_decide() -> None:
    from drift_monitor import DriftMonitor

    monitor = DriftMonitor(window_size=1000)
    execute("drift_monitor.py-467-lines-2", monitor=monitor)
    assert monitor.thresholds == DriftMonitor().thresholds
    monitor.set_baseline({"cpu_pct": np.linspace(30, 50, 400)})
    actual = {"cpu_pct": np.linspace(30, 50, 400)}
    monitor.update({"cpu_pct": actual["cpu_pct"] + 3.0}, actual)
    assert monitor.calculate_drift_metrics()["needs_retraining"] is False
    monitor.thresholds["per_threshold"] = 0.01
    assert monitor.calculate_drift_metrics()["needs_retraining"] is True


@covers("data_buffer.py-340-lines", "649288ed")
def test_the_buffer_snippet() -> None:
    import pandas as pd

    from data_buffer import DataBuffer

    now = pd.Timestamp.now("UTC").floor("s")
    records = [
        {
            "timestamp": (now - pd.Timedelta(hours=hours)).isoformat(),
            "server_name": "web-01",
            "cpu_pct": 12.5 + hours,
        }
        for hours in range(48)
    ]
    scope = execute("data_buffer.py-340-lines", DataBuffer=DataBuffer, records=records)
    shown = ast.literal_eval(printed_result("data_buffer.py-340-lines"))
    stats = scope["stats"]
    assert shown.keys() <= stats.keys()
    assert stats["date_range"].keys() == shown["date_range"].keys()
    assert stats["total_records"] == 48
    assert stats["date_range"]["end"] == now.date().isoformat()
    before_today = sum(pd.Timestamp(r["timestamp"]).date() < now.date() for r in records)
    assert len(scope["df"]) == before_today, "include_today=False"
    assert len(pd.read_parquet("training_data.parquet")) == 48
    scope["buffer"].close()


@covers("data_buffer.py-340-lines-2", "4f49b1e7")
def test_the_storage_structure_is_one_readable_day_file_per_utc_day() -> None:
    import pandas as pd

    from data_buffer import DataBuffer

    names = re.findall(r"metrics_\d{4}-\d\d-\d\d\.parquet", BLOCKS["data_buffer.py-340-lines-2"].text)
    now = pd.Timestamp.now("UTC").floor("s")
    days = [now - pd.Timedelta(days=age) for age in (0, 1, 30)]
    buffer = DataBuffer(expire=False)
    buffer.append([{"timestamp": day.isoformat(), "server_name": "a", "cpu_pct": 1.0} for day in days])
    buffer.flush()
    expected = {f"metrics_{day.date().isoformat()}.parquet" for day in days}
    assert {path.name for path in Path("data_buffer").glob("metrics_*")} == expected
    assert all(re.fullmatch(r"metrics_\d{4}-\d\d-\d\d\.parquet", name) for name in names)
    assert [len(pd.read_parquet(Path("data_buffer") / name)) for name in expected] == [1, 1, 1]
    buffer.close()


@covers("adaptive_retraining_daemon.py-400-lines", "d0be8d0a")
def test_the_engine_snippet() -> None:
    from adaptive_retraining_daemon import RetrainingDecisionEngine

    drift = {"per": 0.3, "dss": 0.1, "fds": 0.1, "anomaly_rate": 0.01, "combined_score": 0.2}
    scope = execute(
        "adaptive_retraining_daemon.py-400-lines",
        RetrainingDecisionEngine=RetrainingDecisionEngine,
        drift_metrics=drift | {"needs_retraining": True},
    )
    decision = scope["decision"]
    assert {"should_retrain", "reason", "safeguards"} <= decision.keys()
    assert decision["should_retrain"] is True
    again = scope["engine"].should_retrain(drift | {"needs_retraining": True}, is_quiet_period=True)
    assert again["should_retrain"] is False, "record_training() was called: 6 hours have not passed"


@pytest.mark.slow
@covers("adaptive_retraining_daemon.py-400-lines-2", "5e287cd2")
def test_the_daemon_snippet_runs_until_it_is_stopped_and_then_checks_once(
    new_workplace: Callable[[str], Workplace],
) -> None:
    place = new_workplace("snippet")
    code = BLOCKS["adaptive_retraining_daemon.py-400-lines-2"].text
    head = "from adaptive_retraining_daemon import AdaptiveRetrainingDaemon\n"
    (place.folder / "snippet.py").write_text(head + code)
    process = place.start("python snippet.py")
    metrics = place.folder / "drift_metrics.json"
    until(metrics.exists, place)
    written = metrics.stat().st_mtime_ns
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert metrics.stat().st_mtime_ns > written, "run_check_cycle() came after run()"


def source(program: str) -> str:
    from spec_blocks import ROOT

    return (ROOT / program).read_text(encoding="utf-8")


def literals(text: str) -> dict[str, dict[str, float]]:
    """Return each `self.NAME = {...}` of Python source."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        target = (
            node.targets[0]
            if isinstance(node, ast.Assign)
            else node.target
            if isinstance(node, ast.AnnAssign)
            else None
        )
        if isinstance(target, ast.Attribute) and isinstance(node.value, ast.Dict):
            found[target.attr] = ast.literal_eval(node.value)
    return found


@covers("drift-thresholds", "ae75eab7")
def test_the_printed_thresholds_stand_in_the_program_and_editing_them_works(tmp_path: Path) -> None:
    printed = literals(BLOCKS["drift-thresholds"].text)["thresholds"]
    standing = literals(source("drift_monitor.py"))["thresholds"]
    assert printed.items() <= standing.items()
    edited = edited_module("drift_monitor.py", "'per_threshold': 0.10", "'per_threshold': 0.37")
    assert edited.DriftMonitor().thresholds["per_threshold"] == 0.37


@covers("metric-weights", "da507dee")
def test_the_printed_weights_stand_in_the_program_and_editing_them_works(tmp_path: Path) -> None:
    printed = literals(BLOCKS["metric-weights"].text)["weights"]
    assert literals(source("drift_monitor.py"))["weights"] == printed
    edited = edited_module("drift_monitor.py", "'dss_weight': 0.30", "'dss_weight': 0.37")
    assert edited.DriftMonitor().weights["dss_weight"] == 0.37


@covers("safeguards", "28cffcf6")
def test_the_printed_safeguards_are_arguments_and_stand_in_the_program() -> None:
    from adaptive_retraining_daemon import RetrainingDecisionEngine

    execute("safeguards", RetrainingDecisionEngine=RetrainingDecisionEngine)
    text = source("adaptive_retraining_daemon.py")
    for line in ("min_hours_between_training", "max_days_without_training", "max_trainings_per_week"):
        printed = re.search(rf"{line}=(\d+)", BLOCKS["safeguards"].text)
        assert printed is not None
        assert re.search(rf"{line}(: [\w| ]+)? ?= ?{printed[1]}\b", text), line


@covers("quiet-period-detection", "36de8a24")
def test_the_printed_quiet_limits_stand_in_check_quiet_period() -> None:
    tree = ast.parse(source("adaptive_retraining_daemon.py"))
    (method,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "check_quiet_period"
    )
    numbers = {node.value for node in ast.walk(method) if isinstance(node, ast.Constant)}
    printed = {float(text) for text in re.findall(r"< ([\d.]+)", BLOCKS["quiet-period-detection"].text)}
    assert printed == {60.0, 70.0}
    assert printed <= numbers


@pytest.mark.parametrize(
    ("cpu", "mem", "old", "new"),
    [
        (65.0, 10.0, "'quiet_cpu_percent': 60.0", "'quiet_cpu_percent': 66.0"),
        (10.0, 75.0, "'quiet_mem_percent': 70.0", "'quiet_mem_percent': 76.0"),
    ],
)
def test_editing_a_quiet_limit_works(cpu: float, mem: float, old: str, new: str) -> None:
    def is_quiet(program: Any) -> bool:
        with Told() as told:
            told.answers = quiet_answers(None, cpu=cpu, mem=mem)
            daemon = program.AdaptiveRetrainingDaemon(daemon_url=told.url, settings=settings())
            return bool(daemon.check_quiet_period())

    import adaptive_retraining_daemon

    assert not is_quiet(adaptive_retraining_daemon)
    assert is_quiet(edited_module("adaptive_retraining_daemon.py", old, new))


@pytest.mark.parametrize(
    ("old", "new", "name", "value"),
    [
        ("min_hours_between_training=6", "min_hours_between_training=7", "min_hours_between_training", 7),
        ("max_days_without_training=30", "max_days_without_training=9", "max_days_without_training", 9),
        ("max_trainings_per_week=3", "max_trainings_per_week=5", "max_trainings_per_week", 5),
    ],
)
def test_editing_a_safeguard_works(old: str, new: str, name: str, value: int) -> None:
    edited = edited_module("adaptive_retraining_daemon.py", old, new)
    decision = edited.AdaptiveRetrainingDaemon().engine.should_retrain({"needs_retraining": False})
    assert decision["safeguards"][name]["limit"] == value


def edited_module(program: str, old: str, new: str) -> Any:
    """Import a copy of a program in which a user changed one literal."""
    import importlib.util

    text = source(program).replace('"', "'")
    assert text.count(old) == 1, old
    spec = importlib.util.spec_from_loader("edited", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["edited"] = module
    lines = source(program)
    for quote in ('"', "'"):
        lines = lines.replace(old.replace("'", quote), new.replace("'", quote))
    exec(compile(lines, program, "exec"), module.__dict__)
    del sys.modules["edited"]
    return module
