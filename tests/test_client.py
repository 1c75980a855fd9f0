import time

import pytest
from scripted_daemon import Reply, ScriptedDaemon
from test_outbound import dripping

from fleetcast.errors import BadData, DaemonAway
from fleetcast.loop import Stop
from fleetcast.sources.client import DaemonClient, FeedAnswer, RecordSender, RequestRefused

RECORDS = [
    {"timestamp": f"2026-01-15T10:00:{second:02d}Z", "server_name": "web-01", "cpu_pct": 1.0}
    for second in range(8)
]
CLOSED_PORT = "http://127.0.0.1:9"  # the discard port: nothing listens there


def sender(daemon: ScriptedDaemon, *, give_up_s: float = 5.0) -> RecordSender:
    return RecordSender(DaemonClient(daemon.url), Stop(), give_up_s=give_up_s)


def test_a_post_returns_what_the_daemon_counted_and_why() -> None:
    body = {
        "status": "ok",
        "records_received": 7,
        "records_rejected": 1,
        "errors": [{"index": 3, "field": "cpu_pct", "reason": "not a number"}],
    }
    with ScriptedDaemon(Reply(200, body)) as daemon, DaemonClient(daemon.url) as client:
        assert client.post_records(RECORDS) == FeedAnswer(7, 1, ("cpu_pct: not a number",), (3,))


def test_the_key_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFT_API_KEY", "s3cret")
    with ScriptedDaemon() as daemon, DaemonClient(daemon.url) as client:
        client.post_records(RECORDS)
        assert daemon.headers[0]["X-API-Key"] == "s3cret"


def test_without_a_key_no_header_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TFT_API_KEY", raising=False)
    with ScriptedDaemon() as daemon, DaemonClient(daemon.url) as client:
        client.post_records(RECORDS)
        assert "X-API-Key" not in daemon.headers[0]


def test_a_proxy_of_the_environment_is_not_asked_for_a_daemon_on_this_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", CLOSED_PORT)
    with ScriptedDaemon() as daemon, DaemonClient(daemon.url) as client:
        assert client.post_records(RECORDS).received == 8


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "", "http://"])
def test_an_address_that_is_none_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(BadData, match=r"must look like http://127\.0\.0\.1:8000"):
        DaemonClient(url)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_daemon_is_tried_again_until_it_takes_the_records(status: int) -> None:
    busy = Reply(status, "busy", {"Retry-After": "0"})
    with ScriptedDaemon(busy, busy, busy) as daemon:
        sending = sender(daemon)
        assert sending.send(RECORDS) == FeedAnswer(8, 0)
        assert (sending.requests, sending.retries) == (4, 3)
        assert daemon.taken == RECORDS


def test_a_busy_daemon_never_exhausts_our_patience() -> None:
    busy = Reply(429, "training", {"Retry-After": "0.05"})
    with ScriptedDaemon(*[busy] * 6) as daemon:
        assert sender(daemon, give_up_s=0.1).send(RECORDS) == FeedAnswer(8, 0)


def test_a_body_that_is_too_large_is_sent_in_parts_and_in_order() -> None:
    with ScriptedDaemon(max_records=3) as daemon:
        assert sender(daemon).send(RECORDS) == FeedAnswer(8, 0)
        assert daemon.taken == RECORDS


@pytest.mark.parametrize(("status", "hint"), [(401, "TFT_API_KEY"), (422, "422"), (404, "address")])
def test_a_refusal_that_cannot_pass_is_raised_at_once_and_says_what_to_do(status: int, hint: str) -> None:
    with ScriptedDaemon(Reply(status, "no")) as daemon:
        with pytest.raises(RequestRefused, match=hint):
            sender(daemon).send(RECORDS)
        assert len(daemon.posts) == 1


def test_a_full_disk_is_tried_again_and_then_named() -> None:
    with ScriptedDaemon(*[Reply(507, "full")] * 50) as daemon:
        sending = sender(daemon, give_up_s=0.5)
        with pytest.raises(RequestRefused, match="disk is full"):
            sending.send(RECORDS)
        assert sending.retries >= 1


def test_a_daemon_that_is_away_is_given_up_after_the_stated_time() -> None:
    sending = RecordSender(DaemonClient(CLOSED_PORT), Stop(), give_up_s=0.5)
    with pytest.raises(DaemonAway, match=r"does not answer: .*refused"):
        sending.send(RECORDS)
    assert sending.retries >= 1


def test_a_stop_ends_the_waiting_without_an_answer() -> None:
    stop = Stop()
    stop.request("test")
    assert RecordSender(DaemonClient(CLOSED_PORT), stop).send(RECORDS) is None


@pytest.mark.parametrize("body", ["no json", "[]", '{"status": "ok"}', '{"records_received": "x"}'])
def test_an_answer_of_another_shape_is_no_success(body: str) -> None:
    with (
        ScriptedDaemon(Reply(200, body)) as daemon,
        DaemonClient(daemon.url) as client,
        pytest.raises(DaemonAway),
    ):
        client.post_records(RECORDS)


@pytest.mark.parametrize("header", ["Wed, 21 Oct 2026 07:28:00 GMT", "soon", "-5"])
def test_a_retry_after_that_is_no_number_does_not_stop_the_retry(header: str) -> None:
    with ScriptedDaemon(Reply(503, "", {"Retry-After": header})) as daemon:
        assert sender(daemon).send(RECORDS) == FeedAnswer(8, 0)


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", b"b"),  # the head
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{", b" "),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", b" "),  # what was cut off is JSON
        (b"HTTP/1.1 500 No\r\nContent-Length: 1000\r\n\r\n", b"x"),
    ],
)
def test_an_answer_that_drips_is_given_up_at_the_limit(start: bytes, more: bytes) -> None:
    with dripping(start, more, wait_s=0.05) as (url, ended):
        with DaemonClient(url, timeout_s=0.2) as client, pytest.raises(DaemonAway) as caught:
            client.status()
        assert caught.value.args[0] == f"{url}/status was not answered whole within 0.4 s"
        assert ended.wait(20)  # the connection is not left open


def test_an_answer_that_is_too_large_is_not_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DaemonClient, "most_bytes", 1_000_000)
    with dripping(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65_536, wait_s=0.0) as (url, ended):
        with DaemonClient(url) as client, pytest.raises(DaemonAway, match="of more than 1,000,000 bytes"):
            client.status()
        assert ended.wait(20)


def test_of_a_refusal_that_is_large_the_beginning_is_told() -> None:
    head = b"HTTP/1.1 500 No\r\n\r\n"
    with (
        dripping(head, b"x" * 65_536, wait_s=0.0) as (url, _),
        DaemonClient(url) as client,
        pytest.raises(RequestRefused) as caught,
    ):
        client.status()
    assert caught.value.detail == "x" * 300


def test_json_that_is_nested_too_deep_is_no_answer() -> None:
    body = b"[" * 200_000
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    with (
        dripping(head, body, wait_s=0.1) as (url, _),
        DaemonClient(url) as client,
        pytest.raises(DaemonAway, match="did not answer with JSON"),
    ):
        client.status()


def test_one_connection_serves_requests_beyond_the_limit_of_each() -> None:
    with ScriptedDaemon() as daemon, DaemonClient(daemon.url, timeout_s=0.1) as client:
        for _ in range(3):
            client.post_records(RECORDS)
            time.sleep(0.25)
    assert len(daemon.taken) == 3 * len(RECORDS)
