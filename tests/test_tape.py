"""A request that repeats an earlier one is read by comparison, and as it would be read by parsing."""

import random
from collections.abc import Mapping

import numpy as np
import pytest
from remote_write_bodies import STALE, Series, field, labels, request_bytes, series_bytes

from fleetcast.errors import BadData
from fleetcast.prometheus import wire
from fleetcast.prometheus.tape import RUN_MIN, Tape
from fleetcast.prometheus.wire import WriteDecoder, WriteRequest
from fleetcast.settings import RemoteWriteSettings

NOW = 1_768_471_205_000
FLEET = [labels("node_load1", f"web-{number:02d}:9100", zone="z" * (number % 3 * 60)) for number in range(40)]


class Reader:
    """A decoder, and one that never recorded anything."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[tuple[str, str], ...], int] = {}
        self.decoder = WriteDecoder(self.number, RemoteWriteSettings())

    def number(self, labels: Mapping[str, str]) -> int:
        return self.numbers.setdefault(tuple(sorted(labels.items())), len(self.numbers))

    def read(self, content: bytes) -> list[tuple[int, int, int]]:
        """Return what both read, which must be the same."""
        fresh = rows(WriteDecoder(self.number, RemoteWriteSettings()).read(content))
        assert rows(self.decoder.read(content)) == fresh
        return fresh


def rows(request: WriteRequest) -> list[tuple[int, int, int]]:
    bits = request.samples.values.view(np.int64).tolist()
    return sorted(
        zip(request.samples.series.tolist(), request.samples.timestamps_ms.tolist(), bits, strict=True)
    )


def scrape(time_ms: int, value: float = 1.0, fleet: list[dict[str, str]] = FLEET) -> list[Series]:
    return [(own, [(time_ms, value + place)]) for place, own in enumerate(fleet)]


@pytest.fixture
def reader() -> Reader:
    """A reader that has seen three scrapes."""
    reader = Reader()
    for number in range(3):
        reader.read(request_bytes(scrape(NOW + number)))
    return reader


def forbid_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("looked up series by series")

    monkeypatch.setattr(wire.Found, "add_tails", refuse)
    monkeypatch.setattr(wire, "TimeSeriesMessage", None)


@pytest.mark.parametrize("series", [scrape(NOW + 9), scrape(NOW + 9)[7:] + scrape(NOW + 10)[:7]])
def test_a_repeated_request_is_neither_parsed_nor_looked_up(
    reader: Reader, series: list[Series], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_parsing(monkeypatch)
    found = rows(reader.decoder.read(request_bytes(series)))
    want = [(reader.number(own), time_ms, np.float64(v).view(np.int64)) for own, [(time_ms, v)] in series]
    assert found == sorted(want)


def test_values_keep_their_bits(reader: Reader) -> None:
    for value in (STALE, float("nan"), float("-inf"), 5e-324):
        assert len(reader.read(request_bytes([(own, [(NOW + 5, value)]) for own in FLEET]))) == len(FLEET)


@pytest.mark.parametrize("time_ms", [0, 1, 2**35 - 1, 2**35, 2**42 - 1, 2**42, 2**63 - 1, -1])
def test_times_of_any_length_are_read(reader: Reader, time_ms: int) -> None:
    assert {row[1] for row in reader.read(request_bytes(scrape(time_ms)))} == {time_ms}


@pytest.mark.parametrize(
    "change",
    [
        lambda series: [*series[:5], (labels("new"), [(NOW + 9, 1.0)]), *series[5:]],
        lambda series: series[:5] + series[6:],
        lambda series: series[::-1],
        lambda series: [*series[:5], (FLEET[5], [(NOW + 9, 0.0)]), *series[6:]],
        lambda series: [*series[:5], (FLEET[5], [(NOW + 9, 1.0), (NOW + 10, 2.0)]), *series[6:]],
        lambda series: [*series[:5], (FLEET[5], []), *series[6:]],
        lambda series: [*series, *series],
        lambda series: [(own, [(NOW + 9, 0.0)]) for own in FLEET],
    ],
)
def test_a_request_that_repeats_only_in_part_is_read_whole(reader: Reader, change) -> None:  # type: ignore[no-untyped-def]
    content = request_bytes(change(scrape(NOW + 9)))
    for _ in range(4):
        reader.read(content)
    reader.read(request_bytes(scrape(NOW + 11)))


def test_other_fields_between_series_are_passed_over(reader: Reader) -> None:
    half = request_bytes(scrape(NOW + 9)[:20]), request_bytes(scrape(NOW + 9)[20:])
    metadata = field(3, field(2, b"node_load1") + field(4, b"1m load"))
    assert len(reader.read(metadata.join(half))) == len(FLEET)
    assert len(reader.read(b"".join(half) + metadata)) == len(FLEET)
    chunk = series_bytes(FLEET[0], [(NOW + 9, 1.0)])
    assert len(chunk) < 128
    longer_written = b"\x8a\x00" + bytes([len(chunk) | 0x80, 0]) + chunk
    assert len(reader.read(longer_written + half[1] + longer_written)) == 22


@pytest.mark.parametrize("cut", [1, 5, 9, 17, 40])
def test_a_request_that_is_cut_off_is_an_error(reader: Reader, cut: int) -> None:
    with pytest.raises(BadData):
        reader.decoder.read(request_bytes(scrape(NOW + 9))[:-cut])


def test_a_renumbering_is_followed(reader: Reader) -> None:
    turned = np.arange(len(FLEET))[::-1].copy()
    reader.decoder.renumber(turned)
    reader.numbers = {own: int(turned[number]) for own, number in reader.numbers.items()}
    for number in range(4):
        reader.read(request_bytes(scrape(NOW + number)))


def test_a_tape_that_is_full_begins_anew() -> None:
    reader = Reader()
    reader.decoder._tape = Tape(bytes_max=4000)
    rng = random.Random(1)
    for number in range(50):
        reader.read(request_bytes(scrape(NOW + number, fleet=rng.sample(FLEET, 20))))
        assert reader.decoder._tape._size <= 4000


def test_a_sender_without_an_order_is_not_recorded_for_a_while() -> None:
    tape = Tape()
    recorded = 0
    for _ in range(300):
        if tape.may_record(n_followed=0, n_others=RUN_MIN):
            tape._n_entries = RUN_MIN  # as if it were
            recorded += 1
    assert recorded < 15
    assert not tape.may_record(n_followed=0, n_others=RUN_MIN)
    assert tape.may_record(n_followed=5 * RUN_MIN, n_others=RUN_MIN)
