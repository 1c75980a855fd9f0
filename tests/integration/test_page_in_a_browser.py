"""The page in a real Chromium, on a real daemon with a recorded fleet; nothing but the daemon is asked."""

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from benchmarks.browser import CHROMIUM, Browser
from benchmarks.programs import InferenceDaemon, wait_for
from fleetcast.clock import iso_z, parse_plain_utc
from fleetcast.errors import DaemonAway
from fleetcast.files import write_json
from fleetcast.sources.replay import main as replay

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "smd_fleet.parquet"
MAPPED = ("cpu_pct=cpu_r_norm01*100", "mem_pct=mem_u_norm01*100", "disk_io_mb_s=disk_wb_norm01*50")
SERVER = "smd-machine-1-2"
SILENT = "zz-silent"
VENDOR = ROOT / "tests" / "vendor"
HOURS = 14  # forecasts of 8 h before have come due
CONFIG = """
[clock]
mode = "data"
[paths]
models_dir = "no_models"
"""
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
CUT = "[...document.querySelectorAll('.scroll')].filter((it) => it.scrollWidth > it.clientWidth).length"
LIMITS = {"per": 0.1, "dss": 0.2, "fds": 0.15, "anomaly_rate": 0.05, "combined_score": 0.12}


def leave_drift_files(folder: Path, server: str) -> None:
    """Write what a retraining daemon leaves behind, with one series in alarm."""
    start = datetime(2000, 1, 10, tzinfo=UTC)
    scores = dict.fromkeys(LIMITS, 0.11)
    lines = [
        json.dumps({"at": iso_z(start + timedelta(minutes=5 * step)), "drift": scores}) for step in range(30)
    ]
    (folder / "decisions.jsonl").write_text("\n".join(lines) + "\n")
    series = {
        "server": server, "metric": "cpu_pct", "is_drifting": True, "score": 1.5, "usual": 5.0,
        "actual": 25.0, "says": "has left its usual values", "since": iso_z(start),
        "in_alarm_since": iso_z(start),
    }  # fmt: skip
    check = {
        "made_at": iso_z(start + timedelta(hours=HOURS)), "status": "ready", "recommendation": "OK",
        "current_metrics": scores, "thresholds": LIMITS, "top_drifting": [series],
    }  # fmt: skip
    write_json(folder / "drift_metrics.json", check)
    attempt = {
        "id": "x", "rule": "initial", "reason": "initial training", "outcome": "rejected", "version": None,
        "started_at": "2000-01-10T00:00:00", "ended_at": "2000-01-10T00:10:00",
        "why": "loss is 1.2 of the champion's",
    }  # fmt: skip
    write_json(folder / "retraining_state.json", {"attempts": [attempt], "total_trainings": 0})
    sentence = "it passes 90 % within the horizon with a probability of 0.83 (> 0.5)"
    times = {"since": iso_z(start), "seen_at": iso_z(start), "fired_at": iso_z(start), "ended_at": None}
    alert = {
        "rule": "LimitLikely", "severity": "warning", "state": "firing", "sentence": sentence, **times,
        "labels": {"server": HOSTILE, "metric": "cpu_pct"},
    }  # fmt: skip
    slack = {
        "told": {}, "sent": [], "last_ok": None, "failures": 3, "next_try": None,
        "last_error": "HTTP 403: no_team",
    }  # fmt: skip
    write_json(folder / "alerts.json", {"format": 1, "alerts": [alert], "channels": {"slack": slack}})


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceDaemon]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "fleetcast.toml").write_text(CONFIG)
    with InferenceDaemon(folder) as daemon:
        asked = ["--data", str(SAMPLE), "--url", daemon.url, "--days", str(HOURS / 24), "--map", *MAPPED]
        assert replay(asked) == 0
        newest = daemon.status()["newest_record_time"]
        daemon.client.post_records([{"timestamp": newest, "server_name": HOSTILE, "cpu_pct": 1.0}])
        before = iso_z(parse_plain_utc(newest) - timedelta(hours=2))
        daemon.client.post_records([{"timestamp": before, "server_name": SILENT, "cpu_pct": 42.0}])
        wait_for("the last sweep", lambda: not daemon.status()["backlog"])
        leave_drift_files(folder, SERVER)
        yield daemon
        assert daemon.stop() == 0


