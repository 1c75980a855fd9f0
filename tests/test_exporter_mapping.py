import dataclasses
import random
from collections.abc import Iterable

import numpy as np
import pytest
from exporter_sender import NOW, RULES, STALE, Found, Sample, Sender, disk, idle, series
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcast.errors import SettingsError
from fleetcast.prometheus.series import IGNORED, NAMELESS, REFUSED


def test_gauges_become_a_record_at_their_first_scrape() -> None:
    found = Sender().send(
        (series("node_load1"), 0, 0.75),
        (series("node_memory_MemTotal_bytes"), 0, 8e9),
        (series("node_memory_MemAvailable_bytes"), 0, 2e9),
        (series("node_filesystem_size_bytes", mountpoint="/"), 0, 100e9),
        (series("node_filesystem_free_bytes", mountpoint="/"), 0, 60e9),
        (series("node_filesystem_avail_bytes", mountpoint="/"), 0, 40e9),
    )
    assert found == {("web-01", 0): {"load_average": 0.75, "mem_pct": 75.0, "disk_usage_pct": 50.0}}


def test_rates_begin_at_the_second_scrape_over_all_cpus_and_devices() -> None:
    sender = Sender()
    zero = [(idle(0), 0, 100.0), (idle(1), 0, 100.0), (disk("sda"), 0, 0.0), (disk("sdb"), 0, 5e9)]
    one = [(idle(0), 10, 109.0), (idle(1), 10, 105.0), (disk("sda"), 10, 30e6), (disk("sdb"), 10, 5.02e9)]
    write = [(disk("sda", "written"), 0, 7.0), (disk("sda", "written"), 10, 10e6 + 7)]
    assert sender.send(*zero) == {}
    found = sender.send(*one, *write)
    assert found == {("web-01", 10): {"cpu_pct": 30.0, "disk_io_mb_s": 6.0}}


def test_busy_modes_of_a_cpu_are_not_needed_and_do_no_harm() -> None:
    sender = Sender()
    busy = [series("node_cpu_seconds_total", cpu="0", mode=mode) for mode in ("user", "system", "iowait")]
    sender.send((idle(0), 0, 50.0), *((one, 0, 9.0) for one in busy))
    found = sender.send((idle(0), 10, 58.0), *((one, 10, 9.5) for one in busy))
    assert found == {("web-01", 10): {"cpu_pct": 20.0}}


def test_a_reset_counts_from_zero_and_a_missed_scrape_is_averaged_over() -> None:
    sender = Sender()
    receive = series("node_network_receive_bytes_total", device="eth0")
    for at_s, value in ((0, 9e9), (15, 45e6), (45, 105e6)):
        sender.send((receive, at_s, value))
    assert sender.found == {("web-01", 15): {"net_in_mb_s": 3.0}, ("web-01", 45): {"net_in_mb_s": 2.0}}


def test_virtual_devices_are_left_out() -> None:
    mapping = Sender().mapping
    assert mapping.number(series("node_network_receive_bytes_total", device="lo")) == IGNORED
    assert mapping.number(disk("dm-0")) == IGNORED
    assert mapping.number(series("go_goroutines")) == IGNORED


def test_a_scrape_in_pieces_is_one_record_once_its_last_piece_is_there() -> None:
    sender = Sender()
    sender.send((idle(0), 0, 0.0), (idle(1), 0, 0.0))
    assert sender.send((idle(0), 10, 10.0)) == {}
    assert sender.send((idle(1), 10, 0.0)) == {("web-01", 10): {"cpu_pct": 50.0}}


def test_pieces_of_several_scrapes_may_arrive_in_any_order() -> None:
    sender = Sender()
    sender.send((idle(0), 0, 0.0), (idle(1), 0, 0.0))
    sender.send(*((idle(0), 10 * n, 10.0 * n) for n in range(1, 13)))
    for n in range(1, 13):
        assert sender.send((idle(1), 10 * n, 0.0)) == {("web-01", 10 * n): {"cpu_pct": 50.0}}


def test_a_repeated_request_changes_nothing() -> None:
    sender = Sender()
    request = [(idle(0), 10, 5.0), (series("node_load1"), 10, 1.0)]
    sender.send((idle(0), 0, 0.0))
    assert sender.send(*request)
    assert sender.send(*request) == {}


def test_a_cpu_that_went_offline_with_a_mark_is_no_longer_waited_for() -> None:
    sender = Sender()
    sender.send((idle(0), 0, 0.0), (idle(1), 0, 0.0))
    assert sender.send((idle(0), 10, 5.0)) == {}
    assert sender.send((idle(1), 10, STALE)) == {("web-01", 10): {"cpu_pct": 50.0}}
    assert sender.send((idle(0), 20, 12.0)) == {("web-01", 20): {"cpu_pct": 30.0}}


