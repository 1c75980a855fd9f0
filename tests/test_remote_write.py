import dataclasses
import struct
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from remote_write_bodies import (
    STALE,
    Series,
    body,
    field,
    label_bytes,
    labels,
    packed,
    request_bytes,
    sample_bytes,
    series_bytes,
)

from fleetcast.errors import BadData
from fleetcast.prometheus import wire
from fleetcast.prometheus.series import IGNORED, REFUSED
from fleetcast.prometheus.wire import BodyTooLarge, WriteDecoder, WriteRequest
from fleetcast.settings import RemoteWriteSettings

NOW = 1_768_471_205_000
UP = labels("up")
LOAD = labels("node_load1")
LIMITS = RemoteWriteSettings()
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)


class Numbers:
    """Numbers every series it is asked about, in order; names with "x" are not wanted."""

    def __init__(self) -> None:
        self.known: dict[tuple[tuple[str, str], ...], int] = {}
        self.asked = 0

    def number(self, labels: Mapping[str, str]) -> int:
        self.asked += 1
        if "x" in labels.get("__name__", ""):
            return IGNORED
        if "full" in labels.get("__name__", ""):
            return REFUSED
        return self.known.setdefault(tuple(sorted(labels.items())), len(self.known))


@pytest.fixture
def numbers() -> Numbers:
    return Numbers()


@pytest.fixture
def decoder(numbers: Numbers) -> WriteDecoder:
    return WriteDecoder(numbers.number, LIMITS)


def rows(request: WriteRequest) -> list[tuple[int, int, float]]:
    samples = request.samples
    return sorted(
        zip(samples.series.tolist(), samples.timestamps_ms.tolist(), samples.values.tolist(), strict=True)
    )


def test_a_request_is_read_as_samples_by_series(decoder: WriteDecoder) -> None:
    request = decoder.decode(body([(UP, [(NOW, 1.0)]), (LOAD, [(NOW, 0.25), (NOW + 5, 0.5)])]))
    assert rows(request) == [(0, NOW, 1.0), (1, NOW, 0.25), (1, NOW + 5, 0.5)]


def test_a_series_seen_before_is_not_looked_at_again(decoder: WriteDecoder, numbers: Numbers) -> None:
    decoder.decode(body([(UP, [(NOW, 1.0)]), (LOAD, [(NOW, 0.0)])]))
    asked = numbers.asked
    request = decoder.decode(body([(UP, [(NOW + 5, 0.5)]), (LOAD, [(NOW + 5, 0.0)])]))
    assert rows(request) == [(0, NOW + 5, 0.5), (1, NOW + 5, 0.0)]
    assert numbers.asked == asked


def test_the_same_series_with_zero_and_without_is_one_series(decoder: WriteDecoder) -> None:
    got = [
        rows(decoder.decode(body([(UP, [(NOW + i, value)])]))) for i, value in enumerate((1.0, 0.0, 2.0, 0.0))
    ]
    assert got == [[(0, NOW, 1.0)], [(0, NOW + 1, 0.0)], [(0, NOW + 2, 2.0)], [(0, NOW + 3, 0.0)]]


def test_values_keep_their_bits_staleness_marks_too(decoder: WriteDecoder) -> None:
    values = [STALE, float("nan"), float("inf"), -0.0, 5e-324]
    for _ in range(2):  # parsed, then recognised
        samples = decoder.decode(body([(UP, [(NOW + i, value)]) for i, value in enumerate(values)])).samples
        want = sorted(struct.pack("<d", value) for value in values)
        assert sorted(struct.pack("<d", value) for value in samples.values.tolist()) == want


def test_unwanted_series_are_counted_and_left_out(decoder: WriteDecoder) -> None:
    series: list[Series] = [(labels("x1"), [(NOW, 1.0)]), (UP, [(NOW, 1.0)]), (labels("full"), [(NOW, 1.0)])]
    for _ in range(2):
        request = decoder.decode(body(series))
        assert (len(request.samples), request.n_ignored, request.n_refused) == (1, 1, 1)


def test_an_empty_request_and_one_of_metadata_alone_hold_no_samples(decoder: WriteDecoder) -> None:
    metadata = field(3, field(2, b"node_load1") + field(4, b"1m load"))
    assert rows(decoder.decode(packed(b""))) == rows(decoder.decode(packed(metadata))) == []


def test_exemplars_and_histograms_are_skipped(decoder: WriteDecoder) -> None:
    chunk = series_bytes(UP, [(NOW, 1.0)])
    content = field(1, chunk + field(3, b"")) + field(1, chunk[:-18] + field(4, b"\x08\x01") + chunk[-18:])
    assert rows(decoder.decode(packed(content))) == [(0, NOW, 1.0), (0, NOW, 1.0)]


def test_times_outside_the_usual_range_are_read_too(decoder: WriteDecoder) -> None:
    times = [0, 1, 2**35 - 1, 2**35, 2**42 - 1, 2**42, 2**63 - 1, -1, -(2**63)]
    for value in (1.0, 0.0, 2.0, 0.0):
        request = decoder.decode(body([(UP, [(time, value)]) for time in times]))
        assert rows(request) == sorted((0, time, value) for time in times)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its size is missing"),
        (b"\xff\xff\xff\xff\xff\xff", "its size is missing"),
        (b"\x80\x80\x80\x04abc", "impossible size"),
        (b"\x10hello, snappy", "not a snappy block"),
        (packed(b"hello, protobuf"), "not a protobuf WriteRequest"),
        (packed(field(1, b"\x0a\xff")), "not protobuf"),
    ],
)
def test_a_body_that_is_none_says_why(decoder: WriteDecoder, content: bytes, message: str) -> None:
    with pytest.raises(BadData, match=message):
        decoder.decode(content)


