"""Remote-write 2.0 read as 1.0 reads the same samples, and bounded as it is."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from remote_write_bodies import STALE, Series, field, labels, request_bytes, symbols_bytes, varint

from fleetcast.errors import BadData
from fleetcast.prometheus import symbols
from fleetcast.prometheus.protobuf import BodyTooLarge
from fleetcast.prometheus.series import IGNORED, REFUSED
from fleetcast.prometheus.symbols import SymbolDecoder
from fleetcast.prometheus.wire import WriteDecoder, WriteRequest
from fleetcast.settings import RemoteWriteSettings

NOW = 1_768_471_205_000
UP, LOAD = labels("up"), labels("node_load1")
LIMITS = RemoteWriteSettings()
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
METADATA = field(5, b"\x08\x01\x18\x03")


class Both:
    """The decoders of both versions over the same series."""

    def __init__(self, limits: RemoteWriteSettings = LIMITS) -> None:
        self.known: dict[tuple[tuple[str, str], ...], int] = {}
        self.asked = 0
        self.first = WriteDecoder(self.number, limits)
        self.second = SymbolDecoder(self.first.known, limits)

    def number(self, labels: Mapping[str, str]) -> int:
        self.asked += 1
        return self.known.setdefault(tuple(sorted(labels.items())), len(self.known))


@pytest.fixture
def both() -> Both:
    return Both()


def rows(request: WriteRequest) -> list[tuple[int, int, int]]:
    bits = request.samples.values.view(np.int64).tolist()
    return sorted(
        zip(request.samples.series.tolist(), request.samples.timestamps_ms.tolist(), bits, strict=True)
    )


@pytest.mark.parametrize("after", [b"", METADATA, field(4, b"\x08\x01"), b"\x30\x05"])
def test_a_series_is_the_same_in_both_versions(both: Both, after: bytes) -> None:
    series: list[Series] = [(UP, [(NOW, 1.0)]), (LOAD, [(NOW, 0.0)]), (labels("x"), [(NOW, STALE)])]
    want = rows(both.first.read(request_bytes(series)))
    asked = both.asked
    for _ in range(3):  # parsed, then recognised
        assert rows(both.second.read(symbols_bytes(series, after=after))) == want
    assert both.asked == asked


def test_another_table_gives_the_same_places_another_meaning(both: Both) -> None:
    for _ in range(2):
        for name in ("up", "down"):
            both.second.read(symbols_bytes([({"__name__": name}, [(NOW, 1.0)])]))
    assert list(both.known) == [(("__name__", "up"),), (("__name__", "down"),)]
    request = both.second.read(symbols_bytes([({"__name__": "down"}, [(NOW, 1.0)])]))
    assert request.samples.series.tolist() == [1]


def test_a_second_sample_in_a_known_series_is_read_too(both: Both) -> None:
    table = ["", "__name__", "up"]
    for samples in ([(NOW, 1.0)], [(NOW, 1.0), (NOW + 1, 2.0)], [(NOW + 2, 0.0)], []):
        request = both.second.read(symbols_bytes([({"__name__": "up"}, samples)], list(table)))
        assert request.samples.timestamps_ms.tolist() == [time_ms for time_ms, _ in samples]


@pytest.mark.parametrize(
    ("refs", "fault"),
    [
        (b"\x01", "not in the table"),
        (b"\x01\x07", "not in the table"),
        (b"\x01\x02" * 2, "'a' twice"),
        (b"\x00\x02", "without a name"),
        (b"\x01\x02" * 300, "over 256 labels"),
        (b"\x01\x03" * 200, "over 4096 bytes"),
    ],
)
def test_a_series_whose_places_are_not_usable_costs_itself_only(both: Both, refs: bytes, fault: str) -> None:
    table = b"".join(field(4, text) for text in (b"", b"a", b"b", b"c" * 30))
    sample = field(2, b"\x09" + b"\1" * 8 + b"\x10" + varint(NOW))
    content = table + field(5, field(1, refs) + sample) + field(5, field(1, b"\x01\x02") + sample)
    for _ in range(2):
        request = both.second.read(content)
        assert (request.n_invalid, request.n_faults, len(request.samples)) == (1, 1, 1)
        assert fault in request.faults[0]


@pytest.mark.parametrize(
    "content",
    [
        field(4, b"") + field(5, b"") * 100_001,
        field(4, b"") * 400_001,
        b"\xa2\x00\x00" * 3_000_000,  # a symbol's tag, written longer
    ],
)
def test_more_than_a_sender_puts_into_a_request_is_not_built(
    both: Both, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symbols, "RequestMessage", None)
    with pytest.raises(BodyTooLarge, match=r"remote_write\.max_request_samples"):
        both.second.read(content)


def test_more_samples_than_the_limit_are_refused_known_or_not() -> None:
    both = Both(dataclasses.replace(LIMITS, max_request_samples=10))
    both.second.read(symbols_bytes([(UP, [(NOW, 1.0)])]))
    with pytest.raises(BodyTooLarge):
        both.second.read(symbols_bytes([(UP, [(NOW, 1.0)])] * 5 + [(LOAD, [(NOW, 1.0)] * 6)]))


@pytest.mark.parametrize(
    "content", [request_bytes([(UP, [(NOW, 1.0)])]), b"hello", field(4, b"") + field(5, b"\x0a\xff")]
)
def test_what_is_no_request_of_2_0_is_an_error(both: Both, content: bytes) -> None:
    with pytest.raises(BadData):
        both.second.read(content)


def test_memory_of_tables_is_bounded(both: Both) -> None:
    for number in range(200):
        both.second.read(symbols_bytes([({"__name__": f"n{number}", "a": "b" * 200}, [(NOW, 1.0)])]))
    assert len(both.second._tables) == symbols._TABLES_MAX
    both.second.read(symbols_bytes([(UP, [(NOW, 1.0)])], ["", "c" * 600_000]))  # too large to be kept
    assert max(sum(map(len, table)) for table in both.second._tables) < 300


def test_bounding_memory_by_either_version_leaves_no_series_under_anothers_number(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, ignored = ([labels(f"{kind}_{number}") for number in range(20)] for kind in ("wanted", "ignored"))
    number = both.number
    for decoder in (both.first, both.second):
        decoder._known._number = lambda own: IGNORED if "ignored" in own["__name__"] else number(own)

    def request(later: int) -> bytes:
        return request_bytes([(own, [(NOW + later, 1.0)]) for own in (*wanted[:10], *ignored, *wanted[10:])])

    for later in range(3):
        want = both.first.read(request(later)).samples.series.tolist()
    monkeypatch.setattr("fleetcast.prometheus.labels._KNOWN_BYTES_MAX", both.second._known._n_bytes - 1)
    both.second.read(symbols_bytes([(wanted[0], [(NOW, 1.0)])]))
    monkeypatch.undo()
    both.first.read(request_bytes([(labels(f"new_{place}"), [(NOW, 1.0)]) for place in range(40)]))
    assert both.first.read(request(3)).samples.series.tolist() == want


def test_after_a_renumbering_series_are_asked_for_again(both: Both) -> None:
    content = symbols_bytes([(UP, [(NOW, 1.0)]), (LOAD, [(NOW, 1.0)])])
    both.second.read(content)
    both.first.renumber(np.array([REFUSED, 0]))
    both.second.clear()
    both.known = {tuple(sorted(LOAD.items())): 0}
    assert both.second.read(content).samples.series.tolist() == [1, 0]


@given(
    st.lists(
        st.tuples(
            st.dictionaries(TEXTS.filter(bool), TEXTS, max_size=4),
            st.lists(
                st.tuples(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, width=64)), max_size=3
            ),
        ),
        max_size=6,
    )
)
def test_both_versions_say_the_same(series: list[Series]) -> None:
    both = Both()
    want = rows(both.first.read(request_bytes(series)))
    for _ in range(2):
        assert rows(both.second.read(symbols_bytes(series))) == want
