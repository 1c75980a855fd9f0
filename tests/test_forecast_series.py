"""`GET /metrics/forecasts`: which series there are, what they say, and who may read them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_inference import World

from fleetcast.clock import FakeClock, from_ms, to_ms
from fleetcast.errors import SettingsError, StorageBroken
from fleetcast.inference import build_fleet
from fleetcast.schema import FleetForecast, SettledForecasts
from fleetcast.serving import export as export_module
from fleetcast.serving.export import Export
from fleetcast.settings import ExportSettings, Settings, load_settings

BIN = 300_000
METRICS = Settings().bins.forecast_metrics
ORIGIN = to_ms(FakeClock().now()) - BIN
HORIZONS = (1, 12, 96)
A_SERVER = len(METRICS) * len(HORIZONS) * 3 * 2 + len(METRICS)  # series of one server at most
HOSTILE = [
    'a"} 1\nup 0\\',
    "<img src=x onerror=alert(1)>",
    "{job='x'}",
    "日本 é\u2028",
    "back\\slash",
    "a" * 128,
]
ON = ExportSettings(enabled="on")
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Told:
    """A past that knows one ratio, and counts how often it was asked."""

    n_asked = 0
    fails = False

    def accuracy(self, _asked: object) -> dict[str, Any]:
        self.n_asked += 1
        if self.fails:
            raise StorageBroken("no such device")
        return {"metrics": {"cpu_pct": {"1": {"ratio": 0.75}, "12": {"ratio": None}}}}


def export_of(settings: ExportSettings = ON, past: Any = None, clock: FakeClock | None = None) -> Export:
    return Export(settings, build_fleet(Settings(), clock or FakeClock()), HORIZONS, past or Told())


def forecast(*names: str, origin_ms: int = ORIGIN) -> FleetForecast:
    """Return forecasts of CPU alone, whose values tell server, step and quantile."""
    quantiles = np.full((len(names), len(METRICS), 96, 3), np.nan, np.float32)
    for row in range(len(names)):
        quantiles[row, 0] = 1000 * row + np.arange(1, 97)[:, None] + np.array([0.1, 0.5, 0.9])
    sources = np.zeros(quantiles.shape[:2], bool)
    return FleetForecast(origin_ms, BIN, names, METRICS, quantiles, sources, None)


def settled(name: str, horizon: int, p50: float, actual: float, target_ms: int = ORIGIN) -> SettledForecasts:
    return SettledForecasts(
        np.array([target_ms - horizon * BIN]), np.array([target_ms]), np.array([horizon], np.int32),
        np.array([name], object), np.array(["cpu_pct"], object), np.array([p50 - 1]), np.array([p50]),
        np.array([p50 + 1]), np.array([actual]), np.array([None], object),
    )  # fmt: skip


def samples(text: bytes) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def said(export: Export) -> Samples:
    return samples(b"".join(export.pieces()))


def key(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


def servers_in(found: Samples) -> set[str]:
    return {dict(labels)["server"] for name, labels in found if name == "fleetcast_forecast"}


def test_how_far_a_forecast_looks_ahead_is_a_label_and_every_sample_is_one_of_now() -> None:
    export = export_of()
    export.note(forecast("a", "b"))

    found = said(export)

    for lead, step in (("5m", 1), ("1h", 12), ("8h", 96)):
        for quantile in ("0.1", "0.5", "0.9"):
            labels = {"metric": "cpu_pct", "lead": lead, "quantile": quantile}
            assert found[key("fleetcast_forecast", server="b", **labels)] == pytest.approx(
                1000 + step + float(quantile), rel=1e-4
            )
    assert len([name for name, _ in found if name == "fleetcast_forecast"]) == 2 * 3 * 3, "no series of NaN"
    lines = b"".join(export.pieces()).decode().splitlines()
    assert all(re.fullmatch(r"#.*|[a-z_]+(\{.*\})? \S+", line) for line in lines), "no timestamps"
    assert found[key("fleetcast_forecast_origin_timestamp_seconds")] == (ORIGIN + BIN) / 1000


def test_what_is_due_is_what_was_said_before_of_the_newest_closed_bin() -> None:
    export = export_of()
    export.note_settled(settled("a", 12, 41.0, 44.0))
    export.note(forecast("a"))

    found = said(export)

    due = {"server": "a", "metric": "cpu_pct", "lead": "1h"}
    assert [found[key("fleetcast_forecast_due", quantile=q, **due)] for q in ("0.1", "0.5", "0.9")] == [
        40.0, 41.0, 42.0,
    ]  # fmt: skip
    assert len([name for name, _ in found if name == "fleetcast_forecast_due"]) == 3


def test_settled_forecasts_of_another_bin_or_of_other_settings_are_not_due() -> None:
    for rows in (
        settled("a", 1, 41.0, 44.0, ORIGIN - BIN),
        settled("gone", 1, 41.0, 44.0),
        settled("a", 7, 41.0, 44.0),
    ):
        export = export_of()
        export.note_settled(rows)
        export.note(forecast("a"))
        assert "fleetcast_forecast_due" not in {name for name, _ in said(export)}


def test_the_choice_is_bounded_and_by_name_whatever_the_order_of_arrival() -> None:
    names = [f"web-{number:02}" for number in range(20)]
    for order in (names, names[::-1]):
        export = export_of(ExportSettings(enabled="on", max_series=3 * A_SERVER))
        export.note(forecast(*order))
        found = said(export)
        assert servers_in(found) == {"web-00", "web-01", "web-02"}
        assert found[key("fleetcast_forecasts_left_out")] == 17
        ours = {"fleetcast_forecast", "fleetcast_forecast_due", "y", "yhat", "yhat_lower", "yhat_upper"}
        assert len([name for name, _ in found if name in ours]) <= 3 * A_SERVER


def test_servers_are_chosen_by_their_whole_name_and_too_few_series_are_none() -> None:
    export = export_of(ExportSettings(enabled="on", servers="web-[0-9]|db"))
    export.note(forecast("web-1", "web-10", "db", "db-1"))
    assert servers_in(said(export)) == {"web-1", "db"}
    assert said(export)[key("fleetcast_forecasts_left_out")] == 0, "others do not match"

    export = export_of(ExportSettings(enabled="on", max_series=A_SERVER - 1))
    export.note(forecast("a"))
    assert said(export) == {key("fleetcast_forecasts_left_out"): 1}


def test_hostile_names_stay_label_values() -> None:
    export = export_of()
    export.note(forecast(*HOSTILE))

    found = said(export)

    assert servers_in(found) == set(HOSTILE)
    assert key("up") not in found
    assert len(found) == len(HOSTILE) * 9 + 3, "and no sample more"


def test_the_text_is_made_once_a_sweep_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = [0.0]
    monkeypatch.setattr(export_module, "monotonic", lambda: wall[0])
    past = Told()
    export = export_of(past=past)
    export.note(forecast("a"))
    first = export.pieces()
    assert export.pieces() is first
    export.note(forecast("a"))
    assert export.pieces() is not first
    assert said(export)[key("fleetcast_forecast_error_ratio", metric="cpu_pct", lead="5m")] == 0.75
    assert past.n_asked == 1, "a day's errors are read once an hour"
    wall[0] = 3601.0
    export.note(forecast("a"))
    export.pieces()
    assert past.n_asked == 2


def test_a_new_fleets_errors_are_told_as_soon_as_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    past: Any = Told()
    export = export_of(past=past)
    monkeypatch.setattr(past, "accuracy", lambda _asked: {"metrics": {"cpu_pct": {}}})
    export.note(forecast("a"))
    export.pieces()
    monkeypatch.undo()
    export.note(forecast("a"))
    assert key("fleetcast_forecast_error_ratio", metric="cpu_pct", lead="5m") in said(export)


def test_errors_that_cannot_be_read_cost_no_forecast(caplog: pytest.LogCaptureFixture) -> None:
    past = Told()
    past.fails = True
    export = export_of(past=past)
    export.note(forecast("a"))
    assert servers_in(said(export)) == {"a"}
    assert "forecast errors not exported" in caplog.text


def test_forecasts_of_long_ago_are_not_told_as_those_of_now() -> None:
    clock = FakeClock()
    export = export_of(clock=clock)
    export.note(forecast("a"))
    assert servers_in(said(export)) == {"a"}
    clock.advance(seconds=4 * 300)
    assert {name for name, _ in said(export)} == {
        "fleetcast_forecasts_left_out", "fleetcast_forecast_origin_timestamp_seconds",
    }  # fmt: skip


def test_the_names_of_vmanomaly_are_those_of_what_is_due() -> None:
    export = export_of(ExportSettings(enabled="on", names="vmanomaly"))
    export.note_settled(settled("a", 1, 41.0, 44.0))
    export.note(forecast("a"))

    found = said(export)

    labels = {"server": "a", "for": "cpu_pct", "lead": "5m"}
    assert [found[key(name, **labels)] for name in ("yhat_lower", "yhat", "yhat_upper")] == [40.0, 41.0, 42.0]
    assert found[key("y", server="a", **{"for": "cpu_pct"})] == 44.0
    assert "fleetcast_forecast_due" not in {name for name, _ in found}
    assert servers_in(found) == {"a"}


@pytest.mark.parametrize("names", ["fleetcast", "vmanomaly"])
def test_promtool_has_nothing_to_say(names: str) -> None:
    if shutil.which("promtool") is None:
        if os.environ.get("CI"):
            pytest.fail("promtool is missing: .ci/run installs it")
        pytest.skip("promtool is not installed")
    export = export_of(ExportSettings(enabled="on", names=names))
    export.note_settled(settled(HOSTILE[0], 1, 41.0, 44.0))
    export.note(forecast(*HOSTILE))
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=b"".join(export.pieces()), capture_output=True, check=False)
    lint = 'non-summary metrics should not have "quantile" label'  # it says what the value is
    found = (done.stdout + done.stderr).decode().splitlines()
    assert [line for line in found if not line.endswith(lint)] == []
    assert done.returncode in (0, 3), "3: lint"


def test_every_series_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "dashboards.md").read_text()
    export = export_of(ExportSettings(enabled="on", names="vmanomaly"))
    export.note_settled(settled("a", 1, 41.0, 44.0))
    export.note(forecast("a"))
    names = {name for name, _ in said(export)} | {"fleetcast_forecast_due"}
    assert len(names) == 9
    assert [name for name in names if not re.search(rf"`{name}[`{{]", page)] == []
    assert f"so many servers: {20_000 // A_SERVER}" in page.replace(
        "how many servers have series", "so many servers"
    )


def test_a_pattern_that_is_none_is_a_wrong_setting() -> None:
    with pytest.raises(SettingsError, match=r"export\.servers must be a regular expression, got 'web-\('"):
        load_settings(flags={"export.servers": "web-("}, environ={})


KEY = "0123456789abcdef"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, api_key=KEY)
    world.export = ON
    world.start()
    yield world
    world.end()


def test_only_those_with_the_key_read_and_prometheus_sends_it_as_a_bearer(world: World) -> None:
    def code(**headers: str) -> int:
        return world.client.get("/metrics/forecasts", headers=headers).status_code

    assert code() == code(Authorization="Bearer wrong") == code(Authorization=f"Basic {KEY}") == 401
    assert code(**{"X-API-Key": "wrong", "Authorization": f"Bearer {KEY}"}) == 401
    assert code(Authorization=f"Bearer {KEY}") == code(**{"X-API-Key": KEY}) == 200
    assert 'fleetcast_requests_refused_total{reason="key"} 4.0' in world.client.get("/metrics").text
    refused = world.client.get("/metrics/forecasts?server=a", headers={"X-API-Key": KEY})
    assert refused.status_code == 422, "a filter that does nothing would be taken for one"


def test_a_real_daemon_says_now_what_is_due_later(world: World) -> None:
    world.client.headers["X-API-Key"] = KEY
    told = []
    for number in range(16):
        assert world.post((HOSTILE[1], number, 20.0 + number)).status_code == 200
        world.service.cycle()
        answer = world.client.get("/metrics/forecasts")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        told.append(samples(answer.content))
    labels = {"server": HOSTILE[1], "metric": "cpu_pct"}
    for quantile in ("0.1", "0.5", "0.9"):
        for lead, n_bins in (("5m", 1), ("1h", 12)):
            made = [
                found.get(key("fleetcast_forecast", lead=lead, quantile=quantile, **labels)) for found in told
            ]
            due = [
                found.get(key("fleetcast_forecast_due", lead=lead, quantile=quantile, **labels))
                for found in told
            ]
            assert due[n_bins + 1 :] == made[1:-n_bins], "the forecast of then, with an offset of its lead"
            assert None not in due[n_bins + 1 :]
    origin = told[-1][key("fleetcast_forecast_origin_timestamp_seconds")]
    assert from_ms(round(origin * 1000)).minute == 75 % 60


def test_an_export_that_fails_costs_no_forecast(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Export, "note", fail)
    monkeypatch.setattr(Export, "note_settled", fail)
    world.client.headers["X-API-Key"] = KEY
    for number in range(3):
        world.post(("a", number, 20.0))
        world.service.cycle()
    assert world.get("/predictions/current")["predictions"]["a"]["source"] == "fallback"
    assert 'fleetcast_errors_total{part="export"} 3.0' in world.client.get("/metrics").text
    assert world.get("/status")["ledger"]["settled"] == 1


def test_without_the_setting_there_is_no_such_path(tmp_path: Path) -> None:
    world = World(tmp_path).start()
    try:
        assert world.client.get("/metrics/forecasts").status_code == 404
    finally:
        world.end()