def test_a_disk_that_vanished_without_a_mark_is_waited_for_only_for_the_longest_gap() -> None:
    sender = Sender(rules=('io = sum(rate(node_disk_read_bytes_total{device!=""}))',))
    sender.send((disk("sda"), 0, 0.0), (disk("sdb"), 0, 0.0))
    for at_s in range(15, 600, 15):
        sender.send((disk("sda"), at_s, 1.0 * at_s))
    times = sorted(at_s for _, at_s in sender.found)
    assert times[0] in range(300, 400)
    assert sender.found["web-01", 585] == {"io": 1.0}


def test_a_new_device_is_absent_in_its_first_scrape_and_then_counted() -> None:
    sender = Sender(rules=("io = sum(rate(node_disk_read_bytes_total))",))
    sender.send((disk("sda"), 0, 0.0))
    sender.send((disk("sda"), 10, 10.0), (disk("sdb"), 10, 100.0))
    sender.send((disk("sda"), 20, 20.0), (disk("sdb"), 20, 300.0))
    assert sender.found == {("web-01", 20): {"io": 21.0}}


def test_a_member_that_turns_up_late_corrects_what_was_told_without_it() -> None:
    sender = Sender(rules=("free = min(node_free)", "top = max(node_free)", "both = sum(node_free)"))
    assert sender.send((series("node_free", disk="a"), 0, 5.0)) == {
        ("web-01", 0): {"free": 5, "top": 5, "both": 5}
    }
    sender.send((series("node_free", disk="b"), 0, 3.0))
    assert sender.found == {("web-01", 0): {"free": 3.0, "top": 5.0, "both": 8.0}}


def test_two_scrapers_of_one_host_count_once() -> None:
    sender = Sender(rules=("up = sum(node_up)",))
    first = sender.send(({**series("node_up"), "prometheus_replica": "a"}, 0, 1.0))
    second = sender.send(({**series("node_up"), "prometheus_replica": "b", "job": "other"}, 3, 1.0))
    assert (first, second) == ({("web-01", 0): {"up": 1.0}}, {("web-01", 3): {"up": 1.0}})


def test_two_exporters_of_one_host_are_two_targets_of_one_server_and_count_once() -> None:
    sender = Sender(rules=("io = sum(rate(node_disk_read_bytes_total))",))
    for at_s in range(0, 60, 15):
        for instance, later_s in (("web-01:9100", 0.0), ("web-01", 7.313)):
            read = {**disk("sda"), "instance": instance}
            sender.send((read, at_s + later_s, 2.0 * (at_s + later_s)))
    assert sorted(sender.found) == [("web-01", at_s) for at_s in (15, 22, 30, 37, 45, 52)]
    assert [values["io"] for values in sender.found.values()] == pytest.approx([2.0] * 6, rel=1e-3)


@pytest.mark.parametrize(
    "more",
    [
        {"__replica__": "b"},
        {"monitor": "b"},
        {"agent_hostname": "x", "region": "eu"},
        {"job": "integrations/unix"},
    ],
)
def test_a_second_scraper_of_a_host_silences_nothing(more: dict[str, str]) -> None:
    sender = Sender()
    for at_s in range(0, 300, 15):
        for labels, later_s in (({}, 0.0), (more, 7.313)):
            at = at_s + later_s
            cpus = [({**idle(cpu), **labels}, at, 0.8 * at) for cpu in (0, 1)]
            sender.send(*cpus, ({**series("node_load1"), **labels}, at, 0.5))
    assert len(sender.found) == 40
    assert sum(values.get("cpu_pct") == pytest.approx(20.0) for values in sender.found.values()) >= 38


def test_series_of_other_exporters_that_never_come_together_are_counted_and_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Given an exporter whose labels nobody knows, scraped twice: nothing may be told, it could be half
    sender = Sender(rules=("requests = sum(rate(app_requests_total))",))
    for at_s in range(0, 4000, 15):
        for who, later_s in (("a", 0.0), ("b", 7.313)):
            for code in ("200", "500"):
                labels = series("app_requests_total", "web-01:80", code=code, scraper=who)
                sender.send((labels, at_s + later_s, 5.0 * at_s))
    assert sender.found == {}
    assert sender.counted["incomplete"] > 500
    (said,) = [record.getMessage() for record in caplog.records if "unfinished" in record.getMessage()]
    assert "server=web-01 label=scraper" in said
    assert "honor_timestamps" not in said


def test_series_with_times_of_their_own_are_named_with_the_setting_of_the_scraper_that_helps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Given an exporter that stamps each series itself, some milliseconds apart
    sender = Sender(rules=("requests = sum(rate(app_requests_total))",))
    for at_s in range(0, 4000, 15):
        for number, code in enumerate(("200", "404", "500")):
            labels = series("app_requests_total", "web-01:80", code=code)
            sender.send((labels, at_s + 0.003 * number, 5.0 * at_s))
    assert sender.found == {}
    (said,) = [record.getMessage() for record in caplog.records if "unfinished" in record.getMessage()]
    assert "server=web-01" in said
    assert "honor_timestamps: false" in said


