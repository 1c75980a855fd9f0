"""The page in a real Chromium where an address, a key, a fleet or a screen is not the usual one."""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from benchmarks.browser import CHROMIUM, Browser
from benchmarks.programs import InferenceDaemon, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
CONFIG = '[clock]\nmode = "data"\n[paths]\nmodels_dir = "no_models"\n'
LONG = "ip-10-0-12-255.eu-central-1.compute.internal.example.net"
FULL = {"mem_pct": 50.0, "disk_io_mb_s": 1234.5, "latency_ms": 98765.0}
INHERITED = ("toString", "__proto__", "constructor", "hasOwnProperty")  # every object of JavaScript has them
VISIBLE = "[...document.querySelectorAll('main > *')].filter((it) => it.checkVisibility()).length"
PULSES = "performance.getEntriesByType('resource').filter((it) => it.name.endsWith('api/pulse')).length"
NAMES = "[...document.querySelectorAll('tbody th')].map((it) => it.innerText)"
CUT = "[...document.querySelectorAll('.scroll')].filter((it) => it.scrollWidth > it.clientWidth).length"
# Names that break elsewhere than behind a sign that parts them: the boxes of words that have two lines.
BROKEN = """[...document.querySelectorAll('tbody th a')].flatMap((link) => [...link.childNodes])
  .filter((node) => node.nodeType === 3).flatMap((node) => [...node.data.matchAll(/[\\w]+/g)].map((word) => {
    const range = document.createRange();
    range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
    return new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1 ? word[0] : null;
  })).filter(Boolean)"""


def bin_of(daemon: InferenceDaemon, number: int, **cpu: float) -> None:
    """Send one bin: a value for each server, `_` in a name for `-`."""
    stamp = f"2020-01-01T{number // 12:02}:{5 * (number % 12):02}:01Z"
    records = [
        {"timestamp": stamp, "server_name": name.replace("_", "-"), "cpu_pct": value, **FULL}
        for name, value in cpu.items()
    ]
    daemon.client.post_records(records)
    wait_for("the sweep", lambda: not daemon.status()["backlog"])


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceDaemon]:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "fleetcast.toml").write_text(CONFIG)
    with InferenceDaemon(folder) as daemon:
        for number in range(9):
            others = {"gone_1": 96.0} if not number else {}
            bin_of(daemon, number, web_1=95.0, web_2=99.0, calm_1=5.0, **{LONG: 7.0}, **others)
        stamp = "2020-01-01T00:40:02Z"
        daemon.client.post_records([{"timestamp": stamp, "server_name": "fans", "fans_rpm": 1200.0}])
        yield daemon
        assert daemon.stop() == 0


def says(browser: Browser, selector: str, words: str) -> None:
    browser.wait(f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(words)})")


@pytest.mark.parametrize(
    "query",
    [
        "offset=-5",
        "offset=1e400",
        "offset=999999",
        "offset=x",
        "order=zzz",
        "state=zzz",
        "sort=nope",
        "sort=nope&order=asc",
        *(f"state={name}" for name in INHERITED),
    ],
)
def test_what_makes_no_sense_in_an_address_shows_the_fleet(
    browser: Browser, daemon: InferenceDaemon, query: str
) -> None:
    browser.open(f"{daemon.url}/ui/#/?{query}")
    browser.wait("document.querySelectorAll('tbody tr').length === 6")
    says(browser, ".tools [role=status]", "1 to 6 of 6")
    assert browser.evaluate(NAMES)[:3] == ["gone-1", "web-2", "web-1"]
    assert browser.evaluate("document.getElementById('alert').hidden")
    assert browser.complaints == [] or query.startswith("sort=nope")  # the refusal of a column


@pytest.mark.parametrize("name", INHERITED)
def test_a_view_or_a_span_by_an_inherited_name_is_the_usual_one(
    browser: Browser, daemon: InferenceDaemon, name: str
) -> None:
    browser.open(f"{daemon.url}/ui/#/{name}")
    browser.wait("document.querySelectorAll('tbody tr').length === 6")
    browser.evaluate(f"location.hash = '#/server?name=web-1&span={name}&said={name}'")
    browser.wait("document.querySelector('.plot canvas')?.checkVisibility()")
    assert browser.evaluate("document.querySelector('input[name=span]:checked').value") == "48h"
    assert browser.evaluate("document.getElementById('alert').hidden")
    assert browser.complaints == []