def is_local(url: str, daemon: InferenceDaemon) -> bool:
    return url.startswith((f"{daemon.url}/", "data:", "about:"))


def check_quiet(browser: Browser, daemon: InferenceDaemon) -> None:
    """No script failed, the policy forbade nothing, and no address but the daemon's was asked for."""
    browser.evaluate("1")
    assert browser.complaints == []
    assert [url for url in browser.requests if not is_local(url, daemon)] == []


def text(browser: Browser, selector: str) -> str:
    found: str = browser.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")
    return found


def has_ink(selector: str) -> str:
    """Return a condition: a canvas is painted."""
    return (
        f"(() => {{ const it = document.querySelector({json.dumps(selector)});"
        " if (!it || !it.width) return false;"
        " const dots = it.getContext('2d').getImageData(0, 0, it.width, it.height).data;"
        " let n = 0; for (let i = 3; i < dots.length; i += 4) n += dots[i] > 0; return n > 500; })()"
    )


WATCH_LABELS = """
window.labels = [];  // those of axes of values: their text, and where it begins
const pen = CanvasRenderingContext2D.prototype, write = pen.fillText;
pen.fillText = function (text, x, ...rest) {
  const place = this.getTransform().transformPoint({ x: x - this.measureText(text).width, y: 0 });
  if (this.textAlign === "right") labels.push([text, place.x]);
  return write.call(this, text, x, ...rest);
};
"""


def test_the_root_leads_to_the_fleet_with_its_strip_and_table(
    browser: Browser, daemon: InferenceDaemon
) -> None:
    browser.open(f"{daemon.url}/")
    browser.wait("document.querySelectorAll('tbody tr').length > 5")
    browser.wait(has_ink("canvas.strip"))
    assert browser.evaluate("location.pathname") == "/ui/"
    assert SERVER in text(browser, "tbody")
    assert text(browser, "h1") == "Fleet"
    check_quiet(browser, daemon)


def test_a_hostile_name_stays_text(browser: Browser, daemon: InferenceDaemon) -> None:
    browser.open(f"{daemon.url}/ui/#/?filter={quote('<img')}")
    browser.wait("document.querySelectorAll('tbody tr').length === 1")
    assert HOSTILE in text(browser, "tbody")
    browser.evaluate("document.querySelector('tbody a').click()")
    browser.wait("document.querySelector('h1').textContent.startsWith('<img')")
    browser.wait("document.querySelector('.card')")
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    browser.wait(f"document.title === {json.dumps(f'{HOSTILE} · fleetcast')}")
    check_quiet(browser, daemon)


def test_a_server_s_charts_show_the_past_the_fan_and_what_was_said(
    browser: Browser, daemon: InferenceDaemon
) -> None:
    browser.open(f"{daemon.url}/ui/#/server?name={SERVER}")
    browser.wait(has_ink(".plot canvas"))
    assert points(browser) == 48 * 12 + 96
    assert "Ahead" in text(browser, "table.small")
    assert "8 h" in text(browser, "table.small")
    assert "Next 8 h" in text(browser, "figcaption")
    assert "drifts" in text(browser, ".head")
    browser.evaluate("[...document.querySelectorAll('button.plain')][0].click()")
    browser.wait("document.querySelectorAll('.scroll.tall tbody tr').length > 600")
    browser.evaluate("document.querySelector('input[value=\"96\"]').click()")
    browser.wait("location.hash.includes('said=96')")
    check_quiet(browser, daemon)


def points(browser: Browser) -> int:
    return int(browser.evaluate("document.querySelector('.plot').dataset.points"))