def test_a_body_that_would_unpack_to_more_than_the_limit_is_not_unpacked(numbers: Numbers) -> None:
    decoder = WriteDecoder(numbers.number, dataclasses.replace(LIMITS, max_unpacked_bytes=1000))
    with pytest.raises(BodyTooLarge, match="1001 bytes, at most 1000"):
        decoder.decode(packed(b"\0" * 1001))


@pytest.mark.parametrize(
    "content",
    [
        field(1, b"") * 100_001,
        b"\x8a\x00\x00" * 5_000_000,  # the same tag, written longer
        b"\x18\x01" * 10 + field(1, b"\x10\x07") * 2_000_000,
    ],
)
def test_more_series_than_any_sender_puts_into_a_request_are_not_built(
    decoder: WriteDecoder, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = packed(content)
    monkeypatch.setattr(wire, "WriteRequestMessage", None)
    with pytest.raises(BodyTooLarge, match=r"over 100000 series .*remote_write\.max_request_samples"):
        decoder.decode(body)


def test_more_samples_than_any_sender_puts_into_a_request_are_refused_wherever_they_stand(
    numbers: Numbers,
) -> None:
    decoder = WriteDecoder(numbers.number, dataclasses.replace(LIMITS, max_request_samples=100))
    few = [(NOW + place, 1.0) for place in range(60)]
    odd = packed(field(1, label_bytes(LOAD) + field(2, b"") * 60) * 2)
    for request in (body([(UP, few), (LOAD, few)]), odd):
        with pytest.raises(BodyTooLarge, match=r"over 100 samples .*remote_write\.max_request_samples"):
            decoder.decode(request)
    decoder.decode(body([(UP, few)]))


def test_one_series_larger_than_the_limit_is_not_parsed(
    decoder: WriteDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = body([({**UP, "zone": "a" * 262_145}, [(NOW, 1.0)])])
    monkeypatch.setattr(wire, "TimeSeriesMessage", None)
    with pytest.raises(BodyTooLarge, match=r"262144 bytes \(remote_write\.max_series_bytes\)"):
        decoder.decode(content)


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"zone": "a" * 5000}, "over 4096 bytes of labels"),
        ({f"l{place}": "" for place in range(300)}, "over 256 labels"),
    ],
)
def test_a_series_with_more_labels_than_can_be_kept_costs_itself_only(
    decoder: WriteDecoder, numbers: Numbers, more: dict[str, str], fault: str
) -> None:
    for _ in range(2):
        request = decoder.decode(body([({**UP, **more}, [(NOW, 1.0), (NOW + 1, 1.0)]), (LOAD, [(NOW, 2.0)])]))
        assert (request.n_invalid, request.n_faults, rows(request)) == (2, 1, [(0, NOW, 2.0)])
        assert fault in request.faults[0]
    assert numbers.known.keys() == {tuple(sorted(LOAD.items()))}


def test_a_group_is_no_field_of_a_request(decoder: WriteDecoder) -> None:
    with pytest.raises(BadData, match="not a protobuf WriteRequest"):
        decoder.decode(packed(b"\x23\x24" + field(1, b"") * 100_001))


def test_a_known_head_before_a_damaged_sample_is_an_error_not_a_guess(decoder: WriteDecoder) -> None:
    decoder.decode(body([(UP, [(NOW, 1.0)])]))
    chunk = series_bytes(UP, [(NOW, 1.0)])
    endless = chunk[:-1] + bytes([chunk[-1] | 0x80])  # the time's last byte says that another follows
    with pytest.raises(BadData):
        decoder.decode(packed(field(1, endless)))


def test_a_renumbering_is_followed_and_forgotten_series_are_asked_for_again(
    decoder: WriteDecoder, numbers: Numbers
) -> None:
    series: list[Series] = [(UP, [(NOW, 1.0)]), (LOAD, [(NOW, 2.0)]), (labels("x"), [(NOW, 3.0)])]
    decoder.decode(body(series))
    decoder.renumber(np.array([REFUSED, 0]))
    numbers.known = {tuple(sorted(LOAD.items())): 0}
    assert rows(decoder.decode(body(series))) == [(0, NOW, 2.0), (1, NOW, 1.0)]


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
def test_recognised_series_read_as_parsed_ones_do(series: list[Series]) -> None:
    numbers = Numbers()
    decoder = WriteDecoder(numbers.number, LIMITS)
    first = decoder.decode(body(series))
    again = decoder.decode(body(series))
    assert rows(first) == rows(again)
    assert first.n_ignored == again.n_ignored
    wanted = [(own, samples) for own, samples in series if "x" not in own.get("__name__", "")]
    want = sorted(
        (numbers.known[tuple(sorted(own.items()))], time, value)
        for own, samples in wanted
        if "full" not in own.get("__name__", "")
        for time, value in samples
    )
    assert rows(first) == want


def test_a_sample_that_only_looks_like_two_is_read_once(decoder: WriteDecoder) -> None:
    # Given a known head, and a message whose last label ends in the bytes of a sample
    decoder.decode(body([(UP, [(NOW, 1.0)])]))
    tricky = {**UP, "zone": sample_bytes(NOW, 1.0).decode("latin-1")}
    request = decoder.decode(packed(request_bytes([(tricky, [(NOW, 7.0)]), (UP, [(NOW, 8.0)])])))
    assert rows(request) == [(0, NOW, 8.0), (1, NOW, 7.0)]
