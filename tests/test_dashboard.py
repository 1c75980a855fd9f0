"""deploy/grafana/: every query is PromQL and asks for what a scrape holds; every panel has its place."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_scrape import Labels, problems, whole_scrape
from test_prometheus_rules import promtool

DASHBOARD = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "fleetcast.json"
OF_GRAFANA = {"datasource", "__rate_interval"}
WIDTH = 24
BOARD: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = BOARD["panels"]
every_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])


def queries() -> Iterator[tuple[str, str]]:
    """Yield every expression that Grafana sends, with where it stands."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for note in BOARD["annotations"]["list"]:
        yield note["name"], note["expr"]
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"])
            assert match, variable
            yield variable["name"], match[1]


every_query = pytest.mark.parametrize(("where", "expr"), [*queries()], ids=lambda text: text[:40])


@pytest.fixture(scope="module")
def scrape(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Labels]]:
    return whole_scrape(tmp_path_factory.mktemp("scrape"))


def test_promtool_reads_every_query(tmp_path: Path) -> None:
    rules = [
        {"record": f"query:{number}", "expr": expr.replace("$__rate_interval", "5m")}
        for number, (_, expr) in enumerate(queries())
    ]
    assert len(rules) > 30
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(path))


def test_promtool_reads_the_queries_of_the_page_and_they_ask_for_what_is_scraped(
    tmp_path: Path, scrape: dict[str, list[Labels]]
) -> None:
    page = (DASHBOARD.parents[2] / "docs" / "dashboards.md").read_text(encoding="utf-8")
    exprs = re.findall(r"^((?:fleetcast_|max by).*?)\s+#", page, re.M)
    assert len(exprs) == 3
    rules = [{"record": f"page:{number}", "expr": expr} for number, expr in enumerate(exprs)]
    path = tmp_path / "page.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "page", "rules": rules}]}))
    promtool("check", "rules", str(path))
    assert [name for expr in exprs for name in re.findall(r"fleetcast_\w+", expr) if name not in scrape] == []


@every_query
def test_every_metric_and_label_of_a_query_is_in_a_real_scrape(
    where: str, expr: str, scrape: dict[str, list[Labels]]
) -> None:
    assert re.search(r"\b(fleetcast_|process_|ALERTS)", expr), where
    assert list(problems(expr, scrape)) == []


@every_query
def test_a_query_uses_known_variables_and_asks_one_chosen_daemon(where: str, expr: str) -> None:
    known = OF_GRAFANA | {variable["name"] for variable in BOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", expr)) <= known, where
    for selector in re.findall(r"\b(?:fleetcast|process)_\w+(\{[^}]*\})?", expr):
        assert 'instance=~"$instance"' in selector or where == "instance"


def test_variables_are_made_of_labels_that_their_series_have(scrape: dict[str, list[Labels]]) -> None:
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query" and variable["name"] != "instance":
            name, label = re.findall(r"\((\w+).*, (\w+)\)", variable["definition"])[0]
            assert any(label in labels for labels in scrape[name])
            assert variable["definition"] == variable["query"]["query"]


@every_panel
def test_labels_in_a_legend_are_labels_of_what_is_drawn(
    panel: dict[str, Any], scrape: dict[str, list[Labels]]
) -> None:
    for target in panel["targets"]:
        name = re.findall(r"\b(?:fleetcast|process)_\w+|ALERTS", target["expr"])[0]
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert any(label in labels for labels in scrape[name])


@every_panel
def test_a_panel_explains_itself_and_asks_the_chosen_source(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    refs = Counter(target["refId"] for target in panel["targets"])
    assert set(refs.values()) == {1}


def test_panels_fill_the_width_and_none_lies_on_another() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken = Counter(
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert set(taken.values()) == {1}
    height = max(y for _, y in taken) + 1
    assert len(taken) == WIDTH * height


def test_the_thresholds_of_drift_disk_and_trainings_are_those_of_the_alert_rules() -> None:
    last = {
        panel["title"]: [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]
        for panel in PANELS
        if panel["type"] == "stat"
    }
    assert last["Drift, combined"][-1] == 0.15
    assert last["Free disk"][1] == 5e9
    assert last["Trainings in 7 days"][1] == 3
    assert last["Newest record"][-1] == 120