def test_a_time_is_chosen_and_a_link_shows_the_same(browser: Browser, daemon: InferenceDaemon) -> None:
    browser.open(f"{daemon.url}/ui/#/server?name={SERVER}")
    browser.wait(has_ink(".plot canvas"))
    browser.evaluate("document.querySelector('input[value=\"6h\"]').click()")
    browser.wait(f"document.querySelector('.plot').dataset.points === '{6 * 12 + 96}'")
    assert "span=6h" in browser.evaluate("location.hash")
    browser.evaluate("document.querySelector('[data-focus=\"earlier\"]').click()")
    browser.wait("location.hash.includes('from=')")
    browser.wait("document.querySelector('.range').textContent.includes(' to ')")
    browser.wait("document.querySelector('.plot').dataset.points === '72'")  # nothing ahead is in sight
    assert [url for url in browser.requests if url.startswith(f"{daemon.url}/history?")]
    asked, told = browser.evaluate("[location.href, document.querySelector('.range').textContent]")
    assert "6 h" in told
    check_quiet(browser, daemon)
    with Browser() as other:
        other.open(asked)
        other.wait(has_ink(".plot canvas"))
        assert text(other, ".range") == told
        assert points(other) == points(browser)
        assert other.evaluate("document.querySelector('input[value=\"6h\"]').checked")
        other.evaluate("document.querySelector('[data-focus=\"to now\"]').click()")
        other.wait("document.querySelector('.plot').dataset.points === '168'")
        assert "from=" not in other.evaluate("location.hash")


def test_a_chart_is_zoomed_by_dragging_and_by_keys(browser: Browser, daemon: InferenceDaemon) -> None:
    browser.open(f"{daemon.url}/ui/#/server?name={SERVER}")
    browser.wait(has_ink(".plot canvas"))
    browser.drag(".plot .u-over", 0.7, 0.8)
    browser.wait("location.hash.includes('from=')")
    browser.wait("document.querySelector('.range').textContent.includes('to')")
    reset = "document.querySelector('.plot .u-over').dispatchEvent(new MouseEvent('dblclick'))"
    browser.evaluate(reset)
    browser.wait("!location.hash.includes('from=')")
    browser.evaluate("document.querySelector('.plot').focus()")
    for key, has_zoomed in (("+", True), ("Escape", False)):
        browser.press(key)
        browser.wait(f"location.hash.includes('from=') === {json.dumps(has_zoomed)}")
    check_quiet(browser, daemon)


@pytest.mark.parametrize("width", [1400, 390])
def test_no_label_of_an_axis_is_cut_off(browser: Browser, daemon: InferenceDaemon, width: int) -> None:
    browser.resize(width, 900)
    browser.open(f"{daemon.url}/ui/")
    browser.evaluate(WATCH_LABELS)
    browser.evaluate(f"location.hash = '#/server?name={SERVER}'")
    browser.wait(has_ink("section[aria-label=disk_io_mb_s] canvas"))
    labels = browser.evaluate("labels")
    assert any(text.endswith(" MB/s") and text != "0 MB/s" for text, _ in labels)
    assert [text for text, left in labels if left < 0] == []


