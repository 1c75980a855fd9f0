"""The times of a server's page in a real Chromium: what an address, keys and buttons make of them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.browser import CHROMIUM, Browser
from benchmarks.programs import InferenceDaemon, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
CONFIG = '[clock]\nmode = "data"\n[paths]\nmodels_dir = "no_models"\n'
N_BINS = 48  # four hours, of which the last bin may still come in
STRETCH = "Object.fromEntries(new URLSearchParams(location.hash.split('?')[1]))"
CHECKED = "document.querySelector('input[name=lead]:checked')?.value"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceDaemon]:
    folder = tmp_path_factory.mktemp("times")
    (folder / "fleetcast.toml").write_text(CONFIG)
    with InferenceDaemon(folder) as daemon:
        for number in range(N_BINS + 1):
            stamp = f"2020-01-01T{number // 12:02}:{5 * (number % 12):02}:01Z"
            record = {"timestamp": stamp, "server_name": "web-1", "cpu_pct": 20.0 + number}
            daemon.client.post_records([record])
            wait_for("the sweep", lambda: not daemon.status()["backlog"])
        yield daemon
        assert daemon.stop() == 0


GONE_CONFIG = f"{CONFIG}[forecast]\nstale_after_s = 600\ngone_after_s = 1800\n"


def visit(browser: Browser, daemon: InferenceDaemon, query: str = "") -> None:
    browser.open(f"{daemon.url}/ui/#/server?name=web-1{query}")
    browser.wait("document.querySelector('.plot canvas')")


def says(browser: Browser, words: str) -> None:
    browser.wait(f"document.querySelector('.range').innerText.includes({json.dumps(words)})")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("from=2019-06-01&to=2020-01-01T02:00:00Z", "At most 30 days are shown at once."),
        ("from=2020-01-01T02:00:00Z&to=2020-01-01T02:00:01Z", "30 min. At least 30 min are shown."),
        ("from=2019-06-01&to=2019-06-02", "There is no older record."),
        ("from=2030-06-01&to=2030-06-02", "There is nothing later."),
        ("from=yesterday&to=today", "names no stretch of time"),
        ("from=2020-01-01T02:00:00Z", "names no stretch of time"),
        ("from=2020-01-01T03:00:00Z&to=2020-01-01T02:00:00Z", "names no stretch of time"),
    ],
)
def test_an_address_whose_time_is_not_shown_as_it_stands_is_told_so(
    browser: Browser, daemon: InferenceDaemon, query: str, words: str
) -> None:
    visit(browser, daemon, f"&{query}")
    says(browser, words)
    assert browser.complaints == []


def test_a_time_of_another_year_says_the_year(browser: Browser, daemon: InferenceDaemon) -> None:
    visit(browser, daemon, "&from=2020-01-01T01:00:00Z&to=2020-01-01T02:00:00Z")
    says(browser, "2020")


def test_earlier_ends_at_the_oldest_record(browser: Browser, daemon: InferenceDaemon) -> None:
    visit(browser, daemon, "&from=2020-01-01T00:45:00Z&to=2020-01-01T02:15:00Z")
    earlier = "document.querySelector('[data-focus=earlier]')"
    browser.wait(f"{earlier} && !{earlier}.disabled")
    browser.evaluate(f"{earlier}.click()")
    browser.wait(f"{earlier}.disabled")
    assert browser.evaluate(STRETCH)["from"] == "2020-01-01T00:00:00Z"
    visit(browser, daemon)
    browser.wait(f"{earlier}.disabled")  # two days are shown, of which the first records are four hours old


def test_back_undoes_a_choice_and_quick_keys_are_one_step(browser: Browser, daemon: InferenceDaemon) -> None:
    visit(browser, daemon)
    browser.evaluate("document.querySelector('.plot').focus()")
    for _ in range(3):
        browser.press("+")
    browser.wait("location.hash.includes('from=')")
    found = browser.evaluate(
        f"(({STRETCH}).from && (Date.parse(({STRETCH}).to) - Date.parse(({STRETCH}).from)) / 3600e3)"
    )
    assert found == pytest.approx(56 / 8, abs=0.2), "each of three keys halves two days and eight hours"
    browser.evaluate("history.back()")
    browser.wait("!location.hash.includes('from=')")
    browser.wait("document.querySelector('[data-focus=\"to now\"]')?.disabled")
    assert browser.evaluate("location.hash").startswith("#/server?name=web-1")


def test_keys_zoom_about_what_is_read_and_end_at_half_an_hour(
    browser: Browser, daemon: InferenceDaemon
) -> None:
    visit(browser, daemon, "&from=2020-01-01T00:00:00Z&to=2020-01-01T04:00:00Z")
    says(browser, "4 h")
    browser.evaluate("document.querySelector('.plot').focus()")
    for _ in range(2):
        browser.press("PageUp")  # an hour each, from where the future begins
    browser.wait("document.querySelector('.reads b')")
    for _ in range(8):
        browser.press("+")
    says(browser, "At least 30 min are shown.")
    held = browser.evaluate(STRETCH)
    assert held["from"] <= "2020-01-01T01:55:00Z" <= held["to"], held
    browser.press("+")
    assert browser.evaluate(STRETCH) == held


def test_accuracy_says_how_much_time_it_is_of(browser: Browser, daemon: InferenceDaemon) -> None:
    visit(browser, daemon, "&span=30d")
    browser.wait("document.querySelector('table.small caption')")
    assert "How far forecasts were off in 3.9 h" in browser.evaluate(
        "document.querySelector('table.small caption').innerText"
    )


def test_an_unknown_way_to_compare_is_the_usual_one(browser: Browser, daemon: InferenceDaemon) -> None:
    visit(browser, daemon, "&said=zzz")
    browser.wait(f"{CHECKED} === '12'")
    visit(browser, daemon, "&said=")
    browser.wait(f"{CHECKED} === ''")


ROWS = (  # of the chart's table
    """[...document.querySelectorAll('[aria-label="cpu_pct"] .tall tbody tr')].map((row) => row.innerText)"""
)
CAPTION = "document.querySelector('[aria-label=\"cpu_pct\"] figcaption')?.innerText"


def post_bin(daemon: InferenceDaemon, number: int, *names: str) -> None:
    stamp = f"2020-01-01T{number // 12:02}:{5 * (number % 12):02}:01Z"
    daemon.client.post_records(
        [{"timestamp": stamp, "server_name": name, "cpu_pct": 20.0 + number} for name in names]
    )
    wait_for("the sweep", lambda: not daemon.status()["backlog"])


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("from=2019-06-01T00:00:00Z&to=2019-06-01T01:00:00Z", "Measured between 20.0 % and 32.0 %"),
        ("from=2030-06-01T00:00:00Z&to=2030-06-01T01:00:00Z", "Nothing measured in this time"),
        ("from=2020-01-01T01:00:00Z&to=2020-01-01T02:00:00Z", "Measured between 32.0 % and 44.0 %"),
    ],
)
def test_charts_and_tables_are_those_of_the_time_that_is_shown(
    browser: Browser, daemon: InferenceDaemon, query: str, words: str
) -> None:
    visit(browser, daemon)
    browser.evaluate(f"location.hash = '#/server?name=web-1&{query}'")
    browser.wait(f"{CAPTION}?.includes({json.dumps(words)})")
    browser.evaluate("document.querySelector('[aria-label=\"cpu_pct\"] button.plain').click()")
    browser.wait(f"{ROWS}.length > 0")
    assert browser.evaluate("document.querySelectorAll('.moves button').length") == 3
    assert browser.evaluate("document.getElementById('alert').hidden")


def test_a_gone_server_shows_what_is_stored_and_since_when(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "fleetcast.toml").write_text(GONE_CONFIG)
    with InferenceDaemon(tmp_path) as daemon:
        for number in range(10):
            post_bin(daemon, number, "web-1", "web-2")
        visit(browser, daemon)
        for number in range(10, 18):
            post_bin(daemon, number, "web-2")  # the page is open
        browser.wait("document.querySelector('.head').innerText.includes('gone since')")
        browser.wait(f"{CAPTION}?.includes('Measured between 20.0 % and 29.0 %')")
        daemon.stop()
        daemon.start()
        visit(browser, daemon, "&from=2020-01-01T00:05:00Z&to=2020-01-01T00:35:00Z")
        browser.wait("document.querySelector('.head').innerText.includes('gone since')")
        browser.wait(f"{CAPTION}?.includes('Measured between 21.0 % and 27.0 %')")
        assert browser.evaluate("document.getElementById('alert').hidden")
        visit(browser, daemon, "&from=2020-01-01T01:00:00Z&to=2020-01-01T01:30:00Z")
        says(browser, "There is nothing later.")
        browser.wait(f"{CAPTION}?.includes('Measured between')")
        browser.evaluate("document.querySelector('[data-focus=\"to now\"]').click()")
        browser.wait(f"{CAPTION}?.includes('Measured between 20.0 % and 29.0 %')")
        assert browser.complaints == []
