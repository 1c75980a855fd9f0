"""Bodies: what is JSON for us, and what is refused with which words."""

import pytest

from fleetcast.api import bodies
from fleetcast.api.bodies import ITEMS_MAX, RECORDS_MAX, Refusal, check_unpacked, encode, read_records


def test_the_documented_shape_is_read() -> None:
    assert read_records(b'{"records": [{"a": 1}, 2, null], "source": "agent"}') == [{"a": 1}, 2, None]
    assert read_records(b'{"records": []}') == []


def test_numbers_that_are_none_reach_the_check_of_their_record() -> None:
    first, second = read_records(b'{"records": [{"cpu_pct": NaN}, {"cpu_pct": -Infinity}]}')
    assert first["cpu_pct"] != first["cpu_pct"]
    assert second["cpu_pct"] == float("-inf")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"null", "it is absent"),
        (b"[]", "it is a list"),
        (b"7", "it is a number"),
        (b'"records"', "it is text"),
        (b"{}", '"records" is absent'),
        (b'{"records": null}', '"records" is absent'),
        (b'{"records": {}}', '"records" is an object'),
        (b'{"records": "x"}', '"records" is text'),
        (b'{"records": 7.5}', '"records" is a number'),
        (b'{"records": true}', '"records" is true or false'),
        (b'{"records": [', "not JSON"),
        (b'{"records": [}', "not JSON"),
        (b'{"records": [NaN', "not JSON"),
        (b"\xff\xfe{\x00}\x00", "not JSON"),
        (b'{"records": ["\xff"]}', "not JSON"),
        (b"\x1f\x8b\x08\x00", "not JSON"),
        (b'{"records": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"records": [NaN, ' + b"[" * 200_000 + b"]" * 200_000 + b"]}", "not JSON"),
        (b"cpu_pct=5", "not JSON"),
    ],
)
def test_anything_else_is_refused_with_what_would_be_right(body: bytes, said: str) -> None:
    with pytest.raises(Refusal, match="the body must be") as caught:
        read_records(body)
    assert caught.value.code == 422
    assert said in str(caught.value)


def test_answers_never_hold_nan() -> None:
    assert encode({"a": float("nan"), "b": [float("inf")]}) == b'{"a":null,"b":[null]}'


@pytest.mark.parametrize("item", [b"0,", b"{},", b"[],", b'"",', b"NaN,", b'{"a":1},'])
def test_a_body_of_too_many_items_is_refused_before_any_is_made(
    item: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'{"records":[' + item * (ITEMS_MAX + 1) + b"0]}"

    def decode(_body: bytes) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(bodies.msgspec.json, "decode", decode)
    with pytest.raises(Refusal, match=r"at most .* are taken") as caught:
        read_records(body)
    assert caught.value.code == 413


def test_as_many_records_as_an_arrow_stream_may_have_are_read_and_not_one_more() -> None:
    assert len(read_records(b'{"records":[' + b"0," * (RECORDS_MAX - 1) + b"0]}")) == RECORDS_MAX
    with pytest.raises(Refusal, match=f"{RECORDS_MAX + 1} records"):
        read_records(b'{"records":[' + b"0," * RECORDS_MAX + b"0]}")


def test_a_snappy_block_is_judged_by_what_it_says_before_it_is_unpacked() -> None:
    check_unpacked(b"\xe8\x07" + b"x" * 100, 1000)
    with pytest.raises(Refusal, match="unpacks to 1000 bytes") as caught:
        check_unpacked(b"\xe8\x07" + b"x" * 100, 999)
    assert caught.value.code == 413
    with pytest.raises(Refusal, match="impossible size") as caught:
        check_unpacked(b"\xe8\x07" + b"x" * 10, 10_000)
    assert caught.value.code == 400