def test_the_keyboard_reaches_a_server_and_its_values(browser: Browser, daemon: InferenceDaemon) -> None:
    browser.open(f"{daemon.url}/ui/")
    browser.wait(has_ink("canvas.strip"))
    browser.evaluate("document.querySelector('canvas.strip').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    browser.wait("document.querySelector('.strip-says').textContent.includes('smd-machine')")
    browser.press("Enter")
    browser.wait(has_ink(".plot canvas"))
    browser.evaluate("document.querySelector('.plot').focus()")
    browser.press("ArrowRight")
    browser.wait("document.querySelector('.reads b')")
    assert "%" in text(browser, ".reads")
    check_quiet(browser, daemon)


def test_sorting_keeps_the_focus_and_is_told_to_a_screen_reader(
    browser: Browser, daemon: InferenceDaemon
) -> None:
    browser.open(f"{daemon.url}/ui/")
    browser.wait("document.querySelectorAll('tbody tr').length > 5")
    press = "document.querySelector('[data-focus=\"sort cpu_pct\"]')"
    browser.evaluate(f"{press}.focus(); {press}.click()")
    browser.wait("document.querySelector('th[aria-sort=descending] button').dataset.focus === 'sort cpu_pct'")
    assert browser.evaluate("document.activeElement.dataset.focus") == "sort cpu_pct"
    values = browser.evaluate(
        "[...document.querySelectorAll('tbody tr')].map((row) => parseFloat(row.cells[3].textContent))"
    )
    assert values == sorted(values, reverse=True)
    assert "sort=cpu_pct" in browser.evaluate("location.hash")
    browser.evaluate("document.querySelector('[data-focus=\"sort error\"]').click()")
    browser.wait("document.querySelector('th[aria-sort] button').dataset.focus === 'sort error'")
    assert browser.evaluate("document.querySelectorAll('th[aria-sort]').length") == 1


def test_a_silent_server_comes_first_and_its_values_read_as_old(
    browser: Browser, daemon: InferenceDaemon
) -> None:
    browser.open(f"{daemon.url}/ui/")
    browser.wait("document.querySelectorAll('tbody tr').length > 5")
    assert text(browser, "th[aria-sort=descending]").startswith("State")
    assert "sort=" not in browser.evaluate("location.hash")
    first = text(browser, "tbody tr.old")
    assert browser.evaluate("document.querySelector('tbody tr').className") == "old"
    assert first.startswith(SILENT)
    assert "silent since 11:" in first
    assert "latency_ms" not in text(browser, "thead")  # no server sends it
    browser.evaluate("document.querySelector('tbody a').click()")
    browser.wait("document.querySelector('h2 .number.old')")
    assert text(browser, "h2 .number.old").startswith("42.0 %")
    assert "silent since 11:" in text(browser, "h2 .number.old")
    assert "silent since 11:" in text(browser, ".head")
    check_quiet(browser, daemon)


def test_accuracy_is_whole_on_a_telephone(browser: Browser, daemon: InferenceDaemon) -> None:
    browser.resize(360, 800)
    browser.open(f"{daemon.url}/ui/#/server?name={SERVER}")
    browser.wait("document.querySelectorAll('.scroll table.small').length > 2")
    assert browser.evaluate(CUT) == 0
    assert browser.evaluate("document.querySelector('.scroll:has(table.small)').tabIndex") == 0


@pytest.mark.parametrize("width", [1024, 768, 360])
@pytest.mark.parametrize(("page", "column"), [("capacity?limit=70", "Metric"), ("drift", "In alarm since")])
def test_tables_of_capacity_and_drift_need_no_sideways_scrolling(
    browser: Browser, daemon: InferenceDaemon, page: str, column: str, width: int
) -> None:
    browser.resize(width, 800)
    browser.open(f"{daemon.url}/ui/#/{page}")
    browser.wait("document.querySelectorAll('.blocks tbody tr').length > 0")
    assert browser.evaluate(CUT) == 0
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    label = f"getComputedStyle(document.querySelector('td[data-label=\"{column}\"]'), '::before').content"
    assert browser.evaluate(label) == ("none" if width > 860 else f'"{column}"')


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("capacity", ("90 % within 8 h", "No server sends disk_usage_pct, so no disk has a date.")),
        ("drift", ("Prediction error", "has left its usual values", "over the limit")),
        (
            "trainings",
            ("Did not go into service", "loss is 1.2", "Which model serves", "Nothing has happened"),
        ),
        ("health", ("The daemon", "Forecasts settled", f"LimitLikely {HOSTILE} cpu_pct", "3 times in a row")),
    ],
)
def test_the_other_pages_say_what_they_are_for(
    browser: Browser, daemon: InferenceDaemon, page: str, words: tuple[str, ...]
) -> None:
    browser.open(f"{daemon.url}/ui/#/{page}")
    for word in words:
        browser.wait(f"document.querySelector('main').innerText.includes({json.dumps(word)})")
    if page == "drift":
        browser.wait(has_ink(".plot canvas"))
    check_quiet(browser, daemon)


