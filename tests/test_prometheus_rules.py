"""deploy/prometheus/: the rules pass promtool, each alert is tried, and every metric in them exists."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_scrape import JOB, Labels, problems, whole_scrape

from fleetcast.cli import COMMANDS
from fleetcast.settings import every_setting

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "prometheus"
RULES = FOLDER / "fleetcast.rules.yml"
TRIALS = FOLDER / "fleetcast.rules.test.yml"


def promtool(*arguments: str) -> None:
    """Run it; fail with what it says."""
    if shutil.which("promtool") is None:
        if os.environ.get("CI"):
            pytest.fail("promtool is missing: .ci/run installs it")
        pytest.skip("promtool is not installed")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


every_alert = pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])


@pytest.fixture(scope="module")
def scrape(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Labels]]:
    return whole_scrape(tmp_path_factory.mktemp("scrape"))


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    promtool("check", "rules", str(RULES))


def test_each_alert_does_in_promtool_what_its_trial_says() -> None:
    promtool("test", "rules", str(TRIALS))
    printed = f"```bash\npromtool test rules {TRIALS.relative_to(ROOT)}\n```"
    assert printed in (ROOT / "docs" / "dashboards.md").read_text()


@every_alert
def test_each_alert_is_tried_silent_and_firing(alert: dict[str, Any]) -> None:
    trials = [
        bool(trial["exp_alerts"])
        for test in yaml.safe_load(TRIALS.read_text())["tests"]
        for trial in test["alert_rule_test"]
        if trial["alertname"] == alert["alert"]
    ]
    assert set(trials) == {True, False}


@every_alert
def test_every_metric_and_label_of_an_alert_is_in_a_real_scrape(
    alert: dict[str, Any], scrape: dict[str, list[Labels]]
) -> None:
    queried = " ".join([alert["expr"], *alert["annotations"].values()])
    assert "fleetcast" in queried
    assert list(problems(queried, scrape)) == []


def test_a_metric_a_label_or_a_value_that_no_scrape_has_is_found() -> None:
    known: dict[str, list[Labels]] = {"up": [JOB], "fleetcast_y": [{"side": "served"}]}
    expr = 'up{job="b"} == 0 or up{pod="a"} or fleetcast_x > 1 or fleetcast_y{side="model"}'
    assert list(problems(expr, known)) == [
        'up{job="b"}',
        'up{pod="a"}',
        "fleetcast_x",
        'fleetcast_y{side="model"}',
    ]
    assert (
        list(problems('up{job="fleetcast"} + fleetcast_y{side="$side",job="fleetcast",instance="a"}', known))
        == []
    )


@every_alert
def test_what_an_alert_tells_to_do_can_be_done(alert: dict[str, Any]) -> None:
    text = " ".join(alert["annotations"].values())
    assert set(re.findall(r"`fleetcast ([a-z-]+)", text)) <= {*COMMANDS}
    assert [name for name in re.findall(r"`python (\S+\.py)", text) if not (ROOT / name).exists()] == []
    units = re.findall(r"`systemctl status ([\w-]+)", text)
    assert [name for name in units if not (ROOT / "deploy" / "systemd" / f"{name}.service").exists()] == []
    keys = {info.key for info in every_setting()}
    parts = {info.part for info in every_setting()}
    named = {
        f"{part}.{name}" for part, name in re.findall(r"\b([a-z_]+)\.([a-z_]+)\b", text) if part in parts
    }
    assert named <= keys
    assert alert["labels"]["severity"] in ("warning", "critical")


def test_the_documented_configuration_loads_the_rules(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "dashboards.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    (documented,) = [block for block in blocks if block.startswith("# prometheus.yml")]
    shutil.copy(RULES, tmp_path)
    (tmp_path / "prometheus.yml").write_text(documented.replace("/etc/prometheus/", f"{tmp_path}/"))
    assert f"{tmp_path}/fleetcast.rules.yml" in (tmp_path / "prometheus.yml").read_text()
    promtool("check", "config", str(tmp_path / "prometheus.yml"))