def test_the_pulse_goes_on_where_the_first_view_fails(browser: Browser, daemon: InferenceDaemon) -> None:
    script = "window.ResizeObserver = undefined"  # the strip of the fleet cannot be made
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)
    browser.open(f"{daemon.url}/ui/")
    says(browser, "#alert", "The page failed")
    browser.wait(f"{PULSES} >= 2")
    says(browser, "#pulse", "Forecast of")
    browser.evaluate("location.hash = '#/health'")
    says(browser, "main", "The daemon")
    browser.wait("document.getElementById('alert').hidden")


def test_a_view_that_nothing_was_received_for_shows_no_empty_cards(tmp_path: Path, browser: Browser) -> None:
    with InferenceDaemon(tmp_path) as daemon:
        browser.open(f"{daemon.url}/ui/#/health")
        says(browser, "main", "The daemon")
        daemon.kill()
        says(browser, "#alert", "shows what it said last")
        for place in ("capacity", "drift", "", "server?name=a"):
            browser.evaluate(f"location.hash = '#/{place}'")
            says(browser, "#alert", "Nothing was received for this view yet")
            browser.wait(f"{VISIBLE} === 1")
        browser.evaluate("location.hash = '#/capacity'")
        daemon.start()
        browser.wait("document.getElementById('alert').hidden")
        says(browser, "main", "No forecast yet")


def test_a_choice_among_servers_without_an_answer_is_told_and_made_up_for(
    tmp_path: Path, browser: Browser
) -> None:
    (tmp_path / "fleetcast.toml").write_text(CONFIG)
    with InferenceDaemon(tmp_path) as daemon:
        bin_of(daemon, 0, web_1=5.0, db_1=5.0)
        browser.open(f"{daemon.url}/ui/")
        browser.wait("document.querySelectorAll('tbody tr').length === 2")
        daemon.kill()
        browser.evaluate("document.querySelector('input[type=search]').focus()")
        browser.write("web")
        says(browser, "#alert", "The daemon does not answer")
        browser.evaluate("document.querySelector('.strip').focus()")
        browser.press("ArrowRight")
        says(browser, ".strip-says", "this cell has no name")
        browser.press("Enter")
        daemon.start()
        browser.wait("document.querySelectorAll('tbody tr').length === 1")
        assert browser.evaluate(NAMES) == ["web-1"]
        assert [one for one in browser.complaints if "ERR_CONNECTION_REFUSED" not in one] == []


@pytest.mark.parametrize("place", ["", "capacity", "drift", "health", "server?name=web-1"])
def test_a_view_waits_in_words_for_a_slow_first_answer(
    browser: Browser, daemon: InferenceDaemon, place: str
) -> None:
    browser.open(f"{daemon.url}/ui/#/trainings")
    says(browser, "main", "No training yet")
    browser.evaluate("""const ask = window.fetch; window.answer = new Promise((go) => { window.go = go; });
      window.fetch = async (...all) => { await window.answer; return ask(...all); }; 1""")
    browser.evaluate(f"location.hash = '#/{place}'")
    browser.wait(f"{VISIBLE} === 1")
    waits = "getComputedStyle(document.querySelector('main'), '::after')"
    browser.wait(f"{waits}.content.includes('Asking') && {waits}.visibility === 'visible'")
    browser.evaluate("window.go(); 1")
    browser.wait(f"{VISIBLE} > 1 && {waits}.content === 'none'")
    if place in ("", "server?name=web-1"):
        browser.wait("document.querySelector('main canvas').width > 300")
    assert browser.complaints == []


@pytest.mark.parametrize("metric", ["%3Cimg%3E", "nope", "toString", "__proto__"])
def test_a_metric_without_dates_in_an_address_is_the_usual_one(
    browser: Browser, daemon: InferenceDaemon, metric: str
) -> None:
    browser.open(f"{daemon.url}/ui/#/capacity?metric={metric}")
    says(browser, "main", "No server sends disk_usage_pct")
    assert browser.evaluate("document.getElementById('alert').hidden")
    assert browser.evaluate("document.getElementById('metric')") is None