def test_without_a_configured_key_no_order_is_offered(browser: Browser, daemon: InferenceDaemon) -> None:
    browser.open(f"{daemon.url}/ui/#/trainings")
    browser.wait("document.querySelector('[data-focus=\"order hold\"]')?.disabled")
    assert "orders need a configured key: set TFT_API_KEY" in text(browser, "main")


def test_an_order_is_given_with_a_reason_and_refused_in_the_daemons_words(
    tmp_path: Path, browser: Browser
) -> None:
    with InferenceDaemon(tmp_path, environ={"TFT_API_KEY": "right-key"}) as daemon:
        browser.open(f"{daemon.url}/ui/#/trainings")
        browser.wait("document.getElementById('ask').open")
        answer_dialog(browser, "right-key")
        order_a_hold(browser, "Written down.")
        browser.evaluate("sessionStorage.setItem('fleetcast-key', 'wrong-key')")
        order_a_hold(browser, "Nothing was ordered: ")


def order_a_hold(browser: Browser, told: str) -> None:
    browser.wait("document.querySelector('[data-focus=\"order hold\"]:enabled')")
    browser.evaluate("document.querySelector('[data-focus=\"order hold\"]').click()")
    browser.wait("document.querySelector('dialog[open] #reason')")
    browser.evaluate("document.querySelector('#reason').focus()")
    browser.write("release week")
    browser.evaluate("document.querySelector('dialog[open] button.main').click()")
    browser.wait(f"document.querySelector('main').innerText.includes({json.dumps(told)})")


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_text_is_readable_and_nothing_is_wider_than_the_screen(
    daemon: InferenceDaemon, width: int, is_dark: bool
) -> None:
    with Browser(width, 900, is_dark=is_dark) as browser:
        for place in ("", f"server?name={SERVER}", "drift", "trainings", "health"):
            browser.open(f"{daemon.url}/ui/#/{place}")
            browser.wait(
                "document.querySelector('main .card') && !document.querySelector('main table:empty')"
            )
            browser.wait("document.querySelector('main').innerText.length > 120")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, place
            assert browser.evaluate(PALE) == [], place
            assert browser.evaluate(UNNAMED) == [], place
            assert browser.evaluate("document.querySelectorAll('h1').length") == 1


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious_on_any_page(daemon: InferenceDaemon, is_dark: bool) -> None:
    axe = (VENDOR / "axe.min.js").read_text(encoding="utf-8")
    with Browser(1200, 900, is_dark=is_dark) as browser:
        for place in ("", f"server?name={SERVER}", "capacity", "drift", "trainings", "health"):
            browser.open(f"{daemon.url}/ui/#/{place}")
            browser.wait("document.querySelector('main').innerText.length > 120")
            browser.evaluate(f"{axe}; 1")
            found = browser.evaluate(AXE)
            assert found["passes"] > 10, place
            assert found["violations"] == [], place


def test_axe_is_byte_for_byte_what_was_released() -> None:
    (package,) = json.loads((VENDOR / "vendor.json").read_text())
    sums = {name: hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() for name in package["sha256"]}
    assert sums == package["sha256"]
    assert f"axe v{package['version']}" in (VENDOR / "axe.min.js").read_text()[:100]
    assert {path.name for path in VENDOR.iterdir()} == {"vendor.json", *sums}


