"""Two scrapers of one host, each with shards, after an outage: whatever the order, right or absent."""

import random
from collections import defaultdict

import numpy as np
import pytest
from exporter_sender import OUTCOMES, Sample, Sender, disk, series
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleetcast.schema import increase

RULES = (
    "io = sum(rate(node_disk_read_bytes_total))",
    "low = min(node_filesystem_free_bytes)",
    "two = sum(node_filesystem_free_bytes) + avg(rate(node_disk_written_bytes_total))",
)
EVERY_S = 15
WARM, OUTAGE, AFTER = 4, 80, 8  # scrapes: one minute, 20 minutes, two minutes
OWN = [disk(name, what) for name in ("sda", "sdb") for what in ("read", "written")]
OWN += [series("node_filesystem_free_bytes", mountpoint=name) for name in "ab"]
Block = list[Sample]
Values = dict[tuple[str, int], dict[str, float]]


class Host:
    """What a host's series were at every scrape of two scrapers, and what that means."""

    def __init__(self, rng: random.Random, *, is_steady: bool) -> None:
        self._rng = rng
        self._is_steady = is_steady
        self.scrapes: list[list[Sample]] = []
        self.truth: Values = {}
        self._last: dict[tuple[str, int], tuple[int, float]] = {}
        self._levels = {number: rng.uniform(1e6, 1e9) for number in range(len(OWN))}
        self._slopes = {number: rng.uniform(1, 50) for number in range(len(OWN))}
        self._at_s = 0

    def scrape(self, at_s: int, more: dict[str, str], target: str) -> None:
        """Take one scrape; `target` tells the counters' histories apart."""
        rates: dict[int, float] = {}
        samples = []
        for number, one in enumerate(OWN):
            if self._is_steady:
                value = self._levels[number] + (self._slopes[number] * at_s if number < 4 else 0.0)
            elif number < 4:
                grown = self._levels[number] + self._rng.uniform(0, 100)
                fallen = self._levels[number] * self._rng.uniform(0, 0.009)
                value = self._levels[number] = grown if self._rng.random() > 0.02 else fallen
            else:
                value = self._rng.uniform(0, 9)
            samples.append(({**one, **more}, at_s, value))
            before = self._last.get((target, number))
            if before is not None and number < 4:
                rates[number] = increase(before[1], value) / (at_s - before[0])
            self._last[target, number] = at_s, value
        free = [value for _, _, value in samples[4:]]
        values = {"low": min(free)}
        if rates:
            values |= {"io": rates[0] + rates[2], "two": sum(free) + (rates[1] + rates[3]) / 2}
        self.truth["web-01", at_s] = values
        self.scrapes.append(samples)


def host_and_blocks(
    rng: random.Random, label: str, n_shards: int, *, is_steady: bool
) -> tuple[Host, Block, list[Block]]:
    """Return the truth, the samples that came in order at first, and the blocks of all queues."""
    host = Host(rng, is_steady=is_steady)
    warm: Block = []
    queues: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for place in range(WARM + OUTAGE + AFTER):
        for who, later_s in (("a", 0), ("b", 7)):
            host.scrape(place * EVERY_S + later_s, {label: who}, who if label == "monitor" else "")
            for number, sample in enumerate(host.scrapes[-1]):
                queue = warm if place < WARM else queues[who, number % n_shards]
                queue.append(sample)
    blocks = []
    for queue in queues.values():
        while queue:
            n = rng.randrange(20, 120)
            blocks.append(queue[:n])
            del queue[:n]
    return host, warm, blocks


def counts_of(sender: Sender) -> int:
    return sum(sender.counted[name] for name in OUTCOMES) + sender.mapping.n_waiting


LABELS = st.sampled_from(["__replica__", "monitor"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), LABELS, st.integers(1, 3))
def test_in_any_order_within_the_window_everything_is_told_and_right_in_the_end(
    seed: int, label: str, n_shards: int
) -> None:
    rng = random.Random(seed)  # the order itself: drawing each choice would take hypothesis minutes
    host, warm, blocks = host_and_blocks(rng, label, n_shards, is_steady=False)
    rng.shuffle(blocks)
    sender = Sender(rules=RULES)
    sender.send(*warm)
    n_sent = len(warm)
    for block in blocks:
        for _ in range(rng.choice([1, 1, 1, 2])):
            sender.send(*block, arrival_s=sender.arrival_s + rng.uniform(0, 2))
            n_sent += len(block)
    assert sender.found.keys() == host.truth.keys()
    for key, values in host.truth.items():
        known = {name: value for name, value in values.items() if not np.isnan(value)}
        told = {name: value for name, value in sender.found[key].items() if name in known}
        assert told == pytest.approx(known, rel=1e-6), key
    n_scraped = sum(map(len, host.scrapes))
    assert sender.counted["repeated"] == n_sent - n_scraped
    assert sender.counted["taken"] == n_scraped
    assert sender.mapping.n_waiting == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), LABELS, st.integers(1, 3), st.sampled_from([60.0, 300.0, 1800.0]))
@example(38, "__replica__", 3, 300.0)  # a request longer than the window displaces its own scrapes
def test_what_is_lost_or_comes_too_late_leaves_values_absent_and_none_wrong(
    seed: int, label: str, n_shards: int, window_s: float
) -> None:
    rng = random.Random(seed)
    # Given a host whose counters grow evenly, so that a rate is the same over any time
    host, warm, blocks = host_and_blocks(rng, label, n_shards, is_steady=True)
    rng.shuffle(blocks)
    sender = Sender(rules=RULES, reorder_window_s=window_s)
    sender.send(*warm)
    n_sent = len(warm)
    for block in blocks:
        for _ in range(rng.choice([0, 1, 1, 1, 2])):
            told = sender.send(*block, arrival_s=sender.arrival_s + rng.uniform(0, 2))
            n_sent += len(block)
            # Then whatever is told at any moment is the truth
            for key, values in told.items():
                for name in values.keys() & host.truth[key].keys():
                    assert values[name] == pytest.approx(host.truth[key][name], rel=1e-6), (key, name)
            # and each sample has one outcome, or waits
            assert counts_of(sender) == n_sent