def test_a_column_writes_a_value_of_a_hundred_in_one_way(browser: Browser, daemon: InferenceDaemon) -> None:
    browser.open(f"{daemon.url}/ui/")
    values = [9.994, 9.996, 10, 99.94, 99.97, 100, 999.4, 999.7, 1000, 0, -99.97]
    asked = f"import('./text.js').then(({{ number }}) => {values}.map(number))"
    told = ["9.99", "10.0", "10.0", "99.9", "100", "100", "999", "1,000", "1,000", "0", "-100"]
    assert browser.evaluate(asked) == told


def test_a_filter_longer_than_any_name_matches_no_server(browser: Browser, daemon: InferenceDaemon) -> None:
    browser.open(f"{daemon.url}/ui/#/?filter={'x' * 5000}")
    says(browser, "tbody", "No server matches.")
    assert browser.evaluate("document.getElementById('alert').hidden")
    assert browser.evaluate("document.querySelector('input[type=search]').value.length") == 128


@pytest.mark.parametrize(
    ("place", "words"), [("server?name=web-9", "unknown server 'web-9'"), ("server", "No server is named")]
)
def test_an_unknown_server_leaves_no_empty_cards(
    browser: Browser, daemon: InferenceDaemon, place: str, words: str
) -> None:
    browser.open(f"{daemon.url}/ui/#/{place}")
    says(browser, "body", words)
    browser.wait("!document.getElementById('alert').hidden")
    assert browser.evaluate("document.getElementById('alert').innerText").startswith("Not found: ")
    assert browser.evaluate(VISIBLE) == 1
    browser.evaluate("location.hash = '#/server?name=web-1'")
    browser.wait("document.querySelector('.plot canvas')?.checkVisibility()")
    browser.wait("document.getElementById('alert').hidden")


def test_a_fault_in_a_question_is_told_in_the_daemon_s_words(
    browser: Browser, daemon: InferenceDaemon
) -> None:
    browser.open(f"{daemon.url}/ui/")
    asked = (
        "import('./ask.js').then(({ get }) => get('fleet', { offset: -5 })).catch((error) => error.message)"
    )
    assert browser.evaluate(asked) == "offset: Input should be greater than or equal to 0"


def test_a_server_without_a_forecast_metric_says_which_are_forecast(
    browser: Browser, daemon: InferenceDaemon
) -> None:
    browser.open(f"{daemon.url}/ui/#/server?name=fans")
    says(
        browser,
        "main",
        "It sends none of the metrics that are forecast: cpu_pct, mem_pct, disk_io_mb_s, latency_ms.",
    )
    says(browser, ".head", "not forecast")
    says(browser, "main", "fans_rpm 1,200")


def test_silent_servers_are_marked_and_last_in_capacity_and_the_address_keeps_the_limit(
    browser: Browser, daemon: InferenceDaemon
) -> None:
    browser.open(f"{daemon.url}/ui/#/capacity")
    says(browser, "main", "3 series of 5 servers. 1 of these is of a server that is silent")
    says(browser, "tbody tr:last-child.old", "silent since")
    assert browser.evaluate(NAMES) == ["web-1", "web-2", "gone-1"]
    says(browser, "tbody tr:first-child", "or before")
    says(browser, "tbody tr:last-child td:nth-of-type(2)", "96.0")
    choose = (
        "const it = document.getElementById('limit'); it.value = '80'; it.dispatchEvent(new Event('change'))"
    )
    browser.evaluate(f"{choose}; 1")
    browser.wait("location.hash === '#/capacity?limit=80'")
    says(browser, "h2", "80 % within 8 h")
    for place, limit in (("capacity?limit=70&metric=disk_usage_pct", 70), ("capacity?limit=1e400", 90)):
        browser.open(f"{daemon.url}/ui/?x#/{place}")
        says(browser, "h2", f"{limit} % within 8 h")