# What axe-core calls serious or critical, with the first element that has it.
AXE = """axe.run(document, {resultTypes: ["violations"]}).then((found) => ({
  passes: found.passes.length,
  violations: found.violations.filter((one) => ["serious", "critical"].includes(one.impact))
    .map((one) => `${one.id}: ${one.nodes.length} such as ${one.nodes[0].html.slice(0, 160)}`),
}))"""
# Texts whose contrast with what lies behind them is under 4.5 (WCAG 2.2, 1.4.3); the disabled may be pale.
PALE = """(() => {
  const parse = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const line = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * line(r / 255) + 0.7152 * line(g / 255) + 0.0722 * line(b / 255);
  const behind = (it) => {
    for (; it; it = it.parentElement) {
      const colour = parse(getComputedStyle(it).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const left_out = '.hidden, :disabled, dialog, noscript, .skip';
  const bad = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode());) {
    const it = node.parentElement, text = node.data.trim();
    if (!text || !it.checkVisibility() || it.closest(left_out)) continue;
    const both = [light(parse(getComputedStyle(it).color)), light(behind(it))].sort((a, b) => b - a);
    const contrast = (both[0] + 0.05) / (both[1] + 0.05);
    if (contrast < 4.5) bad.push(`${text.slice(0, 40)} ${contrast.toFixed(2)}`);
  }
  return bad;
})()"""
# Things to operate or to look at without a name for a screen reader.
UNNAMED = """[...document.querySelectorAll('a, button, input, .strip, [role=img], [role=region], section')]
  .filter((it) => it.checkVisibility() && !it.innerText?.trim() && !it.getAttribute('aria-label'))
  .filter((it) => !it.labels?.length && !it.title).map((it) => it.outerHTML.slice(0, 120))"""


def test_the_key_is_asked_for_once_and_kept_for_the_tab_alone(tmp_path: Path, browser: Browser) -> None:
    with InferenceDaemon(tmp_path, environ={"TFT_API_KEY": "right-key"}) as daemon:
        browser.open(f"{daemon.url}/ui/")
        browser.wait("document.getElementById('ask').open")
        answer_dialog(browser, "wrong-key")
        browser.wait("document.getElementById('ask-text').textContent.includes('did not accept')")
        browser.wait("document.getElementById('ask').open")
        answer_dialog(browser, "right-key")
        browser.wait("document.querySelector('main').innerText.includes('No server has sent anything yet')")
        kept: dict[str, Any] = browser.evaluate(
            "({ tab: Object.values(sessionStorage), always: { ...localStorage }, cookie: document.cookie })"
        )
        assert kept == {"tab": ["right-key"], "always": {}, "cookie": ""}
        assert [url for url in browser.requests if "key" in url or not is_local(url, daemon)] == []
        browser.open(f"{daemon.url}/ui/#/health")
        browser.wait("document.querySelector('main').innerText.includes('The daemon')")
        assert not browser.evaluate("document.getElementById('ask').open")


def answer_dialog(browser: Browser, key: str) -> None:
    browser.evaluate("document.getElementById('key').focus()")
    browser.write(key)
    browser.press("Enter")
    browser.wait("!document.getElementById('ask').open || document.getElementById('key').value === ''")


def test_a_daemon_that_went_away_is_told_and_found_again(tmp_path: Path, browser: Browser) -> None:
    with InferenceDaemon(tmp_path) as daemon:
        browser.open(f"{daemon.url}/ui/#/health")
        browser.wait("document.querySelector('main').innerText.includes('The daemon')")
        daemon.kill()
        browser.wait("document.getElementById('alert').innerText.includes('does not answer')")
        daemon.start()
        browser.wait("document.getElementById('alert').hidden")
        daemon.kill()
        browser.wait("!document.getElementById('alert').hidden")
        daemon._environ["TFT_API_KEY"] = "right-key"
        daemon.start()
        browser.wait("document.getElementById('ask').open")
        assert browser.evaluate("document.getElementById('alert').hidden"), "the daemon answers"


def test_a_daemon_without_records_says_what_to_do(tmp_path: Path, browser: Browser) -> None:
    with InferenceDaemon(tmp_path) as daemon:
        browser.open(daemon.url + "/ui/")
        browser.wait("document.querySelector('main').innerText.includes('No server has sent anything yet')")
        with pytest.raises(DaemonAway):
            daemon.client.get("/ui/api/server?name=a")
        check_quiet(browser, daemon)