@pytest.mark.parametrize(
    ("changes", "labels", "name"),
    [
        ({}, {"instance": "web-01:9100"}, "web-01"),
        ({}, {"instance": "web-01"}, "web-01"),
        ({}, {"instance": "[::1]:9100"}, "[::1]"),
        ({}, {"instance": "[::1]"}, "[::1]"),
        ({}, {"instance": "2001:db8::1"}, "2001:db8::1"),
        ({}, {"instance": "2001:db8:0:0:0:0:0:9100"}, "2001:db8:0:0:0:0:0:9100"),
        ({}, {"instance": "fe80::1%eth0"}, "fe80::1%eth0"),
        ({}, {"instance": "[fe80::1%25eth0]:9100"}, "[fe80::1%25eth0]"),
        ({}, {"instance": "10.0.0.1:9100"}, "10.0.0.1"),
        ({"server_label": "nodename"}, {"nodename": "db:1"}, "db"),
        ({"server_pattern": r"([^.:]+).*"}, {"instance": "web-01.example.com:9100"}, "web-01"),
    ],
)
def test_the_server_is_named_by_label_and_pattern(
    changes: dict[str, str], labels: dict[str, str], name: str
) -> None:
    sender = Sender(**changes)
    assert list(sender.send(({"__name__": "node_load1", **labels}, 0, 1.0))) == [(name, 0)]


@pytest.mark.parametrize("instance", ["", "tab\there:1", "x" * 200, "y" * 5000, "\u202eover:1"])
def test_a_series_whose_server_has_no_usable_name_is_told_from_one_that_no_rule_wants(instance: str) -> None:
    assert Sender().mapping.number(series("node_load1", instance)) == NAMELESS
    assert Sender().mapping.number(series("go_goroutines", instance)) == IGNORED


@pytest.mark.parametrize("pattern", ["(", ".*"])
def test_a_pattern_without_a_group_or_that_cannot_be_read_is_refused(pattern: str) -> None:
    with pytest.raises(SettingsError, match="server_pattern"):
        Sender(server_pattern=pattern)


def test_samples_out_of_bounds_are_counted_and_touch_nothing() -> None:
    sender = Sender()
    sender.send(
        (series("node_load1"), 0, 1.0),
        (series("node_load1"), 100_000, 2.0),
        (series("node_load1"), -100_000, 3.0),
    )
    assert sender.derived.n_out_of_bounds == 2
    assert sender.found == {("web-01", 0): {"load_average": 1.0}}
    assert sender.send((series("node_load1"), 15, 4.0)) == {("web-01", 15): {"load_average": 4.0}}