def test_the_newest_whole_day_is_not_called_now(browser: Browser, daemon: InferenceDaemon) -> None:
    row = {"server": "web-1", "now": 96.0, "per_day": 1.0, "full_between": None, "p_within": None}
    dates = {
        "metric": "disk_usage_pct", "limit": 95.0, "known": ["disk_usage_pct"], "days": 9, "with_date": 0,
        "matching": 1, "comparisons": 40, "newest_day": "2026-01-13T00:00:00Z",
        "rows": [{**row, "why_no_date": "it was over the limit"}],
    }  # fmt: skip
    browser.open(f"{daemon.url}/ui/")
    browser.wait("document.querySelectorAll('tbody tr').length === 6")
    browser.evaluate(f"""const ask = window.fetch; window.fetch = async (...all) =>
      /capacity[/]dates/.test(all[0]) ? new Response({json.dumps(json.dumps(dates))}) : ask(...all); 1""")
    browser.evaluate("location.hash = '#/capacity'")
    says(browser, "[aria-label='Days and weeks'] thead", "Highest on Jan 13")


@pytest.mark.parametrize("width", [1440, 1280, 1024, 768, 360])
def test_the_table_of_the_fleet_is_whole_and_breaks_no_word(
    browser: Browser, daemon: InferenceDaemon, width: int
) -> None:
    browser.resize(width, 900)
    browser.open(f"{daemon.url}/ui/")
    browser.wait("document.querySelectorAll('tbody tr').length === 6")
    assert browser.evaluate(CUT) == 0
    assert browser.evaluate(BROKEN) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert LONG in browser.evaluate(NAMES)


def test_bins_that_wait_are_told_beside_the_values(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "fleetcast.toml").write_text(CONFIG)
    with InferenceDaemon(tmp_path) as daemon:
        for number in range(3):
            bin_of(daemon, number, a=95.0)
        browser.open(f"{daemon.url}/ui/")
        browser.wait("document.querySelectorAll('tbody tr').length === 1")
        made_late = """const ask = window.fetch; window.fetch = async (...all) => {
          const got = await ask(...all);
          if (!/api[/](fleet|capacity[?]|pulse)/.test(all[0]) || got.status !== 200) return got;
          return new Response(JSON.stringify({ ...await got.json(), bins_waiting: 2 })); }; 1"""
        browser.evaluate(made_late)
        for place in ("capacity", ""):
            browser.evaluate(f"location.hash = '#/{place}'")
            says(browser, "main .warning", "2 newer bins wait for a forecast")
        bin_of(daemon, 3, a=95.0)  # the pulse is another one
        says(browser, "#pulse", "2 newer bins wait")


@pytest.mark.parametrize(
    ("key", "words"), [("klucz-ł", "“ł”"), ("right-key\u2028", "U+2028"), (" right-key", "blank")]
)
def test_a_key_that_no_header_carries_is_told_at_once_and_not_kept(
    tmp_path: Path, browser: Browser, key: str, words: str
) -> None:
    with InferenceDaemon(tmp_path, environ={"TFT_API_KEY": "right-key"}) as daemon:
        browser.open(f"{daemon.url}/ui/")
        browser.wait("document.getElementById('ask').open")
        browser.evaluate("document.getElementById('key').focus()")
        browser.write(key)
        assert words in browser.evaluate("document.getElementById('key').validationMessage")
        browser.press("Enter")
        assert browser.evaluate("document.getElementById('ask').open")
        browser.evaluate("document.getElementById('key').value = ''; 1")
        browser.write("wrong")
        browser.press("Enter")
        browser.wait("document.getElementById('ask-text').textContent.includes('did not accept')")
        browser.wait("document.getElementById('ask').open")
        assert browser.evaluate("sessionStorage.length") == 0
        browser.evaluate(
            f"sessionStorage.setItem('fleetcast-key', {json.dumps(key)}); 1"
        )  # as it was kept once
        browser.open(f"{daemon.url}/ui/?x{quote('#')}")
        browser.wait("document.getElementById('ask').open")
        assert browser.evaluate("sessionStorage.length") == 0
        browser.evaluate("document.getElementById('key').focus()")
        browser.write("right-key")
        browser.press("Enter")
        says(browser, "main", "No server has sent anything yet")
        assert browser.evaluate("document.querySelector('.tools [role=status]').innerText") == ""