def test_under_the_data_clock_old_samples_are_taken_but_none_from_before_1970() -> None:
    sender = Sender()
    sender.send(
        (series("node_load1"), -NOW / 1000 - 1, 1.0),
        (series("node_load1"), -NOW / 1000 + 1, 2.0),
        rules=dataclasses.replace(RULES, oldest_ms=None),
    )
    assert sender.derived.n_out_of_bounds == 1
    assert [at_s for _, at_s in sender.found] == [1 - NOW // 1000]


def test_a_value_out_of_range_costs_its_metric_and_not_the_record() -> None:
    sender = Sender(rules=("x_pct = max(node_x)", "y = max(node_y)"))
    found = sender.send((series("node_x"), 0, 5000.0), (series("node_y"), 0, 5000.0))
    assert found == {("web-01", 0): {"y": 5000.0}}


def test_no_more_series_than_the_limit_are_kept_in_mind() -> None:
    mapping = Sender(max_series=2).mapping
    numbers = [mapping.number(series("node_load1", f"web-{n}:1")) for n in (0, 1, 2, 0)]
    assert numbers == [0, 1, REFUSED, 0]


def test_series_nothing_comes_from_are_forgotten_and_the_others_keep_their_state() -> None:
    # Given three servers, of which the last one alone goes on sending
    sender = Sender()
    for n in range(3):
        sender.send((idle(0, f"web-{n}:1"), 0, 0.0), (series("node_load1", f"web-{n}:1"), 0, 1.0))
    new_numbers = None
    for at_s in range(15, 9000, 15):
        sender.send((idle(0, "web-2:1"), at_s, at_s / 2), (series("node_load1", "web-2:1"), at_s, 1.0))
        got = sender.mapping.forget_silent(at_s)
        new_numbers = got if got is not None else new_numbers
    assert new_numbers is not None
    assert new_numbers.tolist() == [REFUSED, REFUSED, REFUSED, REFUSED, 0, 1]
    assert sender.mapping.n_series == 2
    rates = [
        values["cpu_pct"]
        for (name, _), values in sender.found.items()
        if name == "web-2" and len(values) == 2
    ]
    assert rates == [50.0] * 599
    # When one of the others comes back, it begins anew under a new number
    assert sender.send((series("node_load1", "web-0:1"), 9000, 3.0)) == {
        ("web-0", 9000): {"load_average": 3.0}
    }


def reference(samples: Iterable[Sample], gap_s: float = 300.0) -> Found:
    """Say plainly what a fleet's samples mean, given all of them at once: per scrape, cpu and free."""
    last: dict[str, tuple[int, float]] = {}
    by_scrape: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    members: dict[str, dict[str, set[str]]] = {}
    for labels, at_s, value in sorted(samples, key=lambda sample: sample[1]):
        server, key = labels["instance"].split(":")[0], repr(sorted(labels.items()))
        scrape = by_scrape.setdefault((server, at_s), {"cpu": {}, "free": {}})
        if labels["__name__"] == "node_cpu_seconds_total":
            before = last.get(key)
            rate = np.nan
            if before is not None and at_s - before[0] <= gap_s:
                near_zero = value if value <= 0.01 * before[1] else np.nan
                grown = value - before[1] if value >= before[1] else near_zero
                rate = grown / (at_s - before[0])
            last[key] = (at_s, value)
            scrape["cpu"][key] = rate
        else:
            scrape["free"][key] = value
        for kind in ("cpu", "free"):
            members.setdefault(server, {"cpu": set(), "free": set()})[kind] |= scrape[kind].keys()
    found: Found = {}
    for (server, at_s), kinds in by_scrape.items():
        values = {}
        if kinds["cpu"].keys() == members[server]["cpu"] and kinds["cpu"]:
            values["cpu_pct"] = float(np.clip(100 * (1 - np.mean(list(kinds["cpu"].values()))), 0, 100))
        if kinds["free"].keys() == members[server]["free"] and kinds["free"]:
            values["free"] = min(kinds["free"].values())
        values = {name: value for name, value in values.items() if not np.isnan(value)}
        if values:
            found[server, at_s] = values
    return found


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 3), st.integers(1, 12))
def test_any_split_of_scrapes_into_requests_yields_what_all_samples_together_mean(
    rng: random.Random, n_cpus: int, n_servers: int, n_shards: int
) -> None:
    # Given a fleet with resets and missed scrapes, whose series are sent by several shards at their own pace
    everyone = [idle(cpu, f"s{n}:1") for cpu in range(n_cpus) for n in range(n_servers)]
    everyone += [series("node_free", f"s{n}:1", disk=d) for n in range(n_servers) for d in "ab"]
    shards: list[list[Sample]] = [[] for _ in range(n_shards)]
    shard_of = {repr(one): rng.randrange(n_shards) for one in everyone}
    level = {repr(one): 0.0 for one in everyone}
    missed = {at_s for at_s in range(30, 600, 15) if rng.random() < 0.1}
    for at_s in range(0, 600, 15):
        for one in everyone:
            was, chance = level[repr(one)], rng.random()
            level[repr(one)] = (
                was + rng.uniform(0, 15) if chance > 0.04 else was * rng.choice([0.005, 0.3, 0.99])
            )
            if at_s not in missed:
                shards[shard_of[repr(one)]].append((one, at_s, level[repr(one)]))
    want = reference(sample for shard in shards for sample in shard)
    # When the first scrape arrives complete, and the others in requests of any size, a few scrapes apart
    sender = Sender(rules=("free = min(node_free)",))
    queues = [[s for s in shard if s[1] > 0] for shard in shards]
    sender.send(*(s for shard in shards for s in shard if s[1] == 0))
    while any(queues):
        behind = min(queue[0][1] for queue in queues if queue)
        shard = rng.choice([queue for queue in queues if queue and queue[0][1] <= behind + 100])
        n_sent = rng.randrange(1, 20)
        ready = [s for s in shard[:n_sent] if s[1] <= behind + 100]
        del shard[: len(ready)]
        for repeat in range(rng.choice([1, 1, 1, 2])):
            sender.send(*ready)
            del repeat
    # Then every record is there with the same values
    assert sender.found.keys() == want.keys()
    for key, values in want.items():
        assert sender.found[key] == pytest.approx(values, abs=0.0051)  # percents keep two decimals


def test_a_whole_fleet_may_appear_in_one_request() -> None:
    sender = Sender()
    everyone = [idle(cpu, f"web-{n}:1") for n in range(100) for cpu in range(10)]
    sender.send(*((one, 0, 0.0) for one in everyone))
    sender.send(*((one, 10, 4.0) for one in everyone))
    assert sender.found == {(f"web-{n}", 10): {"cpu_pct": 60.0} for n in range(100)}
